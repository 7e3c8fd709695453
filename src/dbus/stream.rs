//! What stands between a job and its caller: the pipe with JSON lines, or the reply with the whole answer.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::details::Details;
use super::errors::{Error, failure_name, without_nul};
use super::job::Record;
use crate::api::names::ErrorName;
use crate::api::stream::{Line, ServedBy, Timings, Usage};
use crate::dispatch::{Job, JobEvent};
use crate::domain::prompt::{Done, Failure, FailureKind};

/// A caller that reads nothing for this long is given up.
const SLOW: Duration = Duration::from_secs(30);

/// A failed job waits so long for its reader to take the last line before others are told.
const LAST_WORDS: Duration = Duration::from_millis(500);

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
        self.model = without_nul(model);
        self.by = ServedBy { peer_id: by.id.to_string(), name: without_nul(by.name) };
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
                details.insert("Message", super::details::text(&failure.detail));
                (if failure.kind == FailureKind::Cancelled { "cancelled" } else { "failed" }, details)
            }
        }
    }
}

/// Collects the whole answer. The record's token ends it.
pub(super) async fn collect(mut job: Job, record: &Record, progress: &mut Progress) -> Result<(String, Done), Failure> {
    let mut text = String::new();
    let outcome = loop {
        let event = tokio::select! {
            biased;
            () = record.cancel.cancelled() => break Err(record.cancelled()),
            event = job.next() => event,
        };
        match event {
            Some(JobEvent::Started { model, by }) => {
                progress.started(model, by);
                record.started(&progress.model, &progress.by);
            }
            Some(JobEvent::Queued { position }) => record.waits(position),
            Some(JobEvent::Text(more)) => {
                record.tokens.fetch_add(1, Ordering::Relaxed);
                text.push_str(&more);
            }
            Some(JobEvent::End(outcome)) => break outcome,
            None => break Err(Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")),
        }
    };
    record.end(&outcome);
    outcome.map(|done| (without_nul(text), done))
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
        JobEvent::Queued { position } => {
            record.waits(position);
            (Line::Queued { position }, None)
        }
        JobEvent::Started { model, by } => {
            progress.started(model, by);
            record.started(&progress.model, &progress.by);
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
                    usage: Usage { prompt_tokens: done.usage.prompt_tokens, completion_tokens: done.usage.completion_tokens },
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

/// The pipe, and what of the lines is not written yet.
#[derive(Debug)]
pub(super) struct Lines {
    pipe: pipe::Sender,
    buffer: Vec<u8>,
    sent: usize,
}

/// Why lines were not written.
#[derive(Debug)]
enum Unwritten {
    /// The reader closed its end.
    Closed,
    /// It read nothing for [`SLOW`].
    Slow,
}

impl From<Unwritten> for Failure {
    fn from(why: Unwritten) -> Self {
        match why {
            Unwritten::Closed => Self::new(FailureKind::Cancelled, "the caller closed its stream"),
            Unwritten::Slow => {
                Self::new(FailureKind::SlowConsumer, format!("the caller did not read its stream for {} s", SLOW.as_secs()))
            }
        }
    }
}

impl Lines {
    /// Nothing is written yet.
    ///
    /// # Errors
    /// The pipe cannot be used.
    pub(super) fn new(write: OwnedFd) -> std::io::Result<Self> {
        Ok(Self { pipe: pipe::Sender::from_owned_fd(write)?, buffer: Vec::new(), sent: 0 })
    }

    fn push(&mut self, line: &Line) {
        self.push_bytes(&line.to_bytes());
    }

    /// One whole line.
    pub(super) fn push_bytes(&mut self, line: &[u8]) {
        self.buffer.extend_from_slice(line);
    }

    /// Resolves when nobody can read the pipe any more. Cancel-safe.
    pub(super) async fn closed(&self) {
        let _ = self.pipe.ready(Interest::ERROR).await;
    }

    /// Whether everything was written.
    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Resolves when the pipe may take more. Cancel-safe.
    pub(super) async fn writable(&self) {
        let _ = self.pipe.writable().await;
    }

    /// Writes what can be written at once; true when nothing is left.
    pub(super) fn try_flush(&mut self) -> bool {
        while self.sent < self.buffer.len() {
            match self.pipe.try_write(&self.buffer[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(_) => return false,
            }
        }
        self.buffer.clear();
        self.sent = 0;
        true
    }

    /// Writes what there is; each read of the caller gives it [`SLOW`] more. Cancel-safe.
    async fn flush(&mut self) -> Result<(), Unwritten> {
        while self.sent < self.buffer.len() {
            let rest = &self.buffer[self.sent..];
            let written = match self.pipe.try_write(rest) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => match timeout(SLOW, self.pipe.writable()).await {
                    Ok(ready) => ready.map(|()| 0),
                    Err(_) => return Err(Unwritten::Slow),
                },
                written => written,
            };
            self.sent += written.map_err(|_| Unwritten::Closed)?;
        }
        self.buffer.clear();
        self.sent = 0;
        Ok(())
    }

    /// Drops the lines of which nothing was written yet: a reader gets whole lines alone.
    fn keep_begun_line(&mut self) {
        if self.sent == 0 {
            self.buffer.clear();
        } else if self.buffer[self.sent - 1] != b'\n' {
            let end = self.buffer[self.sent..]
                .iter()
                .position(|&byte| byte == b'\n')
                .map_or(self.buffer.len(), |end| self.sent + end + 1);
            self.buffer.truncate(end);
        } else {
            self.buffer.truncate(self.sent);
        }
    }

    /// Tells the failure as the last line, for as long as `time`: whoever reads on learns why there is no more.
    pub(super) async fn last_words(&mut self, time: Duration) {
        let _ = timeout(time, self.flush()).await;
    }
}

/// Writes a job to the pipe, line by line, until its end, its cancellation, or the reader's. With a failure come the lines
/// that the reader did not take in time, if it is still there.
pub(super) async fn write(
    mut job: Job,
    record: &Arc<Record>,
    progress: &mut Progress,
    write: OwnedFd,
) -> (Result<Done, Failure>, Option<Lines>) {
    let mut lines = match Lines::new(write) {
        Ok(lines) => lines,
        Err(error) => {
            let failure = Err(Failure::new(FailureKind::Busy, format!("the pipe cannot be used: {error}")));
            record.end(&failure);
            return (failure, None);
        }
    };
    let mut outcome = loop {
        let event = tokio::select! {
            biased;
            () = record.cancel.cancelled() => JobEvent::End(Err(record.cancelled())),
            event = job.next() => event.unwrap_or_else(|| {
                JobEvent::End(Err(Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")))
            }),
            // Told at once when nobody can read the pipe any more, also while nothing is being written.
            () = lines.closed() => {
                let failure = Err(Unwritten::Closed.into());
                record.end(&failure);
                return (failure, None);
            }
        };
        let (line, mut ended) = line_of(event, record, progress);
        lines.push(&line);
        // What is ready already goes out with it: one wake-up of the reader instead of three.
        while ended.is_none()
            && lines.buffer.len() < 32 * 1024
            && let Some(Some(event)) = job.next().now_or_never()
        {
            let (line, end) = line_of(event, record, progress);
            lines.push(&line);
            ended = end;
        }
        if let Some(outcome) = ended {
            break outcome;
        }
        let failure: Failure = tokio::select! {
            written = lines.flush() => match written {
                Ok(()) => continue,
                Err(why) => why.into(),
            },
            () = record.cancel.cancelled() => record.cancelled(),
        };
        lines.keep_begun_line();
        lines.push(&line_of(JobEvent::End(Err(failure.clone())), record, progress).0);
        break Err(failure);
    };
    // The serving node is let go, whatever the reader does.
    drop(job);
    if outcome.is_err() {
        record.end(&outcome);
        lines.last_words(LAST_WORDS).await;
    } else {
        if let Err(why) = lines.flush().await {
            outcome = Err(why.into());
        }
        record.end(&outcome);
    }
    let left = (lines.sent < lines.buffer.len()).then_some(lines);
    (outcome, left)
}
