//! Lanes: inference streams that are negotiated and wait for a prompt, so that asking costs no negotiation.
//!
//! One lane carries one prompt at a time; after its last frame it goes back to the pool of its peer. Dropping a lane in
//! use resets the stream, which cancels the prompt at the serving node. The pool is the one thing of `net` that is
//! shared with callers: a prompt takes a lane and speaks on it without a detour through the swarm's task.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::swarm::{ConnectionId, Stream};
use tokio::sync::{mpsc, oneshot};

use super::meter::Meter;
use super::transport::MAX_STREAMS;
use crate::wire::frame::FrameReader;

/// Lanes to one peer at once. The rest of its streams is left for membership streams and Kademlia.
pub(crate) const MAX_LANES: usize = MAX_STREAMS as usize - 16;
/// Lanes to one peer that are opened at once: half of what the other side negotiates at a time.
const MAX_OPENING: usize = 16;
/// Callers that may wait for a lane of one peer; more is `Busy`.
const MAX_WAITING: usize = 1024;
/// Idle lanes beyond the first are closed after this.
const SPARE: Duration = Duration::from_secs(30);

/// One negotiated stream to a peer.
#[derive(Debug)]
pub(crate) struct Lane {
    pub connection: ConnectionId,
    pub stream: FrameReader<Stream>,
    /// What the connection carried, when it is relayed.
    pub meter: Option<Arc<Meter>>,
    /// It carried a prompt before: a failure may mean that it went stale, not that the peer refused.
    pub used: bool,
    idle_since: Instant,
    /// Counts the lane for as long as it lives, wherever it is dropped.
    count: Option<Arc<()>>,
}

impl Lane {
    pub(crate) fn new(connection: ConnectionId, stream: Stream, meter: Option<Arc<Meter>>) -> Self {
        Self { connection, stream: FrameReader::new(stream), meter, used: false, idle_since: Instant::now(), count: None }
    }
}

/// Why there is no lane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoLane {
    #[error("not connected to this node")]
    NotConnected,
    #[error("{MAX_LANES} prompts to this node are running and {MAX_WAITING} wait for a stream")]
    Busy,
    #[error("the stream could not be opened: {0}")]
    Failed(String),
}

#[derive(Debug, Default)]
struct PeerLanes {
    idle: Vec<Lane>,
    /// Being opened.
    opening: usize,
    waiting: VecDeque<oneshot::Sender<Result<Lane, NoLane>>>,
    /// Each lane holds a clone of its connection's token. A number that is added to and subtracted from by hand drifts:
    /// a lane may be dropped inside a promise that nobody waits for any more.
    counts: HashMap<ConnectionId, Arc<()>>,
    /// Relayed connections beside a direct one: what runs on them ends there, and nothing new begins.
    retired: HashSet<ConnectionId>,
}

impl PeerLanes {
    /// Lanes that are idle or in use.
    fn alive(&self) -> usize {
        self.counts.values().map(|count| Arc::strong_count(count) - 1).sum()
    }

    /// Idle, in use, or being opened.
    fn total(&self) -> usize {
        self.alive() + self.opening
    }
}

/// The lanes to all peers. A cheap clone.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    peers: Arc<Mutex<HashMap<PeerId, PeerLanes>>>,
    /// Peers for which the swarm's task shall open a stream.
    wanted: mpsc::Sender<PeerId>,
}

/// A lane, or the promise of one.
#[allow(clippy::large_enum_variant, reason = "moved once, into a box; a second box would cost every prompt an allocation")]
#[derive(Debug)]
pub(crate) enum Taken {
    Now(Lane),
    Soon(oneshot::Receiver<Result<Lane, NoLane>>),
}

impl Pool {
    /// A pool, and the peers for which it wants streams opened.
    pub(crate) fn new() -> (Self, mpsc::Receiver<PeerId>) {
        let (wanted, receiver) = mpsc::channel(MAX_WAITING);
        (Self { peers: Arc::default(), wanted }, receiver)
    }

    fn with<T>(&self, change: impl FnOnce(&mut HashMap<PeerId, PeerLanes>) -> T) -> T {
        // Held for a few map operations, never across an await; a panic inside leaves a usable map.
        change(&mut self.peers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A member may be asked from now on.
    pub(crate) fn admit(&self, peer: PeerId) {
        self.with(|peers| {
            peers.entry(peer).or_default();
        });
    }

    /// Asks for as many streams as the waiting callers need and the bounds allow.
    fn open_more(&self, peer: PeerId) {
        let wanted = self.with(|peers| {
            let Some(lanes) = peers.get_mut(&peer) else { return 0 };
            lanes.waiting.retain(|waiting| !waiting.is_closed());
            let wanted = lanes.waiting.len().saturating_sub(lanes.opening);
            let wanted = wanted.min(MAX_OPENING.saturating_sub(lanes.opening)).min(MAX_LANES.saturating_sub(lanes.total()));
            lanes.opening += wanted;
            wanted
        });
        for _ in 0..wanted {
            if self.wanted.try_send(peer).is_err() {
                self.opened(peer, Err(NoLane::Busy));
            }
        }
    }

    /// Takes an idle lane to `peer`, or waits for one.
    pub(crate) fn take(&self, peer: PeerId) -> Result<Taken, NoLane> {
        let taken = self.with(|peers| {
            let Some(lanes) = peers.get_mut(&peer) else { return Err(NoLane::NotConnected) };
            if let Some(lane) = lanes.idle.pop() {
                return Ok(Taken::Now(lane));
            }
            if lanes.waiting.len() >= MAX_WAITING {
                lanes.waiting.retain(|waiting| !waiting.is_closed());
            }
            if lanes.waiting.len() >= MAX_WAITING {
                return Err(NoLane::Busy);
            }
            let (sender, receiver) = oneshot::channel();
            lanes.waiting.push_back(sender);
            Ok(Taken::Soon(receiver))
        })?;
        if matches!(taken, Taken::Soon(_)) {
            self.open_more(peer);
        }
        Ok(taken)
    }

    /// Makes sure that one lane to `peer` is ready or on its way.
    pub(crate) fn warm(&self, peer: PeerId) {
        let open = self.with(|peers| {
            let lanes = peers.entry(peer).or_default();
            let open = lanes.total() == 0;
            if open {
                lanes.opening += 1;
            }
            open
        });
        if open && self.wanted.try_send(peer).is_err() {
            self.opened(peer, Err(NoLane::Busy));
        }
    }

    /// The outcome of an opening that the pool asked for.
    pub(crate) fn opened(&self, peer: PeerId, outcome: Result<Lane, NoLane>) {
        let opened = self.with(|peers| {
            let lanes = peers.get_mut(&peer)?;
            lanes.opening = lanes.opening.saturating_sub(1);
            match outcome {
                Ok(mut lane) => {
                    lanes.counts.retain(|_, count| Arc::strong_count(count) > 1);
                    lane.count = Some(Arc::clone(lanes.counts.entry(lane.connection).or_default()));
                    Some(lane)
                }
                Err(error) => {
                    // Who waits is told only when no other lane can serve it.
                    if lanes.total() == 0 {
                        for waiting in lanes.waiting.drain(..) {
                            let _ = waiting.send(Err(error.clone()));
                        }
                    }
                    None
                }
            }
        });
        if let Some(lane) = opened {
            self.hand_out(peer, lane);
            self.open_more(peer);
        }
    }

    /// Gives a lane to who waits longest, or keeps it.
    pub(crate) fn hand_out(&self, peer: PeerId, lane: Lane) {
        if self.retires(peer, &lane) {
            drop(lane);
            self.open_more(peer);
        } else {
            self.pass_on(peer, lane);
        }
    }

    /// There is a better connection than the one of this lane.
    fn retires(&self, peer: PeerId, lane: &Lane) -> bool {
        self.with(|peers| peers.get(&peer).is_some_and(|lanes| lanes.retired.contains(&lane.connection)))
    }

    fn pass_on(&self, peer: PeerId, mut lane: Lane) {
        self.with(|peers| {
            let Some(lanes) = peers.get_mut(&peer) else { return };
            while let Some(waiting) = lanes.waiting.pop_front() {
                match waiting.send(Ok(lane)) {
                    Ok(()) => return,
                    Err(Ok(back)) => lane = back,
                    Err(Err(_)) => return,
                }
            }
            lane.idle_since = Instant::now();
            lanes.idle.push(lane);
        });
    }

    /// Gives a lane back after a complete answer.
    pub(crate) fn give_back(&self, peer: PeerId, mut lane: Lane) {
        lane.used = true;
        self.hand_out(peer, lane);
    }

    /// Reports that a lane in use was dropped; opens another when somebody waits.
    pub(crate) fn lost(&self, peer: PeerId) {
        self.open_more(peer);
    }

    /// Prompts of ours that are on their way over this connection.
    pub(crate) fn in_use(&self, peer: PeerId, connection: ConnectionId) -> usize {
        self.with(|peers| {
            let Some(lanes) = peers.get(&peer) else { return 0 };
            let alive = lanes.counts.get(&connection).map_or(0, |count| Arc::strong_count(count) - 1);
            alive - lanes.idle.iter().filter(|lane| lane.connection == connection).count().min(alive)
        })
    }

    /// Names the connections on which nothing new shall begin, because there is a better one. Their idle lanes go; those
    /// in use go when their prompt has ended.
    pub(crate) fn retire(&self, peer: PeerId, connections: HashSet<ConnectionId>) {
        self.with(|peers| {
            if let Some(lanes) = peers.get_mut(&peer) {
                lanes.idle.retain(|lane| !connections.contains(&lane.connection));
                lanes.retired = connections;
            }
        });
    }

    /// Forgets the idle lanes of a connection that closed.
    pub(crate) fn connection_closed(&self, peer: PeerId, connection: ConnectionId) {
        self.with(|peers| {
            if let Some(lanes) = peers.get_mut(&peer) {
                lanes.idle.retain(|lane| lane.connection != connection);
                lanes.retired.remove(&connection);
            }
        });
    }

    /// Forgets a peer that is a member of nothing any more; who waits is told.
    pub(crate) fn forget(&self, peer: PeerId) {
        if let Some(lanes) = self.with(|peers| peers.remove(&peer)) {
            for waiting in lanes.waiting {
                let _ = waiting.send(Err(NoLane::NotConnected));
            }
        }
    }

    /// Forgets everybody: the swarm of all lanes is gone.
    pub(crate) fn forget_all(&self) {
        let peers: Vec<PeerId> = self.with(|peers| peers.keys().copied().collect());
        for peer in peers {
            self.forget(peer);
        }
    }

    /// Closes lanes that have been idle for long; the first of each peer stays. Tells whether there are others left.
    pub(crate) fn trim(&self, now: Instant) -> bool {
        self.with(|peers| {
            let mut more = false;
            for lanes in peers.values_mut() {
                let mut kept = 0;
                lanes.idle.retain(|lane| {
                    kept += 1;
                    kept == 1 || now.duration_since(lane.idle_since) < SPARE
                });
                more |= lanes.total() > 1;
            }
            more
        })
    }
}
