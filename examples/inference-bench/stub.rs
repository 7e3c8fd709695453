//! An OpenAI server that computes nothing, so that whatever is in front of it is all that takes time.
//!
//! | model | what it does |
//! | --- | --- |
//! | `instant` | says "4" at once, whole or as a stream |
//! | `slow` | a word every 20 ms, for a minute |
//! | `silent` | takes the request and says nothing, for a minute |
//!
//! `GET /open` tells how many prompts are being answered, and how many were answered or given up so far.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use futures::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::json;

use crate::Failed;

type Body = UnsyncBoxBody<Bytes, Infallible>;

const WORD_EVERY: Duration = Duration::from_millis(20);
const MINUTE: Duration = Duration::from_secs(60);
const WORDS: u32 = 3000;

const HEAD: &str = r#""id":"chatcmpl-1","created":1,"model":"instant","#;
const USAGE: &str = r#""usage":{"prompt_tokens":8,"completion_tokens":1,"total_tokens":9}"#;

#[derive(Debug, Deserialize)]
struct Asked<'a> {
    model: &'a str,
    #[serde(default)]
    stream: bool,
}

/// Prompts since the start. One that ended counts as answered or as given up.
#[derive(Debug, Default)]
struct Count {
    open: AtomicUsize,
    answered: AtomicUsize,
    given_up: AtomicUsize,
}

/// A prompt that is being answered; dropped early when its asker is gone.
#[derive(Debug)]
struct Open {
    count: Arc<Count>,
    answered: bool,
}

impl Open {
    fn new(count: &Arc<Count>) -> Self {
        count.open.fetch_add(1, Relaxed);
        Self { count: Arc::clone(count), answered: false }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.count.open.fetch_sub(1, Relaxed);
        let ended = if self.answered { &self.count.answered } else { &self.count.given_up };
        ended.fetch_add(1, Relaxed);
    }
}

/// Serves until it is killed.
pub async fn serve(address: SocketAddr) -> Result<(), Failed> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let answers = Arc::new(Answers::new());
    let count = Arc::new(Count::default());
    println!("{}", json!({ "ev": "ready", "address": listener.local_addr()?.to_string() }));
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (answers, count) = (Arc::clone(&answers), Arc::clone(&count));
        let service = hyper::service::service_fn(move |request| {
            let (answers, count) = (Arc::clone(&answers), Arc::clone(&count));
            async move { Ok::<_, Infallible>(answer(request, &answers, &count).await) }
        });
        tokio::spawn(async move {
            // An asker that is gone is an error here, and what the cancel figures wait for.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// What is said at once, made once.
#[derive(Debug)]
struct Answers {
    models: Bytes,
    whole: Bytes,
    stream: Bytes,
}

impl Answers {
    fn new() -> Self {
        let model = |name: &str| json!({ "id": name, "object": "model", "created": 1, "owned_by": "stub" });
        let whole = format!(
            r#"{{"object":"chat.completion",{HEAD}"choices":[{{"index":0,"message":{{"role":"assistant","content":"4"}},"finish_reason":"stop"}}],{USAGE}}}"#
        );
        let mut stream = chunk(r#"{"role":"assistant","content":""}"#, "null");
        stream.push_str(&chunk(r#"{"content":"4"}"#, "null"));
        stream.push_str(&end());
        Self {
            models: json!({ "object": "list", "data": [model("instant"), model("slow"), model("silent")] }).to_string().into(),
            whole: whole.into(),
            stream: stream.into(),
        }
    }
}

fn chunk(delta: &str, finish: &str) -> String {
    format!(
        "data: {{\"object\":\"chat.completion.chunk\",{HEAD}\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{finish}}}]}}\n\n"
    )
}

fn end() -> String {
    let last = chunk("{}", "\"stop\"");
    format!("{last}data: {{\"object\":\"chat.completion.chunk\",{HEAD}\"choices\":[],{USAGE}}}\n\ndata: [DONE]\n\n")
}

async fn answer(request: Request<Incoming>, answers: &Answers, count: &Arc<Count>) -> Response<Body> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/v1/models") => whole("application/json", answers.models.clone()),
        (&Method::GET, "/open") => {
            let of = |count: &AtomicUsize| count.load(Relaxed);
            let told = json!({ "open": of(&count.open), "answered": of(&count.answered), "given_up": of(&count.given_up) });
            whole("application/json", told.to_string().into())
        }
        (&Method::POST, "/v1/chat/completions") => prompt(request, answers, Open::new(count)).await,
        _ => {
            let mut response = whole("application/json", Bytes::from_static(br#"{"error":{"message":"no such path"}}"#));
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        }
    }
}

async fn prompt(request: Request<Incoming>, answers: &Answers, mut open: Open) -> Response<Body> {
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let asked: Asked<'_> = match serde_json::from_slice(&body) {
        Ok(asked) => asked,
        Err(error) => {
            let mut response = whole("application/json", json!({ "error": { "message": error.to_string() } }).to_string().into());
            *response.status_mut() = StatusCode::BAD_REQUEST;
            return response;
        }
    };
    match asked.model {
        "slow" => pieces(open),
        "silent" => {
            tokio::time::sleep(MINUTE).await;
            whole("text/event-stream", answers.stream.clone())
        }
        _ => {
            open.answered = true;
            if asked.stream {
                whole("text/event-stream", answers.stream.clone())
            } else {
                whole("application/json", answers.whole.clone())
            }
        }
    }
}

fn whole(kind: &'static str, body: Bytes) -> Response<Body> {
    response(kind, Full::new(body).boxed_unsync())
}

fn pieces(open: Open) -> Response<Body> {
    let words = futures::stream::unfold((0, open), |(said, mut open)| async move {
        if open.answered {
            return None;
        }
        tokio::time::sleep(WORD_EVERY).await;
        open.answered = said == WORDS;
        let event = if open.answered { end() } else { chunk(r#"{"content":"word "}"#, "null") };
        Some((event, (said + 1, open)))
    });
    let frames = words.map(|event| Ok(Frame::data(Bytes::from(event))));
    response("text/event-stream", StreamBody::new(frames).boxed_unsync())
}

fn response(kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
