//! An answer as server-sent events: the job is polled by whoever sends the response, so a slow client slows the node that
//! answers, and a client that is gone ends it.

use std::time::Duration;

use futures::Stream;
use hyper::body::Bytes;

use super::answer::Served;
use super::errors::Refusal;
use super::shape::Shape;
use crate::dispatch::{Job, JobEvent};
use crate::domain::prompt::{Failure, FailureKind};

/// While nothing else is to be said, a comment tells the client and what is between that the answer still comes.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

struct Stage {
    job: Job,
    shape: Shape,
    /// Goes out first, with whatever comes first.
    out: Vec<u8>,
    started: bool,
    ended: bool,
}

/// The events of a job; `started` when its response says already who serves it. `queued` is what was heard of its place.
pub(super) fn events(job: Job, shape: Shape, started: bool, queued: Option<u32>) -> impl Stream<Item = Bytes> + Send + 'static {
    let mut stage = Stage { job, shape, out: Vec::new(), started, ended: false };
    if started {
        stage.shape.first(&mut stage.out);
    } else {
        stage.wait(queued);
    }
    futures::stream::unfold(stage, |mut stage| async move {
        if stage.ended && stage.out.is_empty() {
            return None;
        }
        if stage.out.is_empty() {
            stage.next().await;
        }
        Some((Bytes::from(std::mem::take(&mut stage.out)), stage))
    })
}

impl Stage {
    fn wait(&mut self, queued: Option<u32>) {
        let comment = queued.map_or_else(|| ": waiting\n\n".to_owned(), |position| format!(": queued {position}\n\n"));
        self.out.extend_from_slice(comment.as_bytes());
    }

    async fn next(&mut self) {
        match tokio::time::timeout(KEEP_ALIVE, self.job.next()).await {
            Err(_) => self.out.extend_from_slice(b": waiting\n\n"),
            Ok(Some(JobEvent::Queued { position })) => self.wait(Some(position)),
            Ok(Some(JobEvent::Started { model, by })) => {
                self.out.extend_from_slice(format!(": served-by {}\n\n", Served::new(&by).line(&model)).as_bytes());
                self.start(model);
            }
            Ok(Some(JobEvent::Text(text))) => self.shape.text(&mut self.out, &text),
            Ok(Some(JobEvent::End(Ok(done)))) => {
                self.start(String::new());
                self.shape.last(&mut self.out, &done);
                self.ended = true;
            }
            Ok(Some(JobEvent::End(Err(failure)))) => self.fail(&failure),
            Ok(None) => self.fail(&Failure::new(FailureKind::ShuttingDown, "the daemon is stopping")),
        }
    }

    fn start(&mut self, model: String) {
        if !self.started {
            self.started = true;
            self.shape.begin(model);
            self.shape.first(&mut self.out);
        }
    }

    /// An error, and no `[DONE]` after it: what came before is not the whole answer.
    fn fail(&mut self, failure: &Failure) {
        self.out.extend_from_slice(b"data: ");
        self.out.extend_from_slice(&Refusal::from(failure).json_text());
        self.out.extend_from_slice(b"\n\n");
        self.ended = true;
    }
}
