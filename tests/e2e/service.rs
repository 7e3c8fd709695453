//! The service: how it starts, stops, reloads, fails and comes back.

use std::time::{Duration, Instant};

use crate::lab::{Bus, DEADLINE, Host};
use crate::{CLUSTER, CONFIG, deployed, slow_upstream};

on_both_buses! {
    reload_applies_a_changed_configuration_and_refuses_a_bad_one_while_the_daemon_goes_on,
    root_changes_the_level_of_the_log_and_nobody_else,
    a_client_that_streams_is_told_when_the_daemon_dies,
    asking_a_stopped_daemon_starts_nothing_and_says_so,
    after_a_power_cut_an_enabled_service_boots_into_its_clusters,
    after_a_restart_of_the_bus_the_name_is_back_within_10_s,
}

/// Adds to the configuration.
fn configure(host: &Host, text: &str) {
    let path = host.path(CONFIG);
    let old = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, format!("{old}\n{text}\n")).unwrap();
}

/// Puts lines into the unit's section `[Service]`, as an administrator does.
fn drop_in(host: &Host, lines: &str) {
    host.write("/etc/systemd/system/opengatewayd.service.d/test.conf", format!("[Service]\n{lines}\n"));
    host.sh("systemctl daemon-reload");
}

/// The clusters that it is in.
fn ids(host: &Host) -> Vec<String> {
    let clusters = host.json(&["clusters"]);
    let joined = clusters["clusters"].as_array().unwrap().iter().filter(|cluster| cluster["joined"] == true);
    joined.map(|cluster| cluster["id"].as_str().unwrap().to_owned()).collect()
}

fn after_a_power_cut_an_enabled_service_boots_into_its_clusters(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    host.sh("systemctl enable opengatewayd");
    assert_eq!(host.ogctl(&["connect", CLUSTER, "--wait", "0"]).code, 0);
    assert_eq!(host.ogctl(&["connect", "second", "--wait", "0"]).code, 0);
    assert_eq!(host.ogctl(&["disconnect", "second"]).code, 0);
    let identity = host.json(&["status"])["peer_id"].clone();
    for _ in 0..3 {
        host.power_cut();
        host.power_on();
        host.until(DEADLINE, "systemctl is-active opengatewayd");
        assert_eq!(ids(host), [CLUSTER]);
        assert_eq!(host.json(&["status"])["peer_id"], identity);
        assert_eq!(host.property("NRestarts"), "0");
    }
    // An orderly shutdown is an orderly stop.
    host.power_off();
    host.power_on();
    host.until(DEADLINE, "systemctl is-active opengatewayd");
    assert_eq!(ids(host), [CLUSTER]);
    let before = host.sh("journalctl --no-pager --boot=-1 --output=cat --unit=opengatewayd --unit=init.scope");
    assert!(before.contains("opengatewayd.service: Deactivated successfully"), "{before}");
}

#[test]
fn a_service_that_is_not_enabled_stays_down_after_a_boot() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.power_cut();
    host.power_on();
    assert_eq!(host.exec("systemctl is-active opengatewayd").stdout.trim(), "inactive");
}

fn reload_applies_a_changed_configuration_and_refuses_a_bad_one_while_the_daemon_goes_on(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    let pid = host.property("MainPID");
    configure(host, "[[cluster]]\nid = \"configured\"");
    host.sh("systemctl reload opengatewayd");
    assert_eq!(ids(host), ["configured"], "in force when reload returns");
    configure(host, "[nonsense]\nkey = 1");
    let said = host.exec("systemctl reload opengatewayd");
    assert_ne!(said.code, 0, "{said:?}");
    assert_eq!(host.property("MainPID"), pid);
    assert_eq!(host.property("ActiveState"), "active");
    assert_eq!(ids(host), ["configured"]);
    let journal = host.journal("opengatewayd");
    assert!(journal.contains("nonsense"), "the journal says what is wrong: {journal}");
}

/// Damages a file of a daemon that was in use; the start must fail once, with the code for it, and touch nothing.
fn fails_for_good(host: &Host, file: &str, garbage: &str) {
    host.sh("systemctl stop opengatewayd");
    let kept = std::fs::read(host.path(file)).unwrap();
    std::fs::write(host.path(file), garbage).unwrap();
    let said = host.exec("systemctl start opengatewayd");
    assert_ne!(said.code, 0, "{file}: {said:?}");
    assert_eq!(host.property("ExecMainStatus"), "78", "{file}");
    assert_eq!(host.property("ActiveState"), "failed", "{file}: no restart is scheduled");
    assert_eq!(host.property("NRestarts"), "0", "{file}");
    assert_eq!(std::fs::read_to_string(host.path(file)).unwrap(), garbage, "{file} was touched");
    let journal = host.sh("journalctl --no-pager --output=cat --unit=opengatewayd --since=-30s");
    let name = file.rsplit_once('/').unwrap().1;
    assert!(journal.contains(name), "the journal names {name}: {journal}");
    std::fs::write(host.path(file), kept).unwrap();
    host.sh("systemctl reset-failed opengatewayd; systemctl start opengatewayd");
}

#[test]
fn what_is_damaged_ends_the_start_with_78_and_is_neither_retried_nor_touched() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    assert_eq!(host.ogctl(&["connect", CLUSTER, "--wait", "0"]).code, 0);
    fails_for_good(host, "/var/lib/opengateway/identity.key", "garbage");
    fails_for_good(host, CONFIG, "[node]\nnmae = \"typo\"\n");
    // The list of clusters has its last good version beside it: that one first.
    host.write("/var/lib/opengateway/clusters.json.prev", "garbage");
    fails_for_good(host, "/var/lib/opengateway/clusters.json", "garbage");
    assert_eq!(ids(host), [CLUSTER], "mended, everything is there again");
}

#[test]
fn a_daemon_that_was_killed_is_started_again() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh("systemctl kill --signal=KILL opengatewayd");
    let took = host.until(DEADLINE, "[ $(systemctl show -P NRestarts opengatewayd) = 1 ] && systemctl is-active opengatewayd");
    eprintln!("MEASURED killed, and up again after {:.1} s", took.as_secs_f64());
    assert_eq!(host.ogctl(&["status"]).code, 0);
}

#[test]
fn a_daemon_that_hangs_is_noticed_by_the_watchdog_and_started_again() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    assert_eq!(host.property("WatchdogUSec"), "30s");
    drop_in(host, "WatchdogSec=4s\nRestartSec=1s");
    host.sh("systemctl restart opengatewayd");
    // One that is well feeds it, beyond two times the limit, and is left alone.
    let fed = "systemctl show -P WatchdogTimestampMonotonic opengatewayd";
    let since = "systemctl show -P ExecMainStartTimestampMonotonic opengatewayd";
    host.until(DEADLINE, &format!("[ $(( $({fed}) - $({since}) )) -gt 8000000 ]"));
    assert_eq!(host.property("NRestarts"), "0");
    host.sh("systemctl kill --signal=STOP opengatewayd");
    host.until(DEADLINE, "[ $(systemctl show -P NRestarts opengatewayd) = 1 ] && systemctl is-active opengatewayd");
    let journal = host.journal("opengatewayd");
    assert!(journal.contains("Watchdog timeout"), "{journal}");
}

#[test]
fn stopping_lets_a_running_prompt_end() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    slow_upstream(host, 20, 0.25);
    let prompt = host.command(&["ogctl", "prompt", "hello", "--model", "slow"]);
    let prompt = crate::in_background(prompt);
    host.until(DEADLINE, "[ $(ogctl jobs --json | grep -c running) -gt 0 ]");
    let begun = Instant::now();
    host.sh("systemctl stop opengatewayd");
    let took = begun.elapsed();
    let said = prompt.join().unwrap();
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.stdout.contains("word19"), "the whole answer: {said:?}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    assert_eq!(host.property("Result"), "success");
    eprintln!("MEASURED stop with a prompt that had 5 s to go: {:.1} s", took.as_secs_f64());
}

#[test]
fn stopping_waits_no_longer_than_30_s() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    slow_upstream(host, 1000, 0.2);
    let prompt = crate::in_background(host.command(&["ogctl", "prompt", "hello", "--model", "slow", "--timeout", "300"]));
    host.until(DEADLINE, "[ $(ogctl jobs --json | grep -c running) -gt 0 ]");
    let begun = Instant::now();
    host.sh("systemctl stop opengatewayd");
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(20) && took < Duration::from_secs(36), "{took:?}");
    let said = prompt.join().unwrap();
    assert_eq!(said.code, 1, "half an answer is no answer: {said:?}");
    assert_eq!(host.property("Result"), "success", "it ended by itself, not by the service manager's patience");
}

#[test]
fn systemctl_status_tells_the_truth() {
    let Some(lab) = deployed(2, Bus::Daemon) else { return };
    let [host, other] = lab.hosts() else { unreachable!() };
    let text = host.property("StatusText");
    assert!(text.contains("no cluster"), "{text}");
    for host in [host, other] {
        assert_eq!(host.ogctl(&["connect", CLUSTER, "--wait", "0"]).code, 0);
    }
    host.until(DEADLINE, &format!("systemctl show -P StatusText opengatewayd | grep {CLUSTER} | grep '1 peer'"));
    other.power_cut();
    host.until(DEADLINE, &format!("systemctl show -P StatusText opengatewayd | grep {CLUSTER} | grep -E '0 peers|no peer'"));
    assert!(host.exec("systemctl status opengatewayd --no-pager").stdout.contains("Status: \""));
}

fn root_changes_the_level_of_the_log_and_nobody_else(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    let level = || host.sh("systemctl service-log-level opengatewayd");
    assert_eq!(level(), "info");
    host.sh("systemctl service-log-level opengatewayd debug");
    assert_eq!(level(), "debug");
    let object = "org.opengateway.Gateway1 /org/freedesktop/LogControl1 org.freedesktop.LogControl1";
    let said = host.as_user("alice", &format!("busctl set-property {object} LogLevel s trace"));
    assert_ne!(said.code, 0, "{said:?}");
    assert_eq!(level(), "debug");
    assert_eq!(host.sh(&format!("busctl get-property {object} SyslogIdentifier")), "s \"opengatewayd\"");
    assert_eq!(host.sh(&format!("busctl get-property {object} LogTarget")), "s \"journal\"");
    assert_ne!(host.exec("systemctl service-log-level opengatewayd nonsense").code, 0);
}

#[test]
fn the_unit_is_clean_and_exposes_little() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    assert_eq!(host.sh("systemd-analyze verify --man=no opengatewayd.service 2>&1"), "");
    let table = host.sh("systemd-analyze security --no-pager opengatewayd.service");
    let exposure = table.lines().last().and_then(|line| line.split_once("service: ")).map(|(_, rest)| rest).unwrap();
    let exposure: f64 = exposure.split_whitespace().next().unwrap().parse().unwrap();
    eprintln!("MEASURED systemd-analyze security: {exposure}");
    assert!(exposure <= 1.5, "{table}");
}

#[test]
fn the_journal_has_fields_and_levels_and_plain_text() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    assert_eq!(host.ogctl(&["connect", CLUSTER, "--wait", "0"]).code, 0);
    let own = "journalctl --no-pager --output=json _SYSTEMD_UNIT=opengatewayd.service";
    host.until(DEADLINE, &format!("{own} | grep -q {CLUSTER}"));
    let entries: Vec<serde_json::Value> = host.sh(own).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for entry in &entries {
        assert_eq!(entry["SYSLOG_IDENTIFIER"], "opengatewayd", "{entry}");
        assert_eq!(entry["_TRANSPORT"], "journal", "{entry}");
        assert!(entry["PRIORITY"].is_string() && entry["TARGET"].is_string(), "{entry}");
        let message = entry["MESSAGE"].as_str().expect("text, not bytes");
        assert!(!message.contains('\u{1b}') && !message.contains(" INFO "), "{message}");
    }
    assert!(entries.iter().any(|entry| entry["OPENGATEWAY_CLUSTER"] == CLUSTER), "{entries:#?}");
    // Who reads the plain journal misses nothing that stands in a field.
    let listening = |entry: &serde_json::Value| {
        let message = entry["MESSAGE"].as_str().unwrap_or_default().strip_prefix("listening on ");
        message.is_some_and(|address| entry["OPENGATEWAY_ADDRESS"] == address)
    };
    assert!(entries.iter().any(listening), "{entries:#?}");
}

fn after_a_restart_of_the_bus_the_name_is_back_within_10_s(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    host.sh("systemctl restart dbus");
    let took = host.until(Duration::from_secs(10), "ogctl status");
    eprintln!("MEASURED bus restarted ({bus:?}), and answering again after {:.1} s", took.as_secs_f64());
    host.until(DEADLINE, "systemctl is-active opengatewayd");
}

fn a_client_that_streams_is_told_when_the_daemon_dies(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    slow_upstream(host, 200, 0.1);
    let script = "ogctl prompt hello --model slow >/tmp/answer";
    let prompt = crate::in_background(host.command(&["sh", "-c", script]));
    host.until(DEADLINE, "grep -q word3 /tmp/answer");
    host.sh("systemctl kill --signal=KILL opengatewayd");
    let said = prompt.join().unwrap();
    assert_eq!(said.code, 8, "{said:?}");
    assert!(said.stderr.contains("opengatewayd went away before the answer was whole"), "{said:?}");
}

fn asking_a_stopped_daemon_starts_nothing_and_says_so(bus: Bus) {
    let Some(lab) = deployed(1, bus) else { return };
    let host = lab.host();
    for enabled in ["disable", "enable"] {
        host.sh(&format!("systemctl stop opengatewayd; systemctl {enabled} opengatewayd"));
        for command in ["status", "clusters", "resources", "eligible", "peers", "jobs"] {
            let said = host.ogctl(&[command]);
            assert_eq!(said.code, 8, "{command}: {said:?}");
            assert!(said.stderr.contains("systemctl start opengatewayd"), "{command}: {said:?}");
        }
        assert_eq!(host.exec("systemctl is-active opengatewayd").stdout.trim(), "inactive", "{enabled}d");
    }
    // A call that does ask for a start gets one where the service is enabled, and none elsewhere.
    let call = "busctl call org.opengateway.Gateway1 /org/opengateway/Gateway1 org.opengateway.Gateway1.Manager GetStatus";
    host.sh(call);
    assert_eq!(host.property("ActiveState"), "active");
    host.sh("systemctl disable --now opengatewayd");
    assert_ne!(host.exec(call).code, 0);
    assert_eq!(host.property("ActiveState"), "inactive");
}

#[test]
fn a_service_without_a_link_joins_when_the_cable_is_plugged() {
    let Some(lab) = deployed(2, Bus::Daemon) else { return };
    let [host, other] = lab.hosts() else { unreachable!() };
    other.sh("systemctl enable opengatewayd");
    for host in [host, other] {
        assert_eq!(host.ogctl(&["connect", CLUSTER, "--wait", "0"]).code, 0);
    }
    other.cut();
    other.power_cut();
    other.power_on();
    other.until(DEADLINE, "systemctl is-active opengatewayd");
    other.heal();
    let took = other.until(DEADLINE, &format!("ogctl peers {CLUSTER} --json | grep -q '\"a1\"'"));
    eprintln!("MEASURED booted without a link; joined {:.1} s after the plug", took.as_secs_f64());
    assert!(took < Duration::from_secs(15), "{took:?}");
}
