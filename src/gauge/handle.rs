//! The handle that the bus, `serve` and `daemon` hold.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use crate::domain::resources::Resources;

/// What the sampler is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Measure now.
    Measure {
        /// Write `resources.json` also when nothing moved.
        keep: bool,
        /// Told the result.
        reply: oneshot::Sender<Arc<Resources>>,
    },
}

/// A cheap clone that reads and asks for measurements.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    latest: watch::Receiver<Arc<Resources>>,
}

impl Handle {
    /// A handle over `first`, and its other ends: what the sampler holds, or a test that plays it.
    pub fn scripted(first: Resources) -> (Self, mpsc::Receiver<Command>, watch::Sender<Arc<Resources>>) {
        let (commands, receiver) = mpsc::channel(16);
        let (publish, latest) = watch::channel(Arc::new(first));
        (Self { commands, latest }, receiver, publish)
    }

    /// The last measurement, whatever its age. Until the first one is whole it has no storage and no GPUs, and is of time 0.
    pub fn latest(&self) -> Arc<Resources> {
        self.latest.borrow().clone()
    }

    /// Wakes when a total or an availability has moved by more than 5 % since the last time.
    pub fn watch(&self) -> watch::Receiver<Arc<Resources>> {
        self.latest.clone()
    }

    /// Measures now and writes `resources.json`; falls back to the last measurement when the sampler is gone. Cancel-safe.
    pub async fn fresh(&self) -> Arc<Resources> {
        self.measure(true).await
    }

    /// Measures now and keeps nothing, for whoever decides by it. Cancel-safe.
    pub async fn measured(&self) -> Arc<Resources> {
        self.measure(false).await
    }

    async fn measure(&self, keep: bool) -> Arc<Resources> {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Measure { keep, reply }).await.is_err() {
            return self.latest();
        }
        answer.await.unwrap_or_else(|_| self.latest())
    }

    /// The last measurement when it is at most 2 s old, else a new one. Cancel-safe.
    pub async fn recent(&self) -> Arc<Resources> {
        let last = self.latest();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
        if now.saturating_sub(last.measured_at) <= 2_000_000 { last } else { self.measure(false).await }
    }
}
