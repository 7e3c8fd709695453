//! The part of the network task that takes in what other nodes open, and counts those who break the protocol.

use std::sync::Arc;

use libp2p::PeerId;

use super::address::ip_of;
use super::answer::{self, Desk};
use super::streams::Inbound;
use super::task::Task;
use crate::domain::node::{FoundBy, GoneReason};
use crate::wire::version::{INFERENCE_PROTOCOL, PING_PROTOCOL};

impl Task<'_> {
    pub(super) fn on_inbound(&mut self, inbound: Inbound) {
        if inbound.protocol.as_ref() == INFERENCE_PROTOCOL {
            self.accept_lane(inbound);
        } else if inbound.protocol.as_ref() == PING_PROTOCOL {
            self.accept_ping(inbound);
        } else {
            self.accept_hello(inbound);
        }
    }

    /// Another node wants to send prompts.
    fn accept_lane(&mut self, inbound: Inbound) {
        // A stranger's stream is reset unread.
        if !self.members.is_member(&inbound.peer) {
            tracing::debug!(peer = %inbound.peer, "inference stream of a stranger refused");
            return;
        }
        if !self.swarm.behaviour().streams.connections(&inbound.peer).iter().any(|known| known.id == inbound.connection) {
            return; // it closed meanwhile
        }
        let Some(room) = self.rooms.lane(inbound.peer) else {
            tracing::debug!(peer = %inbound.peer, "inference stream refused: the member has enough of them");
            return;
        };
        let desk = Desk {
            permits: self.permits.subscribe(),
            service: Arc::clone(&self.lasting.service),
            seen: Arc::clone(&self.seen),
            working: Arc::clone(&self.working),
            on_connection: Arc::clone(self.serving.entry(inbound.connection).or_default()),
            violations: self.violations.clone(),
            room,
        };
        self.spawn(answer::serve(desk, inbound.peer, inbound.stream));
    }

    /// A peer broke the protocol: the third time it is banned, and whoever comes from where it came from comes slowly.
    pub(super) fn on_violation(&mut self, peer: PeerId) {
        if !self.bans.violation(peer, std::time::Instant::now()) {
            return;
        }
        tracing::warn!(%peer, "peer {peer} banned for ten minutes: it broke the protocol three times");
        for connection in self.swarm.behaviour().streams.connections(&peer) {
            if let Some(ip) = ip_of(&connection.remote).filter(|ip| !connection.relayed && !ip.is_loopback()) {
                self.door.slow_down(ip);
            }
        }
        self.swarm.behaviour_mut().gate.ban(peer);
        self.ledger.heard(peer, FoundBy::Inbound, std::time::Instant::now());
        self.drop_peer(peer, GoneReason::Banned);
        let _ = self.swarm.disconnect_peer_id(peer);
    }
}
