//! The OpenAI endpoint, asked over real sockets: in this process with a played dispatcher, and the real daemon.

mod daemon;
mod gone;
mod limits;
mod requests;
mod streams;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use opengateway::config::{HttpAddress, HttpSettings};
use opengateway::dispatch::{self, JobEvent, ServedBy, Start};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::{ClusterState, ClusterView, FoundBy, Liveness, Member, ModelOffer, NodeId};
use opengateway::domain::prompt::{Done, Failure, FinishReason, Usage};
use opengateway::net::{self, Scripted, Snapshot};
use opengateway::serve::{self, Echo};
use opengateway::{http, http::Handle};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

pub const DEADLINE: Duration = Duration::from_secs(20);

/// What must happen, soon on any machine.
pub async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("it happens in time")
}

/// Waits until it is so.
pub async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A response, whole.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.body)))
    }

    pub fn code(&self) -> Value {
        self.json()["error"]["code"].clone()
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Reads one response, and nothing after it.
pub async fn response(stream: &mut (impl AsyncRead + Unpin), has_body: bool) -> Option<Reply> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return None,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let mut reply = Reply { status, head, body: Vec::new() };
    if !has_body || status == 204 || status == 100 {
        return Some(reply);
    }
    if reply.header("transfer-encoding") == Some("chunked") {
        loop {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                line.push(stream.read_u8().await.ok()?);
            }
            let length = usize::from_str_radix(std::str::from_utf8(&line).ok()?.trim(), 16).ok()?;
            let mut chunk = vec![0; length + 2];
            stream.read_exact(&mut chunk).await.ok()?;
            if length == 0 {
                return Some(reply);
            }
            reply.body.extend_from_slice(&chunk[..length]);
        }
    }
    reply.body = vec![0; reply.header("content-length")?.parse().ok()?];
    stream.read_exact(&mut reply.body).await.ok()?;
    Some(reply)
}

/// A member that serves these models.
pub fn member(id: &str, name: &str, models: &[&str]) -> Arc<Member> {
    Arc::new(Member {
        id: NodeId::new(id),
        name: name.to_owned(),
        version: String::new(),
        protocol: 2,
        addresses: Vec::new(),
        found_by: FoundBy::Mdns,
        direct: true,
        relay: None,
        transport: "quic",
        connected_at: SystemTime::now(),
        last_seen: SystemTime::now(),
        latency_us: None,
        serving: true,
        draining: false,
        free_slots: 1,
        queued: 0,
        models: models.iter().map(|&name| ModelOffer::named(name)).collect(),
        tiers: Vec::new(),
        liveness: Liveness::Alive,
    })
}

/// A snapshot with these clusters.
pub fn snapshot(clusters: &[(&str, Vec<Arc<Member>>)]) -> Arc<Snapshot> {
    let clusters: BTreeMap<_, _> = clusters
        .iter()
        .map(|(name, members)| {
            let id = ClusterId::new(name).unwrap();
            let (state, joined_at, members) = (ClusterState::Connected, SystemTime::now(), members.clone());
            let view =
                ClusterView { id: id.clone(), state, serving: true, joined_at, announced: true, discovery: vec![], members };
            (id, Arc::new(view))
        })
        .collect();
    Arc::new(Snapshot { peer_id: Some(NodeId::new("12self")), clusters, ..Snapshot::default() })
}

/// The endpoint, with a dispatcher that the test plays.
pub struct Endpoint {
    pub handle: Handle,
    pub address: SocketAddr,
    pub key: String,
    pub starts: mpsc::Receiver<Start>,
    pub net: Scripted,
    _dir: tempfile::TempDir,
    _active: watch::Sender<u32>,
}

pub fn loopback() -> HttpSettings {
    HttpSettings { listen: vec![HttpAddress::Tcp("127.0.0.1:0".parse().unwrap())], ..HttpSettings::default() }
}

impl Endpoint {
    /// In cluster "lab" with two members.
    pub async fn start() -> Self {
        Self::with(loopback()).await
    }

    pub async fn with(settings: HttpSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (net, scripted) = net::Handle::scripted();
        let lab = vec![member("12a", "NodeA", &["llama", "echo"]), member("12b", "NodeB", &["phi"])];
        scripted.state.send_replace(snapshot(&[("lab", lab)]));
        let (dispatch, starts, active) = dispatch::Handle::scripted();
        let (_, tiers) = watch::channel(Vec::new());
        let (serve, _) = serve::spawn(serve::Config { backends: vec![Arc::new(Echo::default())], tiers });
        let (node_name, state_dir) = ("me".to_owned(), dir.path().to_owned());
        let handle = http::start(http::Parts { net, serve, dispatch, node_name, state_dir, settings }, Vec::new());
        until("it listens", || !handle.addresses().is_empty()).await;
        let key = handle.key(1000, false).await.unwrap();
        let tcp = handle
            .addresses()
            .iter()
            .find_map(|address| address.strip_prefix("http://")?.strip_suffix("/v1")?.parse::<SocketAddr>().ok());
        let address = tcp.unwrap_or_else(|| "127.0.0.1:9".parse().unwrap());
        Self { handle, address, key, starts, net: scripted, _dir: dir, _active: active }
    }

    pub async fn connect(&self) -> TcpStream {
        within(TcpStream::connect(self.address)).await.unwrap()
    }

    /// The text of a request with the key.
    pub fn request(&self, method: &str, path: &str, more: &str, body: &str) -> String {
        let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let json = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
        let key = &self.key;
        format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n{json}{length}{more}\r\n{body}")
    }

    /// Sends bytes, and reads one response.
    pub async fn raw(&self, bytes: impl AsRef<[u8]>) -> Option<Reply> {
        let mut stream = self.connect().await;
        // A refusal may come before all of it is sent.
        let _ = within(stream.write_all(bytes.as_ref())).await;
        within(response(&mut stream, true)).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.raw(self.request("GET", path, "", "")).await.unwrap()
    }

    pub async fn post(&self, path: &str, more: &str, body: &Value) -> Reply {
        self.raw(self.request("POST", path, more, &body.to_string())).await.unwrap()
    }

    pub async fn chat(&self, more: &Value) -> Reply {
        self.post("/v1/chat/completions", "", &chat_body(more)).await
    }

    pub async fn started(&mut self) -> Start {
        within(self.starts.recv()).await.expect("the endpoint lives")
    }
}

pub fn chat_body(more: &Value) -> Value {
    let mut body = json!({"model": "llama", "messages": [{"role": "user", "content": "What is 2+2?"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

pub fn started_by(name: &str) -> JobEvent {
    let by = ServedBy { id: NodeId::new("12a"), name: name.to_owned(), local: false };
    JobEvent::Started { model: "llama".to_owned(), by }
}

pub fn done() -> JobEvent {
    JobEvent::End(Ok(Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 7, completion_tokens: 2 } }))
}

pub fn failed(failure: Failure) -> JobEvent {
    JobEvent::End(Err(failure))
}

/// Plays an answer.
pub async fn play(start: &Start, events: Vec<JobEvent>) {
    for event in events {
        let _ = start.events.send(event).await;
    }
}
