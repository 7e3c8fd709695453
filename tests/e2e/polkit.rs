//! Who may do what, decided by the real polkit for real users.

use std::path::Path;

use serde_json::Value;

use crate::abuse;
use crate::lab::{Bus, DEADLINE, Host, Lab};
use crate::{deployed, in_background, slow_upstream};

const MANAGER: &str = "org.opengateway.Gateway1 /org/opengateway/Gateway1 org.opengateway.Gateway1.Manager";
const ACTION: &str = "org.opengateway.gateway1";

on_both_buses! {
    a_plain_user_sees_and_changes_nothing_and_root_may_everything,
    members_of_opengateway_users_may_as_long_as_they_are_members,
    without_polkit_root_may_and_nobody_else,
    an_administrator_is_asked_for_a_password_on_a_terminal,
    nobody_but_the_service_takes_its_name,
    a_job_of_another_user_is_neither_seen_nor_cancelled,
    of_1000_callers_that_leave_right_after_their_call_none_is_authorised,
    ten_thousand_calls_with_random_arguments_neither_stop_the_daemon_nor_make_it_grow,
}

/// Commands that change something, with the action that polkit is asked about.
const CHANGES: [(&str, &str); 3] =
    [("connect gatewayai-poc --wait 0", "connect"), ("disconnect kept", "disconnect"), ("prompt hello", "prompt")];

/// A host whose daemon is in the cluster "kept".
fn joined(bus: Bus) -> Option<Lab> {
    let lab = deployed(1, bus)?;
    assert_eq!(lab.host().ogctl(&["connect", "kept", "--serve", "--wait", "0"]).code, 0);
    Some(lab)
}

fn clusters(host: &Host) -> Vec<String> {
    let clusters = host.json(&["clusters"]);
    clusters["clusters"].as_array().unwrap().iter().map(|cluster| cluster["id"].as_str().unwrap().to_owned()).collect()
}

/// `ogctl … --json` of a user, who is refused by name of the error, with the action in the message.
fn refused(host: &Host, user: &str, command: &str, action: &str) {
    let said = host.as_user(user, &format!("ogctl {command} --json"));
    assert_eq!(said.code, 4, "{user}: {command}: {said:?}");
    let error: Value = serde_json::from_str(&said.stdout).unwrap();
    let name = error["error"]["name"].as_str().unwrap();
    assert!(["NotAuthorized", "InteractiveAuthorizationRequired"].contains(&name), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains(&format!("{ACTION}.{action}")), "{error}");
}

fn all_refused(host: &Host, user: &str) {
    for (command, action) in CHANGES {
        refused(host, user, command, action);
    }
    // busctl shows the message of an error of our own.
    for (call, action) in [("SetSharing ba{sv} false 0", "configure"), ("Reload", "configure")] {
        let said = host.as_user(user, &format!("busctl call {MANAGER} {call}"));
        assert!(said.code != 0 && said.stderr.contains(ACTION), "{call} ({action}): {said:?}");
    }
    assert_eq!(clusters(host), ["kept"]);
    assert_eq!(host.json(&["status"])["sharing"], true);
}

fn all_allowed(host: &Host, user: &str) {
    for command in ["connect gatewayai-poc --wait 0", "prompt hello --cluster kept", "disconnect gatewayai-poc"] {
        let said = host.as_user(user, &format!("ogctl {command}"));
        assert_eq!(said.code, 0, "{user}: {command}: {said:?}");
    }
    for call in ["SetSharing ba{sv} true 0", "Reload"] {
        let said = host.as_user(user, &format!("busctl call {MANAGER} {call}"));
        assert_eq!(said.code, 0, "{user}: {call}: {said:?}");
    }
}

fn a_plain_user_sees_and_changes_nothing_and_root_may_everything(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    for command in ["status", "clusters", "peers kept", "models", "resources", "eligible", "jobs"] {
        let said = host.as_user("alice", &format!("ogctl {command}"));
        assert_eq!(said.code, 0, "{command}: {said:?}");
    }
    all_refused(host, "alice");
    all_allowed(host, "root");
}

fn members_of_opengateway_users_may_as_long_as_they_are_members(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    all_refused(host, "alice");
    host.sh("gpasswd --add alice opengateway-users");
    all_allowed(host, "alice");
    host.sh(&format!("busctl call {MANAGER} Disconnect 'sa{{sv}}' gatewayai-poc 1 Forget b true"));
    host.sh("gpasswd --delete alice opengateway-users");
    all_refused(host, "alice");
}

fn without_polkit_root_may_and_nobody_else(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    host.sh("gpasswd --add alice opengateway-users");
    host.sh("systemctl mask --runtime --now polkit");
    all_refused(host, "alice");
    let said = host.as_user("alice", "ogctl connect another --wait 0 --json");
    assert!(said.stdout.contains("\"NotAuthorized\"") && said.stdout.contains("polkit"), "it says why: {said:?}");
    all_allowed(host, "root");
    host.sh("systemctl unmask --runtime polkit");
    all_allowed(host, "alice");
}

/// Runs a command of a user who logged in and sits at a terminal, where a password may be asked for; gives how it ended and
/// what was shown. Polkit lets an agent on a terminal ask for a user of a session alone.
fn on_a_terminal(host: &Host, user: &str, command: &str, password: &str) -> (u8, String) {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/terminal.py");
    host.push(Path::new(program), "/usr/local/bin/terminal");
    let login = "systemd-run --quiet --wait --pipe --collect --property=PAMName=login";
    let said = host.exec(&format!("{login} --property=User={user} /usr/local/bin/terminal '{command}' '{password}'"));
    (said.code, said.stdout + &said.stderr)
}

fn an_administrator_is_asked_for_a_password_on_a_terminal(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    let (code, shown) = on_a_terminal(host, "bob", "ogctl connect gatewayai-poc --wait 0", "wrong");
    assert_eq!(code, 4, "{shown}");
    assert!(shown.contains("Authentication is required to join this machine to a cluster"), "{shown}");
    assert_eq!(clusters(host), ["kept"]);
    for (user, command) in [("bob", "ogctl connect one --wait 0"), ("alice", "ogctl connect two --wait 0")] {
        let (code, shown) = on_a_terminal(host, user, command, "bob");
        assert_eq!(code, 0, "{user}: {shown}");
    }
    assert_eq!(clusters(host), ["kept", "one", "two"]);
    // Without a terminal nobody can be asked, and bob hears what to do.
    let said = host.as_user("bob", "ogctl disconnect one </dev/null");
    assert_eq!(said.code, 4, "{said:?}");
    assert!(said.stderr.contains("on a terminal"), "{said:?}");
}

fn nobody_but_the_service_takes_its_name(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    host.sh("systemctl stop opengatewayd");
    let take = "python3 -c \"import dbus; dbus.SystemBus().request_name('org.opengateway.Gateway1')\"";
    for user in ["alice", "bob"] {
        let said = host.as_user(user, take);
        assert!(said.code != 0 && said.stderr.contains("AccessDenied"), "{said:?}");
    }
}

/// Lets plain users ask, and nothing else: so that two of them have prompts of their own.
fn everybody_may_ask(host: &Host) {
    host.write(
        "/etc/polkit-1/rules.d/10-test.rules",
        "polkit.addRule(function(action, subject) {\n\
         if (action.id == \"org.opengateway.gateway1.prompt\") return polkit.Result.YES; });\n",
    );
    host.until(DEADLINE, "setpriv --reuid alice --regid alice --init-groups ogctl prompt hello");
}

fn a_job_of_another_user_is_neither_seen_nor_cancelled(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    everybody_may_ask(host);
    slow_upstream(host, 60, 0.1);
    let script = "setpriv --reuid alice --regid alice --init-groups ogctl prompt secret --model slow";
    let prompt = in_background(host.command(&["sh", "-c", script]));
    host.until(DEADLINE, "ogctl jobs --json | grep -q running");
    let jobs = host.json(&["jobs"]);
    let path = jobs["jobs"][0]["path"].as_str().unwrap();
    let of = |user: &str| -> Value { serde_json::from_str(&host.as_user(user, "ogctl jobs --json").stdout).unwrap() };
    assert_eq!(of("alice")["jobs"].as_array().unwrap().len(), 1);
    assert_eq!(of("bob")["jobs"], serde_json::json!([]));
    let job = format!("org.opengateway.Gateway1 {path} org.opengateway.Gateway1.Job");
    for property in ["Uid", "ClusterId", "State", "CompletionTokens"] {
        let said = host.as_user("bob", &format!("busctl get-property {job} {property}"));
        assert_ne!(said.code, 0, "{property}: {said:?}");
    }
    let objects =
        "busctl call org.opengateway.Gateway1 /org/opengateway/Gateway1 org.freedesktop.DBus.ObjectManager GetManagedObjects";
    let said = host.as_user("bob", objects);
    assert!(!said.stdout.contains("CompletionTokens"), "{said:?}");
    let said = host.as_user("bob", &format!("busctl call {job} Cancel"));
    assert_ne!(said.code, 0, "{said:?}");
    let said = prompt.join().unwrap();
    assert_eq!((said.code, said.stdout.contains("word59")), (0, true), "alice has her whole answer: {said:?}");
}

/// Resident memory in KiB, and open descriptors.
fn size(host: &Host) -> (u64, usize) {
    let pid = host.property("MainPID");
    let resident = host.sh(&format!("awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status")).parse().unwrap();
    (resident, host.sh(&format!("ls /proc/{pid}/fd | wc -l")).parse().unwrap())
}

fn of_1000_callers_that_leave_right_after_their_call_none_is_authorised(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    let pid = host.property("MainPID");
    abuse::play(host, "alice", "races", 100);
    let (before, descriptors) = size(host);
    abuse::play(host, "alice", "races", 1000);
    // What was asked last is decided when the bus and polkit have forgotten the callers.
    host.until(DEADLINE, &format!("[ $(ls /proc/{pid}/fd | wc -l) -le $(({descriptors} + 4)) ]"));
    assert_eq!(clusters(host), ["kept"]);
    let status = host.json(&["status"]);
    assert_eq!((&status["sharing"], &status["jobs"]), (&Value::Bool(true), &Value::from(0)), "{status}");
    assert_eq!(host.property("MainPID"), pid);
    let (now, _) = size(host);
    eprintln!("MEASURED 1000 callers that left: resident {before} KiB before, {now} KiB after");
    assert!(now < before + 4 * 1024, "{before} KiB before, {now} KiB after");
}

fn ten_thousand_calls_with_random_arguments_neither_stop_the_daemon_nor_make_it_grow(bus: Bus) {
    let Some(lab) = joined(bus) else { return };
    let host = lab.host();
    let pid = host.property("MainPID");
    for user in ["alice", "root"] {
        abuse::play(host, user, "random", 1000);
    }
    let (before, _) = size(host);
    for user in ["alice", "root"] {
        let answers = abuse::play(host, user, "random", 5000);
        eprintln!("{user}: {answers}");
        assert!(!answers.contains("NoReply") && !answers.contains("DBus.Error.Failed"), "{answers}");
    }
    assert_eq!(host.property("MainPID"), pid);
    assert_eq!(host.property("NRestarts"), "0");
    assert_eq!(host.ogctl(&["status"]).code, 0);
    let (now, descriptors) = size(host);
    eprintln!("MEASURED 10000 random calls: resident {before} KiB before, {now} KiB after, {descriptors} descriptors");
    assert!(now < before + 8 * 1024, "{before} KiB before, {now} KiB after");
}
