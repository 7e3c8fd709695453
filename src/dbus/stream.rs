//! What stands between a job and its caller: the pipe with JSON lines, or the reply with the whole answer.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::details::Details;
use super::errors::{Error, failure_name};
use super::job::{Record, State};
use crate::api::names::ErrorName;
use crate::api::stream::{Line, ServedBy, Timings, Usage};
use crate::dispatch::{Job, JobEvent};
use crate::domain::prompt::{Done, Failure, FailureKind};

/// A caller that reads nothing for this long is given up.
const SLOW: Duration = Duration::from_secs(30);

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// What is known of an answer so far.
#[derive(Debug)]
pub(super) struct Progress {
    begun: Instant,
    first: Option<Duration>,
    pub model: String,
    pub by: ServedBy,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), first: None, model: String::new(), by: ServedBy::default() }
    }

    fn started(&mut self, model: String, by: crate::dispatch::ServedBy) {
        self.first.get_or_insert_with(|| self.begun.elapsed());
        self.model = model;
        self.by = ServedBy { peer_id: by.id.to_string(), name: by.name };
    }

    fn timings(&self) -> Timings {
        let whole = self.begun.elapsed();
        Timings { first_token_us: micros(self.first.unwrap_or(whole)), duration_us: micros(whole) }
    }

    /// Details of the reply to `Prompt`.
    pub(super) fn reply(&self, done: &Done) -> Details {
        let timings = self.timings();
        Details::from([
            ("Model", self.model.clone().into()),
            ("ServedBy", self.by.peer_id.clone().into()),
            ("ServedByName", self.by.name.clone().into()),
            ("PromptTokens", done.usage.prompt_tokens.into()),
            ("CompletionTokens", done.usage.completion_tokens.into()),
            ("FinishReason", done.finish.as_str().into()),
            ("FirstTokenUSec", timings.first_token_us.into()),
            ("DurationUSec", timings.duration_us.into()),
        ])
    }

    /// Result and details of `Job.Finished`.
    pub(super) fn finished(&self, record: &Record, outcome: &Result<Done, Failure>) -> (&'static str, Details) {
        let mut details = Details::from([
            ("DurationUSec", self.timings().duration_us.into()),
            ("Model", self.model.clone().into()),
            ("ServedBy", self.by.peer_id.clone().into()),
            ("ServedByName", self.by.name.clone().into()),
            ("CompletionTokens", record.tokens.load(Ordering::Relaxed).into()),
        ]);
        match outcome {
            Ok(done) => {
                details.insert("FinishReason", done.finish.as_str().into());
                details.insert("PromptTokens", done.usage.prompt_tokens.into());
                details.insert("CompletionTokens", done.usage.completion_tokens.into());
                ("done", details)
            }
            Err(failure) => {
                details.insert("Error", failure_name(failure.kind).as_str().into());
                details.insert("Message", failure.detail.clone().into());
                (if failure.kind == FailureKind::Cancelled { "cancelled" } else { "failed" }, details)
            }
        }
    }
}

fn settle(record: &Record, outcome: &Result<Done, Failure>) {
    record.set_state(match outcome {
        Ok(_) => State::Done,
        Err(failure) if failure.kind == FailureKind::Cancelled => State::Cancelled,
        Err(_) => State::Failed,
    });
}

fn cancelled() -> Failure {
    Failure::new(FailureKind::Cancelled, "the prompt was cancelled")
}

/// Collects the whole answer. The record's token ends it.
pub(super) async fn collect(mut job: Job, record: &Record, progress: &mut Progress) -> Result<(String, Done), Failure> {
    let mut text = String::new();
    let outcome = loop {
        let event = tokio::select! {
            biased;
            () = record.cancel.cancelled() => break Err(cancelled()),
            event = job.next() => event,
        };
        match event {
            Some(JobEvent::Started { model, by }) => {
                record.set_state(State::Running);
                progress.started(model, by);
            }
            Some(JobEvent::Text(more)) => {
                record.tokens.fetch_add(1, Ordering::Relaxed);
                text.push_str(&more);
            }
            Some(JobEvent::End(outcome)) => break outcome,
            None => break Err(Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")),
        }
    };
    settle(record, &outcome);
    outcome.map(|done| (text, done))
}

/// A pipe: the end to write to, and the end that goes to the caller.
///
/// # Errors
/// No more descriptors.
pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)
        .map_err(|error| Error::new(ErrorName::Busy, format!("no pipe can be made: {error}")))?;
    // The caller's end blocks, as programs expect of a pipe that they are given.
    let flags = rustix::fs::fcntl_getfl(&read).unwrap_or(rustix::fs::OFlags::empty());
    let _ = rustix::fs::fcntl_setfl(&read, flags - rustix::fs::OFlags::NONBLOCK);
    Ok((read, write))
}

fn line_of(event: JobEvent, record: &Record, progress: &mut Progress) -> (Line, Option<Result<Done, Failure>>) {
    match event {
        JobEvent::Started { model, by } => {
            record.set_state(State::Running);
            progress.started(model, by);
            (Line::Start { model: progress.model.clone(), served_by: progress.by.clone() }, None)
        }
        JobEvent::Text(text) => {
            record.tokens.fetch_add(1, Ordering::Relaxed);
            (Line::Text { text }, None)
        }
        JobEvent::End(outcome) => {
            let line = match &outcome {
                Ok(done) => Line::End {
                    reason: done.finish.as_str().to_owned(),
                    usage: Usage {
                        prompt_tokens: done.usage.prompt_tokens,
                        completion_tokens: done.usage.completion_tokens,
                    },
                    timings: progress.timings(),
                },
                Err(failure) => {
                    Line::Error { name: failure_name(failure.kind).as_str().to_owned(), message: failure.detail.clone() }
                }
            };
            (line, Some(outcome))
        }
    }
}

/// Writes a job to the pipe, line by line, until its end, its cancellation, or the reader's.
pub(super) async fn write(mut job: Job, record: &Arc<Record>, progress: &mut Progress, write: OwnedFd) -> Result<Done, Failure> {
    let mut pipe = match pipe::Sender::from_owned_fd(write) {
        Ok(pipe) => pipe,
        Err(error) => {
            let failure = Failure::new(FailureKind::Busy, format!("the pipe cannot be used: {error}"));
            settle(record, &Err(failure.clone()));
            return Err(failure);
        }
    };
    let mut buffer = Vec::new();
    let outcome = loop {
        let event = tokio::select! {
            biased;
            () = record.cancel.cancelled() => JobEvent::End(Err(cancelled())),
            event = job.next() => event.unwrap_or_else(|| {
                JobEvent::End(Err(Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")))
            }),
            // Told at once when nobody can read the pipe any more, also while nothing is being written.
            _ = pipe.ready(Interest::ERROR) => break Err(Failure::new(FailureKind::Cancelled, "the caller closed its stream")),
        };
        buffer.clear();
        let (line, mut ended) = line_of(event, record, progress);
        buffer.extend_from_slice(&line.to_bytes());
        // What is ready already goes out with it: one wake-up of the reader instead of three.
        while ended.is_none()
            && buffer.len() < 32 * 1024
            && let Some(Some(event)) = job.next().now_or_never()
        {
            let (line, end) = line_of(event, record, progress);
            buffer.extend_from_slice(&line.to_bytes());
            ended = end;
        }
        let written = tokio::select! {
            written = timeout(SLOW, pipe.write_all(&buffer)) => written,
            () = record.cancel.cancelled(), if ended.is_none() => continue,
        };
        match written {
            Ok(Ok(())) => {}
            Ok(Err(_)) => break Err(Failure::new(FailureKind::Cancelled, "the caller closed its stream")),
            Err(_) => break Err(Failure::new(FailureKind::SlowConsumer, "the caller did not read its stream for 30 s")),
        }
        if let Some(outcome) = ended {
            break outcome;
        }
    };
    settle(record, &outcome);
    outcome
}
