//! The `openai` backend against a real HTTP server in a process of its own, which misbehaves in every way it knows.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use opengateway::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Text};
use opengateway::net::AnswerEvent;
use opengateway::serve::backend::{Backend, Limits};
use opengateway::serve::{self, OpenAi, OpenAiSettings, Requester, Served};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(20);
pub const MODELS: &str = r#"{"object":"list","data":[{"id":"slow","max_model_len":2048}]}"#;

/// Reads one request: its first line and its body.
pub async fn request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).to_lowercase();
    let length: usize = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    while bytes.len() < head + length {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
        }
    }
    let line = String::from_utf8_lossy(&bytes).lines().next()?.to_owned();
    Some((line, bytes[head..].to_vec()))
}

pub async fn models(stream: &mut TcpStream, body: &str) {
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
}

/// Lists its model, takes a prompt, says nothing; tells when the asker is gone. Used by the tests of the daemon too.
pub async fn never_answers(mut stream: TcpStream, gone: mpsc::UnboundedSender<()>) {
    let Some((line, _)) = request(&mut stream).await else { return };
    if line.contains("/models") {
        models(&mut stream, MODELS).await;
        return;
    }
    let mut byte = [0];
    let _ = stream.read(&mut byte).await;
    let _ = gone.send(());
}

pub fn event(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"delta\":{{\"content\":{}}}}}]}}\n\n", serde_json::to_string(text).unwrap())
}

pub const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\n";

async fn misbehave(mut stream: TcpStream) {
    let Some((line, body)) = request(&mut stream).await else { return };
    let path = line.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let how = path.split('/').nth(1).unwrap_or_default().to_owned();
    if path.ends_with("/models") {
        match how.as_str() {
            "nomodels" => models(&mut stream, r#"{"data":[]}"#).await,
            "garbagemodels" => models(&mut stream, "<html>").await,
            _ => models(&mut stream, MODELS).await,
        }
        return;
    }
    let streamed =
        |content: String| format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n{content}");
    let status = |code: &str, more: &str| {
        let body = r#"{"error":{"message":"said the server"}}"#;
        format!("HTTP/1.1 {code}\r\n{more}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let reply = match how.as_str() {
        "good" => streamed(format!("{}{}{STOP}{USAGE}data: [DONE]\n\n", event("The answer "), event("is 4"))),
        "echoes" => streamed(format!("{}{STOP}data: [DONE]\n\n", event(&String::from_utf8_lossy(&body)))),
        "nousage" => streamed(format!("{}{STOP}", event("4"))),
        "length" => streamed(format!("{}{}", event("4"), STOP.replace("stop", "length"))),
        "whole" => {
            let body = r#"{"choices":[{"message":{"content":"4"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}"#;
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        }
        "400" => status("400 Bad Request", ""),
        "401" => status("401 Unauthorized", ""),
        "404" => status("404 Not Found", ""),
        "413" => status("413 Payload Too Large", ""),
        "429" => status("429 Too Many Requests", "retry-after: 7\r\n"),
        "500" => status("500 Internal Server Error", ""),
        "503" => status("503 Service Unavailable", ""),
        "redirect" => status("302 Found", "location: http://127.0.0.1:1/\r\n"),
        "garbage" => "this is no HTTP\r\n\r\n".to_owned(),
        "garbageevents" => streamed("data: <html>\n\n".to_owned()),
        "errorevent" => streamed("data: {\"error\":{\"message\":\"out of memory\"}}\n\n".to_owned()),
        "silent" => streamed(String::new()),
        "cut" => format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 100000\r\n\r\n{}",
            event("The answer ")
        ),
        "nofinish" => streamed(event("The answer ")),
        "closes" => return,
        "longline" => streamed(format!("data: {}", "x".repeat(2 << 20))),
        "huge" => streamed(format!("{}{STOP}", event(&"x".repeat(64 * 1024)).repeat(80))),
        "afterdone" => streamed(format!("{}{STOP}data: [DONE]\n\n{}", event("4"), event("not this"))),
        "drip" => {
            let content = streamed(format!("{}{STOP}", event("h\u{e9}llo \u{1f600}")));
            for byte in content.as_bytes() {
                let _ = stream.write_all(&[*byte]).await;
                tokio::task::yield_now().await;
            }
            return;
        }
        "chunked" => {
            // Chunks that end inside a character.
            let content = format!("{}{STOP}", event("h\u{e9}llo"));
            let mut reply =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".as_bytes().to_vec();
            for chunk in content.as_bytes().chunks(3) {
                reply.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                reply.extend_from_slice(chunk);
                reply.extend_from_slice(b"\r\n");
            }
            reply.extend_from_slice(b"0\r\n\r\n");
            let _ = stream.write_all(&reply).await;
            return;
        }
        "neverends" => {
            let _ = stream.write_all(streamed(String::new()).as_bytes()).await;
            while stream.write_all(event("again ").as_bytes()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            println!("closed");
            return;
        }
        "hangs" => {
            let mut byte = [0];
            let _ = stream.read(&mut byte).await;
            println!("closed");
            return;
        }
        other => status(&format!("501 {other}"), ""),
    };
    let _ = stream.write_all(reply.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// Not a test by itself: with `OPENGATEWAY_STUB` set, this process is the server.
#[test]
fn stub_process() {
    if std::env::var_os("OPENGATEWAY_STUB").is_none() {
        return;
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        println!("port {}", listener.local_addr().unwrap().port());
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(misbehave(stream));
        }
    });
}

struct Server {
    child: Child,
    port: u16,
    lines: mpsc::UnboundedReceiver<String>,
}

impl Server {
    #[allow(clippy::zombie_processes)] // waited for when the server is dropped
    async fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["openai::stub_process", "--exact", "--nocapture"])
            .env("OPENGATEWAY_STUB", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, mut lines) = mpsc::unbounded_channel();
        let out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        loop {
            let line = timeout(DEADLINE, lines.recv()).await.unwrap().unwrap();
            // The test runner may have begun the line with words of its own.
            if let Some((_, port)) = line.rsplit_once("port ") {
                return Self { child, port: port.trim().parse().unwrap(), lines };
            }
        }
    }

    fn backend(&self, how: &str) -> Arc<dyn Backend> {
        Arc::new(OpenAi::start(settings(&format!("http://127.0.0.1:{}/{how}/v1", self.port))).unwrap())
    }

    async fn closed(&mut self) {
        loop {
            if timeout(DEADLINE, self.lines.recv()).await.expect("the server sees the close").unwrap().ends_with("closed") {
                return;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn settings(url: &str) -> OpenAiSettings {
    let limits = Limits { slots: 2, queued: 2, running_per_peer: 1, queued_per_peer: 1 };
    OpenAiSettings {
        url: url.to_owned(),
        api_key_file: None,
        models: Vec::new(),
        api: None,
        allow_http: false,
        limits,
        learns_slots: false,
    }
}

fn ask(text: &str) -> Ask {
    Ask { prompt: Text::new(text), ..Ask::default() }
}

async fn answer(backend: &dyn Backend) -> (String, Result<Done, Failure>) {
    let (out, mut pieces) = mpsc::channel(4);
    let answering = backend.answer("slow".to_owned(), ask("What is 2+2?"), out);
    let collecting = async {
        let mut text = String::new();
        while let Some(piece) = pieces.recv().await {
            text.push_str(piece.as_str());
        }
        text
    };
    let (outcome, text) = timeout(DEADLINE, async { tokio::join!(answering, collecting) }).await.expect("an outcome in time");
    (text, outcome)
}

#[tokio::test]
async fn good_answers_of_every_shape_are_understood() {
    let server = Server::start().await;
    for (how, text) in [
        ("good", "The answer is 4"),
        ("nousage", "4"),
        ("whole", "4"),
        ("afterdone", "4"),
        ("drip", "h\u{e9}llo \u{1f600}"),
        ("chunked", "h\u{e9}llo"),
    ] {
        let (said, outcome) = answer(&*server.backend(how)).await;
        assert_eq!((said.as_str(), outcome.map(|done| done.finish)), (text, Ok(FinishReason::Stop)), "{how}");
    }
    let (_, outcome) = answer(&*server.backend("good")).await;
    assert_eq!(outcome.unwrap().usage.prompt_tokens, 7);
    let (_, outcome) = answer(&*server.backend("length")).await;
    assert_eq!(outcome.unwrap().finish, FinishReason::Length);
    let (said, _) = answer(&*server.backend("echoes")).await;
    assert!(said.contains("\"model\":\"slow\"") && said.contains("What is 2+2?"), "{said}");
}

#[tokio::test]
async fn every_misbehaviour_has_its_named_failure() {
    let server = Server::start().await;
    for (how, kind) in [
        ("400", FailureKind::InvalidRequest),
        ("401", FailureKind::BackendFailed),
        ("404", FailureKind::ModelUnavailable),
        ("413", FailureKind::InvalidRequest),
        ("429", FailureKind::Busy),
        ("500", FailureKind::BackendFailed),
        ("503", FailureKind::Busy),
        ("redirect", FailureKind::BackendFailed),
        ("garbage", FailureKind::BackendFailed),
        ("garbageevents", FailureKind::BackendFailed),
        ("errorevent", FailureKind::BackendFailed),
        ("silent", FailureKind::BackendFailed),
        ("closes", FailureKind::BackendFailed),
        ("longline", FailureKind::BackendFailed),
        ("cut", FailureKind::Interrupted),
        ("nofinish", FailureKind::Interrupted),
        ("huge", FailureKind::AnswerTooLarge),
    ] {
        let (_, outcome) = answer(&*server.backend(how)).await;
        let failure = outcome.expect_err(how);
        assert_eq!(failure.kind, kind, "{how}: {failure}");
        if how == "429" {
            assert_eq!(failure.retry_after, Some(Duration::from_secs(7)));
        }
    }
    let unreachable = OpenAi::start(settings("http://127.0.0.1:9/v1")).unwrap();
    assert_eq!(answer(&unreachable).await.1.unwrap_err().kind, FailureKind::BackendFailed);
}

#[tokio::test]
async fn letting_go_closes_the_connection_to_the_server() {
    let mut server = Server::start().await;
    for how in ["hangs", "neverends"] {
        let backend = server.backend(how);
        let (out, mut pieces) = mpsc::channel(4);
        let answering = backend.answer("slow".to_owned(), ask("x"), out);
        let reading = async { while pieces.recv().await.is_some() {} };
        let both = async { tokio::join!(answering, reading) };
        assert!(timeout(Duration::from_millis(300), both).await.is_err(), "{how} does not end by itself");
        server.closed().await;
    }
}

#[tokio::test]
async fn models_come_and_go_with_the_server() {
    let server = Server::start().await;
    let backend = server.backend("good");
    let mut availability = backend.availability();
    let there = timeout(DEADLINE, availability.wait_for(|found| !found.models.is_empty())).await.unwrap().unwrap().clone();
    assert_eq!((there.models[0].name.as_str(), there.models[0].context_tokens, there.problem), ("slow", 2048, None));
    for (how, problem) in [("nomodels", "no model"), ("garbagemodels", "cannot be read")] {
        let backend = server.backend(how);
        let mut availability = backend.availability();
        let wanted = |found: &serve::backend::Availability| found.problem.as_ref().is_some_and(|known| known.contains(problem));
        timeout(DEADLINE, availability.wait_for(wanted)).await.unwrap_or_else(|_| panic!("{how}")).unwrap();
    }
    drop(server);
    // A prompt that fails makes the backend look at once.
    let _ = answer(&*backend).await;
    timeout(DEADLINE, availability.wait_for(|found| found.models.is_empty())).await.unwrap().unwrap();
}

fn served(requester: &str, timeout: Duration) -> (Served, mpsc::Receiver<AnswerEvent>) {
    let (events, receiver) = mpsc::channel(64);
    let requester = Requester::Peer(opengateway::domain::node::NodeId::new(requester));
    let ask = Ask { model: Some("slow".to_owned()), ..ask("x") };
    (Served { requester, ask, timeout, events }, receiver)
}

async fn end(events: &mut mpsc::Receiver<AnswerEvent>) -> Result<Done, Failure> {
    loop {
        match timeout(DEADLINE, events.recv()).await.expect("an outcome in time").expect("an outcome") {
            AnswerEvent::End(outcome) => return outcome,
            AnswerEvent::Queued { .. } | AnswerEvent::Started { .. } | AnswerEvent::Text(_) => {}
        }
    }
}

#[tokio::test]
async fn the_queue_refuses_at_once_keeps_deadlines_and_frees_slots() {
    let server = Server::start().await;
    let backend = server.backend("hangs");
    let mut availability = backend.availability();
    timeout(DEADLINE, availability.wait_for(|found| !found.models.is_empty())).await.unwrap().unwrap();
    let (_tiers, tiers) = watch::channel(Vec::new());
    let (handle, _running) = serve::spawn(serve::Config { backends: vec![backend], tiers });
    let mut offer = handle.offer();
    timeout(DEADLINE, offer.wait_for(|offer| offer.free_slots == 2)).await.unwrap().unwrap();
    let long = Duration::from_secs(60);
    let mut held = Vec::new();
    for requester in ["a", "b", "a", "b"] {
        let (prompt, events) = served(requester, long);
        handle.submit(prompt).unwrap();
        held.push(events);
    }
    let (prompt, mut refused) = served("c", long);
    let begun = Instant::now();
    handle.submit(prompt).unwrap();
    let failure = end(&mut refused).await.unwrap_err();
    assert!(failure.kind == FailureKind::Busy && failure.retry_after.is_some(), "{failure}");
    assert!(begun.elapsed() < Duration::from_secs(1));
    timeout(DEADLINE, offer.wait_for(|offer| offer.free_slots == 0 && offer.queued == 2)).await.unwrap().unwrap();
    // Letting go of a running one lets a waiting one run.
    held.remove(0);
    timeout(DEADLINE, offer.wait_for(|offer| offer.queued == 1)).await.unwrap().unwrap();
    let (prompt, mut late) = served("d", Duration::from_millis(100));
    handle.submit(prompt).unwrap();
    assert_eq!(end(&mut late).await.unwrap_err().kind, FailureKind::DeadlineExceeded);
    // Stopping: who waits is refused, who runs may end.
    let draining = handle.clone();
    let drained = tokio::spawn(async move { draining.drain(long).await });
    assert_eq!(end(held.last_mut().unwrap()).await.unwrap_err().kind, FailureKind::ShuttingDown);
    assert!(!drained.is_finished());
    held.clear();
    timeout(DEADLINE, drained).await.expect("drained when the last one is gone").unwrap();
    let (prompt, _events) = served("e", long);
    assert_eq!(handle.submit(prompt).unwrap_err().kind, FailureKind::ShuttingDown);
}

#[tokio::test]
async fn a_model_that_nobody_has_is_named_with_those_there_are() {
    let server = Server::start().await;
    let backend = server.backend("good");
    let mut availability = backend.availability();
    timeout(DEADLINE, availability.wait_for(|found| !found.models.is_empty())).await.unwrap().unwrap();
    let (_tiers, tiers) = watch::channel(Vec::new());
    let backends: Vec<Arc<dyn Backend>> = vec![backend, Arc::new(serve::Echo::default())];
    let (handle, _running) = serve::spawn(serve::Config { backends, tiers });
    let (mut prompt, mut events) = served("a", DEADLINE);
    prompt.ask.model = Some("other".to_owned());
    handle.submit(prompt).unwrap();
    let failure = end(&mut events).await.unwrap_err();
    assert!(failure.kind == FailureKind::ModelUnavailable && failure.detail.contains("slow, echo"), "{failure}");
    // Without a wish the real model answers, not the echo.
    let (mut prompt, mut events) = served("a", DEADLINE);
    prompt.ask.model = None;
    handle.submit(prompt).unwrap();
    let Some(AnswerEvent::Started { model }) = timeout(DEADLINE, events.recv()).await.unwrap() else { panic!("not started") };
    assert_eq!(model, "slow");
}
