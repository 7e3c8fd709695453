//! What the network task is told once, at its start. Text addresses are checked here, not in the configuration.

use std::time::Duration;

use super::behaviour::ConnectionCaps;
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

/// What the network task is told at its start.
#[derive(Debug, Clone)]
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
}
