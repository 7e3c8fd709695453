//! The handle that the bus (and later HTTP) holds.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::job::{Router, Running};
use super::route;
use crate::domain::cluster::ClusterId;
use crate::domain::node::NodeId;
use crate::domain::prompt::{Ask, DEFAULT_TIMEOUT, Done, Failure, FailureKind};

/// Wishes about who answers. A wish is refused, never silently widened.
#[derive(Debug, Clone)]
pub struct Options {
    /// This peer id only.
    pub peer: Option<String>,
    /// The node with this name or peer id only.
    pub node: Option<String>,
    /// Only nodes that qualify for this tier.
    pub tier: Option<String>,
    /// This machine first, when it serves the model.
    pub local_first: bool,
    /// Never this machine.
    pub no_local: bool,
    /// From asking to the last token.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { peer: None, node: None, tier: None, local_first: false, no_local: false, timeout: DEFAULT_TIMEOUT }
    }
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedBy {
    /// Its peer id.
    pub id: NodeId,
    /// Its name, its own word.
    pub name: String,
    /// It is this node itself.
    pub local: bool,
}

/// A piece of an answer, in order; `End` is the last and comes exactly once.
#[derive(Debug)]
pub enum JobEvent {
    /// It waits; so many prompts are before it. Any number of times, before `Started`.
    Queued {
        /// Prompts before it.
        position: u32,
    },
    /// A node has taken it up; its first text follows.
    Started {
        /// The model that answers.
        model: String,
        /// Who answers.
        by: ServedBy,
    },
    /// More text.
    Text(String),
    /// The outcome.
    End(Result<Done, Failure>),
}

/// What the dispatcher is asked to do.
#[derive(Debug)]
pub struct Start {
    /// Uid of the asking user, for fair shares.
    pub uid: u32,
    /// In which cluster; `None` is this machine alone.
    pub cluster: Option<ClusterId>,
    /// What.
    pub ask: Ask,
    /// Wishes.
    pub options: Options,
    /// Where the pieces go; closed means cancelled.
    pub events: mpsc::Sender<JobEvent>,
}

/// A prompt in progress. Dropping it cancels the work, here and at the serving node.
#[derive(Debug)]
pub struct Job(Source);

#[derive(Debug)]
enum Source {
    Running(Box<Running>),
    Scripted(mpsc::Receiver<JobEvent>),
}

impl Job {
    /// The next piece; `None` after [`JobEvent::End`]. Not calling it slows the serving node down; the deadline is
    /// kept while it is being awaited.
    ///
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<JobEvent> {
        match &mut self.0 {
            Source::Running(running) => running.next().await,
            Source::Scripted(events) => events.recv().await,
        }
    }
}

/// A cheap clone that starts prompts.
#[derive(Debug, Clone)]
pub struct Handle(Inner);

#[derive(Debug, Clone)]
enum Inner {
    Router(Arc<Router>),
    Scripted { starts: mpsc::Sender<Start>, active: watch::Receiver<u32> },
}

impl Handle {
    /// A handle whose jobs take their way through `router`.
    pub fn new(router: Router) -> Self {
        Self(Inner::Router(Arc::new(router)))
    }

    /// A handle and its other ends: a test plays the dispatcher.
    pub fn scripted() -> (Self, mpsc::Receiver<Start>, watch::Sender<u32>) {
        let (starts, receiver) = mpsc::channel(1024);
        let (publish, active) = watch::channel(0);
        (Self(Inner::Scripted { starts, active }), receiver, publish)
    }

    /// Starts a prompt. Everything that happens to it comes out of the job.
    ///
    /// # Errors
    /// [`FailureKind::Busy`] when too many start at once, [`FailureKind::ShuttingDown`] when the daemon stops.
    pub fn start(&self, uid: u32, cluster: ClusterId, ask: Ask, options: Options) -> Result<Job, Failure> {
        self.start_in(uid, Some(cluster), ask, options)
    }

    /// Starts a prompt that this machine answers itself, whatever clusters it is in.
    ///
    /// # Errors
    /// As of [`Handle::start`].
    pub fn start_here(&self, uid: u32, ask: Ask, options: Options) -> Result<Job, Failure> {
        self.start_in(uid, None, ask, options)
    }

    fn start_in(&self, uid: u32, cluster: Option<ClusterId>, ask: Ask, options: Options) -> Result<Job, Failure> {
        match &self.0 {
            Inner::Router(router) => {
                Ok(Job(Source::Running(Box::new(Running::new(Arc::clone(router), uid, cluster, ask, options)))))
            }
            Inner::Scripted { starts, .. } => {
                let (events, receiver) = mpsc::channel(64);
                starts.try_send(Start { uid, cluster, ask, options, events }).map_err(|error| match error {
                    mpsc::error::TrySendError::Full(_) => {
                        Failure::busy("too many prompts start at once", Duration::from_millis(100))
                    }
                    mpsc::error::TrySendError::Closed(_) => Failure::new(FailureKind::ShuttingDown, "the daemon is stopping"),
                })?;
                Ok(Job(Source::Scripted(receiver)))
            }
        }
    }

    /// Tokens a second of one answer that `peer` (or this machine, by its own peer id) was seen to give with `model` lately;
    /// `None` when it has not answered with it within the last hour.
    pub fn speed(&self, peer: &NodeId, model: &str) -> Option<f64> {
        match &self.0 {
            Inner::Router(router) => router.speed(peer, model),
            Inner::Scripted { .. } => None,
        }
    }

    /// Prompts of this machine's users that are in progress.
    pub fn active(&self) -> u32 {
        match &self.0 {
            Inner::Router(router) => router.active.load(Ordering::Relaxed),
            Inner::Scripted { active, .. } => *active.borrow(),
        }
    }
}

/// The cluster that an empty cluster id means: the only joined one; the default one when it is among several.
pub fn default_cluster<'a>(joined: impl Iterator<Item = &'a ClusterId>) -> Option<&'a ClusterId> {
    route::default_cluster(joined)
}
