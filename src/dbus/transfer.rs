//! A copy or a check of a model's file, and the pipe that tells how far it is.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::errors::Error;
use super::stream::Lines;
use crate::api::stream::Step;
use crate::models::{ModelError, Progress};

/// Between two lines of progress.
const STEP: Duration = Duration::from_millis(100);
/// The last line waits so long for its reader.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// Tells how `work` goes on, and how it ended. A closed pipe cancels it by closing `steps`; a reader that is slow is told
/// less often, and never slows the work.
pub(super) async fn run<T>(
    write: OwnedFd,
    mut steps: mpsc::Receiver<Progress>,
    work: impl Future<Output = Result<T, ModelError>>,
    end: impl FnOnce(T) -> Step,
    _permit: OwnedSemaphorePermit,
) {
    let mut work = std::pin::pin!(work);
    let Ok(mut lines) = Lines::new(write) else {
        drop(steps);
        let _ = work.await;
        return;
    };
    let mut told: Option<Instant> = None;
    let outcome = loop {
        tokio::select! {
            biased;
            outcome = &mut work => break outcome,
            () = lines.closed() => {
                drop(steps);
                let _ = work.await;
                return;
            }
            Some(Progress { done, total }) = steps.recv() => {
                if told.is_none_or(|told| told.elapsed() >= STEP) && lines.try_flush() {
                    lines.push_bytes(&Step::Progress { done, total }.to_bytes());
                    lines.try_flush();
                    told = Some(Instant::now());
                }
            }
        }
    };
    let last = match outcome {
        Ok(done) => end(done),
        Err(error) => {
            let error = Error::from(error);
            Step::Error { name: error.name.as_str().to_owned(), message: error.message }
        }
    };
    lines.push_bytes(&last.to_bytes());
    lines.last_words(LAST_WORDS).await;
}
