//! The real daemon, the real engine and the model that every installation brings: many prompts, and daemons that are killed.

mod kills;
mod many;

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::common::node::{Node, skipped};
use crate::engine::real::{demo, program};
use crate::http::{Reply, response};

/// Most time that one prompt may take, on a machine that does other work too.
const DEADLINE: Duration = Duration::from_secs(60);
const MODEL: &str = "opengateway-demo";
const QUESTION: &str = "What is 2+2?";
/// Of the demonstration model; `[engine] slots` would change it.
const SLOTS: u64 = 8;

/// A daemon whose engine has the model loaded.
struct Answering {
    node: Node,
    engine: u32,
    _directory: tempfile::TempDir,
}

impl Answering {
    /// `None`, said aloud, where the engine was not built or there is no bus.
    async fn start(name: &str, args: &[&str]) -> Option<Self> {
        let Some(program) = program() else {
            skipped("the engine is not built here: scripts/engine.sh, or name it in OPENGATEWAY_ENGINE");
            return None;
        };
        if !demo().is_file() {
            skipped("there is no models/opengateway-demo.gguf");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let models = directory.path().join("models");
        fs::create_dir(&models).unwrap();
        fs::copy(demo(), models.join(format!("{MODEL}.gguf"))).unwrap();
        let config = directory.path().join("daemon.toml");
        let text = format!(
            "[models]\ndirectory = {models:?}\n[engine]\nprogram = {program:?}\nkeep = [{MODEL:?}]\n[http]\nmax_connections = 512\n"
        );
        fs::write(&config, text).unwrap();
        let node = Node::start(name, &[&["--config", config.to_str().unwrap()], args].concat()).await?;
        let local = node.until(&["models", "--local"], |models| models["models"][0]["state"] == "ready").await;
        let engine = local["models"][0]["engine_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap();
        Some(Self { node, engine, _directory: directory })
    }

    async fn endpoint(&self) -> Endpoint {
        let status = self.node.until(&["status"], |status| status["http"][0].is_string()).await;
        let url = status["http"][0].as_str().unwrap();
        let address = url.strip_prefix("http://").unwrap().strip_suffix("/v1").unwrap().parse().unwrap();
        let key = self.node.ogctl(&["key", "--print"]).await.stdout.trim().to_owned();
        Endpoint { address, key }
    }

    /// What `ogctl models --local` says of the model.
    async fn local(&self) -> Value {
        self.node.json(&["models", "--local"]).await["models"][0].clone()
    }

    /// Waits until nothing is in progress and every slot is free.
    async fn is_idle(&self) {
        self.node.until(&["status"], |status| status["jobs"] == 0).await;
        self.node.until(&["models"], |models| models["models"][0]["free_slots"] == SLOTS).await;
    }

    fn signal_engine(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.engine).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

/// Where the OpenAI endpoint of a daemon is, and the key to it.
#[derive(Clone)]
struct Endpoint {
    address: SocketAddr,
    key: String,
}

impl Endpoint {
    async fn connect(&self) -> BufReader<TcpStream> {
        BufReader::new(TcpStream::connect(self.address).await.unwrap())
    }

    /// Asks over a connection that stays open.
    async fn ask(&self, stream: &mut BufReader<TcpStream>, question: &str) -> Reply {
        let body = json!({"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": question}]}).to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            self.key,
            body.len()
        );
        let asked = tokio::time::timeout(DEADLINE, async {
            stream.write_all(request.as_bytes()).await.unwrap();
            response(stream, true).await
        });
        asked.await.expect("a prompt hangs").expect("the connection was closed without an answer")
    }
}

fn content(reply: &Reply) -> Value {
    reply.json()["choices"][0]["message"]["content"].clone()
}
