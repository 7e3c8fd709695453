//! Reads one answer as it comes.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::http::{Body, HttpError};
use super::refusal::Refusal;
use super::sse::{Chunk, Events, Piece};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, MAX_ANSWER_BYTES, Text, Usage};

/// A server that sends nothing for this long in the middle of an answer is given up. Comments that keep a connection alive
/// count as something, and so does what a model thinks before it answers.
pub(super) const IDLE: Duration = Duration::from_secs(60);

/// What is known of an answer so far.
struct Reading<'a> {
    model: &'a str,
    ask: &'a Ask,
    out: &'a mpsc::Sender<Text>,
    finish: Option<String>,
    usage: Option<Usage>,
    pieces: u32,
    bytes: usize,
}

/// Passes the text of `response` on and returns how it ended.
pub(super) async fn read(mut response: Body, model: &str, ask: &Ask, out: &mpsc::Sender<Text>) -> Result<Done, Failure> {
    let mut reading = Reading { model, ask, out, finish: None, usage: None, pieces: 0, bytes: 0 };
    let mut events = Events::new(response.is_event_stream());
    loop {
        let data = match timeout(IDLE, response.next()).await {
            Ok(Ok(Some(data))) => data,
            Ok(Ok(None)) => break,
            Ok(Err(error)) => return Err(reading.lost(&error)),
            Err(_) => return Err(reading.broken("it sent nothing for 60 s")),
        };
        events.push(&data).map_err(|error| reading.broken(&error.to_string()))?;
        while let Some(chunk) = events.next().map_err(|error| reading.broken(&error.to_string()))? {
            if !reading.take(chunk).await? {
                response.finish();
                return reading.done(true);
            }
        }
    }
    if let Some(chunk) = events.finish().map_err(|error| reading.broken(&error.to_string()))? {
        reading.take(chunk).await?;
    }
    reading.done(false)
}

impl Reading<'_> {
    /// False at the end of the answer.
    async fn take(&mut self, chunk: Chunk) -> Result<bool, Failure> {
        match chunk {
            Chunk::Done => Ok(false),
            Chunk::Error(error) => Err(self.refused(&error)),
            Chunk::Piece(Piece { text, finish_reason, usage }) => {
                if let Some(text) = text.filter(|text| !text.is_empty()) {
                    self.say(text).await?;
                }
                self.finish = finish_reason.or(self.finish.take());
                self.usage = usage.or(self.usage);
                Ok(true)
            }
        }
    }

    async fn say(&mut self, text: String) -> Result<(), Failure> {
        self.pieces = self.pieces.saturating_add(1);
        self.bytes += text.len();
        // The queue has the limit too; here it saves the memory of a server that never ends a line.
        if self.bytes > MAX_ANSWER_BYTES {
            return Err(Failure::new(FailureKind::AnswerTooLarge, "the answer passed the limit of 4 MiB"));
        }
        self.out.send(Text::new(text)).await.map_err(|_| Failure::new(FailureKind::Cancelled, "the asker is gone"))
    }

    fn broken(&self, what: &str) -> Failure {
        let kind = if self.pieces > 0 { FailureKind::Interrupted } else { FailureKind::BackendFailed };
        Failure::new(kind, format!("the backend's answer broke off: {what}"))
    }

    fn lost(&self, error: &HttpError) -> Failure {
        self.broken(&error.to_string())
    }

    fn refused(&self, error: &serde_json::Value) -> Failure {
        let failure = Refusal::in_answer(error).failure(self.model, self.ask);
        if self.pieces > 0 { Failure { kind: FailureKind::Interrupted, ..failure } } else { failure }
    }

    /// `told`: the server said that this is the end, so a reason that it leaves out is no loss.
    fn done(self, told: bool) -> Result<Done, Failure> {
        let finish = match self.finish.as_deref() {
            Some("length" | "max_tokens") => FinishReason::Length,
            Some("content_filter") => return Err(self.broken("a filter of the backend ended it")),
            Some("error" | "abort") => return Err(self.broken("the backend says that it failed")),
            None if !told => return Err(self.broken("it ended without a finish reason")),
            Some(_) | None => FinishReason::Stop,
        };
        // A server that does not count: a piece is about a token, and a word of the prompt about one and a third.
        let usage = self.usage.unwrap_or_else(|| Usage {
            prompt_tokens: u32::try_from(self.ask.prompt.as_str().split_whitespace().count() * 4 / 3).unwrap_or(u32::MAX),
            completion_tokens: self.pieces,
        });
        Ok(Done { finish, usage })
    }
}
