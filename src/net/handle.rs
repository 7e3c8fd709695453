//! The handle that the rest of the daemon holds: commands in, snapshots and events out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::ask::Asking;
use super::config::Remembered;
use super::lanes::Pool;
use crate::domain::cluster::ClusterId;
use crate::domain::network::{Facts, PingError, Pinged};
use crate::domain::node::{ClusterView, GoneReason, Member, NodeId, Offer};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, Text};

/// Commands that may wait for the swarm; more is [`JoinError::Busy`] or [`FailureKind::Busy`].
const COMMAND_QUEUE: usize = 1024;
/// Membership events kept for a slow listener; it is told how many it missed.
const EVENT_QUEUE: usize = 1024;

/// What the caller of [`Handle::join`] may choose.
#[derive(Debug, Clone, Default)]
pub struct JoinOptions {
    /// Multiaddrs with `/p2p/…` to dial at once, besides the configured ones.
    pub bootstrap: Vec<String>,
    /// Take prompts of this cluster.
    pub serve: bool,
}

/// Why a cluster was not joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The limit of clusters at once (16) is reached.
    #[error("this node is in {0} clusters already, which is the limit")]
    TooMany(usize),
    /// An address is not a multiaddr that can be dialled.
    #[error("{address:?} is not an address to dial: {reason}")]
    BadAddress {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Too many commands are waiting.
    #[error("the network task is busy")]
    Busy,
    /// The network task has stopped.
    #[error("the network task has stopped")]
    Stopped,
}

/// Why a cluster was not left.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// This node is not in it.
    #[error("this node is not in cluster {0}")]
    NotJoined(ClusterId),
    /// Too many commands are waiting.
    #[error("the network task is busy")]
    Busy,
    /// The network task has stopped.
    #[error("the network task has stopped")]
    Stopped,
}

/// What the swarm's owner is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Join, announce, look for members. Joining again with other options changes them.
    Join {
        /// Which.
        cluster: ClusterId,
        /// How.
        options: JoinOptions,
        /// Told when the node is joined and has announced itself.
        reply: oneshot::Sender<Result<(), JoinError>>,
    },
    /// Say goodbye and forget the members.
    Leave {
        /// Which.
        cluster: ClusterId,
        /// Time for running prompts to end.
        drain: Duration,
        /// Told when the goodbye is out.
        reply: oneshot::Sender<Result<(), LeaveError>>,
    },
    /// Send a prompt to a member. Only scripted handles send it; a real one asks past the task.
    Ask {
        /// In which cluster.
        cluster: ClusterId,
        /// To whom.
        member: NodeId,
        /// What.
        ask: Ask,
        /// Time left.
        timeout: Duration,
        /// Where the answer goes: bounded, so that a slow reader slows the sender.
        events: mpsc::Sender<AnswerEvent>,
    },
    /// Goodbye to everybody; the task ends.
    Shutdown {
        /// Told when the goodbyes are out, or after 200 ms.
        reply: oneshot::Sender<()>,
    },
    /// Tell what is known of the network.
    Facts {
        /// A peer, by id or name, that must not be missing from them if it is known.
        about: Option<String>,
        /// Told at once.
        reply: oneshot::Sender<Facts>,
    },
    /// Ask a peer for signs of life.
    Ping {
        /// Whom, by peer id or by the name that it told.
        peer: String,
        /// How often, one after the other.
        count: u32,
        /// Told when the last one is answered, or one is not.
        reply: oneshot::Sender<Result<Pinged, PingError>>,
    },
    /// Connect to a member that is only known: a prompt needs it.
    Reach {
        /// In which cluster.
        cluster: ClusterId,
        /// Whom.
        member: NodeId,
        /// When it is waited for no longer.
        until: Instant,
        /// Told when it is a member here, or cannot be reached.
        reply: oneshot::Sender<bool>,
    },
    /// Answers when the loop gets to it: the watchdog's proof of life.
    Probe {
        /// Told at once.
        reply: oneshot::Sender<()>,
    },
    /// Panics inside the loop.
    #[cfg(test)]
    Panic,
    /// Does as if a link had come up.
    #[cfg(test)]
    ChangeNetwork,
}

/// A piece of an answer from another node, in order; `End` is the last.
#[derive(Debug)]
pub enum AnswerEvent {
    /// It waits at the serving node; so many prompts are before it. Any number of times, before `Started`.
    Queued {
        /// Prompts before it.
        position: u32,
    },
    /// The serving node took it up, with this model.
    Started {
        /// The model that answers.
        model: String,
    },
    /// More text.
    Text(String),
    /// The end, exactly once.
    End(Result<Done, Failure>),
}

/// The receiving end of an answer. Dropping it cancels the work at the serving node.
#[derive(Debug)]
pub struct AnswerStream(Source);

#[derive(Debug)]
enum Source {
    /// A lane of our own: polling this drives it.
    Lane(Box<Asking>),
    /// A test plays the other node.
    Scripted(mpsc::Receiver<AnswerEvent>),
}

impl AnswerStream {
    /// The next piece; `None` after [`AnswerEvent::End`]. Not calling it slows the serving node down.
    ///
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<AnswerEvent> {
        match &mut self.0 {
            Source::Lane(asking) => asking.next().await,
            Source::Scripted(events) => events.recv().await,
        }
    }
}

/// An answer that was ready before it was asked for.
#[derive(Debug)]
pub struct AnswerNow {
    /// The model that answered.
    pub model: String,
    /// The text in the pieces in which a model would have given it.
    pub pieces: Vec<Text>,
    /// The end.
    pub done: Done,
}

/// Who answers the prompts of other members: `serve`, or a test.
pub trait Service: std::fmt::Debug + Send + Sync + 'static {
    /// Answers without waiting, when that is possible and fair to those who wait. Called on the network's thread.
    fn answer_now(&self, from: &NodeId, ask: &Ask) -> Option<Result<AnswerNow, Failure>>;

    /// Takes a prompt; its answer goes to [`InboundPrompt::reply`].
    ///
    /// # Errors
    /// `Busy`, `ShuttingDown` and the like, at once.
    fn submit(&self, prompt: InboundPrompt) -> Result<(), Failure>;

    /// What this node offers, as it changes.
    fn offer(&self) -> watch::Receiver<Offer>;
}

/// What a caller needs to ask a member without the swarm's task: the shadow of the member table for askers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Directory {
    pub clusters: HashMap<ClusterId, [u8; 16]>,
    pub peers: HashMap<NodeId, PeerId>,
}

/// The short way of a prompt: past the swarm's task.
#[derive(Debug, Clone)]
pub(crate) struct Direct {
    pub pool: Pool,
    pub directory: watch::Receiver<Arc<Directory>>,
}

/// What happened to the membership, as it happens.
#[derive(Debug, Clone)]
pub enum Event {
    /// A member is there.
    MemberUp {
        /// In which cluster.
        cluster: ClusterId,
        /// Who.
        member: Arc<Member>,
    },
    /// A member is gone.
    MemberDown {
        /// In which cluster.
        cluster: ClusterId,
        /// Who.
        id: NodeId,
        /// Its name as it was listed.
        name: String,
        /// Why.
        reason: GoneReason,
    },
}

/// Everything that readers may know, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// This node's peer id; `None` before the first start of the swarm.
    pub peer_id: Option<NodeId>,
    /// Addresses that it listens on, without the peer id.
    pub listen_addresses: Vec<String>,
    /// Those of them that are of use to other machines, without the peer id; on a machine without a network, all.
    pub dialable_addresses: Vec<String>,
    /// Joined clusters.
    pub clusters: BTreeMap<ClusterId, Arc<ClusterView>>,
    /// Connected peers of any kind (members, bootstraps, DHT).
    pub connected_peers: usize,
    /// Connections to them.
    pub connections: usize,
    /// What hinders discovery now, a sentence each; empty is well.
    pub problems: Vec<String>,
}

/// A prompt that a member sent to this node. `net` has checked that the sender is a member of `cluster`.
#[derive(Debug)]
pub struct InboundPrompt {
    /// Who asks.
    pub from: NodeId,
    /// Its name, its own word.
    pub from_name: String,
    /// In which cluster.
    pub cluster: ClusterId,
    /// What.
    pub ask: Ask,
    /// Time left at the asker when it arrived here.
    pub timeout: Duration,
    /// Where the answer goes.
    pub reply: Replier,
}

/// The way back to the asker of an [`InboundPrompt`]. Dropping it without `End` tells the asker `BackendFailed`.
#[derive(Debug)]
pub struct Replier {
    pub(crate) events: mpsc::Sender<AnswerEvent>,
}

impl Replier {
    /// A replier and its receiving end.
    pub fn new(capacity: usize) -> (Self, mpsc::Receiver<AnswerEvent>) {
        let (events, receiver) = mpsc::channel(capacity);
        (Self { events }, receiver)
    }

    /// Sends one piece; waits while the asker reads slowly.
    ///
    /// # Errors
    /// The asker is gone or cancelled: stop working.
    ///
    /// Cancel-safe: a dropped future has sent nothing.
    pub async fn send(&self, event: AnswerEvent) -> Result<(), Failure> {
        self.events.send(event).await.map_err(|_| Failure::new(FailureKind::Cancelled, "the asker is gone"))
    }

    /// Sends without waiting; gives the event back when the way is full or closed.
    ///
    /// # Errors
    /// The event itself: `closed` tells which of the two.
    pub fn try_send(&self, event: AnswerEvent) -> Result<(), AnswerEvent> {
        self.events.try_send(event).map_err(|error| error.into_inner())
    }

    /// The bare sender: dropping it without `End` tells the asker `BackendFailed`.
    pub fn into_events(self) -> mpsc::Sender<AnswerEvent> {
        self.events
    }

    /// Resolves when the asker is gone or cancelled. Cancel-safe.
    pub async fn closed(&self) {
        self.events.closed().await;
    }
}

/// A cheap clone through which everybody talks to the network task.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<Arc<Snapshot>>,
    remembered: watch::Receiver<Arc<[Remembered]>>,
    events: broadcast::Sender<Event>,
    direct: Option<Direct>,
}

/// The other ends of a [`Handle`]: what the network task holds, or a test that plays it.
#[derive(Debug)]
pub struct Scripted {
    /// Commands to obey.
    pub commands: mpsc::Receiver<Command>,
    /// Publishes snapshots.
    pub state: watch::Sender<Arc<Snapshot>>,
    /// Publishes who is to be remembered.
    pub remembered: watch::Sender<Arc<[Remembered]>>,
    /// Publishes membership events.
    pub events: broadcast::Sender<Event>,
}

impl Handle {
    /// A handle and its other ends.
    pub fn scripted() -> (Self, Scripted) {
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let (publish, state) = watch::channel(Arc::new(Snapshot::default()));
        let (remember, remembered) = watch::channel(Arc::from([]));
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        (
            Self { commands, state, remembered, events: events.clone(), direct: None },
            Scripted { commands: receiver, state: publish, remembered: remember, events },
        )
    }

    /// The same handle, asking on lanes of its own.
    pub(crate) fn with_direct(self, direct: Direct) -> Self {
        Self { direct: Some(direct), ..self }
    }

    /// Joins `cluster`; resolves once the node is joined and announced. Joining a joined cluster succeeds.
    ///
    /// # Errors
    /// [`JoinError`].
    ///
    /// Cancel-safe: dropping the future abandons the wait, not the joining.
    pub async fn join(&self, cluster: ClusterId, options: JoinOptions) -> Result<(), JoinError> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Join { cluster, options, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => JoinError::Busy,
            mpsc::error::TrySendError::Closed(_) => JoinError::Stopped,
        })?;
        answer.await.map_err(|_| JoinError::Stopped)?
    }

    /// Leaves `cluster`; resolves once the members were told.
    ///
    /// # Errors
    /// [`LeaveError`].
    ///
    /// Cancel-safe: dropping the future abandons the wait, not the leaving.
    pub async fn leave(&self, cluster: ClusterId, drain: Duration) -> Result<(), LeaveError> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Leave { cluster, drain, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LeaveError::Busy,
            mpsc::error::TrySendError::Closed(_) => LeaveError::Stopped,
        })?;
        answer.await.map_err(|_| LeaveError::Stopped)?
    }

    /// Sends `ask` to `member`. The stream ends with exactly one [`AnswerEvent::End`].
    ///
    /// # Errors
    /// [`FailureKind::Busy`] when too many commands wait, [`FailureKind::ShuttingDown`] when the task has ended;
    /// everything else comes in the stream.
    pub fn ask(&self, cluster: ClusterId, member: NodeId, ask: Ask, timeout: Duration) -> Result<AnswerStream, Failure> {
        if let Some(Direct { pool, directory }) = &self.direct {
            let (peer, reference) = {
                let directory = directory.borrow();
                let lost = |what: &str| Failure::new(FailureKind::PeerLost, what);
                let peer = *directory.peers.get(&member).ok_or_else(|| lost("this node is no member any more"))?;
                let reference = *directory.clusters.get(&cluster).ok_or_else(|| lost("this node has left the cluster"))?;
                (peer, reference)
            };
            let asking = Asking::new(pool.clone(), peer, reference, &ask, timeout)?;
            return Ok(AnswerStream(Source::Lane(Box::new(asking))));
        }
        // 64 pieces: as much as one stream buffers.
        let (events, receiver) = mpsc::channel(64);
        self.commands.try_send(Command::Ask { cluster, member, ask, timeout, events }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Failure::busy("the network task is busy", Duration::from_millis(100)),
            mpsc::error::TrySendError::Closed(_) => Failure::new(FailureKind::ShuttingDown, "the network task has stopped"),
        })?;
        Ok(AnswerStream(Source::Scripted(receiver)))
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.state.borrow().clone()
    }

    /// A receiver that wakes with each new snapshot.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.state.clone()
    }

    /// Who was a member last and where, the latest first, as that changes: what to give to the next start
    /// ([`crate::net::Config::remembered`]). Before the first member it is empty.
    pub fn remembered(&self) -> watch::Receiver<Arc<[Remembered]>> {
        self.remembered.clone()
    }

    /// Membership events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Says goodbye to all members and ends the task; resolves when that is done, at most 200 ms later.
    pub async fn shutdown(&self) {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Shutdown { reply }).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// What is known of the network now, `about` a peer (by id or name) in any case; `None` when the task is busy beyond
    /// measure or has stopped.
    pub async fn facts(&self, about: Option<String>) -> Option<Facts> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Facts { about, reply }).ok()?;
        answer.await.ok()
    }

    /// Asks a peer, by id or name, `count` times for a sign of life, dialling it when it is known and not connected.
    ///
    /// # Errors
    /// [`PingError`].
    ///
    /// Cancel-safe: dropping the future abandons the wait.
    pub async fn ping(&self, peer: String, count: u32) -> Result<Pinged, PingError> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Ping { peer, count, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => PingError::Busy,
            mpsc::error::TrySendError::Closed(_) => PingError::Stopped,
        })?;
        answer.await.map_err(|_| PingError::Stopped)?
    }

    /// Connects to a member that is only known ([`crate::domain::node::Liveness::Known`]); false when it cannot be reached
    /// by `until`.
    ///
    /// Cancel-safe: dropping the future abandons the wait, not the dial.
    pub async fn reach(&self, cluster: ClusterId, member: NodeId, until: Instant) -> bool {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Reach { cluster, member, until, reply }).is_ok() && answer.await.unwrap_or(false)
    }

    /// Makes the network task panic.
    #[cfg(test)]
    pub(crate) fn panic(&self) {
        let _ = self.commands.try_send(Command::Panic);
    }

    /// Makes the network task believe that the network changed.
    #[cfg(test)]
    pub(crate) fn change_network(&self) {
        let _ = self.commands.try_send(Command::ChangeNetwork);
    }

    /// Resolves to true when the network task answered: the watchdog's proof of life.
    pub async fn probe(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Probe { reply }).is_ok() && answer.await.is_ok()
    }
}
