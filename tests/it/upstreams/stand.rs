//! A server that answers as it is told, keeps connections as real ones do, and counts.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub body: serde_json::Value,
}

/// What is said to it.
#[derive(Debug, Clone)]
pub enum Reply {
    Json(u16, String),
    /// Events in one chunk, and the end of the body.
    Events(String),
    /// The beginning of an answer and then nothing, until the asker is gone: a slot is busy meanwhile.
    Hang,
    /// The connection is closed without a word.
    Close,
    /// Other bytes as they are; then the connection is closed.
    Raw(String),
}

impl Reply {
    pub fn ok(body: impl ToString) -> Self {
        Self::Json(200, body.to_string())
    }

    pub fn not_found() -> Self {
        Self::Json(404, r#"{"error":{"message":"File Not Found","type":"not_found_error","code":404}}"#.to_owned())
    }

    /// "4", as llama-server streams it.
    pub fn four() -> Self {
        let chunk = |delta: &str, finish: &str| {
            format!(
                "data: {{\"choices\":[{{\"finish_reason\":{finish},\"index\":0,\"delta\":{delta}}}],\"object\":\"chat.completion.chunk\"}}\n\n"
            )
        };
        let usage = "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2,\"prompt_tokens\":20,\"total_tokens\":22},\"timings\":{}}\n\n";
        Self::Events(format!(
            "{}{}{}{usage}data: [DONE]\n\n",
            chunk(r#"{"role":"assistant","content":null}"#, "null"),
            chunk(r#"{"content":"4"}"#, "null"),
            chunk("{}", "\"stop\"")
        ))
    }
}

#[derive(Default)]
struct Counts {
    connections: AtomicUsize,
    bytes: AtomicUsize,
    busy: AtomicUsize,
    asked: Mutex<Vec<Asked>>,
}

type Answer = Arc<dyn Fn(&Asked) -> Reply + Send + Sync>;

/// Ends, with all its connections, when dropped.
pub struct Stand {
    pub port: u16,
    counts: Arc<Counts>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Stand {
    pub async fn start(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen("127.0.0.1:0".parse().unwrap(), None, answer).await
    }

    /// `idle`: an unused connection is closed after this, as real servers do.
    pub async fn listen(
        at: SocketAddr,
        idle: Option<Duration>,
        answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let counts = Arc::new(Counts::default());
        let (counted, answer): (_, Answer) = (Arc::clone(&counts), Arc::new(answer));
        let serving = tokio::spawn(async move {
            let mut all = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                counted.connections.fetch_add(1, Ordering::SeqCst);
                all.spawn(serve(stream, Arc::clone(&counted), Arc::clone(&answer), idle));
                while all.try_join_next().is_some() {}
            }
        });
        Self { port, counts, serving }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    pub fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::SeqCst)
    }

    pub fn bytes(&self) -> usize {
        self.counts.bytes.load(Ordering::SeqCst)
    }

    pub fn busy(&self) -> usize {
        self.counts.busy.load(Ordering::SeqCst)
    }

    /// Requests whose method and path begin so, in their order.
    pub fn asked(&self, begin: &str) -> Vec<Asked> {
        let asked = self.counts.asked.lock().unwrap();
        asked.iter().filter(|asked| format!("{} {}", asked.method, asked.path).starts_with(begin)).cloned().collect()
    }
}

async fn request(stream: &mut TcpStream, bytes: &mut Vec<u8>, counts: &Counts) -> Option<Asked> {
    let mut more = async |bytes: &mut Vec<u8>| {
        let mut buffer = [0; 65536];
        let count = stream.read(&mut buffer).await.ok().filter(|count| *count > 0)?;
        counts.bytes.fetch_add(count, Ordering::SeqCst);
        bytes.extend_from_slice(&buffer[..count]);
        Some(())
    };
    let head = loop {
        match bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            Some(end) => break end + 4,
            None => more(bytes).await?,
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
    let lower = text.to_lowercase();
    let length = lower.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    while bytes.len() < head + length {
        more(bytes).await?;
    }
    let rest = bytes.split_off(head + length);
    let body = serde_json::from_slice(&bytes[head..]).unwrap_or_default();
    *bytes = rest;
    let mut words = text.split_whitespace();
    Some(Asked { method: words.next()?.to_owned(), path: words.next()?.to_owned(), body })
}

async fn serve(mut stream: TcpStream, counts: Arc<Counts>, answer: Answer, idle: Option<Duration>) {
    let mut bytes = Vec::new();
    loop {
        let next = request(&mut stream, &mut bytes, &counts);
        let Ok(Some(asked)) = tokio::time::timeout(idle.unwrap_or(Duration::from_secs(3600)), next).await else { return };
        counts.asked.lock().unwrap().push(asked.clone());
        let sse = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        let reply = match answer(&asked) {
            Reply::Json(status, body) => format!(
                "HTTP/1.1 {status} Word\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            ),
            Reply::Events(events) => format!("{sse}{:x}\r\n{events}\r\n0\r\n\r\n", events.len()),
            Reply::Hang => {
                counts.busy.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(sse.as_bytes()).await;
                let _ = stream.read(&mut [0]).await;
                counts.busy.fetch_sub(1, Ordering::SeqCst);
                return;
            }
            Reply::Close => return,
            Reply::Raw(raw) => {
                let _ = stream.write_all(raw.as_bytes()).await;
                return;
            }
        };
        if stream.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}
