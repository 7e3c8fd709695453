//! The DHT: Kademlia with what it leaves open settled, and with its dials counted.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::kad::{self, StoreInserts};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, DialError, DialFailure, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol};

use super::address::{self, Network};
use super::guard;
use super::store::Providers;
use crate::wire::version::KAD_PROTOCOL;

/// Lifetime of a provider record at the nodes that store it.
pub(crate) const PROVIDER_TTL: Duration = Duration::from_secs(30 * 60);
/// Nodes that hold a provider record. It is published every ten minutes, so one of them has to last that long; each lookup asks
/// that many on each of its three paths.
const REPLICAS: NonZeroUsize = NonZeroUsize::new(10).unwrap();
/// Addresses of one peer that are taken from the DHT.
const MAX_DHT_ADDRESSES: usize = 8;
/// Peers in the routing table that connected from one IPv4 address or IPv6 /64.
const MAX_PER_SOURCE: usize = 4;
/// Addresses of one peer in the routing table.
const MAX_ADDRESSES: usize = 8;
/// Peers come into the table together, after so long, where nothing depends on it: each one that comes into a small table by
/// itself has Kademlia ask for its own key and a key of each bucket.
const TOGETHER: Duration = Duration::from_secs(10);
const MAX_WAITING: usize = 64;
const KAD_QUERY_TIMEOUT: Duration = Duration::from_secs(20);
const KAD_BOOTSTRAP: Duration = Duration::from_secs(5 * 60);

fn kademlia(local: PeerId) -> kad::Behaviour<Providers> {
    let mut config = kad::Config::new(StreamProtocol::new(KAD_PROTOCOL));
    config
        .set_query_timeout(KAD_QUERY_TIMEOUT)
        .disjoint_query_paths(true)
        .set_replication_factor(REPLICAS)
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

/// How much a node depends on the DHT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// It knows nobody, or nearly so: the DHT is how members are found.
    Lonely,
    /// It has members who tell of the others.
    Company,
    /// It is well connected in a large cluster, many of whose members are in the DHT too.
    Crowd,
}

impl Need {
    /// Dials at once, and per second after that. With company: two publications, each to the nodes
    /// nearest to a key ([`REPLICAS`]).
    fn allowance(self) -> (f64, f64) {
        match self {
            Self::Lonely => (100.0, 20.0),
            Self::Company => (24.0, 0.5),
            Self::Crowd => (4.0, 0.2),
        }
    }
}

/// Counts the dials of the DHT.
///
/// Whenever a peer enters a small routing table, Kademlia asks for its own key and one key of each bucket, and dials whoever is
/// named: half of all nodes, when a hundred are switched on together. That cannot be turned off
/// (<https://github.com/libp2p/rust-libp2p/pull/4838>); it cost six times the connections that members need.
#[derive(Debug)]
pub(crate) struct Thrift {
    need: Need,
    tokens: f64,
    filled: Instant,
}

impl Thrift {
    fn new(now: Instant) -> Self {
        Self { need: Need::Lonely, tokens: Need::Lonely.allowance().0, filled: now }
    }

    fn refill(&mut self, now: Instant) {
        let (most, per_second) = self.need.allowance();
        let more = now.saturating_duration_since(self.filled).as_secs_f64() * per_second;
        (self.tokens, self.filled) = ((self.tokens + more).min(most), now);
    }

    fn needs(&mut self, need: Need, now: Instant) {
        self.refill(now);
        self.need = need;
    }

    /// Counts a dial, if there is one to be had.
    fn may_dial(&mut self, now: Instant) -> bool {
        self.refill(now);
        let may = self.tokens >= 1.0;
        self.tokens -= f64::from(u8::from(may));
        may
    }
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
    /// Peers that are to come into the table, and when.
    waiting: HashMap<PeerId, Vec<Multiaddr>>,
    due: Option<Instant>,
    thrift: Thrift,
}

impl Dht {
    pub(crate) fn new(local: PeerId, now: Instant) -> Self {
        Self {
            inner: kademlia(local),
            networks: Vec::new(),
            configured: HashSet::new(),
            sources: HashMap::new(),
            waiting: HashMap::new(),
            due: None,
            thrift: Thrift::new(now),
        }
    }

    /// Whether a peer that connected from `source` may be in the routing table: names cost nothing and addresses do, so one
    /// address has few of the places near a key, however many names it was ground to.
    pub(crate) fn may_enter(&mut self, peer: PeerId, source: Option<IpAddr>) -> bool {
        let Some(source) = source.filter(|ip| !ip.is_loopback()).map(guard::source) else { return true };
        let mut listed = HashSet::new();
        for bucket in self.inner.kbuckets() {
            listed.extend(bucket.iter().map(|entry| *entry.node.key.preimage()));
        }
        self.sources.retain(|known, _| listed.contains(known) || self.waiting.contains_key(known));
        let neighbours = self.sources.iter().filter(|(known, from)| **from == source && **known != peer).count();
        let may = neighbours < MAX_PER_SOURCE;
        if may {
            self.sources.insert(peer, source);
        }
        may
    }

    /// A peer that may enter the routing table, and where it says that it is.
    pub(crate) fn enter(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, now: Instant) {
        let is_listed =
            self.inner.kbucket(peer).is_some_and(|bucket| bucket.iter().any(|entry| *entry.node.key.preimage() == peer));
        if is_listed || self.thrift.need == Need::Lonely || self.waiting.len() >= MAX_WAITING {
            self.list(&peer, &addresses);
        } else {
            self.waiting.insert(peer, addresses);
            self.due.get_or_insert(now + TOGETHER);
        }
    }

    fn list(&mut self, peer: &PeerId, addresses: &[Multiaddr]) {
        for address in addresses {
            self.inner.add_address(peer, address.clone());
        }
        self.keep_newest(peer, addresses);
    }

    /// The peer is no node of the DHT any more.
    pub(crate) fn leave(&mut self, peer: &PeerId) {
        self.waiting.remove(peer);
        self.inner.remove_peer(peer);
    }

    /// How much depends on the DHT now. To be called now and then.
    pub(crate) fn needs(&mut self, need: Need, now: Instant) {
        self.thrift.needs(need, now);
        if need == Need::Lonely || self.due.is_some_and(|due| due <= now) {
            self.due = None;
            for (peer, addresses) in std::mem::take(&mut self.waiting) {
                self.list(&peer, &addresses);
            }
        }
    }

    /// A bootstrap has asked for this node's own key, and goes on with a key of each bucket: only who is lonely needs those. The
    /// rest of the table fills with whoever is met.
    pub(crate) fn content_with_neighbours(&mut self, bootstrap: &kad::QueryId) {
        if self.thrift.need != Need::Lonely
            && let Some(mut query) = self.inner.query_mut(bootstrap)
        {
            query.finish();
        }
    }

    /// Forgets the oldest addresses of a peer that has too many, the `newest` never: a peer may announce others every second.
    fn keep_newest(&mut self, peer: &PeerId, newest: &[Multiaddr]) {
        let mut known: Vec<Multiaddr> = Vec::new();
        for bucket in self.inner.kbuckets() {
            if let Some(entry) = bucket.iter().find(|entry| entry.node.key.preimage() == peer) {
                known = entry.node.value.iter().map(address::without_peer).collect();
            }
        }
        let mut surplus = known.len().saturating_sub(MAX_ADDRESSES);
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
        loop {
            match self.inner.poll(cx) {
                Poll::Ready(ToSwarm::Dial { opts }) if !self.thrift.may_dial(Instant::now()) => {
                    // The query goes on with those who are connected.
                    let failure = DialFailure {
                        peer_id: opts.get_peer_id(),
                        error: &DialError::Aborted,
                        connection_id: opts.connection_id(),
                    };
                    self.inner.on_swarm_event(FromSwarm::DialFailure(failure));
                }
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone_dials_a_hundred_and_who_has_company_as_many_as_a_publication_needs() {
        let start = Instant::now();
        let mut thrift = Thrift::new(start);
        let dials = |thrift: &mut Thrift, now| (0..1000).filter(|_| thrift.may_dial(now)).count();
        assert_eq!(dials(&mut thrift, start), 100);
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(1)), 20);
        thrift.needs(Need::Company, start + Duration::from_secs(60));
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(60)), 24);
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(64)), 2);
        thrift.needs(Need::Crowd, start + Duration::from_secs(600));
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(600)), 4);
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(604)), 0);
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(605)), 1);
        thrift.needs(Need::Lonely, start + Duration::from_secs(606));
        assert_eq!(dials(&mut thrift, start + Duration::from_secs(611)), 100);
    }
}
