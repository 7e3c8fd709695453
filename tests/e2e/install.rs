//! `scripts/install.sh` on booted hosts: from a folder, a URL, a repository; as root and as a user; and away again.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Instant;

use crate::common::bus::Said;
use crate::lab::{Bus, DEADLINE, Host, Lab};
use crate::releases::{self, FOLDER, NEWER};

const CLUSTER: &str = "gatewayai-poc";
/// As a distribution without packages of ours looks.
const ANY_LINUX: &str = "rm -f /etc/os-release; echo ID=other >/etc/os-release";

/// What differs from a host that never booted: names, rights, and hashes of files.
fn disk(host: &Host) -> BTreeSet<String> {
    // Logs, lists of packages, what measures the machine, and what systemd notes about itself.
    let volatile = "-path ./var/log -o -path ./var/lib/dpkg -o -path ./var/lib/apt -o -path ./var/lib/dnf -o -path ./var/cache -o -path ./var/tmp \
                    -o -path ./root/.rpmdb -o -path ./var/lib/systemd -o -path ./srv -o -name resources.json -o -name .updated";
    let list = format!(
        "cd \"$1\"; find . \\( {volatile} \\) -prune -o ! -type d -printf '%y %m %U:%G %p %l\\n'
         find . \\( {volatile} \\) -prune -o -type f -exec sha256sum {{}} +
         find . \\( {volatile} \\) -prune -o -type d -name '*opengateway*' -print"
    );
    let upper = host.disk().join("disk/upper");
    let output = Command::new("sh").args(["-c", &list, "sh"]).arg(upper).output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// What is there now and was not before, but for the files of users and groups: users stay, as their numbers must not go to
/// somebody else.
fn left(host: &Host, before: &BTreeSet<String>) -> Vec<String> {
    let users = ["etc/passwd", "etc/group", "etc/shadow", "etc/gshadow", "etc/subuid", "etc/subgid", "etc/.pwd.lock"];
    let now = disk(host);
    now.symmetric_difference(before).filter(|line| !users.iter().any(|file| line.contains(file))).cloned().collect()
}

/// The disk and the unit are what they were.
fn is_unchanged(host: &Host, before: &(BTreeSet<String>, String)) {
    let left: Vec<_> = disk(host).symmetric_difference(&before.0).cloned().collect();
    assert!(left.is_empty(), "{left:#?}");
    assert_eq!(unit(host), before.1);
}

fn unit(host: &Host) -> String {
    host.sh("systemctl show --property=MainPID,ActiveState,UnitFileState,NRestarts opengatewayd")
}

fn state(host: &Host) -> (BTreeSet<String>, String) {
    (disk(host), unit(host))
}

/// Pipes install.sh of a folder or URL into bash.
fn pipe(host: &Host, place: &str, environment: &str, options: &str) -> Said {
    let place = if place.starts_with('/') { format!("file://{place}") } else { place.to_owned() };
    host.exec(&format!("curl -fsSL {place}/install.sh | OPENGATEWAY_RELEASE={place} {environment} bash -s -- {options}"))
}

#[track_caller]
fn done(said: &Said) {
    assert_eq!(said.code, 0, "{}{}", said.stdout, said.stderr);
}

fn hosts(count: usize, bus: Bus) -> Option<Lab> {
    let lab = Lab::boot(count, bus)?;
    releases::put(lab.hosts())?;
    Some(lab)
}

fn peer_names(host: &Host) -> BTreeSet<String> {
    let peers = host.json(&["peers", CLUSTER]);
    peers["peers"].as_array().into_iter().flatten().filter_map(|peer| peer["name"].as_str().map(str::to_owned)).collect()
}

#[test]
fn three_commands_make_a_cluster_and_get_an_answer_and_the_asker_is_as_it_was() {
    let Some(lab) = hosts(3, Bus::Daemon) else { return };
    let [a, b, c] = lab.hosts() else { panic!("three hosts") };
    let before = (disk(b), state(c));

    let begun = Instant::now();
    let said = pipe(a, FOLDER, "NODE_NAME=NodeA POC_SERVE=1", "");
    done(&said);
    eprintln!("MEASURED install.sh with a .deb, 5 s of looking round included: {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(said.stdout, "", "announcements are on stderr");
    for step in ["1/5 Dependencies", "2/5 CLI", "3/5 Gauge", "4/5 Eligible", "5/5 Join"] {
        assert!(said.stderr.contains(step), "{step}: {}", said.stderr);
    }
    assert_eq!(a.json(&["status"])["node_name"], "NodeA");
    assert_eq!(a.json(&["clusters"])["clusters"][0]["role"], "serve");
    assert_eq!(a.sh("systemctl is-enabled opengatewayd"), "enabled");

    b.sh(&format!("systemd-run --quiet --working-directory={FOLDER} python3 -m http.server --bind 127.0.0.1 8000"));
    b.until(DEADLINE, "curl -fso /dev/null http://127.0.0.1:8000/RELEASE");
    done(&pipe(b, "http://127.0.0.1:8000", "NODE_NAME=NodeB POC_SERVE=1", ""));
    assert_eq!(peer_names(b), BTreeSet::from(["NodeA".to_owned()]), "it has looked round");

    let begun = Instant::now();
    let said = pipe(c, FOLDER, "NODE_NAME=NodeC POC_PROMPT='What is 2+2?'", "");
    done(&said);
    eprintln!("MEASURED install.sh for one prompt, from download to nothing left: {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(said.stdout, "4\n");
    assert!(said.stderr.contains("served by Node"), "{}", said.stderr);
    is_unchanged(c, &before.1);
    assert_ne!(c.exec("pgrep -x opengatewayd").code, 0);

    done(&pipe(b, FOLDER, "", "--uninstall"));
    assert_eq!(left(b, &before.0), Vec::<String>::new());
    assert_ne!(b.exec("dpkg -s opengateway || pgrep -x opengatewayd").code, 0);
    a.until(DEADLINE, "ogctl peers --json | grep -q '\"peers\":\\[\\]'");
}

#[test]
fn a_second_run_changes_nothing_and_a_reboot_neither() {
    let Some(lab) = hosts(1, Bus::Daemon) else { return };
    let host = lab.host();
    let run = || done(&pipe(host, FOLDER, "NODE_NAME=NodeA POC_SERVE=1", ""));
    run();
    let before = state(host);
    run();
    is_unchanged(host, &before);
    // Whoever says nothing this time keeps what was said.
    done(&pipe(host, FOLDER, "", ""));
    is_unchanged(host, &before);

    let identity = host.json(&["status"])["peer_id"].clone();
    host.power_off();
    host.power_on();
    host.until(DEADLINE, "ogctl status");
    assert_eq!(host.json(&["status"])["peer_id"], identity);
    assert_eq!(host.json(&["clusters"])["clusters"][0]["role"], "serve");
}

#[test]
fn a_newer_release_upgrades_and_keeps_configuration_identity_and_clusters() {
    let Some(lab) = hosts(1, Bus::Broker) else { return };
    let host = lab.host();
    done(&pipe(host, FOLDER, "NODE_NAME=NodeA POC_SERVE=1 POC_CLUSTER_ID=mine", ""));
    host.sh("echo '# mine' >>/etc/opengateway/opengatewayd.toml");
    let version = || host.sh("dpkg-query -W -f '${Version}' opengateway");
    let kept = || {
        let files = "/etc/opengateway/opengatewayd.toml /etc/default/opengatewayd /var/lib/opengateway/identity.key";
        (host.sh(&format!("sha256sum {files}")), host.json(&["clusters"])["clusters"][0]["id"].clone())
    };
    let starts = || host.sh("journalctl --no-pager -o cat -u opengatewayd | grep -c '^Started '").trim().parse::<u32>().unwrap();
    let (before, first, pid) = (kept(), version(), host.property("MainPID"));
    let started = starts();

    done(&pipe(host, NEWER, "", ""));
    assert_ne!(version(), first);
    assert_eq!(kept(), before);
    assert_ne!(host.property("MainPID"), pid, "the new program runs");
    assert_eq!(starts(), started + 1, "prompts are interrupted once");
    assert_eq!(host.json(&["clusters"])["clusters"][0]["role"], "serve");

    let said = pipe(host, FOLDER, "", "");
    assert!(said.code == 1 && said.stderr.contains("--allow-downgrade"), "{}", said.stderr);
    done(&pipe(host, FOLDER, "", "--allow-downgrade"));
    assert_eq!((version(), kept()), (first, before));

    host.sh("ogctl disconnect mine && systemctl restart opengatewayd && ogctl status");
    assert!(!host.sh("ogctl clusters --json").contains("\"joined\":true"), "who has left is not brought back");

    done(&pipe(host, FOLDER, "", "--uninstall --keep-state"));
    host.sh(
        "test -e /var/lib/opengateway/identity.key && test -e /etc/opengateway/opengatewayd.toml && ! test -e /usr/bin/ogctl",
    );
}

#[test]
fn what_cannot_be_done_is_taken_back() {
    let Some(lab) = hosts(1, Bus::Daemon) else { return };
    let host = lab.host();
    let before = disk(host);
    // No lab has a machine for this tier.
    let said = pipe(host, FOLDER, "POC_CLUSTER_ID=Llama-3.1-405B POC_SERVE=1", "");
    assert!(said.code == 1 && said.stderr.contains("16 cores"), "{}", said.stderr);
    assert_eq!(left(host, &before), Vec::<String>::new());
    assert_ne!(host.exec("id opengateway").code, 0, "the user that it made is gone too");

    // A configuration from earlier with which the daemon does not start: that stays, the rest goes.
    host.write("/etc/opengateway/opengatewayd.toml", "nonsense = true\n");
    let before = disk(host);
    let said = pipe(host, FOLDER, "", "");
    assert!(said.code == 1 && said.stderr.contains("nonsense"), "the log of the daemon is shown: {}", said.stderr);
    let left = left(host, &before);
    // Configuration that came with the package, which goes with a purge only.
    let kept = ["/etc/default/opengatewayd", "/etc/ufw/applications.d/opengateway", "credentials"];
    assert!(left.iter().all(|line| kept.iter().any(|kept| line.contains(kept))), "{left:#?}");
}

#[test]
fn a_prompt_where_no_private_bus_can_be_made_installs_and_uninstalls() {
    let Some(lab) = hosts(2, Bus::Broker) else { return };
    let [a, b] = lab.hosts() else { panic!("two hosts") };
    done(&pipe(a, FOLDER, "NODE_NAME=NodeA POC_SERVE=1", ""));
    // As on a system whose only bus is dbus-broker.
    b.sh("mv /usr/bin/dbus-daemon /usr/bin/elsewhere");
    let before = disk(b);
    let said = pipe(b, FOLDER, "POC_PROMPT='What is 2+2?'", "");
    done(&said);
    assert_eq!(said.stdout, "4\n", "{}", said.stderr);
    assert_eq!(left(b, &before), Vec::<String>::new());
    assert_ne!(b.exec("id opengateway || dpkg -s opengateway || systemctl cat opengatewayd").code, 0);
}

#[test]
fn a_user_has_a_node_of_their_own_on_the_session_bus() {
    let Some(lab) = hosts(2, Bus::Daemon) else { return };
    let [a, b] = lab.hosts() else { panic!("two hosts") };
    done(&pipe(a, FOLDER, "NODE_NAME=NodeA POC_SERVE=1", ""));
    b.sh("loginctl enable-linger alice");
    b.until(DEADLINE, "test -S /run/user/1000/bus");
    let home = || {
        // Enabling makes directories that disabling leaves.
        b.sh("cd /home/alice; find . ! -name resources.json ! -path './.config*' -printf '%y %m %p %l\\n' | sort; find .config ! -type d 2>/dev/null || true")
    };
    let empty = home();
    let alice = |environment: &str, options: &str| {
        b.as_user("alice", &format!("{environment} OPENGATEWAY_RELEASE={FOLDER} bash {FOLDER}/install.sh {options}"))
    };
    // systemd reads the name from a file, where it has to be quoted.
    let name = r#"A "b" $HOME \ #"#;
    done(&alice(&format!("NODE_NAME='{name}' POC_SERVE=1"), ""));
    let ogctl = "/home/alice/.opengateway-poc/bin/ogctl --bus unix:path=/run/user/1000/bus";
    let status = b.as_user("alice", &format!("{ogctl} status --json")).stdout;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["node_name"], name);
    a.until(DEADLINE, "ogctl peers | grep -q 'A \"b\"'");
    let user = "XDG_RUNTIME_DIR=/run/user/1000 systemctl --user";
    assert_eq!(b.as_user("alice", &format!("{user} is-enabled opengatewayd")).stdout.trim(), "enabled");
    // By the other machine's model, and by her own.
    for who in ["--no-local", "--local-first"] {
        let answer = b.as_user("alice", &format!("{ogctl} prompt {who} 'What is 2+2?'"));
        assert_eq!((answer.code, answer.stdout.as_str()), (0, "4\n"), "{who}: {}", answer.stderr);
    }
    for path in [
        "bin/ogctl",
        "libexec/opengateway-engine",
        "lib/opengateway/libllama.so.0",
        "share/opengateway/models/opengateway-demo.gguf",
        "config/opengatewayd.toml",
        "state/identity.key",
        "models",
    ] {
        b.sh(&format!("test -e /home/alice/.opengateway-poc/{path}"));
    }

    // Written when the model was hashed, a moment after the start, and when members had been there for a while.
    for file in ["models.json", "peers.json"] {
        b.until(DEADLINE, &format!("test -e /home/alice/.opengateway-poc/state/{file}"));
    }
    let pid = || b.as_user("alice", &format!("{user} show --property=MainPID opengatewayd")).stdout;
    let before = (home(), pid());
    done(&alice(&format!("NODE_NAME='{name}' POC_SERVE=1"), ""));
    assert_eq!((home(), pid()), before);

    done(&alice("", "--uninstall"));
    assert_eq!(home(), empty);
    assert_ne!(b.exec("pgrep -x opengatewayd").code, 0);
}

#[test]
fn a_system_without_packages_gets_the_tarball() {
    let Some(lab) = hosts(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh(ANY_LINUX);
    let before = disk(host);
    let run = || done(&pipe(host, FOLDER, "NODE_NAME=NodeA POC_SERVE=1", ""));
    run();
    assert_ne!(host.exec("dpkg -s opengateway").code, 0);
    assert_eq!(host.json(&["status"])["node_name"], "NodeA");
    let journal = host.sh("journalctl --no-pager");
    assert!(!journal.contains("refused by policy") && host.property("NRestarts") == "0", "{journal}");
    let installed = state(host);
    run();
    is_unchanged(host, &installed);
    done(&pipe(host, FOLDER, "", "--uninstall"));
    assert_eq!(left(host, &before), Vec::<String>::new());
}

/// dnf and rpm are the real ones, on a host that is Debian's otherwise.
#[test]
fn a_system_of_rpm_gets_the_rpm() {
    let Some(lab) = hosts(1, Bus::Broker) else { return };
    let host = lab.host();
    know_fedora(host);
    // Debian's rpm wants this word before it does anything.
    let shim = "#!/bin/sh\nexec /usr/bin/rpm.real --force-debian \"$@\"\n";
    host.sh(&format!("mv /usr/bin/rpm /usr/bin/rpm.real; printf '{shim}' >/usr/bin/rpm; chmod 755 /usr/bin/rpm"));
    host.sh("rm -f /etc/os-release; echo ID=fedora >/etc/os-release");
    let before = disk(host);
    let run = || done(&pipe(host, FOLDER, "NODE_NAME=NodeA POC_SERVE=1", ""));
    run();
    host.sh("rpm -q opengateway && rpm -V opengateway | { ! grep -v ' c '; }");
    assert_eq!(host.json(&["status"])["node_name"], "NodeA");
    let installed = state(host);
    run();
    is_unchanged(host, &installed);
    // Kept are both: what was edited, and what rpm would remove because nobody did.
    let files = "cd /etc; sha256sum default/opengatewayd; find opengateway -name '*.toml*' -exec sha256sum {} +";
    host.sh("echo '# mine' >>/etc/opengateway/opengatewayd.toml");
    let kept = host.sh(files);
    done(&pipe(host, FOLDER, "", "--uninstall --keep-state"));
    assert_eq!(host.sh(files), kept);
    run();
    done(&pipe(host, FOLDER, "", "--uninstall"));
    assert_ne!(host.exec("rpm -q opengateway").code, 0);
    let left: Vec<_> = left(host, &before).into_iter().filter(|line| !line.contains("/rpm/")).collect();
    assert_eq!(left, Vec::<String>::new());
}

/// Debian has no packages of Fedora's names: rpm is told what is there.
fn know_fedora(host: &Host) {
    host.push(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/lab/rpm-provides.sh").as_ref(), "/var/tmp/rpm-provides.sh");
    host.sh("/var/tmp/rpm-provides.sh");
}

#[test]
fn the_apt_repository_installs_what_its_key_signed() {
    let Some(lab) = hosts(1, Bus::Daemon) else { return };
    let host = lab.host();
    // As the README has it, with a folder in place of the web.
    host.sh(&format!("install -D -m 644 {FOLDER}/apt/opengateway.asc /etc/apt/keyrings/opengateway.asc"));
    host.write(
        "/etc/apt/sources.list",
        format!("deb [signed-by=/etc/apt/keyrings/opengateway.asc] file://{FOLDER}/apt stable main\n"),
    );
    host.sh("apt-get update 2>&1 && apt-get install -y opengateway");
    host.sh("systemctl start opengatewayd && ogctl status");
    host.sh("apt-get purge -y opengateway");

    // Another byte in the list of packages, another key: neither is taken.
    host.sh(&format!("rm -rf /var/lib/apt/lists/*; sed -i 's/^Description/description/' {FOLDER}/apt/dists/stable/main/binary-*/Packages; rm -f {FOLDER}/apt/dists/stable/main/binary-*/Packages.gz"));
    assert_ne!(host.exec("apt-get update -o APT::Update::Error-Mode=any").code, 0);
    host.sh(&format!("cp -r {NEWER}/install.sh /etc/apt/keyrings/opengateway.asc; rm -rf /var/lib/apt/lists/*"));
    assert_ne!(host.exec("apt-get update -o APT::Update::Error-Mode=any").code, 0);
}

#[test]
fn the_dnf_repository_installs_what_its_key_signed() {
    let Some(lab) = hosts(1, Bus::Broker) else { return };
    let host = lab.host();
    know_fedora(host);
    host.write(
        "/etc/yum.repos.d/opengateway.repo",
        format!(
            "[opengateway]\nname=OpenGateway\nbaseurl=file://{FOLDER}/dnf\nrepo_gpgcheck=1\ngpgcheck=0\ngpgkey=file://{FOLDER}/dnf/opengateway.asc\n"
        ),
    );
    host.sh("dnf -y install opengateway");
    host.sh("systemctl start opengatewayd && ogctl status");
    host.sh("dnf -y remove opengateway");
    assert_ne!(host.exec("pgrep -x opengatewayd").code, 0);

    host.sh(&format!("dnf clean all; rm -rf /var/cache/dnf; printf '<!-- -->' >>{FOLDER}/dnf/repodata/repomd.xml"));
    assert_ne!(host.exec("dnf -y install opengateway").code, 0);
}
