//! The sandbox of the unit, read from inside: a probe that is started in the daemon's place tries what it should not.

use std::path::Path;

use serde_json::{Value, json};

use crate::lab::{Bus, Host};
use crate::{DEADLINE, deployed};

const STATE: &str = "/var/lib/opengateway";

/// Runs a command with every property of the unit but its program; gives what it printed.
pub fn in_the_units_place(host: &Host, command: &str) -> String {
    let unit = host.sh("cat $(systemctl show -P FragmentPath opengatewayd)");
    let own = ["Type=", "BusName=", "ExecReload=", "Restart=", "RestartSec=", "WatchdogSec=", "Alias="];
    let kept = unit.lines().filter(|line| !own.iter().any(|key| line.starts_with(key)));
    let text: Vec<&str> = kept
        .map(|line| {
            if line.starts_with("ExecStart=") {
                "Type=exec\nExecStart=/bin/sh -c 'exec $PROBE >$STATE_DIRECTORY/probe.out'"
            } else {
                line
            }
        })
        .collect();
    let text = [text.join("\n"), format!("[Service]\nEnvironment='PROBE={command}'\n")].join("\n");
    host.write("/etc/systemd/system/sandbox-probe.service", text);
    host.sh("systemctl daemon-reload; systemctl start sandbox-probe");
    host.until(DEADLINE, "! systemctl is-active sandbox-probe");
    let result = host.sh("systemctl show -P Result sandbox-probe");
    assert_eq!(result, "success", "{}", host.journal("sandbox-probe"));
    std::fs::read_to_string(host.path(STATE).join("probe.out")).unwrap()
}

fn probe(host: &Host) -> Value {
    host.push(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/sandbox_probe.py")), "/usr/local/bin/sandbox-probe");
    serde_json::from_str(&in_the_units_place(host, "/usr/local/bin/sandbox-probe")).unwrap()
}

/// Every attempt of a group ended so.
fn all(found: &Value, group: &str, wanted: &[&str]) {
    for (what, result) in found[group].as_object().unwrap() {
        assert!(wanted.contains(&result.as_str().unwrap()), "{group} {what}: {result}");
    }
}

fn these(found: &Value, group: &str, names: &[&str], wanted: &[&str]) {
    for name in names {
        let result = found[group][name].as_str().unwrap_or_else(|| panic!("{group} {name} was not tried"));
        assert!(wanted.contains(&result), "{group} {name}: {result}");
    }
}

#[test]
fn a_process_of_the_service_can_do_what_it_needs_and_nothing_else() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    host.sh("systemctl stop opengatewayd");
    host.sh("printf topsecret >/etc/opengateway/credentials/upstream; chmod 600 /etc/opengateway/credentials/upstream");
    host.sh("touch /tmp/of-the-host; mkdir -p /dev/dri");
    // Nodes that anybody may open as far as modes go: of a device that the unit does not name, and of two that it does.
    host.sh(
        "mknod -m 666 /dev/probe-fuse c 10 229; mknod -m 666 /dev/dri/renderD128 c 226 128; mknod -m 666 /dev/nvidia0 c 195 0",
    );
    let outside = host.exec("setpriv --reuid opengateway --clear-groups --regid opengateway sh -c ': <>/dev/probe-fuse'");
    let found = probe(host);
    eprintln!("{found:#}");

    assert_eq!(found["user"].to_string(), host.sh("id -u opengateway"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(found["status"][set], "0000000000000000", "{set}");
    }
    assert_eq!(found["status"]["NoNewPrivs"], "1");
    assert_eq!(found["status"]["Seccomp"], "2");

    // Files: its own, and nobody else's.
    let refused = ["EROFS", "EACCES", "EPERM", "ENOENT"];
    all(&found, "create", &refused);
    all(&found, "own", &["ok"]);
    assert_eq!((&found["state_mode"], &found["made_mode"]), (&json!("0o700"), &json!("0o600")));
    all(&found, "list", &["EACCES", "EPERM", "ENOENT"]);
    these(&found, "read", &["/etc/shadow", "/etc/opengateway/credentials/upstream", "/proc/kmsg", "/proc/kcore"], &refused);
    these(
        &found,
        "read",
        &["/etc/opengateway/opengatewayd.toml", "/proc/meminfo", "/proc/cpuinfo", "/proc/loadavg", "/sys/class/net"],
        &["ok"],
    );
    assert_eq!(found["credentials"], json!({"secret_upstream": "topsecret"}));
    assert_eq!(found["tmp"], json!([]), "its /tmp is its own");
    assert_eq!(found["others"], json!([]), "processes of others are hidden");
    all(&found, "special_bits", &["ok", "EPERM"]);
    these(&found, "special_bits", &["setuid", "setgid"], &["EPERM"]);

    // Calls.
    all(&found, "unshare", &["EPERM"]);
    these(&found, "socket", &["unix", "inet", "inet6", "netlink"], &["ok"]);
    these(&found, "socket", &["packet", "can", "bluetooth", "alg", "vsock", "xdp"], &["EAFNOSUPPORT"]);
    assert_eq!((&found["bus"], &found["serve"]), (&json!("ok"), &json!("ok")));
    // A kernel without Landlock says that it knows no such call.
    let free = ["landlock", "seccomp"];
    these(&found, "call", &free, &["ok", "ENOSYS", "EOPNOTSUPP"]);
    for (call, result) in found["call"].as_object().unwrap() {
        assert!(free.contains(&call.as_str()) || result == "EPERM", "{call}: {result}");
    }

    // Devices: those of a GPU are seen; what the unit does not name cannot be opened even where its mode lets everybody.
    all(&found, "seen", &["ok"]);
    these(&found, "device", &["/dev/null", "/dev/urandom"], &["ok"]);
    if outside.code == 0 {
        these(&found, "device", &["/dev/probe-fuse"], &["EPERM"]);
    } else {
        eprintln!("not shown: this kernel has no device that anybody could open: {outside:?}");
    }
    // A driver that the kernel does not have cannot be allowed by name; one that it has is not refused.
    let drivers = std::fs::read_to_string("/proc/devices").unwrap();
    for (node, driver) in [("/dev/dri/renderD128", "drm"), ("/dev/nvidia0", "nvidia")] {
        if drivers.lines().any(|line| line.split_whitespace().nth(1) == Some(driver)) {
            assert_ne!(found["device"][node], "EPERM");
        } else {
            eprintln!("not shown: {node} can be opened: this kernel has no driver {driver}");
        }
    }

    // The owner of the machine comes first.
    assert!(found["cgroup"].as_str().unwrap().contains("opengateway.slice"), "{}", found["cgroup"]);
    assert_eq!((&found["oom"], &found["core"]), (&json!("500"), &json!(0)));
}

#[test]
fn the_running_daemon_has_no_privilege_and_reads_what_the_machine_has() {
    let Some(lab) = deployed(1, Bus::Daemon) else { return };
    let host = lab.host();
    let pid = host.property("MainPID");
    let status = host.sh(&format!("cat /proc/{pid}/status"));
    for line in ["CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    let total: u64 = host.sh("awk '/^MemTotal/ {print $2}' /proc/meminfo").parse().unwrap();
    let resources = host.json(&["resources"]);
    assert_eq!(resources["memory"]["total"], total * 1024, "{resources:#}");
    assert_eq!(host.sh(&format!("stat -c '%a %U:%G' {STATE}")), "700 opengateway:opengateway");
    let modes = host.sh(&format!("find {STATE} -type f -printf '%m %f\\n'"));
    assert!(modes.lines().all(|line| line.starts_with("600 ") || line.starts_with("400 ")), "{modes}");
}
