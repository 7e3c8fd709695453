//! Programs that a lab needs inside a namespace: this test binary, started again with a role.

use std::io::{BufRead as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use crate::common::node::DEADLINE;
use crate::{lab::Lab, liar, neighbours, old_node, rogue};

const ROLE: &str = "OPENGATEWAY_NETNS_ROLE";

/// Not a test by itself: with a role set, this process plays it.
#[test]
fn role_process() {
    let Some(role) = std::env::var_os(ROLE) else { return };
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        match role.to_str() {
            Some("model-server") => model_server().await,
            Some("liar") => liar::play().await,
            Some("neighbour") => neighbours::neighbour().await,
            Some("stranger") => neighbours::stranger().await,
            Some("forger") => neighbours::forger(),
            Some("old-node") => old_node::play().await,
            Some("rogue") => rogue::play().await,
            _ => panic!("{role:?} is no role"),
        }
    });
}

/// Tells the test a line.
pub fn tell(line: &str) {
    println!("tells {line}");
}

/// A role that is being played.
#[derive(Debug)]
pub struct Role {
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
}

impl Role {
    /// Starts `role` on `host`, with words for it in `settings`.
    pub fn start(lab: &Lab, host: &str, role: &str, settings: &[(&str, &str)]) -> Self {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &lab.namespace(host)])
            .arg(std::env::current_exe().unwrap())
            .args(["roles::role_process", "--exact", "--nocapture"])
            .env(ROLE, role)
            .envs(settings.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = mpsc::unbounded_channel();
        let out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in std::io::BufReader::new(out).lines().map_while(Result::ok) {
                // The test runner may have begun the line with words of its own.
                if let Some((_, told)) = line.split_once("tells ") {
                    let _ = sender.send(told.to_owned());
                }
            }
        });
        Self { child, lines }
    }

    /// The next line that the role tells.
    pub async fn told(&mut self) -> String {
        self.told_within(DEADLINE).await
    }

    /// The same, for a role that takes its time.
    pub async fn told_within(&mut self, limit: Duration) -> String {
        tokio::time::timeout(limit, self.lines.recv()).await.expect("a word in time").expect("the role ended early")
    }

    /// A line that was told already, if any.
    pub fn told_already(&mut self) -> Option<String> {
        self.lines.try_recv().ok()
    }

    /// Tells the role a line.
    pub fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server with the model "slow". What comes before `/v1` in its URL says when it holds back, until it is told "go":
/// `/before/v1` before the first token, `/after/v1` after it.
#[derive(Debug)]
pub struct ModelServer {
    pub role: Role,
    port: u16,
}

impl ModelServer {
    pub async fn start(lab: &Lab, host: &str) -> Self {
        let mut role = Role::start(lab, host, "model-server", &[]);
        let told = role.told().await;
        let port = told.strip_prefix("port ").unwrap().parse().unwrap();
        Self { role, port }
    }

    /// A configuration of a daemon on the same host that uses it.
    pub fn config(&self, how: &str) -> String {
        format!(
            "[[backend]]\nkind = \"openai\"\nurl = \"http://127.0.0.1:{}/{how}/v1\"\nslots = 8\nrunning_per_peer = 8\n",
            self.port
        )
    }
}

async fn model_server() {
    let (sender, go) = watch::channel(false);
    std::thread::spawn(move || {
        for word in std::io::stdin().lines().map_while(Result::ok) {
            sender.send_replace(word == "go");
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    tell(&format!("port {}", listener.local_addr().unwrap().port()));
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, go.clone()));
    }
}

/// Reads one request: its first line.
async fn request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).await.ok().filter(|&count| count > 0)?;
        bytes.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
        if body.len() >= length {
            return head.lines().next().map(str::to_owned);
        }
    }
}

async fn serve(mut stream: TcpStream, mut go: watch::Receiver<bool>) {
    let Some(line) = request(&mut stream).await else { return };
    let path = line.split_whitespace().nth(1).unwrap_or_default();
    if path.ends_with("/models") {
        let body = r#"{"object":"list","data":[{"id":"slow"}]}"#;
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n";
        let _ = stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await;
        return;
    }
    tell("asked");
    let event = |text: &str| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
    let stop = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let pieces = [
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
        &event("The answer "),
        &event("is 4"),
        stop,
    ];
    let hold_at = match path.split('/').nth(1) {
        Some("before") => 1,
        Some("after") => 2,
        _ => usize::MAX,
    };
    for (at, piece) in pieces.into_iter().enumerate() {
        if at == hold_at && go.wait_for(|&go| go).await.is_err() {
            return;
        }
        if stream.write_all(piece.as_bytes()).await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown().await;
    let _ = tokio::time::timeout(Duration::from_secs(1), stream.read(&mut [0])).await;
}
