//! A prompt by HTTP: finds out where it goes, starts it, and makes the response of what comes.

use std::fmt::Write as _;
use std::time::Duration;

use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::ask::{self, Wanted};
use super::body::Reply;
use super::errors::Refusal;
use super::models::{self, Wishes};
use super::shape::{Shape, Surface};
use super::stream;
use crate::dispatch::{Job, JobEvent, Options, ServedBy};
use crate::domain::prompt::{DEFAULT_TIMEOUT, Done, Failure, FailureKind, MAX_TIMEOUT};
use crate::wire::limits::MAX_MODEL_NAME_BYTES;

const NODE: HeaderName = HeaderName::from_static("x-opengateway-node");
const CLUSTER: HeaderName = HeaderName::from_static("x-opengateway-cluster");
const TIMEOUT: HeaderName = HeaderName::from_static("x-opengateway-timeout");
const SERVED_BY: HeaderName = HeaderName::from_static("x-opengateway-served-by");
const PEER: HeaderName = HeaderName::from_static("x-opengateway-peer");
const MODEL: HeaderName = HeaderName::from_static("x-opengateway-model");

/// A stream waits so long for somebody to take the prompt up before it begins: until then errors have a status of their own.
const TAKEN_UP: Duration = Duration::from_secs(1);

/// Who served, in words that fit into a header and a comment.
pub(super) struct Served {
    name: String,
    peer: String,
}

impl Served {
    pub fn new(by: &ServedBy) -> Self {
        Self { name: encoded(&by.name), peer: encoded(by.id.as_str()) }
    }

    pub fn line(&self, model: &str) -> String {
        format!("{} {} {}", self.name, self.peer, encoded(model))
    }
}

/// Percent-encodes what is no visible ASCII: names are the words of other machines.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        if byte.is_ascii_graphic() && byte != b'%' {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// A header that is there at most once, as text.
pub(super) fn wish<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Refusal> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = std::str::from_utf8(value.as_bytes()).ok().filter(|text| !text.is_empty());
    match text {
        Some(text) if headers.get_all(name).iter().count() == 1 => Ok(Some(text)),
        _ => Err(Refusal::bad_request("invalid_header", format!("the header {name} is there once, with a value, or not at all"))),
    }
}

pub(super) fn cluster_wish(headers: &HeaderMap) -> Result<Option<&str>, Refusal> {
    wish(headers, &CLUSTER)
}

fn timeout(headers: &HeaderMap) -> Result<Duration, Refusal> {
    let Some(text) = wish(headers, &TIMEOUT)? else { return Ok(DEFAULT_TIMEOUT) };
    let seconds = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0 && *seconds <= MAX_TIMEOUT.as_secs_f64());
    seconds.map(Duration::from_secs_f64).ok_or_else(|| {
        let most = MAX_TIMEOUT.as_secs();
        Refusal::bad_request("invalid_header", format!("{TIMEOUT} is a number of seconds above 0, and at most {most}"))
    })
}

/// Answers a request for text.
///
/// # Errors
/// The refusal that is the response.
pub(super) async fn answer(
    shared: &Shared,
    uid: u32,
    surface: Surface,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Response<Reply>, Refusal> {
    let Wanted { mut ask, model, stream, usage } = ask::read(surface, body)?;
    let wishes = Wishes { model: model.as_deref(), node: wish(headers, &NODE)?, cluster: cluster_wish(headers)? };
    let timeout = timeout(headers)?;
    let route = models::route(shared, &wishes)?;
    if route.model.as_ref().is_some_and(|model| model.len() > MAX_MODEL_NAME_BYTES) {
        return Err(Refusal::field("model", format!("a name of a model has at most {MAX_MODEL_NAME_BYTES} bytes")));
    }
    ask.model = route.model;
    let options = Options { peer: route.peer.map(|peer| peer.as_str().to_owned()), timeout, ..Options::default() };
    let started = match route.cluster {
        Some(cluster) => shared.dispatch.start(uid, cluster, ask, options),
        None => shared.dispatch.start_here(uid, ask, options),
    };
    let job = started.map_err(|failure| Refusal::from(&failure))?;
    let shape = Shape::new(surface, usage);
    if stream { streamed(job, shape).await } else { whole(job, shape).await }
}

/// What is known of a job before its first text.
enum Begun {
    Started(String, ServedBy),
    Waiting(Option<u32>),
}

/// Waits until somebody has taken the prompt up, but not longer than `until`.
async fn begin(job: &mut Job, until: Option<Instant>) -> Result<Begun, Refusal> {
    let mut queued = None;
    loop {
        let event = match until {
            Some(until) => match timeout_at(until, job.next()).await {
                Ok(event) => event,
                Err(_) => return Ok(Begun::Waiting(queued)),
            },
            None => job.next().await,
        };
        match event {
            Some(JobEvent::Queued { position }) => queued = Some(position),
            Some(JobEvent::Started { model, by }) => return Ok(Begun::Started(model, by)),
            Some(JobEvent::End(Err(failure))) => return Err(Refusal::from(&failure)),
            Some(JobEvent::Text(_) | JobEvent::End(Ok(_))) => {
                return Err(Refusal::internal("an answer came before anybody had taken the prompt up"));
            }
            None => return Err(Refusal::stopping()),
        }
    }
}

async fn streamed(mut job: Job, mut shape: Shape) -> Result<Response<Reply>, Refusal> {
    let begun = begin(&mut job, Some(Instant::now() + TAKEN_UP)).await?;
    let (served, queued) = match begun {
        Begun::Started(model, by) => {
            shape.begin(model.clone());
            (Some((model, by)), None)
        }
        Begun::Waiting(queued) => (None, queued),
    };
    let pieces = stream::events(job, shape, served.is_some(), queued);
    let mut response = Response::new(Reply::pieces(pieces));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Some((model, by)) = served {
        say(headers, &model, &by);
    }
    Ok(response)
}

async fn whole(mut job: Job, mut shape: Shape) -> Result<Response<Reply>, Refusal> {
    let Begun::Started(model, by) = begin(&mut job, None).await? else { return Err(Refusal::stopping()) };
    shape.begin(model.clone());
    let (text, done) = collect(&mut job).await.map_err(|failure| Refusal::from(&failure))?;
    let mut response = Response::new(Reply::whole(shape.whole(&text, &done)));
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    say(headers, &model, &by);
    Ok(response)
}

async fn collect(job: &mut Job) -> Result<(String, Done), Failure> {
    let mut text = String::new();
    loop {
        match job.next().await {
            Some(JobEvent::Text(more)) => text.push_str(&more),
            Some(JobEvent::Queued { .. } | JobEvent::Started { .. }) => {}
            Some(JobEvent::End(outcome)) => return outcome.map(|done| (text, done)),
            None => return Err(Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")),
        }
    }
}

/// Names who serves in the headers.
fn say(headers: &mut HeaderMap, model: &str, by: &ServedBy) {
    let served = Served::new(by);
    for (name, text) in [(SERVED_BY, served.name), (PEER, served.peer), (MODEL, encoded(model))] {
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_machines_cannot_end_a_line() {
        assert_eq!(encoded("NodeA.lab"), "NodeA.lab");
        assert_eq!(encoded("a b\r\nX: y%ä\u{1b}"), "a%20b%0D%0AX:%20y%25%C3%A4%1B");
        assert!(HeaderValue::try_from(encoded("ä\0\n")).is_ok());
    }

    #[test]
    fn the_time_is_a_number_of_seconds_within_its_limits() {
        let with = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(TIMEOUT, HeaderValue::from_static(text));
            timeout(&headers).map_err(|refusal| refusal.status.as_u16())
        };
        assert_eq!(timeout(&HeaderMap::new()).unwrap(), DEFAULT_TIMEOUT);
        assert_eq!(with("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(with("3600"), Ok(MAX_TIMEOUT));
        for bad in ["0", "-1", "3600.1", "nan", "inf", "x", ""] {
            assert_eq!(with(bad), Err(400), "{bad}");
        }
    }
}
