//! The behaviours of the swarm, put together. All of them are infrastructure; what a cluster is, `net::Task` decides.

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{StreamProtocol, identify, memory_connection_limits, relay};
use tokio::sync::mpsc;

use super::config::Relaying;
use super::dht::Dht;
use super::gate::Gate;
use super::meter::Meters;
use super::punch::{DialBack, Punch, Tester};
use super::relaying;
use super::streams::{self, Inbound};
use crate::wire::version::{INFERENCE_PROTOCOL, MEMBER_PROTOCOL, PING_PROTOCOL};

/// Names the software family and nothing else: strangers read it.
const IDENTIFY_PROTOCOL: &str = "opengateway/1";
/// Transports that connections come in by.
const LOBBIES: u32 = 2;

/// How many connections there may be; members and configured bootstrap nodes are exempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionCaps {
    /// Incoming, not authenticated yet, of each transport.
    pub pending_incoming: u32,
    /// Outgoing, not authenticated yet.
    pub pending_outgoing: u32,
    /// Incoming, established.
    pub established_incoming: u32,
    /// Established in all.
    pub established: u32,
    /// Established with one peer.
    pub per_peer: u32,
    /// Resident memory of the process above which no connection is accepted, in bytes.
    pub memory_bytes: usize,
}

impl Default for ConnectionCaps {
    fn default() -> Self {
        Self {
            pending_incoming: 64,
            pending_outgoing: 64,
            established_incoming: 256,
            established: 384,
            per_peer: 4,
            memory_bytes: 512 << 20,
        }
    }
}

/// The swarm's behaviour.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub gate: Gate,
    pub limits: connection_limits::Behaviour,
    pub memory: memory_connection_limits::Behaviour,
    pub identify: identify::Behaviour,
    pub kad: Dht,
    pub streams: streams::Behaviour,
    /// Circuits through other nodes, and places at them.
    pub relay_client: relay::client::Behaviour,
    /// Circuits of others through this node.
    pub relay: Toggle<relay::Behaviour>,
    pub punch: Punch,
    pub tester: Tester,
    pub dial_back: DialBack,
}

/// The parts of a behaviour that are made elsewhere.
pub(crate) struct Parts {
    pub gate: Gate,
    pub inbound: mpsc::Sender<Inbound>,
    pub relay_client: relay::client::Behaviour,
    pub meters: Meters,
}

impl Behaviour {
    pub(crate) fn new(keypair: &Keypair, caps: ConnectionCaps, relaying: &Relaying, parts: Parts) -> Self {
        let Parts { gate, inbound, relay_client, meters } = parts;
        let local = keypair.public().to_peer_id();
        let limits = ConnectionLimits::default()
            // The lobbies keep the limit. Those that made room for others stay in this count until they are taken away.
            .with_max_pending_incoming(Some(caps.pending_incoming.saturating_mul(LOBBIES * 4)))
            .with_max_pending_outgoing(Some(caps.pending_outgoing))
            .with_max_established_incoming(Some(caps.established_incoming))
            .with_max_established(Some(caps.established))
            .with_max_established_per_peer(Some(caps.per_peer));
        let identify = identify::Config::new(IDENTIFY_PROTOCOL.to_owned(), keypair.public())
            .with_agent_version(IDENTIFY_PROTOCOL.to_owned())
            .with_hide_listen_addrs(true)
            .with_cache_size(0);
        Self {
            gate,
            limits: connection_limits::Behaviour::new(limits),
            memory: memory_connection_limits::Behaviour::with_max_bytes(caps.memory_bytes),
            identify: identify::Behaviour::new(identify),
            kad: Dht::new(local, std::time::Instant::now()),
            streams: streams::Behaviour::new(
                [MEMBER_PROTOCOL, INFERENCE_PROTOCOL, PING_PROTOCOL].map(StreamProtocol::new).to_vec(),
                inbound,
                meters,
            ),
            relay_client,
            relay: relaying.enabled.then(|| relay::Behaviour::new(local, relaying::config(relaying))).into(),
            punch: Punch::new(local),
            tester: Tester::default(),
            dial_back: DialBack::new(std::time::Instant::now()),
        }
    }
}
