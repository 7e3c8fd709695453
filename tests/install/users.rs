//! Who installs: root or a user, with which words, from a clone.

use crate::common::node::skipped;
use crate::sandbox::{Sandbox, run};

const RELEASE: &str = "export OPENGATEWAY_RELEASE=/fixture/release";
const ARCH: &str = "rm -f /etc/os-release; echo ID=arch >/etc/os-release";
/// A user with an empty home and no service manager.
const CAROL: &str = "useradd --create-home --shell /bin/bash carol 2>/dev/null";
const AS_CAROL: &str =
    "as_carol() { setpriv --reuid=carol --regid=carol --init-groups env HOME=/home/carol USER=carol bash -c \"$1\"; }";

#[test]
fn a_dry_run_says_what_it_would_do_and_changes_nothing() {
    for (environment, options, said) in [
        ("", "", "install it: tar, system-wide"),
        ("", "--user", "install it: in /root/.opengateway-poc"),
        ("OPENGATEWAY_POC_ROOT=/srv/og", "", "install it: in /srv/og"),
        ("", "--no-start", "start nothing"),
        ("POC_PROMPT=hello", "", "run a node from a private directory"),
        ("NODE_NAME=x POC_SERVE=1", "", "keep NODE_NAME POC_SERVE in /etc/default/opengatewayd"),
        ("", "--uninstall", "OpenGateway is not installed"),
    ] {
        let script = format!("{RELEASE}; {environment} bash /fixture/release/install.sh --dry-run {options}");
        let Some(ran) = run(ARCH, &script) else { return };
        assert!(ran.ok().stderr.contains(said), "{options}: {}", ran.stderr);
        assert_eq!(ran.stdout, "");
        ran.changed_nothing();
    }
}

#[test]
fn words_that_cannot_be_meant_are_refused_before_anything_happens() {
    for environment in [
        "NODE_NAME=$'two\\nlines'",
        "NODE_NAME=$'\\e[31mred'",
        "NODE_NAME=$(printf 'n%.0s' $(seq 65))",
        "POC_CLUSTER_ID='../x'",
        "POC_CLUSTER_ID='a b'",
        "POC_CLUSTER_ID=$(printf 'c%.0s' $(seq 65))",
        "POC_SERVE=maybe",
        "OPENGATEWAY_BOOTSTRAP=192.0.2.1:4001",
        "OPENGATEWAY_BOOTSTRAP='/ip4/192.0.2.1/udp/4001 $(reboot)'",
        "OPENGATEWAY_POC_ROOT=relative",
        "OPENGATEWAY_POC_ROOT='/with blank'",
        "OPENGATEWAY_POC_ROOT=/a/../b",
    ] {
        let Some(ran) = run(ARCH, &format!("{RELEASE}; {environment} bash /fixture/release/install.sh")) else { return };
        assert_eq!(ran.code, 2, "{environment}: {}", ran.stderr);
        ran.changed_nothing();
    }
    let Some(ran) = run(ARCH, &format!("{RELEASE}; bash /fixture/release/install.sh --frobnicate")) else { return };
    assert_eq!(ran.code, 2);
    ran.changed_nothing();
}

#[test]
fn any_name_reaches_the_service_as_it_was_given() {
    // As a shell reads the file, which is how systemd reads double quotes too (tests/e2e/install.rs has systemd itself).
    let script = format!(
        "{RELEASE}
        name='A \"b\" $HOME `id` \\\\ # ö '\"'\"
        NODE_NAME=$name POC_CLUSTER_ID=my-cluster POC_SERVE=1 bash /fixture/release/install.sh --no-start
        (. /etc/default/opengatewayd; test \"$NODE_NAME\" = \"$name\"; test \"$POC_SERVE\" = 1)
        # Another run gives one of them anew, and what the administrator wrote stays.
        sed -i '1i MINE=1' /etc/default/opengatewayd; echo OTHER=2 >>/etc/default/opengatewayd
        POC_SERVE=0 bash /fixture/release/install.sh --no-start
        (. /etc/default/opengatewayd; test \"$NODE_NAME\" = \"$name\"; test \"$POC_SERVE/$MINE/$OTHER\" = 0/1/2)
        test \"$(grep -c ^POC_SERVE= /etc/default/opengatewayd)\" = 1"
    );
    let Some(ran) = run(ARCH, &script) else { return };
    ran.ok();
}

#[test]
fn the_cluster_is_no_configuration_so_that_leaving_it_lasts() {
    let script = format!(
        "{RELEASE}
        POC_CLUSTER_ID=mine NODE_NAME=NodeA bash /fixture/release/install.sh --no-start
        if grep '^POC_CLUSTER_ID' /etc/default/opengatewayd; then exit 1; fi
        # What an earlier script kept is joined instead, with its role; a line of the administrator is theirs.
        sed -i -e '/^NODE_NAME=/{{s/.*/POC_CLUSTER_ID=\"mine\"\\nPOC_SERVE=\"1\"/}}' -e '1i POC_CLUSTER_ID=theirs' /etc/default/opengatewayd
        bash /fixture/release/install.sh --no-start 2>/run/said
        grep -q 'connect mine --serve' /run/said
        test \"$(grep '^POC_' /etc/default/opengatewayd | tr '\\n' ' ')\" = 'POC_CLUSTER_ID=theirs POC_SERVE=\"1\" '
        sed -i '/^POC_SERVE=/s/.*/POC_CLUSTER_ID=\"mine\"/' /etc/default/opengatewayd
        bash /fixture/release/install.sh --no-start
        if grep 'install.sh' /etc/default/opengatewayd; then exit 1; fi"
    );
    let Some(ran) = run(ARCH, &script) else { return };
    ran.ok();
}

#[test]
fn nobody_else_can_hold_the_lock_and_it_goes_with_its_run() {
    let script = format!(
        "{AS_CAROL}
        as_carol 'exec 9</usr/share; flock 9; touch /home/carol/held; exec sleep 60' &
        holder=$!
        for _ in $(seq 100); do test -e /home/carol/held && break; sleep 0.1; done
        {RELEASE}; bash /fixture/release/install.sh --no-start
        kill $holder
        test ! -e /run/opengateway-install.lock
        (umask 077; : >/run/opengateway-install.lock); exec 9</run/opengateway-install.lock; flock 9
        if as_carol 'cat /run/opengateway-install.lock'; then exit 1; fi
        bash /fixture/release/install.sh --no-start"
    );
    let Some(ran) = run(&format!("{ARCH}; {CAROL}"), &script) else { return };
    ran.failed("another install.sh is running");
}

/// A piped copy without a key builds the clone that it runs in.
#[test]
fn a_clone_of_somebody_else_is_not_built_because_one_stands_in_it() {
    let clone = "mkdir -p /srv/clone/scripts; cd /srv/clone
        printf '[package]\\nname = \"opengateway\"\\n' >Cargo.toml
        printf '#!/bin/bash\\necho ran >/run/calls\\nexit 1\\n' >scripts/package.sh; chmod 755 scripts/package.sh
        sed \"s/^release_key=.*/release_key=''/\" /fixture/release/install.sh >/run/install.sh";
    let install = "bash -s -- --no-start </run/install.sh";
    for path in [".", "Cargo.toml", "scripts", "scripts/package.sh"] {
        let Some(ran) = run(&format!("{ARCH}; {CAROL}"), &format!("{clone}\nchown carol {path}; {install}")) else { return };
        ran.failed("belongs to another user");
        assert!(ran.stderr.contains("OPENGATEWAY_SOURCE=/srv/clone"), "{}", ran.stderr);
    }
    // By name, and below sudo, it is what is meant.
    for how in ["cd /; OPENGATEWAY_SOURCE=/srv/clone", "SUDO_UID=$(id -u carol)"] {
        let script = format!("{clone}\nchown -R carol .; {how} {install} || test -e /run/calls");
        let Some(ran) = run(&format!("{ARCH}; {CAROL}"), &script) else { return };
        ran.ok();
    }
}

#[test]
fn a_user_installs_below_their_home_and_takes_it_away_again() {
    let script = format!(
        "{AS_CAROL}
        list() {{ (cd /home/carol; find . -type f -exec sha256sum {{}} +; find . -printf '%m %p %l\\n') | sort; }}
        list >/run/before
        as_carol '{RELEASE}; NODE_NAME=Carol bash /fixture/release/install.sh'
        for path in bin/ogctl bin/opengatewayd libexec config/opengatewayd.toml config/environment state models; do
            test -e /home/carol/.opengateway-poc/$path
        done
        grep -q 'Environment=OPENGATEWAY_POC_ROOT=/home/carol/.opengateway-poc$' /home/carol/.config/systemd/user/opengatewayd.service
        list >/run/first; as_carol '{RELEASE}; NODE_NAME=Carol bash /fixture/release/install.sh'; list >/run/second
        diff /run/first /run/second
        touch /home/carol/.opengateway-poc/state/identity.key
        as_carol 'OPENGATEWAY_RELEASE=/fixture/newer bash /fixture/release/install.sh'
        as_carol 'bash /fixture/release/install.sh --uninstall --keep-state'
        test -e /home/carol/.opengateway-poc/state/identity.key; test ! -e /home/carol/.opengateway-poc/bin
        as_carol '{RELEASE}; bash /fixture/release/install.sh --no-start'
        as_carol 'bash /fixture/release/install.sh --uninstall'
        list >/run/after; diff /run/before /run/after"
    );
    let Some(ran) = run(CAROL, &script) else { return };
    ran.ok();
}

/// The node is run by hand, by the lines that the script prints.
#[test]
fn the_model_of_a_users_installation_answers_and_what_they_added_stays_over_an_upgrade() {
    if crate::fixture::engine().is_none() {
        skipped("no engine is built: OPENGATEWAY_ENGINE names none; scripts/engine.sh builds it");
        return;
    }
    let script = format!(
        "{AS_CAROL}
        root=/home/carol/.opengateway-poc
        as_carol '{RELEASE}; NODE_NAME=Carol POC_SERVE=1 bash /fixture/release/install.sh' 2>&1 | tee /run/said >&2
        test -x $root/libexec/opengateway-engine; test -e $root/lib/opengateway/libllama.so.0
        run() {{ as_carol \"$(grep -E \"$1\" /run/said | tail -n 1)\"; }}
        run '^    dbus-daemon '
        as_carol \"$(grep -E 'bin/opengatewayd --bus' /run/said)\" 2>/run/log &
        for _ in $(seq 200); do run 'ogctl --bus .* status' >/run/found 2>&1 && break; sleep 0.1; done
        for _ in $(seq 200); do run 'ogctl --bus .* prompt' >/run/answer 2>/run/why; grep -qx 4 /run/answer && break; sleep 0.1; done
        cat /run/answer /run/why /run/log >&2
        grep -qx 4 /run/answer
        as_carol \"cp $root/share/opengateway/models/opengateway-demo.gguf $root/models/mine.gguf\"
        as_carol 'OPENGATEWAY_RELEASE=/fixture/newer bash /fixture/release/install.sh --no-start'
        test -e $root/models/mine.gguf; test -e $root/share/opengateway/models/opengateway-demo.gguf
        as_carol 'bash /fixture/release/install.sh --uninstall --keep-state'
        test -e $root/models/mine.gguf; test ! -e $root/libexec; test ! -e $root/lib; test ! -e $root/share
        as_carol '{RELEASE}; bash /fixture/release/install.sh --no-start'
        as_carol 'bash /fixture/release/install.sh --uninstall'
        test ! -e $root"
    );
    let Some(ran) = run(CAROL, &script) else { return };
    ran.ok();
}

#[test]
fn a_directory_with_other_things_in_it_is_no_place_for_an_installation() {
    let script = format!("{AS_CAROL}\nas_carol '{RELEASE}; OPENGATEWAY_POC_ROOT=/home/carol bash /fixture/release/install.sh'");
    let Some(ran) = run(&format!("{CAROL}; touch /home/carol/letter"), &script) else { return };
    ran.failed("which is not of OpenGateway").changed_nothing();
}

#[test]
fn without_systemd_it_says_how_to_run_the_node_and_that_works() {
    let script = format!(
        "{AS_CAROL}
        as_carol '{RELEASE}; NODE_NAME=Carol POC_SERVE=1 bash /fixture/release/install.sh' 2>&1 | tee /run/said >&2
        # The three lines that it printed, in its order; the second stays in the foreground.
        grep -E '^    dbus-daemon ' /run/said >/run/bus; grep -E 'bin/opengatewayd --bus' /run/said >/run/node
        grep -E 'ogctl --bus .* status' /run/said >/run/status
        as_carol \"$(cat /run/bus)\"
        as_carol \"$(cat /run/node)\" 2>/run/log & 
        for _ in $(seq 100); do as_carol \"$(cat /run/status)\" >/run/found 2>&1 && break; sleep 0.2; done
        grep -q 'Node: *Carol' /run/found; grep -q 'gatewayai-poc' /run/found"
    );
    let Some(ran) = run(CAROL, &script) else { return };
    ran.ok();
}

#[test]
fn a_clone_builds_itself() {
    let Some(sandbox) = Sandbox::new(ARCH) else { return };
    let script = "
        mkdir -p /srv/clone/scripts; cd /srv/clone
        printf '[package]\\nname = \"opengateway\"\\n' >Cargo.toml
        sed \"s/^release_key=.*/release_key=''/\" /fixture/release/install.sh >scripts/install.sh
        printf '#!/bin/bash\\necho \"package.sh $*\" >>/run/calls\\ncp /fixture/release/*.tar.gz \"$3\"\\n' >scripts/package.sh
        chmod 755 scripts/*
        for how in './scripts/install.sh' 'cat scripts/install.sh | bash -s --' \\
            'cd /; cat /srv/clone/scripts/install.sh | OPENGATEWAY_SOURCE=/srv/clone bash -s --'; do
            rm -f /run/calls
            (eval \"$how --no-start\")
            grep -q '^package.sh tarball --out' /run/calls
            test -x /usr/bin/opengatewayd
            /srv/clone/scripts/install.sh --uninstall
            test ! -e /usr/bin/opengatewayd
        done";
    let Some(ran) = sandbox.run(script) else { return };
    ran.ok();
}
