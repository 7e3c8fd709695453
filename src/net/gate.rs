//! The behaviour behind the door: refuses banned peers once they have proved who they are.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use super::address::{ip_of, is_circuit};
use super::guard::Knocks;

const BAN: Duration = Duration::from_secs(600);
const MAX_BANNED: usize = 4096;

#[derive(Debug, thiserror::Error)]
#[error("it is banned here: it broke the protocol three times")]
pub(super) struct Banned;

#[derive(Debug, thiserror::Error)]
#[error("too many connections through this relay")]
struct TooFast;

#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Circuits, by the address of the relay that brings them: who comes through it has none of its own, and so passes the
    /// door of the lobby.
    circuits: Knocks,
    banned: HashMap<PeerId, Instant>,
    /// Members and configured nodes: never banned by mistake of a shared address.
    trusted: HashSet<PeerId>,
}

impl Gate {
    /// Lets nobody with this key in for ten minutes.
    pub(crate) fn ban(&mut self, peer: PeerId) {
        let now = Instant::now();
        if self.banned.len() >= MAX_BANNED {
            self.banned.retain(|_, until| *until > now);
            // Names cost nothing: a crowd of banned ones must not let the next one in.
            if let Some(first) = self.banned.iter().min_by_key(|(_, until)| **until).map(|(&peer, _)| peer)
                && self.banned.len() >= MAX_BANNED
            {
                self.banned.remove(&first);
            }
        }
        self.banned.insert(peer, now + BAN);
        self.trusted.remove(&peer);
    }

    pub(crate) fn trust(&mut self, peer: PeerId) {
        self.trusted.insert(peer);
    }

    pub(crate) fn distrust(&mut self, peer: &PeerId) {
        self.trusted.remove(peer);
    }

    fn check(&self, peer: &PeerId) -> Result<(), ConnectionDenied> {
        let banned = self.banned.get(peer).is_some_and(|until| *until > Instant::now());
        if banned && !self.trusted.contains(peer) { Err(ConnectionDenied::new(Banned)) } else { Ok(()) }
    }
}

impl NetworkBehaviour for Gate {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        _: ConnectionId,
        local: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let relay = ip_of(local).filter(|ip| is_circuit(local) && !ip.is_loopback());
        match relay {
            Some(relay) if !self.circuits.allow(relay, Instant::now()) => Err(ConnectionDenied::new(TooFast)),
            _ => Ok(()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(&peer).map(|()| dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.check(&peer).map(|()| dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forty_circuits_of_one_relay_pass_and_the_next_is_refused() {
        let (mut gate, id) = (Gate::default(), ConnectionId::new_unchecked(1));
        let mut through = |local: &str| {
            let remote = format!("/p2p/{}", PeerId::random()).parse().unwrap();
            gate.handle_pending_inbound_connection(id, &local.parse().unwrap(), &remote).is_ok()
        };
        assert_eq!((0..100).filter(|_| through("/ip4/198.51.100.7/tcp/4001/p2p-circuit")).count(), 40);
        assert!(through("/ip4/198.51.100.8/tcp/4001/p2p-circuit"), "another relay");
        assert!(through("/ip4/198.51.100.7/tcp/4001"), "not a circuit");
    }

    #[test]
    fn the_last_of_a_crowd_is_banned_too_and_the_first_is_let_in_again() {
        let mut gate = Gate::default();
        let crowd: Vec<PeerId> = (0..=MAX_BANNED).map(|_| PeerId::random()).collect();
        for peer in &crowd {
            gate.ban(*peer);
        }
        assert_eq!(gate.banned.len(), MAX_BANNED);
        assert!(gate.check(&crowd[MAX_BANNED]).is_err());
        assert!(gate.check(&crowd[0]).is_ok());
    }
}
