//! The behaviours of libp2p that find a way through NAT, each behind a filter of ours: what addresses they try is decided
//! here and in `net::nat`, never by what strangers say.
//!
//! [`Punch`] is hole punching (DCUtR), [`Tester`] asks others to dial us back (AutoNAT v2), [`DialBack`] does that for them.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::Instant;

use either::Either;
use libp2p::autonat::v2::{client, server};
use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::behaviour::NewExternalAddrCandidate;
use libp2p::swarm::derive_prelude::{ConnectionClosed, ConnectionEstablished};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId, dcutr};

use super::address::{self, Network, ip_of};
use super::guard::Knocks;

/// Addresses that one attempt may dial; the message of the library holds more than a hundred.
const MAX_PUNCHED: usize = 16;
/// Dials that others may have us make, at once and per second. Each of them costs its asker a stream and, mostly, 30 KB.
const DIAL_BACK_BURST: f64 = 50.0;
const DIAL_BACKS_PER_SECOND: f64 = 5.0;

#[derive(Debug, thiserror::Error)]
#[error("not an address that this node would dial")]
struct NotDialable;

#[derive(Debug, thiserror::Error)]
#[error("too many dials for others")]
struct TooMany;

/// Hole punching over a relayed connection. The addresses that the other side shall dial are given to it by
/// [`Punch::candidate`] alone: those of identify are of anybody, and rewritten to ports that no NAT ever gave.
pub(crate) struct Punch {
    inner: dcutr::Behaviour,
    fed: HashSet<Multiaddr>,
    /// Dials that are its own, until the swarm asks about them.
    dials: HashSet<ConnectionId>,
    /// Networks of this machine: private addresses are dialled there alone.
    pub networks: Vec<Network>,
}

impl Punch {
    pub(crate) fn new(local: PeerId) -> Self {
        Self { inner: dcutr::Behaviour::new(local), fed: HashSet::new(), dials: HashSet::new(), networks: Vec::new() }
    }

    /// An address at which this node might be reached while it dials.
    pub(crate) fn candidate(&mut self, address: &Multiaddr) {
        if self.fed.len() >= 4 * MAX_PUNCHED {
            self.fed.clear();
        }
        if self.fed.insert(address.clone()) {
            let event = NewExternalAddrCandidate { addr: address };
            self.inner.on_swarm_event(FromSwarm::NewExternalAddrCandidate(event));
        }
    }
}

impl NetworkBehaviour for Punch {
    type ConnectionHandler = <dcutr::Behaviour as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = dcutr::Event;

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
        _: Option<PeerId>,
        addresses: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        let sane = |found: &Multiaddr| address::dialable(&address::without_peer(found), &self.networks);
        if self.dials.remove(&id) && (addresses.len() > MAX_PUNCHED || !addresses.iter().all(sane)) {
            return Err(ConnectionDenied::new(NotDialable));
        }
        Ok(Vec::new())
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
        if !matches!(event, FromSwarm::NewExternalAddrCandidate(_)) {
            self.inner.on_swarm_event(event);
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        let action = self.inner.poll(cx);
        if let Poll::Ready(ToSwarm::Dial { opts }) = &action {
            self.dials.insert(opts.connection_id());
        }
        action
    }
}

/// Asks other nodes whether they reach this one at an address, on another connection than the one that they have.
///
/// The library tests loopback addresses (<https://github.com/libp2p/rust-libp2p/issues/5526>) and never tests an address
/// again: candidates come from [`Tester::candidate`] alone, and [`Tester::reset`] begins anew.
#[derive(Default)]
pub(crate) struct Tester {
    inner: client::Behaviour,
    /// Connections that the inner behaviour was told of.
    known: HashSet<ConnectionId>,
    fed: HashSet<Multiaddr>,
    /// Candidates without an outcome. While there are none its timer, which rings every five seconds, is not wound up.
    waiting: HashSet<Multiaddr>,
    awake: bool,
}

impl Tester {
    /// To be tested as soon as somebody is connected who does that.
    pub(crate) fn candidate(&mut self, address: &Multiaddr) {
        if self.fed.len() < MAX_PUNCHED && self.fed.insert(address.clone()) {
            self.waiting.insert(address.clone());
            let event = NewExternalAddrCandidate { addr: address };
            self.inner.on_swarm_event(FromSwarm::NewExternalAddrCandidate(event));
        }
    }

    /// Forgets all outcomes: the network is another one.
    pub(crate) fn reset(&mut self) {
        *self = Self { awake: true, ..Self::default() };
    }
}

impl NetworkBehaviour for Tester {
    type ConnectionHandler = Either<THandler<client::Behaviour>, dummy::ConnectionHandler>;
    type ToSwarm = client::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if address::is_circuit(local) {
            return Ok(Either::Right(dummy::ConnectionHandler));
        }
        self.inner.handle_established_inbound_connection(id, peer, local, remote).map(Either::Left)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if address::is_circuit(address) {
            return Ok(Either::Right(dummy::ConnectionHandler));
        }
        self.inner.handle_established_outbound_connection(id, peer, address, role, port).map(Either::Left)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        let passes = match &event {
            FromSwarm::NewExternalAddrCandidate(_) => false,
            FromSwarm::ConnectionEstablished(ConnectionEstablished { connection_id, .. }) => self.known.insert(*connection_id),
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => self.known.remove(connection_id),
            _ => true,
        };
        if passes {
            self.inner.on_swarm_event(event);
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        // A handler that was made before a reset speaks of what nobody remembers.
        if let Either::Left(event) = event
            && self.known.contains(&id)
        {
            self.awake = true;
            self.inner.on_connection_handler_event(peer, id, event);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if !self.awake && self.waiting.is_empty() {
            return Poll::Pending;
        }
        let action = self.inner.poll(cx);
        match &action {
            Poll::Pending => self.awake = false,
            Poll::Ready(ToSwarm::GenerateEvent(event)) => drop(self.waiting.remove(&event.tested_addr)),
            Poll::Ready(_) => {}
        }
        action.map(|action| action.map_in(Either::Left))
    }
}

/// Dials other nodes back to tell them whether they are reachable: at the IP address that they come from and nowhere else,
/// so that nobody can have a third party dialled.
pub(crate) struct DialBack {
    inner: server::Behaviour,
    /// This node is reachable itself: what it cannot dial is then not its own fault.
    pub enabled: bool,
    clients: HashMap<ConnectionId, (PeerId, IpAddr)>,
    dials: HashSet<ConnectionId>,
    knocks: Knocks,
    tokens: f64,
    filled: Instant,
    /// Networks of this machine: private addresses are dialled there alone.
    pub networks: Vec<Network>,
}

impl DialBack {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            inner: server::Behaviour::default(),
            enabled: false,
            clients: HashMap::new(),
            dials: HashSet::new(),
            knocks: Knocks::default(),
            tokens: DIAL_BACK_BURST,
            filled: now,
            networks: Vec::new(),
        }
    }

    /// Whether `client` may be dialled at `address` now.
    fn allow(&mut self, client: PeerId, address: &Multiaddr, now: Instant) -> Result<(), ConnectionDenied> {
        let bare = address::without_peer(address);
        let ip = ip_of(&bare).filter(|_| address::dialable(&bare, &self.networks) && !address::is_circuit(&bare));
        let Some(ip) = ip.filter(|&ip| self.clients.values().any(|&known| known == (client, ip))) else {
            return Err(ConnectionDenied::new(NotDialable));
        };
        let refill = now.duration_since(self.filled).as_secs_f64() * DIAL_BACKS_PER_SECOND;
        self.tokens = (self.tokens + refill).min(DIAL_BACK_BURST);
        self.filled = now;
        if self.tokens < 1.0 || !self.knocks.allow(ip, now) {
            return Err(ConnectionDenied::new(TooMany));
        }
        self.tokens -= 1.0;
        Ok(())
    }
}

impl NetworkBehaviour for DialBack {
    type ConnectionHandler = Either<THandler<server::Behaviour>, dummy::ConnectionHandler>;
    type ToSwarm = server::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if !self.enabled || address::is_circuit(local) {
            return Ok(Either::Right(dummy::ConnectionHandler));
        }
        self.inner.handle_established_inbound_connection(id, peer, local, remote).map(Either::Left)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        if self.dials.remove(&id)
            && let (Some(peer), Some(address)) = (peer, addresses.first())
        {
            self.allow(peer, address, Instant::now())?;
        }
        Ok(Vec::new())
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if address::is_circuit(address) {
            return Ok(Either::Right(dummy::ConnectionHandler));
        }
        self.inner.handle_established_outbound_connection(id, peer, address, role, port).map(Either::Left)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                if let Some(ip) = ip_of(endpoint.get_remote_address()).filter(|_| !endpoint.is_relayed()) {
                    self.clients.insert(*connection_id, (*peer_id, ip));
                }
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => drop(self.clients.remove(connection_id)),
            _ => {}
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        let Either::Left(event) = event;
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        let action = self.inner.poll(cx);
        if let Poll::Ready(ToSwarm::Dial { opts }) = &action {
            self.dials.insert(opts.connection_id());
        }
        action.map(|action| action.map_in(Either::Left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(ip: &str) -> Multiaddr {
        format!("/ip4/{ip}/udp/4001/quic-v1").parse().unwrap()
    }

    #[test]
    fn others_are_dialled_back_where_they_come_from_and_not_too_often() {
        let (now, client) = (Instant::now(), PeerId::random());
        let mut server = DialBack::new(now);
        server.clients.insert(ConnectionId::new_unchecked(1), (client, "192.0.2.1".parse().unwrap()));
        assert!(server.allow(client, &at("192.0.2.2"), now).is_err(), "a third party");
        assert!(server.allow(PeerId::random(), &at("192.0.2.1"), now).is_err(), "somebody else's address");
        let circuit = address::circuit(&at("192.0.2.1"), client);
        assert!(server.allow(client, &circuit, now).is_err());
        let served = (0..200).filter(|_| server.allow(client, &at("192.0.2.1"), now).is_ok()).count();
        assert_eq!(served, 40, "one source");
        for other in 2..60_u8 {
            let ip = format!("192.0.2.{other}");
            server.clients.insert(ConnectionId::new_unchecked(other.into()), (client, ip.parse().unwrap()));
            let _ = server.allow(client, &at(&ip), now);
        }
        assert!(server.tokens < 1.0, "all sources together");
        assert!(server.allow(client, &at("192.0.2.9"), now + Duration::from_secs(1)).is_ok());
    }

    #[test]
    fn a_hole_is_punched_to_sane_addresses_and_not_to_a_hundred() {
        let mut punch = Punch::new(PeerId::random());
        let mut dial = |id, addresses: Vec<Multiaddr>| {
            let id = ConnectionId::new_unchecked(id);
            punch.dials.insert(id);
            punch.handle_pending_outbound_connection(id, None, &addresses, Endpoint::Dialer).is_ok()
        };
        assert!(dial(1, vec![at("192.0.2.1"); MAX_PUNCHED]));
        assert!(!dial(2, vec![at("192.0.2.1"); MAX_PUNCHED + 1]));
        for bad in ["127.0.0.1", "169.254.169.254", "10.0.0.1", "0.0.0.0"] {
            assert!(!dial(3, vec![at("192.0.2.1"), at(bad)]), "{bad}");
        }
        // Dials of others are none of its business.
        assert!(punch.handle_pending_outbound_connection(ConnectionId::new_unchecked(9), None, &[], Endpoint::Dialer).is_ok());
    }
}
