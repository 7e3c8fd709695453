//! `kill -9` of the daemon that answers, before and after the first token: its engine is halted, so that the moment is certain.

use std::process::Stdio;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use super::*;
use crate::common::bus::ogctl_on;
use crate::common::node;

const CLUSTER: &str = "gatewayai-poc";
/// In which a halted engine runs before it is looked at; the answer takes a hundred times as long.
const PULSE: Duration = Duration::from_millis(1);

/// Two nodes with the model, and one without that asks.
struct Cluster {
    servers: [Answering; 2],
    asker: Node,
}

impl Cluster {
    async fn start() -> Option<Self> {
        let first = Answering::start("NodeA", &["--serve", "--connect", CLUSTER]).await?;
        let bootstrap = first.node.address().await;
        let second = Answering::start("NodeB", &["--serve", "--connect", CLUSTER, "--bootstrap", &bootstrap]).await?;
        let asker = Node::start("NodeC", &["--consume", "--connect", CLUSTER, "--bootstrap", &bootstrap]).await?;
        let both = |models: &Value| {
            let found = models["models"].as_array().unwrap().iter().find(|model| model["model"] == MODEL);
            found.is_some_and(|model| {
                model["nodes"].as_array().unwrap().iter().filter(|node| node["state"] == "ready").count() == 2
            })
        };
        asker.until(&["models"], both).await;
        Some(Self { servers: [first, second], asker })
    }

    /// Halts both engines and asks; gives the asking `ogctl`, and which of the two has the prompt.
    async fn ask(&self, question: &str) -> (Asking, usize) {
        for server in &self.servers {
            server.signal_engine(Signal::STOP);
        }
        let mut command = ogctl_on(&self.asker.bus, &["prompt", "--model", MODEL, "--stream", "--json", question]);
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let deadline = std::time::Instant::now() + node::DEADLINE;
        loop {
            for (at, server) in self.servers.iter().enumerate() {
                if server.node.json(&["status"]).await["jobs"] == 1 {
                    return (Asking { child, lines }, at);
                }
            }
            assert!(std::time::Instant::now() < deadline, "nobody took it: {}", self.asker.log());
        }
    }
}

/// An `ogctl prompt` under way.
struct Asking {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Asking {
    async fn next(&mut self) -> Option<Value> {
        let line = tokio::time::timeout(DEADLINE, self.lines.next_line()).await.expect("ogctl hangs").unwrap()?;
        Some(serde_json::from_str(&line).unwrap())
    }

    /// The rest: text, its last line, and the exit code.
    async fn rest(mut self) -> (String, Value, Option<i32>) {
        let (mut text, mut last) = (String::new(), Value::Null);
        while let Some(line) = self.next().await {
            text.push_str(line["text"].as_str().unwrap_or_default());
            last = if line["type"] == "start" { last } else { line };
        }
        (text, last, self.child.wait().await.unwrap().code())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_killed_before_the_first_token_is_replaced_by_another() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let (mut asking, took) = cluster.ask(QUESTION).await;
    cluster.servers[1 - took].signal_engine(Signal::CONT);
    cluster.servers[took].node.kill().await;
    let other = cluster.servers[1 - took].node.name().to_owned();
    // A start of the one that was killed may come before that of the other: it had accepted the prompt.
    let by = loop {
        let line = asking.next().await.expect("an answer");
        match line["type"].as_str() {
            Some("text") => panic!("text without a start: {line}"),
            Some("start") if line["served_by"]["name"] == *other => break line,
            Some("start" | "queued") => {}
            _ => panic!("{line}"),
        }
    };
    assert_eq!(by["model"], MODEL);
    let (text, last, code) = asking.rest().await;
    assert_eq!((text.as_str(), &last["type"], code), ("4", &json!("end"), Some(0)), "{last}");
    cluster.servers[1 - took].node.until(&["status"], |status| status["jobs"] == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_killed_after_the_first_token_interrupts_with_the_text_so_far() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let (mut asking, took) = cluster.ask("Count to 50").await;
    cluster.servers[1 - took].signal_engine(Signal::CONT);
    let server = &cluster.servers[took];
    let mut text = String::new();
    let deadline = std::time::Instant::now() + node::DEADLINE;
    while text.is_empty() {
        server.signal_engine(Signal::CONT);
        tokio::time::sleep(PULSE).await;
        server.signal_engine(Signal::STOP);
        // What it wrote before is on the way.
        while let Ok(line) = tokio::time::timeout(Duration::from_millis(100), asking.next()).await {
            text.push_str(line.expect("the answer goes on")["text"].as_str().unwrap_or_default());
        }
        assert!(std::time::Instant::now() < deadline, "no text");
    }
    cluster.servers[took].node.kill().await;
    let (rest, last, code) = asking.rest().await;
    text.push_str(&rest);
    let whole = (1..=50).map(|number| number.to_string()).collect::<Vec<_>>().join(" ");
    assert!(whole.starts_with(&text) && text.len() < whole.len(), "{text}");
    assert_eq!((&last["error"]["name"], code), (&json!("Interrupted"), Some(1)), "{last}");
    // The cluster serves on.
    cluster.asker.until(&["peers"], |peers| peers["peers"].as_array().is_some_and(|peers| peers.len() == 1)).await;
    let said = cluster.asker.ogctl(&["prompt", "--model", MODEL, QUESTION]).await;
    assert_eq!((said.code, said.stdout.trim()), (0, "4"), "{said:?}");
}
