//! What the bus asks of the daemon itself: saved clusters, sharing, reload. The daemon is above this layer, so it holds
//! the other ends.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use crate::domain::cluster::ClusterId;
use crate::domain::resources::Lent;

/// Requests that may wait for the daemon.
const QUEUE: usize = 64;

/// What the caller of `Connect` chose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectOptions {
    /// Multiaddrs to dial.
    pub bootstrap: Vec<String>,
    /// Take prompts; `None` is the machine's setting.
    pub serve: Option<bool>,
    /// Join again after a restart; `None` is yes.
    pub auto_connect: Option<bool>,
}

/// Why a cluster was not joined or left, sharing not set, configuration not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The limit of clusters is reached.
    #[error("{0}")]
    TooManyClusters(String),
    /// Serving was asked for and this machine does not meet the tier.
    #[error("{0}")]
    NotEligible(String),
    /// The cluster is not known.
    #[error("no cluster {0} is known")]
    NoSuchCluster(ClusterId),
    /// The cluster is known; this node is not in it.
    #[error("this node is not in cluster {0}")]
    NotConnected(ClusterId),
    /// An argument, such as an address.
    #[error("{0}")]
    InvalidArgument(String),
    /// The state directory is full or broken; nothing was changed.
    #[error("{0}")]
    Storage(String),
    /// File, line and reason.
    #[error("{0}")]
    InvalidConfiguration(String),
    /// Too much waits to be done.
    #[error("{0}")]
    Busy(String),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    ShuttingDown,
}

/// A saved cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedCluster {
    /// Which.
    pub id: ClusterId,
    /// Joined at the start.
    pub auto_connect: bool,
}

/// What the daemon lets the bus see.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ControlState {
    /// Saved clusters, by id.
    pub saved: Vec<SavedCluster>,
    /// This machine serves others.
    pub sharing: bool,
    /// Most that is lent.
    pub lent: Lent,
    /// The daemon is stopping.
    pub stopping: bool,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
}

/// A request with its reply.
#[derive(Debug)]
pub enum Request {
    /// Join.
    Connect(ClusterId, ConnectOptions, oneshot::Sender<Result<(), ControlError>>),
    /// Leave; forget it too; let work end for so long.
    Disconnect(ClusterId, bool, Duration, oneshot::Sender<Result<(), ControlError>>),
    /// Serve others or not, at most so much; only until the next start.
    SetSharing(bool, Lent, bool, oneshot::Sender<Result<(), ControlError>>),
    /// Read the configuration again.
    Reload(oneshot::Sender<Result<(), ControlError>>),
}

/// A cheap clone that asks the daemon.
#[derive(Debug, Clone)]
pub struct Control {
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<ControlState>,
}

impl Control {
    /// A handle and its other ends: the daemon's, or a test's.
    pub fn new(state: ControlState) -> (Self, mpsc::Receiver<Request>, watch::Sender<ControlState>) {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let (publish, state) = watch::channel(state);
        (Self { requests, state }, receiver, publish)
    }

    async fn ask(&self, request: impl FnOnce(oneshot::Sender<Result<(), ControlError>>) -> Request) -> Result<(), ControlError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| ControlError::ShuttingDown)?;
        answer.await.map_err(|_| ControlError::ShuttingDown)?
    }

    /// Joins a cluster.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn connect(&self, id: ClusterId, options: ConnectOptions) -> Result<(), ControlError> {
        self.ask(|reply| Request::Connect(id, options, reply)).await
    }

    /// Leaves a cluster.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn disconnect(&self, id: ClusterId, forget: bool, drain: Duration) -> Result<(), ControlError> {
        self.ask(|reply| Request::Disconnect(id, forget, drain, reply)).await
    }

    /// Serves others, or stops.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn set_sharing(&self, enabled: bool, lent: Lent, runtime: bool) -> Result<(), ControlError> {
        self.ask(|reply| Request::SetSharing(enabled, lent, runtime, reply)).await
    }

    /// Reads the configuration again.
    ///
    /// # Errors
    /// [`ControlError::InvalidConfiguration`]: the old one stays in force.
    pub async fn reload(&self) -> Result<(), ControlError> {
        self.ask(Request::Reload).await
    }

    /// What the daemon shows now.
    pub fn state(&self) -> ControlState {
        self.state.borrow().clone()
    }

    /// Wakes when that changes.
    pub fn watch(&self) -> watch::Receiver<ControlState> {
        self.state.clone()
    }
}
