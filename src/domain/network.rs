//! What a node knows of its network, in words that every layer understands: the facts from which `domain::doctor` draws
//! its findings. `net` gathers them ([`crate::net::Handle::facts`]); nothing here is of libp2p.

use std::time::{Duration, SystemTime};

use super::cluster::ClusterId;
use super::node::{FoundBy, NodeId};

/// The node between two that have no direct connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Who it is.
    pub id: NodeId,
    /// Its name, when it is a member of a cluster that this node is in.
    pub name: Option<String>,
}

/// What came of a dial to one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DialOutcome {
    /// A connection.
    Connected,
    /// The machine is there and nothing listens.
    Refused,
    /// No answer: a firewall that drops, or no machine.
    TimedOut,
    /// No way there: no route, no network, an address that is down.
    Unreachable,
    /// Another node answers there.
    WrongPeer(NodeId),
    /// It is this node itself that answers.
    Ourselves,
    /// A limit or a ban, here or there.
    Denied(String),
    /// Anything else, as the transport said it.
    Other(String),
}

/// One dial to one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Where, without the peer id.
    pub address: String,
    /// How long ago.
    pub ago: Duration,
    /// What came of it.
    pub outcome: DialOutcome,
}

/// How greeting a peer in a cluster went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GreetOutcome {
    /// It is a member.
    Member,
    /// It let go of the hello without a word: it is not in that cluster (or has not joined yet).
    Refused,
    /// It is in the cluster and has no version of the membership protocol in common with us.
    VersionMismatch,
    /// It broke the protocol.
    Violation,
    /// It did not answer in time, or the connection broke.
    Failed,
    /// It was a member and one of the two said goodbye.
    Left,
    /// Another machine with the same identity is in the cluster already.
    SameIdentity,
}

/// The last greeting of a peer in a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// In which cluster.
    pub cluster: ClusterId,
    /// How long ago.
    pub ago: Duration,
    /// How it went.
    pub outcome: GreetOutcome,
    /// Versions of the membership protocol that the peer speaks, from its oldest to its newest, where it said so.
    pub versions: Option<(u16, u16)>,
}

/// A connection to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Address of the other end.
    pub address: String,
    /// This node dialled.
    pub dialed: bool,
    /// "quic" or "tcp".
    pub transport: &'static str,
    /// Who carries it, when it is not direct.
    pub relay: Option<Relay>,
    /// For how long.
    pub age: Duration,
}

/// What is known of a peer: member, candidate, or one that was met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    /// Who.
    pub id: NodeId,
    /// Its name, if it ever told it.
    pub name: Option<String>,
    /// Where it was heard of.
    pub sources: Vec<FoundBy>,
    /// How long ago it was heard of last.
    pub heard_ago: Option<Duration>,
    /// How long ago it was heard on the local network last: it was awake then.
    pub mdns_ago: Option<Duration>,
    /// Addresses that would be dialled.
    pub addresses: Vec<String>,
    /// The last dial to each address, the newest first; at most 8.
    pub attempts: Vec<Attempt>,
    /// When it is dialled next, if it is to be.
    pub next_dial: Option<Duration>,
    /// Open connections, best first.
    pub links: Vec<Link>,
    /// The last greeting in each cluster.
    pub greetings: Vec<Greeting>,
    /// Clusters in which it is a member now.
    pub member_of: Vec<ClusterId>,
    /// It is a member that has been silent for so long that it gets no new prompts.
    pub suspect: bool,
    /// It broke the protocol three times and is not let in for ten minutes.
    pub banned: bool,
    /// It is a configured bootstrap node.
    pub bootstrap: bool,
}

/// mDNS on one interface, one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MdnsFacts {
    /// Name of the interface.
    pub interface: String,
    /// IPv6 instead of IPv4.
    pub ipv6: bool,
    /// Packets sent.
    pub sent: u64,
    /// Packets heard from others.
    pub heard: u64,
    /// Nodes heard in the last ten minutes.
    pub nodes: u32,
    /// Since when the last packet of another machine was heard.
    pub heard_ago: Option<Duration>,
    /// Why it does not work there.
    pub problem: Option<String>,
    /// That is a failure, and nothing that lies in the nature of the interface.
    pub failed: bool,
}

/// An interface of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceFacts {
    /// Its name.
    pub name: String,
    /// It has a carrier and is up.
    pub up: bool,
    /// It can send to a multicast group (a point-to-point link often cannot).
    pub multicast: bool,
    /// Its addresses, without prefix lengths.
    pub addresses: Vec<String>,
}

/// A configured bootstrap node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapFacts {
    /// As configured.
    pub address: String,
    /// Who is there, once known.
    pub peer: Option<NodeId>,
    /// It is connected.
    pub connected: bool,
    /// What each address that its name stands for said last.
    pub attempts: Vec<Attempt>,
    /// Why it is not reached, a phrase.
    pub problem: Option<String>,
}

/// What lies between this node and the rest of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nat {
    /// Nobody outside has told yet.
    #[default]
    Unknown,
    /// Others see the address that this node listens on, or dialled it successfully.
    None,
    /// Others see another address; the port is kept for all of them, so that holes can be punched.
    Cone,
    /// Others see another address, and each another port: no hole can be punched, a relay has to carry.
    Symmetric,
}

impl Nat {
    /// The word used on the bus and in `--json`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::Cone => "cone",
            Self::Symmetric => "symmetric",
        }
    }
}

/// A place held at a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationFacts {
    /// Which relay.
    pub relay: Relay,
    /// It holds now.
    pub accepted: bool,
    /// Why not, a phrase.
    pub problem: Option<String>,
}

/// What this node carries for others as a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RelayingFacts {
    /// Places held here.
    pub reservations: u32,
    /// Circuits that run.
    pub circuits: u32,
    /// Refusals since the start, for want of budget.
    pub refused: u64,
}

/// How others reach this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReachFacts {
    /// What lies between.
    pub nat: Nat,
    /// Addresses at which others see this node.
    pub observed: Vec<String>,
    /// Addresses that are announced: confirmed, configured, or of a relay.
    pub announced: Vec<String>,
    /// Addresses that another node dialled back and did not reach, with the reason.
    pub unreachable: Vec<(String, String)>,
    /// Places held at relays.
    pub reservations: Vec<ReservationFacts>,
    /// `None` when this node is no relay.
    pub relaying: Option<RelayingFacts>,
}

/// The distributed hash table, in which nodes of different networks find each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DhtFacts {
    /// It answers others' questions; else it only asks.
    pub server: bool,
    /// Nodes in its table.
    pub peers: usize,
    /// Since when the last query for a cluster ended with an answer of somebody.
    pub answered_ago: Option<Duration>,
}

/// A joined cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterFacts {
    /// Which.
    pub id: ClusterId,
    /// Since when.
    pub joined_ago: Duration,
    /// Members that are listed, but for this node.
    pub members: usize,
    /// Of those: only told of by others, without a connection.
    pub known: usize,
    /// Of those: that take prompts.
    pub serving: usize,
    /// This node takes prompts for it.
    pub serves: bool,
    /// It is announced in the DHT.
    pub announced: bool,
}

/// Connections that this node did not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedFacts {
    /// How many since the start.
    pub count: u64,
    /// How long ago the last one was.
    pub ago: Duration,
    /// Why, a phrase.
    pub reason: String,
}

/// Everything that `net` knows of the network, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// When.
    pub at: SystemTime,
    /// This node.
    pub id: NodeId,
    /// Addresses that are listened on.
    pub listening: Vec<String>,
    /// Configured addresses that could not be listened on, with the reason.
    pub not_listening: Vec<(String, String)>,
    /// Interfaces of this machine but the loopback.
    pub interfaces: Vec<InterfaceFacts>,
    /// mDNS is configured to be on.
    pub mdns_enabled: bool,
    /// mDNS is off for a while because somebody flooded it.
    pub mdns_flooded: bool,
    /// mDNS on each interface.
    pub mdns: Vec<MdnsFacts>,
    /// Configured bootstrap nodes.
    pub bootstrap: Vec<BootstrapFacts>,
    /// How others reach this node.
    pub reach: ReachFacts,
    /// The DHT.
    pub dht: DhtFacts,
    /// Joined clusters.
    pub clusters: Vec<ClusterFacts>,
    /// Peers: members, candidates, and those that were met; at most 256, the one that was asked about and those with trouble
    /// first.
    pub peers: Vec<PeerFacts>,
    /// Addresses of another machine that uses this node's identity.
    pub same_identity: Vec<String>,
    /// Two members say so, or this node heard it itself or was turned away for it.
    pub same_identity_certain: bool,
    /// Connections in all, and how many there may be.
    pub connections: (usize, usize),
    /// Connections that a limit of this node kept out.
    pub refused: Option<RefusedFacts>,
    /// Versions of the membership protocol that this node speaks, from the oldest to the newest.
    pub versions: (u16, u16),
}

/// One member, and how it answered when it was asked for a sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinged {
    /// Who.
    pub id: NodeId,
    /// Its name, if it is known.
    pub name: Option<String>,
    /// The connection that was used.
    pub link: Link,
    /// Round trips, in order; fewer than were asked for when one was not answered.
    pub round_trips: Vec<Duration>,
}

/// Why a peer could not be pinged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PingError {
    /// No peer of this id or name is known.
    #[error("no peer {0} is known here")]
    NoSuchPeer(String),
    /// Several peers have this name; the second text names their ids.
    #[error("several peers are called {0}: name one of them by its peer id: {1}")]
    Ambiguous(String, String),
    /// This node itself is meant.
    #[error("that is this node itself")]
    Ourselves,
    /// It is known and there is no connection, nor could one be made.
    #[error("{0} is not connected, and dialling it failed: {1}")]
    NotConnected(String, String),
    /// It is connected and did not answer in time.
    #[error("{0} is connected and does not answer")]
    NoAnswer(String),
    /// It is connected, answers, and is too old to know pings.
    #[error("{0} is connected, and too old to be pinged")]
    Unsupported(String),
    /// Too many pings at once.
    #[error("too many pings are running")]
    Busy,
    /// The network task has stopped.
    #[error("the network task has stopped")]
    Stopped,
}
