//! The behaviours of the swarm, put together. All of them are infrastructure; what a cluster is, `net::Task` decides.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::identity::Keypair;
use libp2p::kad::{self, StoreInserts};
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol, identify, memory_connection_limits, relay};
use tokio::sync::mpsc;

use super::address::{self, Network};
use super::config::Relaying;
use super::gate::Gate;
use super::guard;
use super::meter::Meters;
use super::punch::{DialBack, Punch, Tester};
use super::relaying;
use super::store::Providers;
use super::streams::{self, Inbound};
use crate::wire::version::{INFERENCE_PROTOCOL, KAD_PROTOCOL, MEMBER_PROTOCOL, PING_PROTOCOL};

/// Names the software family and nothing else: strangers read it.
const IDENTIFY_PROTOCOL: &str = "opengateway/1";
/// Lifetime of a provider record at the nodes that store it.
pub(crate) const PROVIDER_TTL: Duration = Duration::from_secs(30 * 60);
/// Addresses of one peer that are taken from the DHT.
const MAX_DHT_ADDRESSES: usize = 8;
/// Peers in the routing table that connected from one IPv4 address or IPv6 /64.
const MAX_PER_SOURCE: usize = 4;
/// Transports that connections come in by.
const LOBBIES: u32 = 2;
const KAD_QUERY_TIMEOUT: Duration = Duration::from_secs(20);
const KAD_BOOTSTRAP: Duration = Duration::from_secs(5 * 60);

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
            kad: Dht { inner: kademlia(local), networks: Vec::new(), configured: HashSet::new(), sources: HashMap::new() },
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

fn kademlia(local: PeerId) -> kad::Behaviour<Providers> {
    let mut config = kad::Config::new(StreamProtocol::new(KAD_PROTOCOL));
    config
        .set_query_timeout(KAD_QUERY_TIMEOUT)
        .disjoint_query_paths(true)
        // Records are handed to us, checked, and only then stored.
        .set_record_filtering(StoreInserts::FilterBoth)
        .set_provider_record_ttl(Some(PROVIDER_TTL))
        // `net::Task` publishes on its own schedule, which starts earlier and repeats more often.
        .set_provider_publication_interval(None)
        .set_publication_interval(None)
        .set_replication_interval(None)
        .set_periodic_bootstrap_interval(Some(KAD_BOOTSTRAP))
        // Only peers whose identify names our protocol, and configured bootstrap nodes, enter the table.
        .set_kbucket_inserts(kad::BucketInserts::Manual);
    let mut kad = kad::Behaviour::with_config(local, Providers::new(local), config);
    // Server mode is entered when an address of ours is known to be reachable (`net::Task`), never by guessing.
    kad.set_mode(Some(kad::Mode::Client));
    kad
}

/// Kademlia behind a filter: what its answers say of addresses comes from strangers, and it would dial all of them.
pub(crate) struct Dht {
    inner: kad::Behaviour<Providers>,
    /// Networks of this machine: private addresses are dialled there alone.
    pub networks: Vec<Network>,
    /// Addresses from the configuration, dialled whatever they are.
    pub configured: HashSet<Multiaddr>,
    /// Where those in the routing table connected from.
    sources: HashMap<PeerId, IpAddr>,
}

impl Dht {
    /// Whether a peer that connected from `source` may be in the routing table: names cost nothing and addresses do, so one
    /// address has few of the places near a key, however many names it was ground to.
    pub(crate) fn may_enter(&mut self, peer: PeerId, source: Option<IpAddr>) -> bool {
        let Some(source) = source.filter(|ip| !ip.is_loopback()).map(guard::source) else { return true };
        let mut listed = HashSet::new();
        for bucket in self.inner.kbuckets() {
            listed.extend(bucket.iter().map(|entry| *entry.node.key.preimage()));
        }
        self.sources.retain(|known, _| listed.contains(known));
        let neighbours = self.sources.iter().filter(|(known, from)| **from == source && **known != peer).count();
        let may = neighbours < MAX_PER_SOURCE;
        if may {
            self.sources.insert(peer, source);
        }
        may
    }

    /// Forgets the oldest addresses of a peer beyond `most`, the `newest` never: a peer may announce others every second.
    pub(crate) fn keep_newest(&mut self, peer: &PeerId, newest: &[Multiaddr], most: usize) {
        let mut known: Vec<Multiaddr> = Vec::new();
        for bucket in self.inner.kbuckets() {
            if let Some(entry) = bucket.iter().find(|entry| entry.node.key.preimage() == peer) {
                known = entry.node.value.iter().map(address::without_peer).collect();
            }
        }
        let mut surplus = known.len().saturating_sub(most);
        for old in known {
            if surplus > 0 && !newest.contains(&old) && !self.configured.contains(&old) {
                self.inner.remove_address(peer, &old);
                surplus -= 1;
            }
        }
    }
}

impl Deref for Dht {
    type Target = kad::Behaviour<Providers>;
    fn deref(&self) -> &Self::Target {
        &self.inner
    }
}

impl DerefMut for Dht {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.inner
    }
}

impl NetworkBehaviour for Dht {
    type ConnectionHandler = <kad::Behaviour<Providers> as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = kad::Event;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.inner.handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        let mut found = self.inner.handle_pending_outbound_connection(id, peer, addresses, role)?;
        found.retain(|found| {
            let bare = address::without_peer(found);
            self.configured.contains(&bare) || address::dialable(&bare, &self.networks)
        });
        found.truncate(MAX_DHT_ADDRESSES);
        Ok(found)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(cx)
    }
}
