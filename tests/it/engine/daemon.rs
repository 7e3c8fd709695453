//! The real daemon with engines under it.

use std::fs;
use std::time::Duration;

use super::lab::{until_ended, write_program};
use crate::common::gguf::Gguf;
use crate::common::node::Node;

/// A daemon that keeps the model "m" loaded, and the pid of its engine.
async fn start() -> Option<(Node, tempfile::TempDir, u32)> {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    write_program(&root.join("engine"));
    fs::create_dir(root.join("models")).unwrap();
    fs::write(root.join("models/m.gguf"), Gguf::default().bytes()).unwrap();
    let text =
        format!("[models]\ndirectory = \"{0}/models\"\n[engine]\nprogram = \"{0}/engine\"\nkeep = [\"m\"]\n", root.display());
    fs::write(root.join("daemon.toml"), text).unwrap();
    let config = root.join("daemon.toml");
    let node = Node::start("N", &["--config", config.to_str().unwrap(), "--connect", "gatewayai-poc"]).await?;
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(pid) = children(node.pid()).first() {
            return Some((node, directory, *pid));
        }
        assert!(std::time::Instant::now() < deadline, "no engine: {}", node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn children(of: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

#[tokio::test]
async fn an_engine_ends_with_a_daemon_that_was_killed() {
    let Some((mut node, _directory, pid)) = start().await else { return };
    node.kill().await;
    until_ended(pid, Duration::from_secs(2)).await;
}

#[tokio::test]
async fn prompts_and_dead_engines_leave_no_descriptor_and_no_process() {
    let Some((mut node, _directory, _)) = start().await else { return };
    let said = node.ogctl(&["prompt", "--model", "m", "words 3"]).await;
    assert_eq!(said.stdout.trim(), "word word word", "{said:?}");
    let before = node.descriptors();
    for round in 0..3 {
        let said = node.ogctl(&["prompt", "--model", "m", &format!("crash {round}")]).await;
        assert!(said.code != 0 && said.stderr.contains("engine died"), "{said:?}");
        let said = node.ogctl(&["prompt", "--model", "m", "words 1"]).await;
        assert_eq!(said.stdout.trim(), "word", "{said:?}");
    }
    assert_eq!(children(node.pid()).len(), 1, "one engine and no zombie");
    assert!(node.descriptors() <= before + 2, "{before} descriptors before, {} after", node.descriptors());
    let pid = children(node.pid())[0];
    node.signal(rustix::process::Signal::TERM);
    node.ended().await;
    until_ended(pid, Duration::from_secs(1)).await;
    assert!(!node.log().contains("words 1"), "no text of prompts in the log");
}
