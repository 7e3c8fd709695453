//! The part of the network task that holds places at relays, for as long as nobody reaches this node directly.
//!
//! libp2p renews a reservation and never makes a lost one again
//! (<https://github.com/libp2p/rust-libp2p/issues/6285>, <https://github.com/libp2p/rust-libp2p/issues/2621>): a listener
//! that closes is opened anew here. No listener of a relay is ever removed by us: the library panics when the relay's
//! answer finds it gone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use libp2p::core::transport::ListenerId;
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::task::{Due, Task};
use super::{address, jitter};
use crate::domain::network::ReservationFacts;

/// Relays that a node holds a place at: when one goes, the other carries on.
const WANTED: usize = 2;
/// Pauses between two tries at one relay: the first, the longest while there is no other place, and otherwise.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_WITHOUT: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(60);
/// A relay that refused tries in a row is forgotten, unless it is a configured bootstrap node.
const MAX_FAILURES: u32 = 6;
/// Addresses through one relay that are announced: the ways to it over both transports and both families.
const MAX_ANNOUNCED: usize = 4;
/// Relays that are remembered.
const MAX_HOPS: usize = 64;

/// One relay that a place is held at, or was.
#[derive(Debug)]
struct Place {
    /// Where the relay is reached.
    relay: Multiaddr,
    listener: Option<ListenerId>,
    accepted: bool,
    failures: u32,
    /// When it is tried again, if it is to be.
    again: Option<Instant>,
    problem: Option<String>,
    announced: Vec<Multiaddr>,
}

/// The places of this node.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// Connected peers that are relays, with where else than on their connection they say that they are.
    hops: HashMap<PeerId, Option<Multiaddr>>,
    places: BTreeMap<PeerId, Place>,
}

/// Which addresses are not worth announcing twice: same way to the same kind of network.
fn kind(address: &Multiaddr) -> (bool, bool, bool) {
    let carrier: Multiaddr = address.iter().take_while(|part| !matches!(part, libp2p::multiaddr::Protocol::P2p(_))).collect();
    let ipv6 = address::ip_of(address).is_some_and(|ip| ip.is_ipv6());
    (ipv6, address::is_quic(address), address::is_global(&carrier))
}

impl Places {
    fn by_listener(&mut self, id: ListenerId) -> Option<(PeerId, &mut Place)> {
        self.places.iter_mut().find(|(_, place)| place.listener == Some(id)).map(|(relay, place)| (*relay, place))
    }

    fn held(&self) -> usize {
        self.places.values().filter(|place| place.listener.is_some()).count()
    }

    fn any_accepted(&self) -> bool {
        self.places.values().any(|place| place.accepted)
    }

    /// A place is held there or asked for.
    pub(crate) fn is_at(&self, relay: &PeerId) -> bool {
        self.places.get(relay).is_some_and(|place| place.listener.is_some())
    }

    /// Why the last dial to a relay failed, for people.
    pub(crate) fn not_reached(&mut self, relay: &PeerId, why: String) {
        if let Some(place) = self.places.get_mut(relay).filter(|place| !place.accepted) {
            place.problem = Some(why);
        }
    }

    /// Enters the end of a place; gives the addresses to announce no more, and whether it had been held.
    fn lost(&mut self, id: ListenerId, why: Option<String>, now: Instant) -> Option<(PeerId, Vec<Multiaddr>, bool)> {
        let (relay, place) = self.by_listener(id)?;
        let held = std::mem::take(&mut place.accepted);
        place.listener = None;
        place.failures = if held { 0 } else { place.failures + 1 };
        if let Some(why) = why {
            place.problem = Some(why);
        } else if held || place.problem.is_none() {
            place.problem = Some("the connection to it was lost".to_owned());
        }
        let gone = std::mem::take(&mut place.announced);
        let failures = place.failures;
        let longest = if self.any_accepted() { LONGEST } else { LONGEST_WITHOUT };
        let pause = (FIRST_PAUSE * (1 << failures.min(10))).min(longest);
        if let Some(place) = self.places.get_mut(&relay) {
            place.again = Some(now + if held { FIRST_PAUSE } else { jitter(pause) });
        }
        Some((relay, gone, held))
    }

    /// Enters a connected peer that is a relay; false when there is no room. Strangers make room for `trusted` ones.
    fn enter_hop(&mut self, peer: PeerId, said: Option<Multiaddr>, trusted: impl Fn(&PeerId) -> bool) -> bool {
        if self.hops.len() >= MAX_HOPS && !self.hops.contains_key(&peer) {
            if !trusted(&peer) {
                return false;
            }
            let strangers = self.hops.keys().filter(|known| !trusted(known));
            if let Some(stranger) = strangers.min_by_key(|known| (self.is_at(known), **known)).copied() {
                self.hops.remove(&stranger);
            }
        }
        self.hops.insert(peer, said);
        true
    }

    /// Forgets a relay at which no place is held or asked for.
    fn drop_idle(&mut self, relay: &PeerId) {
        if !self.is_at(relay) {
            self.places.remove(relay);
        }
    }

    /// Forgets relays that refuse; `keep` names those that stay whatever they do.
    fn tidy(&mut self, keep: impl Fn(&PeerId) -> bool) {
        self.places.retain(|relay, place| place.listener.is_some() || place.failures < MAX_FAILURES || keep(relay));
    }
}

impl Task<'_> {
    /// A relay that others than itself speak for: a member, of now or before, or what the operator named.
    fn is_trusted(&self, relay: &PeerId) -> bool {
        let was_member = self.book.get(relay).is_some_and(|candidate| candidate.was_member);
        // A bootstrap address without /p2p names no peer between two connections.
        let place = self.reach.places.places.get(relay);
        let named = place.is_some_and(|place| self.bootstrap.iter().any(|known| known.dialled.contains(&place.relay)));
        was_member || named || self.members.is_member(relay) || self.is_bootstrap(relay)
    }

    /// A connected peer says that it is a relay, or is none any more. One that is itself connected through a relay is of no
    /// use: circuits do not go through two.
    pub(super) fn note_hop(&mut self, peer: PeerId, is_relay: bool, announced: &[Multiaddr], now: Instant) {
        let direct = self.swarm.behaviour().streams.connections(&peer).iter().any(|known| !known.relayed);
        if !is_relay || !direct {
            self.reach.places.hops.remove(&peer);
            return;
        }
        let said = announced.iter().find(|known| !address::is_circuit(known)).cloned();
        let mut places = std::mem::take(&mut self.reach.places);
        let entered = places.enter_hop(peer, said, |known| self.is_trusted(known));
        self.reach.places = places;
        if entered {
            self.agenda.no_later(Due::Places, now);
        }
    }

    /// A relay is connected no more. A stranger is not dialled for its place: it comes by itself, or another one does.
    pub(super) fn forget_hop(&mut self, peer: &PeerId) {
        self.reach.places.hops.remove(peer);
        if !self.is_trusted(peer) {
            self.reach.places.drop_idle(peer);
        }
    }

    /// Asks for places, while this node needs some and has too few.
    pub(super) fn seek_places(&mut self, now: Instant) {
        if self.reach.is_direct {
            return;
        }
        let bootstraps: HashSet<PeerId> = self.bootstrap.iter().filter_map(|bootstrap| bootstrap.peer).collect();
        self.reach.places.tidy(|relay| bootstraps.contains(relay));
        let places = &self.reach.places;
        let due = |relay: &PeerId| places.places.get(relay).is_none_or(|place| place.again.is_some_and(|again| again <= now));
        let mut free: Vec<PeerId> = places.hops.keys().chain(places.places.keys()).copied().collect();
        free.retain(|relay| !places.is_at(relay) && due(relay));
        // Members first: they have the most reason to carry us. Then those that the operator named, then strangers.
        free.sort_by_key(|relay| {
            let failures = places.places.get(relay).map_or(0, |place| place.failures);
            (failures, !self.members.is_member(relay), !bootstraps.contains(relay), *relay)
        });
        free.dedup();
        for relay in free {
            if self.reach.places.held() >= WANTED {
                break;
            }
            self.ask_for_place(relay, now);
        }
        if self.reach.places.held() < WANTED
            && let Some(again) = self.reach.places.places.values().filter_map(|place| place.again).filter(|at| *at > now).min()
        {
            self.agenda.no_later(Due::Places, again);
        }
    }

    fn ask_for_place(&mut self, relay: PeerId, now: Instant) {
        let connections = self.swarm.behaviour().streams.connections(&relay);
        let remote =
            |dialed: bool| connections.iter().find(|known| known.dialed == dialed && !known.relayed).map(|known| &known.remote);
        let place = self.reach.places.places.get(&relay).map(|place| &place.relay);
        let said = self.reach.places.hops.get(&relay).and_then(Option::as_ref);
        // Where this node dials is not for strangers to say: of one that came in, the place is asked for on its connection.
        let at = if self.is_trusted(&relay) {
            remote(true).or(place).or(said).or(remote(false))
        } else {
            remote(true).or(remote(false))
        };
        let Some(at) = at.map(address::without_peer) else { return };
        let asked = self.swarm.listen_on(address::circuit(&at, relay));
        tracing::debug!(%relay, address = %at, ?asked, "asking for a place at a relay");
        let place = self.reach.places.places.entry(relay).or_insert_with(|| Place {
            relay: at.clone(),
            listener: None,
            accepted: false,
            failures: 0,
            again: None,
            problem: None,
            announced: Vec::new(),
        });
        place.relay = at;
        place.again = None;
        match asked {
            Ok(listener) => place.listener = Some(listener),
            Err(error) => {
                place.failures += 1;
                place.problem = Some(super::bootstrap::why(&error));
                place.again = Some(now + LONGEST);
            }
        }
    }

    /// A relay holds a place for us, or goes on doing so.
    pub(super) fn on_place(&mut self, relay: PeerId, renewal: bool) {
        if let Some(place) = self.reach.places.places.get_mut(&relay) {
            place.accepted = true;
            place.failures = 0;
            place.problem = None;
            if !renewal {
                tracing::info!(%relay, "reachable through relay {relay} at {}", place.relay);
            }
        }
        self.dirty = true;
    }

    /// The way to this node through a relay, as the relay itself or the library names it.
    pub(super) fn on_circuit_address(&mut self, listener: Option<ListenerId>, circuit: &Multiaddr) {
        let bare = address::without_peer(circuit);
        let found = match listener {
            Some(id) => self.reach.places.by_listener(id).map(|(_, place)| place),
            None => address::relay_of(&bare).and_then(|relay| self.reach.places.places.get_mut(&relay)),
        };
        let Some(place) = found else { return };
        let told = place.announced.iter().any(|known| kind(known) == kind(&bare)) || place.announced.len() >= MAX_ANNOUNCED;
        // A relay may hand out whatever it likes; that it is reached where we reach it is all that is sure.
        if told || !address::dialable(&bare, &self.networks) {
            return;
        }
        place.announced.push(bare.clone());
        if listener.is_some() {
            self.swarm.add_external_address(bare);
        }
        self.addresses_changed();
    }

    /// The listener of a place closed; false when it was not one of them.
    pub(super) fn on_place_lost(&mut self, id: ListenerId, why: Option<String>, now: Instant) -> bool {
        let Some((relay, gone, held)) = self.reach.places.lost(id, why, now) else { return false };
        for address in gone {
            self.swarm.remove_external_address(&address);
        }
        let problem = self.reach.places.places.get(&relay).and_then(|place| place.problem.clone()).unwrap_or_default();
        if held {
            tracing::info!(%relay, "the place at relay {relay} is lost: {problem}");
        } else {
            tracing::debug!(%relay, "no place at relay {relay}: {problem}");
        }
        if !self.swarm.is_connected(&relay) && !self.is_trusted(&relay) {
            self.reach.places.drop_idle(&relay);
        }
        if let Some(again) = self.reach.places.places.get(&relay).and_then(|place| place.again) {
            self.agenda.no_later(Due::Places, again);
        }
        self.addresses_changed();
        true
    }

    pub(super) fn place_facts(&self) -> Vec<ReservationFacts> {
        let fact = |(relay, place): (&PeerId, &Place)| ReservationFacts {
            relay: self.members.relay(relay),
            accepted: place.accepted,
            problem: place.problem.clone().filter(|_| !place.accepted),
        };
        self.reach.places.places.iter().map(fact).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(listener: ListenerId) -> Place {
        Place {
            relay: "/ip4/192.0.2.1/tcp/1".parse().unwrap(),
            listener: Some(listener),
            accepted: false,
            failures: 0,
            again: None,
            problem: None,
            announced: Vec::new(),
        }
    }

    #[test]
    fn a_lost_place_is_asked_for_again_within_seconds_and_less_often_where_there_is_another() {
        let (mut places, relay, now) = (Places::default(), PeerId::random(), Instant::now());
        let pause = |places: &mut Places, accepted| {
            let id = ListenerId::next();
            let held = Place { accepted, failures: places.places.get(&relay).map_or(0, |place| place.failures), ..place(id) };
            places.places.insert(relay, held);
            let (_, _, was_held) = places.lost(id, None, now).unwrap();
            assert_eq!(was_held, accepted);
            places.places[&relay].again.unwrap() - now
        };
        assert_eq!(pause(&mut places, true), FIRST_PAUSE);
        for _ in 0..20 {
            assert!(pause(&mut places, false) <= LONGEST_WITHOUT.mul_f64(1.2));
        }
        places.places.insert(PeerId::random(), Place { accepted: true, ..place(ListenerId::next()) });
        assert!(pause(&mut places, false) > LONGEST_WITHOUT.mul_f64(1.2));
        assert!(pause(&mut places, false) <= LONGEST.mul_f64(1.2));
        assert_eq!(pause(&mut places, true), FIRST_PAUSE, "one that was held is asked for at once");
    }

    #[test]
    fn who_refuses_again_and_again_is_forgotten_unless_the_operator_named_it() {
        let (mut places, named, other) = (Places::default(), PeerId::random(), PeerId::random());
        for relay in [named, other] {
            let refused = Place { listener: None, failures: MAX_FAILURES, ..place(ListenerId::next()) };
            places.places.insert(relay, refused);
        }
        places.tidy(|relay| *relay == named);
        assert_eq!(places.places.keys().copied().collect::<Vec<_>>(), [named]);
    }

    #[test]
    fn a_crowd_of_strangers_keeps_no_member_out() {
        let (mut places, held, member) = (Places::default(), PeerId::random(), PeerId::random());
        let nobody = |_: &PeerId| false;
        places.places.insert(held, place(ListenerId::next()));
        assert!(places.enter_hop(held, None, nobody));
        for _ in 1..MAX_HOPS {
            assert!(places.enter_hop(PeerId::random(), None, nobody));
        }
        assert!(!places.enter_hop(PeerId::random(), None, nobody));
        assert!(places.enter_hop(held, None, nobody), "it is in already");
        assert!(places.enter_hop(member, None, |peer| *peer == member));
        assert_eq!(places.hops.len(), MAX_HOPS);
        assert!(places.hops.contains_key(&member) && places.hops.contains_key(&held));
        places.drop_idle(&held);
        assert!(places.is_at(&held), "the library minds when its listener goes");
        places.places.insert(held, Place { listener: None, ..place(ListenerId::next()) });
        places.drop_idle(&held);
        assert!(places.places.is_empty());
    }

    #[test]
    fn one_way_of_each_kind_is_announced() {
        let relay = PeerId::random();
        let of = |text: &str| kind(&address::circuit(&text.parse().unwrap(), relay));
        assert_eq!(of("/ip4/198.51.100.1/tcp/1"), of("/ip4/198.51.100.9/tcp/2"));
        assert_ne!(of("/ip4/198.51.100.1/tcp/1"), of("/ip4/198.51.100.1/udp/1/quic-v1"));
        assert_ne!(of("/ip4/198.51.100.1/tcp/1"), of("/ip4/10.0.0.1/tcp/1"));
        assert_ne!(of("/ip4/198.51.100.1/tcp/1"), of("/ip6/2001:db8::1/tcp/1"));
    }
}
