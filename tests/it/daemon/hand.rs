//! `ogctl` used the wrong way, against the real daemon: every error says what, why, and the next command.

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::*;

/// One sentence on standard error, nothing on standard output, and the next command.
fn is_helpful(said: &Said, code: u8, next: &str) {
    assert_eq!(said.code, code, "{said:?}");
    assert!(said.stdout.is_empty() && said.stderr.starts_with("ogctl: ") && said.stderr.lines().count() == 1, "{said:?}");
    assert!(said.stderr.contains(next), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_mistake_is_told_with_the_next_command() {
    let Some(mut node) = Node::start("a", &["--consume"]).await else {
        return;
    };
    is_helpful(&node.ogctl(&["peers"]).await, 10, "ogctl connect");
    is_helpful(&node.ogctl(&["prompt", "x"]).await, 10, "ogctl connect");
    is_helpful(&node.ogctl(&["peers", "nowhere"]).await, 10, "ogctl clusters");
    is_helpful(&node.ogctl(&["leave", "nowhere"]).await, 10, "ogctl clusters");
    is_helpful(&node.ogctl(&["connect", "../x"]).await, 2, "ogctl clusters");
    is_helpful(&node.ogctl(&["connect", "x", "--bootstrap", "192.0.2.1"]).await, 2, "192.0.2.1");
    is_helpful(&node.ogctl(&["connect", "x", "--secret-file", "/nonexistent"]).await, 2, "/nonexistent");
    is_helpful(&node.ogctl(&["eligible", "--tier", "GPT-9"]).await, 10, "ogctl eligible");
    is_helpful(&node.ogctl(&["jobs", "--cancel", "77"]).await, 10, "there is no job 77");
    is_helpful(&node.ogctl(&["status", "--bus", "nonsense"]).await, 2, "\"nonsense\" is neither \"system\" nor \"session\"");
    assert_eq!(node.ogctl(&["connect", "x", "--wait", "0"]).await.code, 0);
    is_helpful(&node.ogctl(&["prompt", "y"]).await, 5, "ogctl peers");
    is_helpful(&node.ogctl(&["prompt", "y", "--peer", "z"]).await.first_line(), 2, "--peer");
    let alone = node.ogctl(&["connect", "x", "--wait", "0.3"]).await;
    is_helpful(&alone, 6, "--bootstrap");
    node.signal(Signal::TERM);
    assert_eq!(node.ended().await, Some(0));
    is_helpful(&node.ogctl(&["status"]).await, 8, "systemctl start opengatewayd");
    is_helpful(&node.ogctl(&["prompt", "x"]).await, 8, "systemctl start opengatewayd");
    for args in [&["--json", "status"][..], &["--json", "prompt", "x"], &["--json", "monitor"]] {
        let said = node.ogctl(args).await;
        let error: Value = serde_json::from_str(&said.stdout).unwrap();
        assert!(
            said.code == 8
                && said.stderr.is_empty()
                && error["error"]["hint"].as_str().is_some_and(|hint| hint.contains("systemctl")),
            "{said:?}"
        );
    }
}

impl Said {
    /// clap has more to say after its first line.
    fn first_line(self) -> Self {
        let line = self.stderr.lines().next().unwrap_or_default().replacen("error: ", "ogctl: ", 1);
        Self { stderr: line, ..self }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn monitor_goes_on_across_a_restart_of_the_daemon() {
    let Some(mut node) = Node::start("a", &["--connect", "gatewayai-poc"]).await else {
        return;
    };
    let mut child = ogctl_on(&node.bus, &["monitor", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut until = async |wanted: &[&str]| {
        let mut wanted = wanted.iter().copied().peekable();
        while let Some(event) = wanted.peek() {
            let line = tokio::time::timeout(DEADLINE, lines.next_line())
                .await
                .unwrap_or_else(|_| panic!("no {event}"))
                .unwrap()
                .unwrap();
            let seen: Value = serde_json::from_str(&line).unwrap();
            // What has no name is no event: the bare nodes of the object manager are not shown.
            assert!(seen["event"].as_str().is_some_and(|event| !event.is_empty()) && seen["cluster"] != "", "{line}");
            if seen["event"] == *event {
                wanted.next();
            }
        }
    };
    until(&["node", "cluster"]).await;
    assert_eq!(node.ogctl(&["connect", "other", "--wait", "0"]).await.code, 0);
    until(&["cluster"]).await;
    node.signal(Signal::TERM);
    until(&["shutting_down", "stopped"]).await;
    assert_eq!(node.ended().await, Some(0));
    node.restart().await;
    until(&["node", "cluster", "cluster"]).await;
    node.signal(Signal::KILL);
    until(&["stopped"]).await;
    node.ended().await;
    node.restart().await;
    until(&["node"]).await;
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::INT).unwrap();
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    // A shell shows both as 130.
    use std::os::unix::process::ExitStatusExt as _;
    assert!(status.code() == Some(130) || status.signal() == Some(Signal::INT.as_raw()), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_fit_a_narrow_terminal_and_names_of_peers_steer_none() {
    let evil = "\u{202e}evil\u{200b}\u{2066}\u{1f600}";
    let longest = "n".repeat(64);
    let Some(a) = Node::start(&longest, &["--serve", "--connect", "gatewayai-poc"]).await else {
        return;
    };
    let boot = a.address().await;
    let b = Node::start(evil, &["--serve", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    b.sees(&[&longest]).await;
    a.sees(&[evil]).await;
    let has_script = Command::new("script").arg("--version").output().is_ok();
    if !has_script {
        skipped("no script(1), which makes a terminal");
    }
    for (node, args) in
        [(&a, "peers"), (&b, "peers"), (&a, "clusters"), (&a, "models"), (&a, "resources"), (&a, "eligible"), (&a, "jobs")]
    {
        let piped = node.ogctl(&[args]).await;
        assert!(piped.code == 0 && !piped.stdout.contains(['\u{1b}', '\u{202e}', '\u{200b}', '\u{2066}']), "{piped:?}");
        if has_script {
            let command = format!("{} {args}", env!("CARGO_BIN_EXE_ogctl"));
            let mut script = tokio::process::Command::new("script");
            script.args(["-qec", &command, "/dev/null"]).env("COLUMNS", "40").env("NO_COLOR", "1").env("TERM", "xterm");
            script.env("DBUS_SYSTEM_BUS_ADDRESS", node.bus.address()).stdin(Stdio::null());
            let shown = String::from_utf8(script.output().await.unwrap().stdout).unwrap();
            let as_lines = shown.lines().any(|line| line.starts_with("NAME: ") || line.starts_with("TIER: "))
                || !["peers", "eligible"].contains(&args);
            assert!(as_lines, "nine columns are of no use in forty: {shown}");
            assert!(!shown.is_empty() && !shown.contains(['\u{1b}', '\u{202e}', '\u{200b}', '\u{2066}']), "{shown:?}");
        }
    }
}

#[tokio::test]
async fn completion_scripts_are_scripts() {
    let Some(bus) = bus_or_skip() else { return };
    for (shell, check) in [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")] {
        let file = bus.dir().join(shell);
        std::fs::write(&file, ogctl(&bus, &["completion", shell]).await.stdout).unwrap();
        match Command::new(shell).arg(check).arg(&file).output() {
            Ok(checked) => assert!(checked.status.success(), "{shell}: {}", String::from_utf8_lossy(&checked.stderr)),
            // bash is everywhere; the others are checked where they are.
            Err(error) => assert_ne!(shell, "bash", "{error}"),
        }
    }
}

#[tokio::test]
async fn a_bootstrap_node_that_is_not_reached_is_told_with_the_reason_until_it_is() {
    let Some(a) = Node::start("NodeA", &["--connect", "gatewayai-poc"]).await else { return };
    let good = a.address().await;
    let (at, _) = good.rsplit_once("/p2p/").unwrap();
    let stranger = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
    let wrong = format!("{at}/p2p/{stranger}");
    let dead = "/ip4/127.0.0.1/tcp/9";
    let args =
        ["--connect", "gatewayai-poc", "--bootstrap", &wrong, "--bootstrap", dead, "--bootstrap", "/dns4/no.such.invalid/tcp/1"];
    let b = Node::start("NodeB", &args).await.unwrap();
    let problems = |status: &Value| status["problems"].as_array().unwrap().iter().map(ToString::to_string).collect::<String>();
    b.until(&["status"], |status| {
        let told = problems(status);
        told.contains("another node answers there") && told.contains("refused") && told.contains("name is not known")
    })
    .await;
    let said = b.ogctl(&["status"]).await;
    assert!(said.stdout.starts_with('!') && said.stdout.contains(stranger), "{said:?}");
    let c = Node::start("NodeC", &["--connect", "gatewayai-poc", "--bootstrap", &good]).await.unwrap();
    c.sees(&["NodeA"]).await;
    assert_eq!(problems(&c.json(&["status"]).await), "");
}
