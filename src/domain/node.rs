//! What is known of a node in the cluster, in words that every layer understands.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use super::cluster::ClusterId;
use super::network::Relay;

/// A libp2p peer id in its text form. Only `net` makes and reads its inside.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// Wraps the text of a peer id; nothing is checked here.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }
    /// The text of the peer id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Longest node name in bytes, on the wire and in the configuration.
pub const MAX_NODE_NAME_BYTES: usize = 64;

/// How a member was found first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    /// It answered on the local network.
    Mdns,
    /// A provider record named it.
    Kademlia,
    /// It is in the bootstrap list.
    Bootstrap,
    /// Another member told of it.
    View,
    /// It dialled us first.
    Inbound,
    /// It was a member before the last stop.
    Remembered,
}

impl FoundBy {
    /// The word used on the bus and in `--json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mdns => "mdns",
            Self::Kademlia => "kademlia",
            Self::Bootstrap => "bootstrap",
            Self::View => "view",
            Self::Inbound => "inbound",
            Self::Remembered => "remembered",
        }
    }
}

/// What a model is to the node that offers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModelState {
    /// It is there and loaded when somebody asks; also a model of an upstream, which loads as it likes.
    #[default]
    Available,
    /// It is being loaded.
    Loading,
    /// It is loaded.
    Ready,
    /// It could not be loaded and is not tried again until its file or the configuration changes.
    Failed,
}

impl ModelState {
    /// The word used on the bus and in `--json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// Where a node has a model from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModelSource {
    /// Its own word only: a node of the first version says no more than a name.
    #[default]
    Unknown,
    /// Not a model: the echo.
    Echo,
    /// The embedded engine.
    Engine,
    /// An OpenAI-compatible server behind the node.
    Upstream,
}

impl ModelSource {
    /// The word used on the bus and in `--json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Echo => "echo",
            Self::Engine => "engine",
            Self::Upstream => "upstream",
        }
    }
}

/// A model as a member (or this node) offers it. All but the name is absent where it is not known.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelOffer {
    /// The name to ask for.
    pub name: String,
    /// Context window in tokens; 0 when unknown.
    pub context_tokens: u32,
    /// Bytes of its file.
    pub size: Option<u64>,
    /// Parameters (weights).
    pub parameters: Option<u64>,
    /// Such as "Q4_K_M".
    pub quantisation: Option<String>,
    /// SHA-256 of its file.
    pub digest: Option<[u8; 32]>,
    /// Whether it can be asked at once.
    pub state: ModelState,
    /// Where the node has it from.
    pub source: ModelSource,
    /// Prompts that it answers at once; 0 when unknown.
    pub slots: u16,
}

/// Below this a model is a toy, such as the one that every installation brings: any other is preferred to it.
pub const TOY_BYTES: u64 = 50_000_000;

impl ModelOffer {
    /// A model of which only the name is known.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Which of several models answers a prompt that names none: the greater one. The echo is the last choice, a toy the
    /// one before it; of the others the larger file is the better model, one of unknown size comes after those that are known.
    pub fn rank(&self) -> (u8, u64) {
        match (self.source, self.size) {
            (ModelSource::Echo, _) => (0, 0),
            _ if self.name == "echo" => (0, 0),
            (_, Some(size)) if size < TOY_BYTES => (1, size),
            (_, size) => (2, size.unwrap_or(0)),
        }
    }
}

/// What this node offers to the clusters it serves: the owner is `serve`, `net` tells the members.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Offer {
    /// Models that can be asked for now, best first. `echo` is last.
    pub models: Vec<ModelOffer>,
    /// Tier names that this machine qualifies for.
    pub tiers: Vec<String>,
    /// Prompts that would start at once.
    pub free_slots: u16,
    /// Prompts waiting.
    pub queued: u16,
    /// No new prompts: the node is stopping.
    pub draining: bool,
}

/// Whether a member still proves that it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// Heard within the last 10 s.
    Alive,
    /// Silent for 10 s: gets no new prompts, is removed at 15 s.
    Suspect,
    /// Told of by a member, not connected to us (above the full-mesh size).
    Known,
}

/// One member of one cluster, as this node sees it. Its own words are not checked.
#[derive(Debug, Clone)]
pub struct Member {
    /// Who: proved by the connection's key.
    pub id: NodeId,
    /// Its own word, control characters included: strip before showing.
    pub name: String,
    /// Software version, its own word.
    pub version: String,
    /// Agreed protocol version of the membership stream.
    pub protocol: u16,
    /// Multiaddrs that it was reached at or told of.
    pub addresses: Vec<String>,
    /// How it was found first.
    pub found_by: FoundBy,
    /// False when the connection goes through a relay.
    pub direct: bool,
    /// The relay that it goes through.
    pub relay: Option<Relay>,
    /// "quic" or "tcp"; empty when not connected.
    pub transport: &'static str,
    /// When the membership stream came up.
    pub connected_at: SystemTime,
    /// When the last frame of it arrived.
    pub last_seen: SystemTime,
    /// Round trip in microseconds as last measured; `None` before the first measurement.
    pub latency_us: Option<u64>,
    /// It takes prompts of this cluster.
    pub serving: bool,
    /// It is stopping and takes no new prompts.
    pub draining: bool,
    /// Prompts it would start at once, by its last heartbeat.
    pub free_slots: u16,
    /// Prompts waiting there, by its last heartbeat.
    pub queued: u16,
    /// Models it serves here, best first.
    pub models: Vec<ModelOffer>,
    /// Tiers it says it qualifies for.
    pub tiers: Vec<String>,
    /// Whether it is usable.
    pub liveness: Liveness,
}

/// State of a joined cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Known (saved), not joined now.
    Disconnected,
    /// Joined and announced; nobody found yet.
    Discovering,
    /// A candidate is being dialled or greeted.
    Connecting,
    /// At least one member.
    Connected,
    /// Members, but none of them can serve, or discovery is cut off.
    Degraded,
    /// Leaving: running prompts may end.
    Disconnecting,
    /// Could not be joined.
    Failed,
}

impl ClusterState {
    /// The word used on the bus and in `--json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Discovering => "discovering",
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Degraded => "degraded",
            Self::Disconnecting => "disconnecting",
            Self::Failed => "failed",
        }
    }
}

/// One cluster that this node is in.
#[derive(Debug, Clone)]
pub struct ClusterView {
    /// Its name as typed at the first join.
    pub id: ClusterId,
    /// How the joining goes.
    pub state: ClusterState,
    /// This node takes work for it.
    pub serving: bool,
    /// When it was joined.
    pub joined_at: SystemTime,
    /// This node has announced itself, where there is something to announce to.
    pub announced: bool,
    /// Ways of discovery in use.
    pub discovery: Vec<&'static str>,
    /// Members, sorted by id; shared, because a snapshot is taken often.
    pub members: Vec<Arc<Member>>,
}

/// Why a member is no longer listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GoneReason {
    /// It said goodbye.
    Left,
    /// It was silent for 15 s.
    Timeout,
    /// Its connection broke, or it spoke nonsense.
    Error,
    /// It spoke nonsense three times.
    Banned,
}

impl GoneReason {
    /// The word used on the bus.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Timeout => "timeout",
            Self::Error => "error",
            Self::Banned => "banned",
        }
    }
}
