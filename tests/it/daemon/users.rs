//! What one user may learn of another, and do to what is not his.

use super::*;

#[tokio::test]
async fn no_text_of_a_prompt_is_in_a_log_a_signal_or_the_state() {
    const CANARY: &str = "canary-8c1f";
    let Some(a) = Node::start("NodeA", &["--serve", "--connect", "gatewayai-poc", "--log", "trace"]).await else { return };
    let boot = a.address().await;
    let args = ["--consume", "--connect", "gatewayai-poc", "--bootstrap", &boot, "--log", "trace"];
    let c = Node::start("NodeC", &args).await.unwrap();
    c.sees(&["NodeA"]).await;
    // A monitor sees every message of the bus; only the call may hold the text, and the pipe is no message.
    let monitor = c.bus.connect().await;
    monitor
        .call_method(
            Some("org.freedesktop.DBus"),
            "/org/freedesktop/DBus",
            Some("org.freedesktop.DBus.Monitoring"),
            "BecomeMonitor",
            &(vec!["type='signal'", "type='error'", "type='method_return'"], 0_u32),
        )
        .await
        .unwrap();
    let mut messages = MessageStream::from(&monitor);
    for _ in 0..3 {
        let said = c.ogctl(&["prompt", CANARY]).await;
        assert_eq!(said.stdout.trim(), CANARY, "{said:?}");
    }
    let said = c.ogctl(&["prompt", CANARY, "--model", "nonsense"]).await;
    assert!(said.code == 5 && !said.stderr.contains(CANARY), "{said:?}");
    let seen = async {
        use futures::StreamExt as _;
        while let Some(Ok(message)) = messages.next().await {
            let bytes = message.data().to_vec();
            assert!(!bytes.windows(CANARY.len()).any(|window| window == CANARY.as_bytes()), "{message}");
        }
    };
    let _ = tokio::time::timeout(Duration::from_millis(300), seen).await;
    for node in [&a, &c] {
        assert!(node.log().len() > 1000, "the log is at trace level");
        assert!(!node.log().contains(CANARY));
        for entry in std::fs::read_dir(node.state_dir()).unwrap().flatten() {
            let bytes = std::fs::read(entry.path()).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&bytes).contains(CANARY), "{entry:?}");
        }
    }
}

#[tokio::test]
async fn another_user_may_read_and_change_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can become another user");
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI runs as root");
        return;
    }
    let Some(node) = Node::start("a", &["--connect", "gatewayai-poc"]).await else { return };
    use std::os::unix::fs::PermissionsExt as _;
    for path in [node.bus.dir().to_owned(), node.bus.dir().join("socket")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    // The program must be where that user can read it.
    let copy = node.bus.dir().join("ogctl");
    std::fs::copy(env!("CARGO_BIN_EXE_ogctl"), &copy).unwrap();
    let other = |args: &[&str]| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .args(["--bus", node.bus.address()])
            .args(args)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = other(&["status"]);
    if said.contains("bus") && code == Some(8) {
        eprintln!("SKIPPED: this bus takes its own user alone: {said}");
        return;
    }
    assert_eq!(code, Some(0), "{said}");
    for args in [&["connect", "x", "--wait", "0"][..], &["disconnect", "gatewayai-poc"], &["prompt", "x"]] {
        let (code, said) = other(args);
        assert!(code == Some(4) && said.contains("org.opengateway.gateway1."), "{args:?}: {said}");
    }
    assert_eq!(node.json(&["clusters"]).await["clusters"].as_array().unwrap().len(), 1);
}
