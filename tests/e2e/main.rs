//! End to end: the real packages on booted hosts with a real systemd, bus, polkit and journal.
//!
//! They need root, and the packages that `scripts/package.sh` makes (in `target/packages`, or where `OPENGATEWAY_PACKAGES`
//! says). Where they cannot run they say so and pass; with `CI=true` they fail. A few hosts boot at a time, whatever the
//! number of threads. What they measure they print: `cargo test --test e2e -- --nocapture`.

#![allow(clippy::unwrap_used)] // a test says what it expects by panicking

#[path = "../common/mod.rs"]
mod common;

/// Tests of these functions, each with one bus and with the other.
macro_rules! on_both_buses {
    ($($name:ident),+ $(,)?) => {
        mod with_dbus_daemon {
            $(#[test] fn $name() { super::$name(crate::lab::Bus::Daemon); })+
        }
        mod with_dbus_broker {
            $(#[test] fn $name() { super::$name(crate::lab::Bus::Broker); })+
        }
    };
}

mod abuse;
mod cluster;
mod endpoint;
mod engine;
mod install;
mod lab;
mod package;
mod packages;
mod polkit;
mod releases;
mod sandbox;
mod service;

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use common::bus::Said;
use lab::{Bus, DEADLINE, Host, Lab};

const CLUSTER: &str = "gatewayai-poc";
const CONFIG: &str = "/etc/opengateway/opengatewayd.toml";

/// Hosts with the .deb, and the service started.
fn deployed(hosts: usize, bus: Bus) -> Option<Lab> {
    let lab = Lab::with_package(hosts, bus, &packages::package("deb")?)?;
    lab.each(|host| drop(host.sh("systemctl start opengatewayd")));
    Some(lab)
}

/// Runs a command beside the test.
fn in_background(mut command: Command) -> JoinHandle<Said> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::spawn(move || lab::said(child.wait_with_output().unwrap()))
}

/// Starts a model server on the host, with the model "slow" that answers with so many words, `pause` seconds apart, and a
/// daemon that uses it.
fn slow_upstream(host: &Host, words: usize, pause: f64) {
    host.push(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/upstream.py")), "/usr/local/bin/upstream");
    host.sh(&format!("systemd-run --quiet --unit=upstream /usr/local/bin/upstream 8000 {words} {pause}"));
    host.sh(&format!("printf '[[backend]]\\nkind = \"openai\"\\nurl = \"http://127.0.0.1:8000/v1\"\\n' >>{CONFIG}"));
    host.sh("systemctl restart opengatewayd");
    if host.json(&["clusters"])["clusters"] == serde_json::json!([]) {
        assert_eq!(host.ogctl(&["connect", CLUSTER, "--serve", "--wait", "0"]).code, 0);
    }
    let own = "journalctl --no-pager _SYSTEMD_INVOCATION_ID=$(systemctl show -P InvocationID opengatewayd)";
    host.until(DEADLINE, &format!("{own} | grep -q 'backend .* is there'"));
}
