//! The life of a package on a host: what comes, what stays, what goes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::lab::{Bus, DEADLINE, Host, Lab};
use crate::packages::{next_revision, package};
use crate::{CLUSTER, CONFIG, deployed, in_background, slow_upstream};

/// What a fresh installation must be: there, and nothing more.
fn is_quiet(host: &Host) {
    assert_eq!(host.exec("systemctl is-active opengatewayd").stdout.trim(), "inactive");
    assert_eq!(host.exec("systemctl is-enabled opengatewayd").stdout.trim(), "disabled");
    assert_eq!(host.property("NRestarts"), "0");
    assert!(!host.path("/var/lib/opengateway/identity.key").exists(), "it never ran");
    is_well(host);
}

/// Nothing on the host has failed.
fn is_well(host: &Host) {
    let state = host.exec("systemctl is-system-running; systemctl --failed --no-legend").stdout;
    assert_eq!(state.trim(), "running");
}

/// Starts the service, which is up when `systemctl start` returns, and joined to nothing.
fn starts(host: &Host) {
    host.sh("systemctl start opengatewayd");
    assert_eq!(host.property("ActiveState"), "active");
    assert_eq!(host.property("NRestarts"), "0");
    assert_eq!(host.ogctl(&["status"]).code, 0);
    assert_eq!(host.json(&["clusters"])["clusters"], serde_json::json!([]));
    let journal = host.sh("journalctl --no-pager");
    assert!(!journal.contains("refused by policy"), "{journal}");
    is_well(host);
}

fn fresh(bus: Bus, ending: &str) {
    let Some(package) = package(ending) else { return };
    let Some(lab) = Lab::with_package(1, bus, &package) else { return };
    is_quiet(lab.host());
    starts(lab.host());
}

fn a_fresh_deb_is_quiet_and_starts_when_told(bus: Bus) {
    fresh(bus, "deb");
}

fn a_fresh_rpm_is_quiet_and_starts_when_told(bus: Bus) {
    fresh(bus, "rpm");
}

on_both_buses! {
    a_fresh_deb_is_quiet_and_starts_when_told,
    a_fresh_rpm_is_quiet_and_starts_when_told,
}

/// A node in use: enabled, running, joined, with a configuration that its administrator edited.
struct InUse {
    identity: String,
    config: String,
}

impl InUse {
    fn make(host: &Host) -> Self {
        host.sh(&format!("sed -i 's/^# name = .*/name = \"Mine\"/' {CONFIG}"));
        host.sh("systemctl enable --now opengatewayd");
        assert_eq!(host.ogctl(&["connect", CLUSTER, "--wait", "0"]).code, 0);
        let config = std::fs::read_to_string(host.path(CONFIG)).unwrap();
        let used = Self { identity: Self::identity(host), config };
        used.is_whole(host);
        used
    }

    fn identity(host: &Host) -> String {
        host.json(&["status"])["peer_id"].as_str().unwrap().to_owned()
    }

    /// The daemon runs with all that it had.
    fn is_whole(&self, host: &Host) {
        assert_eq!(host.property("ActiveState"), "active");
        assert_eq!(Self::identity(host), self.identity);
        assert_eq!(host.json(&["clusters"])["clusters"][0]["id"], CLUSTER);
        assert_eq!(host.json(&["status"])["node_name"], "Mine");
        self.kept_files(host);
        is_well(host);
    }

    fn kept_files(&self, host: &Host) {
        assert_eq!(std::fs::read_to_string(host.path(CONFIG)).unwrap(), self.config);
        for file in ["identity.key", "identity.pub", "clusters.json"] {
            assert!(host.path("/var/lib/opengateway").join(file).exists(), "{file} is gone");
        }
    }
}

fn moves_between_versions(ending: &str, version: &str) {
    let Some(first) = package(ending) else { return };
    let folder = tempfile::tempdir().unwrap();
    let second = next_revision(&first, folder.path());
    let Some(lab) = Lab::with_package(1, Bus::Daemon, &first) else { return };
    let host = lab.host();
    // A stopped service stays so.
    host.install(&[&second]);
    is_quiet(host);
    host.install(&[&first]);
    is_quiet(host);

    let used = InUse::make(host);
    let steps: [(&Path, &str, &str); 3] = [(&first, "1", "reinstall"), (&second, "2", "upgrade"), (&first, "1", "downgrade")];
    for (package, revision, step) in steps {
        let pid = host.property("MainPID");
        host.install(&[package]);
        assert_eq!(host.sh(version).rsplit_once('-').unwrap().1, revision, "{step}");
        assert_ne!(host.property("MainPID"), pid, "{step}: a running daemon runs the new program");
        assert_eq!(host.property("NRestarts"), "0", "{step}");
        assert_eq!(host.sh("systemctl is-enabled opengatewayd"), "enabled", "{step}");
        used.is_whole(host);
    }
}

#[test]
fn a_deb_that_is_reinstalled_upgraded_or_downgraded_keeps_configuration_identity_and_clusters() {
    moves_between_versions("deb", "dpkg-query --show --showformat='${Version}' opengateway");
}

#[test]
fn an_rpm_that_is_reinstalled_upgraded_or_downgraded_keeps_configuration_identity_and_clusters() {
    moves_between_versions("rpm", "rpm --force-debian -q --queryformat '%{VERSION}-%{RELEASE}' opengateway");
}

/// After the package went: nothing runs, nothing can be started.
fn is_gone(host: &Host) {
    assert_eq!(host.sh("systemctl show --property=LoadState,ActiveState --value opengatewayd"), "not-found\ninactive");
    assert_eq!(host.exec("pgrep -x opengatewayd").stdout, "");
    let owned = "busctl list --no-pager --no-legend | grep org.opengateway";
    assert_ne!(host.exec(owned).code, 0, "the bus knows its name still");
    is_well(host);
}

/// Everything on the host's disk but what an installation of anything leaves: logs, package lists, the user database.
fn listing(host: &Host) -> BTreeSet<String> {
    let volatile = "-path /var/log -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache/apt -o -path /var/tmp -o \
                    -path /tmp -o -path /root/.rpmdb -o -path /var/lib/systemd -o -path /etc/systemd/system/multi-user.target.wants";
    let list = format!(
        "find / -xdev \\( {volatile} \\) -prune -o -printf '%y %m %u:%g %p %l\\n'; find /var/lib/systemd/deb-* /etc/systemd -printf '%p\\n'"
    );
    host.exec(&list).stdout.lines().map(str::to_owned).collect()
}

#[test]
fn an_upgrade_lets_a_running_prompt_end() {
    let Some(deb) = package("deb") else { return };
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    slow_upstream(host, 40, 0.2);
    let pid = host.property("MainPID");
    let prompt = in_background(host.command(&["ogctl", "prompt", "hello", "--model", "slow"]));
    host.until(DEADLINE, "ogctl jobs --json | grep -q running");
    host.install(&[&deb]);
    let said = prompt.join().unwrap();
    assert!(said.code == 0 && said.stdout.contains("word39"), "{said:?}");
    assert_ne!(host.property("MainPID"), pid, "the new program runs");
    assert_eq!(host.property("ActiveState"), "active");
}

#[test]
fn a_removed_deb_keeps_what_its_user_made_and_a_purged_one_nothing() {
    let Some(deb) = package("deb") else { return };
    let Some(lab) = Lab::boot(1, Bus::Daemon) else { return };
    let host = lab.host();
    let before = listing(host);
    host.install(&[&deb]);
    let installed = listing(host);
    assert!(installed.len() > before.len() + 10, "the listing sees an installation");
    let used = InUse::make(host);
    host.sh("echo secret >/etc/opengateway/credentials/upstream");
    let uid = host.sh("id -u opengateway");

    host.sh("apt-get remove -y -q opengateway");
    is_gone(host);
    used.kept_files(host);

    host.install(&[&deb]);
    assert_eq!(host.sh("id -u opengateway"), uid);
    host.sh("systemctl start opengatewayd");
    used.is_whole(host);

    host.sh("apt-get purge -y -q opengateway");
    is_gone(host);
    let left: Vec<_> = listing(host).difference(&before).cloned().collect();
    // Users stay as Debian's policy has it: what was theirs must not come to belong to somebody else.
    let backups = ["/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/.pwd.lock"];
    let left: Vec<_> = left.iter().filter(|line| !backups.iter().any(|backup| line.contains(backup))).collect();
    assert!(left.is_empty(), "{left:#?}");
    assert_eq!(host.sh("id -u opengateway"), uid);

    host.install(&[&deb]);
    assert_eq!(host.sh("id -u opengateway"), uid);
    is_quiet(host);
}

#[test]
fn an_rpm_verifies_and_an_erased_one_keeps_what_its_user_made() {
    let Some(rpm) = package("rpm") else { return };
    let Some(lab) = Lab::boot(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.write("/etc/systemd/system-preset/00-distribution.preset", "disable *\n");
    host.install(&[&rpm]);
    is_quiet(host);
    assert_eq!(host.sh("rpm --force-debian -V opengateway"), "");
    let used = InUse::make(host);

    host.sh("rpm --force-debian -e opengateway");
    is_gone(host);
    let saved = std::fs::read_to_string(host.path(&format!("{CONFIG}.rpmsave"))).unwrap();
    assert_eq!(saved, used.config);
    host.sh(&format!("mv {CONFIG}.rpmsave {CONFIG}"));
    used.kept_files(host);
    host.install(&[&rpm]);
    host.sh("systemctl start opengatewayd");
    used.is_whole(host);
}

#[test]
fn an_installation_is_smaller_than_50_mb_half_of_it_the_engine() {
    let Some(deb) = package("deb") else { return };
    let Some(lab) = Lab::with_package(1, Bus::Daemon, &deb) else { return };
    let bytes = |which: &str| -> u64 {
        let sizes = lab
            .host()
            .sh(&format!("dpkg -L opengateway | {which} | while read -r f; do [ ! -f \"$f\" ] || stat -c %s \"$f\"; done"));
        sizes.lines().map(|line| line.parse::<u64>().unwrap()).sum()
    };
    let of_engine = "grep -E '/usr/(libexec|lib|share)/opengateway[-/]'";
    let (all, engine) = (bytes("cat"), bytes(of_engine));
    eprintln!("MEASURED installed size: {:.1} MB, {:.1} of them the engine and its model", all as f64 / 1e6, engine as f64 / 1e6);
    assert!(all <= 50_000_000 && all - engine <= 25_000_000, "{all}, {engine}");
}

/// Made by hand from an unpacked tree, as an image builder does: no systemd runs there.
#[test]
fn a_deb_installs_into_a_tree_that_is_not_running() {
    let Some(deb) = package("deb") else { return };
    let Some(lab) = Lab::boot(1, Bus::Daemon) else { return };
    let host = lab.host();
    let inside: PathBuf = Path::new("/var/tmp").join(deb.file_name().unwrap());
    host.push(&deb, inside.to_str().unwrap());
    // A copy of the tree below a directory of the host, without the running system's own mounts.
    host.sh("mkdir /srv/image && cp -a --one-file-system /bin /sbin /lib /lib64 /usr /etc /srv/image/ && \
             mkdir -p /srv/image/var/lib /srv/image/dev /srv/image/proc /srv/image/tmp /srv/image/run && \
             cp -a /var/lib/dpkg /srv/image/var/lib/ && cp -a /dev/null /srv/image/dev/");
    host.sh(&format!("DEBIAN_FRONTEND=noninteractive dpkg --root=/srv/image -i {}", inside.display()));
    assert!(host.path("/srv/image/usr/bin/opengatewayd").exists());
    host.sh("grep -q '^opengateway:' /srv/image/etc/passwd");
    assert_ne!(host.exec("id opengateway").code, 0, "the running system has got no user of it");
}
