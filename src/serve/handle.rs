//! The handle through which `net` (for members) and `dispatch` (for this machine's own users) submit prompts.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::domain::node::{NodeId, Offer};
use crate::domain::prompt::{Ask, Failure, FailureKind};
use crate::net::AnswerEvent;

/// Whose share a prompt counts against.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Requester {
    /// A member of a cluster.
    Peer(NodeId),
    /// A user of this machine.
    Local(u32),
}

/// A prompt handed in.
#[derive(Debug)]
pub struct Served {
    /// Whose.
    pub requester: Requester,
    /// What.
    pub ask: Ask,
    /// Time left.
    pub timeout: Duration,
    /// Where the answer goes; closed means cancelled.
    pub events: mpsc::Sender<AnswerEvent>,
}

/// A cheap clone that submits prompts to the queue.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(crate) submissions: mpsc::Sender<Served>,
    pub(crate) offer: watch::Receiver<Offer>,
}

impl Handle {
    /// A handle and its other ends, for tests that play the queue.
    pub fn scripted() -> (Self, mpsc::Receiver<Served>, watch::Sender<Offer>) {
        let (submissions, receiver) = mpsc::channel(1024);
        let (publish, offer) = watch::channel(Offer::default());
        (Self { submissions, offer }, receiver, publish)
    }

    /// Hands in a prompt; the outcome comes as the last [`AnswerEvent`].
    ///
    /// # Errors
    /// [`FailureKind::Busy`] or [`FailureKind::ShuttingDown`], at once.
    pub fn submit(&self, prompt: Served) -> Result<(), Failure> {
        self.submissions.try_send(prompt).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Failure::busy("this node has too many prompts waiting", Duration::from_secs(1)),
            mpsc::error::TrySendError::Closed(_) => Failure::new(FailureKind::ShuttingDown, "this node is stopping"),
        })
    }

    /// What this node offers, as it changes.
    pub fn offer(&self) -> watch::Receiver<Offer> {
        self.offer.clone()
    }
}
