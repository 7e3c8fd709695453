//! What a run takes back when it fails, and what it leaves as it was.

use crate::sandbox::{Ran, run};

const INSTALL: &str = "OPENGATEWAY_RELEASE=/fixture/release bash /fixture/release/install.sh";

/// A service manager whose unit is what the files /run/enabled, /run/active and /run/pid say. No bus: a run that starts the
/// node fails afterwards, when it asks the node what the machine has.
const SYSTEMD: &str = r#"
    mkdir -p /run/systemd/system; echo 0 >/run/pid
    stub systemctl 'case "$*" in
      is-active*) test -e /run/active ;;
      is-enabled*) if test -e /run/enabled; then echo enabled; else echo disabled; exit 1; fi ;;
      show*) cat /run/pid ;;
      enable*) touch /run/enabled ;;
      disable*--now*) rm -f /run/enabled /run/active ;;
      disable*) rm -f /run/enabled ;;
      stop*) rm -f /run/active ;;
      start* | restart*) test ! -e /run/broken && touch /run/active ;;
    esac'
"#;

/// A system of Debian's with the previous release installed; its scripts restart the node.
const OLDER_DEB: &str = r#"
    tar -xzf /fixture/release/opengateway-0.1.0-linux-*.tar.gz -C / --strip-components=1 --wildcards "*/usr/bin/*"
    stub dpkg-query 'case "$*" in *binary:Package*) ;; *Status*) echo installed ;; *) cat /run/version ;; esac'
    echo 0.0.9-1 >/run/version
    stub dpkg-deb 'echo 0.1.0-1'
    stub apt-get 'case "$*" in *" install "*) echo 0.1.0-1 >/run/version; test ! -e /run/active || echo 2 >/run/pid ;; esac'
"#;

fn on(os_release: &str, more: &str, script: &str) -> Option<Ran> {
    let setup = format!("rm -f /etc/os-release; printf 'ID={os_release}\\n' >/etc/os-release\n{more}");
    run(&setup, &format!("trap 'cat /run/calls 2>/dev/null || true' EXIT\n{script}"))
}

#[test]
fn the_service_is_as_enabled_and_as_active_as_it_was() {
    for (enabled, active) in [(false, false), (true, false), (false, true), (true, true)] {
        let state = format!(
            "{}; {}",
            if enabled { "touch /run/enabled" } else { "rm -f /run/enabled" },
            if active { "touch /run/active" } else { "rm -f /run/active" }
        );
        let script = format!(
            "{INSTALL} --no-start; {state}; rm -f /run/calls; cp /etc/default/opengatewayd /run/settings
             if NODE_NAME=NodeA {INSTALL}; then exit 1; fi
             cmp /run/settings /etc/default/opengatewayd
             test \"$(test -e /run/enabled; echo $?) $(test -e /run/active; echo $?)\" = '{} {}'",
            i32::from(!enabled),
            i32::from(!active)
        );
        let Some(ran) = on("arch", SYSTEMD, &script) else { return };
        let calls = &ran.ok().stdout;
        assert!(ran.stderr.contains("taking back"), "{}", ran.stderr);
        // A node that ran has not stopped, and has read the settings that were put back.
        let stopped = calls.contains("systemctl stop") || calls.contains("--now");
        let last = calls.lines().rfind(|line| line.contains("start opengatewayd"));
        assert_eq!((!stopped, last == Some("systemctl restart opengatewayd")), (active, active), "{calls}");
    }
}

#[test]
fn a_package_restarts_the_node_and_the_script_does_not_do_it_again() {
    let Some(ran) = on("debian", &format!("{SYSTEMD}{OLDER_DEB}"), &format!("echo 1 >/run/pid; touch /run/active; {INSTALL}"))
    else {
        return;
    };
    let calls = &ran.failed("taking back").stdout;
    assert!(calls.contains(" install ") && !calls.contains("restart"), "{calls}");
    // Settings of this run are read by a restart of its own.
    let script = format!("echo 1 >/run/pid; touch /run/active; NODE_NAME=NodeA {INSTALL}");
    let Some(ran) = on("debian", &format!("{SYSTEMD}{OLDER_DEB}"), &script) else { return };
    assert!(ran.failed("taking back").stdout.contains("systemctl restart"), "{}", ran.stdout);
}

#[test]
fn an_upgraded_package_stays_and_the_way_back_is_told() {
    let Some(ran) = on("debian", &format!("{SYSTEMD}{OLDER_DEB}"), &format!("touch /run/broken; {INSTALL}")) else { return };
    ran.failed("opengatewayd does not start").failed("0.1.0-1 stays installed").failed("--allow-downgrade");
    assert!(!ran.stdout.contains("purge"), "{}", ran.stdout);
}

#[test]
fn packages_that_somebody_else_installed_meanwhile_stay() {
    // ssh-keygen is missing and installed; between this and our package somebody installs theirs.
    let setup = r#"
        echo base >/run/packages; mv /usr/bin/ssh-keygen /usr/bin/ssh-keygen.away
        stub dpkg-query 'case "$*" in *binary:Package*) sed "s/^/installed /" /run/packages ;; *) exit 1 ;; esac'
        stub dpkg-deb 'echo theirs >>/run/packages; echo 0.1.0-1'
        stub dpkg 'for name; do sed -i "/^$name\$/d" /run/packages; done'
        stub apt-get 'case "$*" in
          *openssh-client*) mv /usr/bin/ssh-keygen.away /usr/bin/ssh-keygen; printf "openssh-client\nlibssh\n" >>/run/packages ;;
          *" install "*) echo libours >>/run/packages; exit 100 ;;
        esac'"#;
    let Some(ran) = on("debian", setup, &format!("{INSTALL} --no-start || cat /run/packages")) else { return };
    let calls = &ran.ok().stdout;
    assert!(calls.contains("dpkg --purge libours libssh openssh-client\n"), "{calls}");
    assert!(calls.starts_with("base\ntheirs\n"), "{calls}");
}

#[test]
fn configuration_outlives_an_rpm_when_it_is_to_be_kept() {
    // As rpm does: what nobody edited is removed, what was edited is renamed.
    let setup = r#"
        mkdir -p /etc/opengateway; echo edited >/etc/opengateway/opengatewayd.toml; echo shipped >/etc/default/opengatewayd
        chmod 640 /etc/opengateway/opengatewayd.toml
        stub dnf
        stub rpm 'case "$*" in -e*)
          rm /etc/default/opengatewayd; mv /etc/opengateway/opengatewayd.toml /etc/opengateway/opengatewayd.toml.rpmsave ;; esac'"#;
    let Some(ran) = on("fedora", setup, &format!("{INSTALL} --uninstall --keep-state")) else { return };
    ran.ok().changed_nothing();
    assert!(ran.stdout.contains("rpm -e opengateway"), "{}", ran.stdout);
    let Some(ran) = on("fedora", setup, &format!("{INSTALL} --uninstall; test ! -e /etc/opengateway")) else { return };
    ran.ok();
}
