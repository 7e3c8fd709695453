//! Passwords: who is asked, what is said when nobody can be, and how a question ends.
//!
//! Polkit is played by the test's daemon, its agent by a script that behaves as badly as an agent can.

use std::path::Path;
use std::process::Stdio;

use opengateway::api::names::exit;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

use super::fake::Fake;
use crate::common::bus::{Bus, LIMIT, bus_or_skip, ogctl};
use crate::common::node::skipped;

/// Takes the echo from the terminal, says so, tells that it is registered, and ignores an interrupt.
const AGENT: &str = r#"#!/bin/sh
trap '' INT
trap 'exit 0' TERM
stty -echo </dev/tty
while [ "$1" != --notify-fd ]; do shift; done
echo "$$" >"${0%/*}/agent.pid"
eval "exec $2>&-"
while :; do sleep 0.02; done
"#;

/// Runs `ogctl connect CLUSTER` on a terminal of its own with `directory` before the PATH; the shell says how it ended
/// and whether the terminal has its echo. `None`, said aloud, where `script` is missing.
fn on_terminal(bus: &Bus, path: &str, cluster: &str) -> Option<Child> {
    let line = format!(
        "trap : INT; {} connect {cluster}; echo \"code=$?\"; stty -a | grep -o -e '-*echo ' ",
        env!("CARGO_BIN_EXE_ogctl")
    );
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("SHELL", "/bin/sh");
    command.env("PATH", path).env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).env_remove("DBUS_SESSION_BUS_ADDRESS");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    match command.spawn() {
        Ok(child) => Some(child),
        Err(error) => {
            skipped(&format!("no script (of util-linux): {error}"));
            None
        }
    }
}

async fn said(child: Child) -> String {
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("it ends").unwrap();
    String::from_utf8_lossy(&output.stdout).replace('\r', "")
}

fn install_agent(directory: &Path) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let agent = directory.join("pkttyagent");
    std::fs::write(&agent, AGENT).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", directory.display(), std::env::var("PATH").unwrap())
}

/// The agent's pid, when it is there.
async fn agent_of(directory: &Path) -> rustix::process::Pid {
    let file = directory.join("agent.pid");
    let read = async {
        loop {
            let pid = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                return pid;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("the agent starts")
}

fn is_gone(pid: rustix::process::Pid) -> bool {
    rustix::process::test_kill_process(pid).is_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_terminal_nobody_is_asked_and_the_way_out_is_told() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let refused = ogctl(&bus, &["connect", "room-opened"]).await;
    assert_eq!(refused.code, exit::REFUSED, "{refused:?}");
    for way in ["with sudo", "sudo usermod -aG opengateway-users USER", "log in anew"] {
        assert!(refused.stderr.contains(way), "{refused:?}");
    }
    assert_eq!(daemon.calls(), ["asked=false"], "a call that waits for a password was made");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_terminal_the_call_is_made_again_with_an_agent() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let path = install_agent(bus.dir());
    let Some(child) = on_terminal(&bus, &path, "room-opened") else { return };
    let text = said(child).await;
    assert!(text.contains("Joined room-opened; 1 peer.\ncode=0\necho"), "{text:?}");
    assert_eq!(daemon.calls()[..2], ["asked=false", "asked=true"]);
    assert!(is_gone(agent_of(bus.dir()).await), "the agent is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_at_the_password_ends_both_and_gives_the_terminal_back() {
    let Some(bus) = bus_or_skip() else { return };
    let daemon = Fake::serve(&bus).await;
    let path = install_agent(bus.dir());
    let Some(mut child) = on_terminal(&bus, &path, "room-waiting") else { return };
    daemon.wait_for(|seen| seen.calls.iter().any(|call| call == "asked=true")).await;
    let agent = agent_of(bus.dir()).await;
    // Ctrl-C, as the terminal sends it to everybody in the foreground.
    child.stdin.as_mut().unwrap().write_all(b"\x03").await.unwrap();
    let text = said(child).await;
    assert!(text.contains("code=130\necho"), "{text:?}");
    assert!(is_gone(agent), "the agent is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminal_without_an_agent_is_told_what_is_missing() {
    let Some(bus) = bus_or_skip() else { return };
    let _daemon = Fake::serve(&bus).await;
    let tools = bus.dir().join("tools");
    std::fs::create_dir(&tools).unwrap();
    for tool in ["sh", "stty", "grep", "script"] {
        let path = std::env::var("PATH").unwrap();
        if let Some(found) = path.split(':').map(|directory| Path::new(directory).join(tool)).find(|file| file.exists()) {
            std::os::unix::fs::symlink(found, tools.join(tool)).unwrap();
        }
    }
    let Some(child) = on_terminal(&bus, tools.to_str().unwrap(), "room-denied") else { return };
    let text = said(child).await;
    assert!(text.contains("pkttyagent (of polkit) must be installed") && text.contains("code=4"), "{text:?}");
    assert!(text.contains("sudo usermod -aG opengateway-users USER"), "{text:?}");
}
