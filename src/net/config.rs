//! What the network task is told once, at its start. Text addresses are checked here, not in the configuration.

use std::time::{Duration, SystemTime};

use super::behaviour::ConnectionCaps;
use crate::domain::node::NodeId;
use crate::wire::version::Versions;

/// Periods and deadlines. The defaults are those of `docs/protocol.md`; tests shorten them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    /// Between two heartbeats to a member.
    pub heartbeat: Duration,
    /// Silence after which a member gets no new prompts.
    pub suspect: Duration,
    /// Silence after which a member is removed.
    pub dead: Duration,
    /// Between two view exchanges.
    pub views: Duration,
    /// How long the higher peer id waits for the lower one to greet.
    pub patience: Duration,
    /// How long the higher peer id waits for the lower one to dial, when both heard of each other on the local network.
    pub patience_lan: Duration,
    /// Longest time between two looks into the DHT while there is no member.
    pub lookup_lonely: Duration,
    /// Between two looks into the DHT otherwise.
    pub lookup: Duration,
    /// How long a second connection to a peer is tolerated.
    pub duplicates: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(5),
            suspect: Duration::from_secs(10),
            dead: Duration::from_secs(15),
            views: Duration::from_secs(30),
            patience: Duration::from_secs(1),
            // Many times what a dial takes there. A node that was away only for a moment is not news to the others, and
            // its own patience is then all that it waits for; one dial too many costs a connection for ten seconds.
            patience_lan: Duration::from_millis(80),
            lookup_lonely: Duration::from_secs(30),
            lookup: Duration::from_secs(300),
            duplicates: Duration::from_secs(10),
        }
    }
}

/// What this node carries for others that cannot reach each other directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relaying {
    /// Be a relay.
    pub enabled: bool,
    /// Places held for others at once.
    pub reservations: usize,
    /// Circuits at once.
    pub circuits: usize,
    /// Bytes of one circuit, both directions together.
    pub circuit_bytes: u64,
    /// How long a circuit may last.
    pub circuit_duration: Duration,
}

impl Default for Relaying {
    fn default() -> Self {
        Self {
            enabled: false,
            reservations: 128,
            circuits: 1024,
            circuit_bytes: 1 << 30,
            circuit_duration: Duration::from_secs(24 * 3600),
        }
    }
}

/// How many members a node stays connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mesh {
    /// Up to this many members of a cluster everybody is connected to everybody.
    pub full: usize,
    /// Above: to this many of them at random.
    pub random: usize,
    /// And to this many that are nearest by round trip.
    pub near: usize,
}

impl Default for Mesh {
    fn default() -> Self {
        Self { full: 64, random: 32, near: 8 }
    }
}

/// A peer that was a member before the last stop: it is tried first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// Who.
    pub id: NodeId,
    /// Where it was reached, best first.
    pub addresses: Vec<String>,
    /// When it was a member last.
    pub last_seen: SystemTime,
}

/// What the network task is told at its start.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Shown to other members; at most 64 bytes.
    pub node_name: String,
    /// Version of this software, shown to other members; at most 32 bytes.
    pub version: String,
    /// Multiaddrs to listen on.
    pub listen: Vec<String>,
    /// When a port of `listen` is taken, take any free one instead of failing.
    pub any_port: bool,
    /// Multiaddrs of nodes to dial at the start; best with `/p2p/…`.
    pub bootstrap: Vec<String>,
    /// Look for members on the local network.
    pub mdns: bool,
    /// Periods and deadlines.
    pub timings: Timings,
    /// How many connections there may be.
    pub caps: ConnectionCaps,
    /// Versions of the membership stream to speak; tests play older nodes.
    pub versions: Versions,
    /// What this node carries for others.
    pub relaying: Relaying,
    /// Multiaddrs at which this node is reached though it does not listen on them: a forwarded port.
    pub announce: Vec<String>,
    /// Members before the last stop, the latest first.
    pub remembered: Vec<Remembered>,
    /// How many members to stay connected to.
    pub mesh: Mesh,
}
