//! A client with one kept connection, which notes when the first text of an answer came and when the answer was whole.

use std::time::Instant;

use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::{Failed, Target};

/// When the parts of an answer came, in seconds after the question, and what came.
#[derive(Debug)]
pub struct Answer {
    pub first: f64,
    pub whole: f64,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub struct Client {
    target: Target,
    connection: SendRequest<Full<Bytes>>,
}

impl Client {
    pub async fn new(target: &Target) -> Result<Self, Failed> {
        let stream = TcpStream::connect(&target.host).await.map_err(|error| format!("{}: {error}", target.name))?;
        stream.set_nodelay(true)?;
        let (connection, driver) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(driver);
        Ok(Self { target: target.clone(), connection })
    }

    /// Asks, and waits for the whole answer. A connection that was closed meanwhile is made anew.
    pub async fn ask(&mut self, path: &str, body: &Bytes) -> Result<Answer, Failed> {
        if self.connection.ready().await.is_err() {
            *self = Self::new(&self.target).await?;
        }
        let request = Request::post(path)
            .header(header::HOST, &self.target.host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body.clone()))?;
        let begun = Instant::now();
        let mut response = self.connection.send_request(request).await?;
        let status = response.status();
        let (mut answer, mut first) = (Vec::new(), None);
        while let Some(frame) = response.body_mut().frame().await {
            if let Some(data) = frame?.data_ref() {
                answer.extend_from_slice(data);
                if first.is_none() && says_something(data) {
                    first = Some(begun.elapsed().as_secs_f64());
                }
            }
        }
        let whole = begun.elapsed().as_secs_f64();
        if status != StatusCode::OK {
            return Err(format!("{}: {status}: {}", self.target.name, String::from_utf8_lossy(&answer)).into());
        }
        Ok(Answer { first: first.unwrap_or(whole), whole, body: answer })
    }
}

/// Whether there is text of an answer: a role alone, or a comment, is none.
fn says_something(body: &[u8]) -> bool {
    let mut rest = std::str::from_utf8(body).unwrap_or_default();
    while let Some((key, value)) = rest.split_once(':') {
        let is_text = key.ends_with("\"content\"") || key.ends_with("\"text\"");
        if is_text && value.trim_start().strip_prefix('"').is_some_and(|text| !text.is_empty() && !text.starts_with('"')) {
            return true;
        }
        rest = value;
    }
    false
}
