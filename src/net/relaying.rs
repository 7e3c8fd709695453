//! This node as a relay: what it allows, and what it carries just now.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::time::Duration;

use libp2p::{PeerId, relay};

use super::config::Relaying;
use crate::domain::network::RelayingFacts;

/// Reservations of one peer: one for each of its connections, and few nodes have more than two.
const PLACES_PER_PEER: usize = 4;
/// Circuits of one peer: each is a stream on its connection, which has 64.
const CIRCUITS_PER_PEER: usize = 32;

/// What the library is told. Its own figures are made for a public service that only helps to punch holes: 128 KiB and two
/// minutes for a circuit, which cuts every longer answer.
pub(crate) fn config(relaying: &Relaying) -> relay::Config {
    let limit = |count| NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN);
    let mut config = relay::Config {
        max_reservations: relaying.reservations,
        // The library compares with ">": it grants one more than it is told.
        max_reservations_per_peer: PLACES_PER_PEER - 1,
        max_circuits: relaying.circuits,
        max_circuits_per_peer: CIRCUITS_PER_PEER - 1,
        // Zero bytes would be without limit, zero time would end every circuit at once
        // (https://github.com/libp2p/rust-libp2p/issues/5170); the configuration refuses both.
        max_circuit_bytes: relaying.circuit_bytes.max(1),
        max_circuit_duration: relaying.circuit_duration.max(Duration::from_secs(1)),
        ..relay::Config::default()
    };
    // The library allows four circuits to a peer and thirty new ones in an hour. Here a peer may have 32, which all come
    // again together when it was away for a moment, and many peers may be behind one address.
    config.circuit_src_rate_limiters.clear();
    config.circuit_src_per_peer(limit(4 * 32), Duration::from_secs(5)).circuit_src_per_ip(limit(16 * 32), Duration::from_secs(1))
}

/// What is carried, as the library tells it event by event.
#[derive(Debug, Default)]
pub(crate) struct Load {
    holders: HashSet<PeerId>,
    circuits: HashMap<(PeerId, PeerId), u32>,
    refused: u64,
}

impl Load {
    /// Takes an event in. `connected` tells whether a peer still has a connection: the library says "reservation closed" of
    /// every connection that closes, with or without one.
    pub(crate) fn on_event(&mut self, event: &relay::Event, connected: impl Fn(&PeerId) -> bool) {
        match event {
            relay::Event::ReservationReqAccepted { src_peer_id, .. } => drop(self.holders.insert(*src_peer_id)),
            relay::Event::ReservationTimedOut { src_peer_id } => drop(self.holders.remove(src_peer_id)),
            relay::Event::ReservationClosed { src_peer_id } if !connected(src_peer_id) => drop(self.holders.remove(src_peer_id)),
            relay::Event::CircuitReqAccepted { src_peer_id, dst_peer_id } => {
                *self.circuits.entry((*src_peer_id, *dst_peer_id)).or_default() += 1;
            }
            relay::Event::CircuitClosed { src_peer_id, dst_peer_id, .. } => {
                let pair = (*src_peer_id, *dst_peer_id);
                if let Some(count) = self.circuits.get_mut(&pair) {
                    *count -= 1;
                    if *count == 0 {
                        self.circuits.remove(&pair);
                    }
                }
            }
            relay::Event::ReservationReqDenied { .. }
            | relay::Event::CircuitReqDenied { status: relay::StatusCode::ResourceLimitExceeded, .. } => self.refused += 1,
            _ => {}
        }
    }

    /// Whether something of this peer is carried or held: its connections are not closed for tidiness.
    pub(crate) fn serves(&self, peer: &PeerId) -> bool {
        self.holders.contains(peer) || self.circuits.keys().any(|(from, to)| from == peer || to == peer)
    }

    pub(crate) fn facts(&self) -> RelayingFacts {
        let circuits: u32 = self.circuits.values().sum();
        let reservations = u32::try_from(self.holders.len()).unwrap_or(u32::MAX);
        RelayingFacts { reservations, circuits, refused: self.refused }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_carried_is_counted_and_given_back() {
        let (mut load, a, b) = (Load::default(), PeerId::random(), PeerId::random());
        let accepted = |renewed| relay::Event::ReservationReqAccepted { src_peer_id: a, renewed };
        for event in [
            accepted(false),
            accepted(true),
            relay::Event::CircuitReqAccepted { src_peer_id: b, dst_peer_id: a },
            relay::Event::CircuitReqAccepted { src_peer_id: b, dst_peer_id: a },
        ] {
            load.on_event(&event, |_| true);
        }
        assert_eq!(load.facts(), RelayingFacts { reservations: 1, circuits: 2, refused: 0 });
        assert!(load.serves(&a) && load.serves(&b) && !load.serves(&PeerId::random()));
        let closed = relay::Event::ReservationClosed { src_peer_id: a };
        load.on_event(&closed, |_| true);
        assert_eq!(load.facts().reservations, 1, "one connection of several closed");
        load.on_event(&closed, |_| false);
        for _ in 0..3 {
            load.on_event(&relay::Event::CircuitClosed { src_peer_id: b, dst_peer_id: a, error: None }, |_| false);
        }
        assert_eq!(load.facts(), RelayingFacts::default());
    }

    #[test]
    fn the_limits_are_those_of_the_configuration_and_never_zero() {
        let relaying = Relaying { circuit_bytes: 0, circuit_duration: Duration::ZERO, ..Relaying::default() };
        let config = config(&relaying);
        assert_eq!((config.max_reservations, config.max_circuits), (128, 1024));
        assert_eq!((config.max_reservations_per_peer, config.max_circuits_per_peer), (3, 31));
        assert!(config.max_circuit_bytes > 0 && config.max_circuit_duration > Duration::ZERO);
    }
}
