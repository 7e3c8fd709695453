//! One prompt from a machine that has no OpenGateway.

use crate::sandbox::run;

/// A node that serves, and its address as $address.
const SERVER: &str = r#"
    mkdir /run/server
    printf '<busconfig><type>session</type><listen>unix:path=/run/server/bus</listen><policy context="default"><allow user="*"/><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy></busconfig>' >/run/server/bus.conf
    dbus-daemon --fork --nopidfile --config-file=/run/server/bus.conf
    /fixture/programs/opengatewayd --bus unix:path=/run/server/bus --state-dir /run/server/state --node-name NodeA --no-mdns \
        --listen /ip4/127.0.0.1/udp/4100/quic-v1 --serve --connect gatewayai-poc 2>/run/server/log &
    for _ in $(seq 100); do /fixture/programs/ogctl --bus unix:path=/run/server/bus status >/run/server/status 2>&1 && break; sleep 0.1; done
    address=/ip4/127.0.0.1/udp/4100/quic-v1
"#;

/// Processes of OpenGateway besides the server's.
const NOTHING_RUNS: &str = "! pgrep -fa opengatewayd | grep -v /run/server";

#[test]
fn the_answer_is_all_of_stdout_and_nothing_stays() {
    let ask = "OPENGATEWAY_RELEASE=/fixture/release OPENGATEWAY_BOOTSTRAP=$address NODE_NAME=NodeC POC_PROMPT='What is 2+2?' \
               bash /fixture/release/install.sh";
    let Some(ran) = run("", &format!("{SERVER}\n{ask}\n{NOTHING_RUNS}")) else { return };
    assert_eq!(ran.ok().stdout, "What is 2+2?\n", "{}", ran.stderr);
    assert!(ran.stderr.contains("served by NodeA"), "{}", ran.stderr);
    for step in ["1/5 Dependencies", "2/5 CLI", "3/5 Gauge", "4/5 Eligible", "5/5 Join"] {
        assert!(ran.stderr.contains(step), "{step}: {}", ran.stderr);
    }
    ran.changed_nothing();
}

#[test]
fn a_user_may_ask_too() {
    let carol = "useradd --create-home --shell /bin/bash carol 2>/dev/null";
    let ask = "setpriv --reuid=carol --regid=carol --init-groups env HOME=/home/carol OPENGATEWAY_RELEASE=/fixture/release \
               OPENGATEWAY_BOOTSTRAP=$address POC_PROMPT='-' bash /fixture/release/install.sh";
    let Some(ran) = run(carol, &format!("{SERVER}\n{ask}\n{NOTHING_RUNS}")) else { return };
    assert_eq!(ran.ok().stdout, "-\n", "{}", ran.stderr);
    ran.changed_nothing();
}

#[test]
fn nobody_to_ask_is_exit_code_5_and_nothing_stays() {
    let ask = "OPENGATEWAY_RELEASE=/fixture/release POC_PROMPT=hello bash /fixture/release/install.sh";
    let Some(ran) = run("", &format!("code=0; {ask} || code=$?; {NOTHING_RUNS}; exit $code")) else { return };
    assert_eq!((ran.code, ran.stdout.as_str()), (5, ""), "{}", ran.stderr);
    assert!(ran.stderr.contains("POC_SERVE=1"), "{}", ran.stderr);
    ran.changed_nothing();
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    // In the middle of looking for members, which nobody answers.
    let ask = "OPENGATEWAY_RELEASE=/fixture/release POC_PROMPT=hello bash /fixture/release/install.sh 2>/run/said & pid=$!
        for _ in $(seq 300); do grep -q 'joined (' /run/said && break; sleep 0.1; done
        grep -q 'joined (' /run/said
        kill -TERM $pid; wait $pid || code=$?; test \"$code\" = 143";
    let Some(ran) = run("", &format!("{ask}\n{NOTHING_RUNS}")) else { return };
    ran.ok().changed_nothing();
}

/// As in a container: no service manager, and no bus.
#[test]
fn what_a_prompt_needs_is_installed_and_removed_again() {
    let ask =
        "OPENGATEWAY_RELEASE=/fixture/release OPENGATEWAY_BOOTSTRAP=$address POC_PROMPT=hello bash /fixture/release/install.sh";
    let packages = "
        stub dpkg-query 'case \"$*\" in *opengateway*) exit 1 ;; esac; [ ! -e /usr/bin/dbus-daemon ] || echo installed dbus-daemon'
        stub apt-get 'cp /usr/bin/elsewhere /usr/bin/dbus-daemon'
        stub dpkg 'rm /usr/bin/dbus-daemon'
        cp /usr/bin/dbus-daemon /usr/bin/elsewhere; rm -f /etc/os-release; echo ID=debian >/etc/os-release";
    // The bus of the server runs already when the program goes.
    let script = format!(
        "{SERVER}\nrm /usr/bin/dbus-daemon\n{ask}\ncat /run/calls >&2\ntest ! -e /usr/bin/dbus-daemon\nmv /usr/bin/elsewhere /usr/bin/dbus-daemon"
    );
    let Some(ran) = run(packages, &script) else { return };
    assert_eq!(ran.ok().stdout, "hello\n", "{}", ran.stderr);
    let calls = &ran.stderr;
    assert!(calls.contains("install dbus-daemon") && calls.contains("dpkg --purge dbus-daemon"), "{calls}");
}
