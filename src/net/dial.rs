//! Whom to dial when: the lower peer id of a pair at once, the higher one a little later and only if still needed;
//! with back-off; and never so many strangers at once that an attacker could use us.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};

use super::book::{Book, Source};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// The same for a member that was lost: when its cable is in again it is to be back within seconds. Nobody dials it for
/// ever: a candidate that is heard of no more is forgotten after ten minutes.
const LONGEST_PAUSE_OF_MEMBER: Duration = Duration::from_secs(2);
/// A handshake over a way that is cut repeats itself after 1, 3 and 7 s, and fails after 15: when the way is open again it may
/// sleep for long. Whoever is missed is dialled once more beside it after this time.
const BESIDE: Duration = Duration::from_secs(5);
/// Dials of one peer at once.
const MAX_BESIDE: u32 = 3;
/// A QUIC handshake without an answer is sent again after 1, 2, 4 s.
const ASLEEP: Duration = Duration::from_secs(1);
/// Dials in all above which none is made beside another: half of a large cluster was cut off, and somebody of it is found.
const MANY_DIALS: usize = 32;
/// New candidates dialled per second, when many come at once.
const DIALS_PER_SECOND: f64 = 5.0;
/// A room full of machines that are switched on together is dialled at once.
const BURST: f64 = 40.0;
/// The same for those that members tell of: they are listed already, and a crowd that starts together has other things to do
/// than shake hands with everybody at once.
const TOLD_PER_SECOND: f64 = 4.0;
const TOLD_BURST: f64 = 8.0;
/// Two that members tell of each other at about the same time: the lower peer id dials, the higher one waits this long.
const TOLD_PATIENCE: Duration = Duration::from_secs(2);

/// A dial to make now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub peer: PeerId,
    pub addresses: Vec<Multiaddr>,
}

/// Dials of one peer that have not ended.
#[derive(Debug, Clone, Copy)]
struct Flights {
    first: Instant,
    last: Instant,
    count: u32,
    /// One more may be made beside them, whatever else holds.
    again: bool,
}

#[derive(Debug, Clone, Copy)]
struct Pause {
    until: Instant,
    length: Duration,
    since: Instant,
    /// The other side asked for it: no change of the network and no membership of before cuts it short.
    held: bool,
}

impl Pause {
    /// When it ends, if pauses are at most `longest`, give or take as much as was given or taken.
    fn until_at_most(&self, longest: Duration) -> Instant {
        if self.held {
            return self.until;
        }
        let part = longest.as_secs_f64() / self.length.as_secs_f64();
        self.since + self.until.duration_since(self.since).mul_f64(part.min(1.0))
    }
}

#[derive(Debug)]
pub(crate) struct Policy {
    local: PeerId,
    patience: Duration,
    dialing: HashMap<PeerId, Flights>,
    pauses: HashMap<PeerId, Pause>,
    /// Peers that proved to be members on the connection that there is.
    proven: HashSet<PeerId>,
    tokens: f64,
    /// The same for those that members tell of.
    told: f64,
    filled: Instant,
    wake: Option<Instant>,
}

impl Policy {
    pub(crate) fn new(local: PeerId, patience: Duration, now: Instant) -> Self {
        Self {
            local,
            patience,
            dialing: HashMap::new(),
            pauses: HashMap::new(),
            proven: HashSet::new(),
            tokens: BURST,
            told: TOLD_BURST,
            filled: now,
            wake: None,
        }
    }

    /// The dials to make at `now`. `connected` tells who needs none.
    pub(crate) fn next(&mut self, now: Instant, book: &Book, connected: impl Fn(&PeerId) -> bool) -> Vec<Order> {
        self.refill(now);
        self.wake = None;
        let mut orders = Vec::new();
        for (&peer, candidate) in book.iter() {
            // Bootstrap nodes are dialled by a plan of their own (`net::bootstrap`), until they are members.
            let planned = candidate.source == Source::Bootstrap && !candidate.was_member;
            if connected(&peer) || planned || peer == self.local || candidate.addresses.is_empty() {
                continue;
            }
            let mut due = candidate.since;
            match self.dialing.get(&peer) {
                Some(_) if !candidate.was_member => continue,
                Some(flights) => match self.beside(flights) {
                    Some(at) => due = at,
                    None => continue,
                },
                None => {}
            }
            // Who hears of whom at the same moment: only the lower one dials at once. Elsewhere it is we who asked,
            // and the other side does not know of us.
            if candidate.source.is_mutual() && self.local.to_bytes() > peer.to_bytes() {
                due += self.patience + self.patience.mul_f64(f64::from(peer.to_bytes().last().copied().unwrap_or(0)) / 1280.0);
            }
            let told = matches!(candidate.source, Source::View(_)) && !candidate.was_member;
            if told && self.local.to_bytes() > peer.to_bytes() {
                due += TOLD_PATIENCE;
            }
            if let Some(pause) = self.pauses.get(&peer) {
                let longest = if candidate.was_member { LONGEST_PAUSE_OF_MEMBER } else { LONGEST_PAUSE };
                due = due.max(pause.until_at_most(longest));
            }
            if due > now {
                self.wake_no_later(due);
                continue;
            }
            // What this node was told by its owner, or by itself before, was not told by strangers.
            if !matches!(candidate.source, Source::Bootstrap | Source::Remembered) {
                if self.tokens < 1.0 {
                    self.wake_no_later(now + Duration::from_secs_f64(1.0 / DIALS_PER_SECOND));
                    continue;
                }
                if told && self.told < 1.0 {
                    self.wake_no_later(now + Duration::from_secs_f64(1.0 / TOLD_PER_SECOND));
                    continue;
                }
                self.tokens -= 1.0;
                self.told -= f64::from(u8::from(told));
            }
            orders.push(Order { peer, addresses: candidate.addresses.clone() });
        }
        orders
    }

    fn refill(&mut self, now: Instant) {
        let refill = now.duration_since(self.filled).as_secs_f64() * DIALS_PER_SECOND;
        self.tokens = (self.tokens + refill).min(BURST);
        let told = now.duration_since(self.filled).as_secs_f64() * TOLD_PER_SECOND;
        self.told = (self.told + told).min(TOLD_BURST);
        self.filled = now;
    }

    /// Whether a stranger whose addresses others know may be dialled now. Counts as a dial.
    pub(crate) fn may_dial(&mut self, peer: &PeerId, now: Instant) -> bool {
        self.refill(now);
        let paused = self.pauses.get(peer).is_some_and(|pause| pause.until > now);
        if paused || self.dialing.contains_key(peer) || self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }

    fn wake_no_later(&mut self, when: Instant) {
        self.wake = Some(self.wake.map_or(when, |wake| wake.min(when)));
    }

    /// When [`Policy::next`] has something to do again, as far as is known.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        self.wake
    }

    pub(crate) fn dialing(&mut self, peer: PeerId, now: Instant) {
        let flights = self.dialing.entry(peer).or_insert(Flights { first: now, last: now, count: 0, again: false });
        (flights.last, flights.again) = (now, false);
        flights.count += 1;
    }

    /// When another dial may be made beside those that are under way; `None` is not before one of them has ended.
    fn beside(&self, flights: &Flights) -> Option<Instant> {
        if flights.again {
            return Some(flights.last);
        }
        (flights.count < MAX_BESIDE && self.dialing.len() <= MANY_DIALS).then_some(flights.last + BESIDE)
    }

    /// A member that was lost is back: others may be, while the dials of them sleep until they send once more. Each is dialled
    /// anew.
    pub(crate) fn one_is_back(&mut self, now: Instant) {
        for flights in self.dialing.values_mut().filter(|flights| now.duration_since(flights.last) >= ASLEEP) {
            flights.again = true;
        }
    }

    /// There are addresses to be tried that the dials under way do not have.
    pub(crate) fn has_other_addresses(&mut self, peer: &PeerId) {
        if let Some(flights) = self.dialing.get_mut(peer) {
            flights.again = true;
        }
    }

    /// Whether a dial of a peer that is missed can be made at `now`: the first one always.
    pub(crate) fn has_room(&self, peer: &PeerId, now: Instant) -> bool {
        self.dialing.get(peer).is_none_or(|flights| self.beside(flights).is_some_and(|at| at <= now))
    }

    /// Whether a dial of the peer is under way.
    pub(crate) fn is_dialing(&self, peer: &PeerId) -> bool {
        self.dialing.contains_key(peer)
    }

    /// Peers whose dials began before `then` and have not ended.
    pub(crate) fn dialing_since(&self, then: Instant) -> Vec<PeerId> {
        self.dialing.iter().filter(|(_, flights)| flights.first < then).map(|(&peer, _)| peer).collect()
    }

    /// We ended the dials of a peer ourselves: that says nothing of it.
    pub(crate) fn aborted(&mut self, peer: &PeerId) {
        self.dialing.remove(peer);
    }

    pub(crate) fn connected(&mut self, peer: &PeerId) {
        self.dialing.remove(peer);
    }

    /// The last connection to a peer is gone that is no candidate: the next one has to prove itself anew.
    pub(crate) fn parted(&mut self, peer: &PeerId) {
        self.dialing.remove(peer);
        self.proven.remove(peer);
    }

    /// The peer proved to be a member: the next loss is dialled again at once.
    pub(crate) fn succeeded(&mut self, peer: &PeerId) {
        self.pauses.remove(peer);
        self.proven.insert(*peer);
    }

    /// The last connection to the peer is gone. One on which it proved nothing counts as a failed dial: a node that
    /// accepts and hangs up must not be dialled again and again.
    pub(crate) fn lost(&mut self, peer: &PeerId, now: Instant) {
        self.dialing.remove(peer);
        if !self.proven.remove(peer) {
            self.failed(peer, now);
        }
    }

    /// A dial failed, or a connection was lost: the next try waits, twice as long each time.
    pub(crate) fn failed(&mut self, peer: &PeerId, now: Instant) {
        if let Some(flights) = self.dialing.get_mut(peer) {
            flights.count -= 1;
            if flights.count == 0 {
                self.dialing.remove(peer);
            }
        }
        if self.held_for(peer, now) > Duration::ZERO {
            return;
        }
        let before = self.pauses.get(peer).filter(|pause| !pause.held);
        let length = before.map_or(FIRST_PAUSE, |pause| (pause.length * 2).min(LONGEST_PAUSE));
        self.pauses.insert(*peer, Pause { until: now + super::jitter(length), length, since: now, held: false });
    }

    /// The peer is not to be dialled for so long, whatever happens to its connections meanwhile.
    pub(crate) fn hold(&mut self, peer: &PeerId, length: Duration, now: Instant) {
        self.proven.insert(*peer);
        self.pauses.insert(*peer, Pause { until: now + length, length, since: now, held: true });
    }

    /// For how much longer [`Policy::hold`] forbids a dial.
    pub(crate) fn held_for(&self, peer: &PeerId, now: Instant) -> Duration {
        let held = self.pauses.get(peer).filter(|pause| pause.held);
        held.map_or(Duration::ZERO, |pause| pause.until.saturating_duration_since(now))
    }

    /// The network changed: what failed before may work now. Who was told to stay away stays away.
    pub(crate) fn network_changed(&mut self) {
        self.pauses.retain(|_, pause| pause.held);
    }

    /// How long a candidate has to wait for its next dial.
    pub(crate) fn pause_left(&self, peer: &PeerId, was_member: bool, now: Instant) -> Duration {
        let longest = if was_member { LONGEST_PAUSE_OF_MEMBER } else { LONGEST_PAUSE };
        self.pauses.get(peer).map_or(Duration::ZERO, |pause| pause.until_at_most(longest).saturating_duration_since(now))
    }

    /// Forgets pauses of peers that are candidates no more.
    pub(crate) fn retain(&mut self, keep: impl Fn(&PeerId) -> bool) {
        self.pauses.retain(|peer, _| keep(peer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pair() -> (PeerId, PeerId) {
        let (a, b) = (PeerId::random(), PeerId::random());
        if a.to_bytes() < b.to_bytes() { (a, b) } else { (b, a) }
    }

    fn address() -> Vec<Multiaddr> {
        vec!["/ip4/192.0.2.1/tcp/1".parse().unwrap()]
    }

    #[test]
    fn a_lost_member_is_tried_every_few_seconds_however_long_it_is_gone() {
        let (local, other) = pair();
        let now = Instant::now();
        let mut book = Book::new();
        book.learn(other, Source::Mdns, address(), now);
        let mut policy = Policy::new(local, SECOND, now);
        for _ in 0..20 {
            policy.failed(&other, now);
        }
        let soon = now + LONGEST_PAUSE_OF_MEMBER.mul_f64(1.21);
        assert!(policy.next(soon, &book, |_| false).is_empty(), "a stranger is not");
        book.succeeded(&other, now);
        assert!(policy.next(now, &book, |_| false).is_empty());
        assert_eq!(policy.next(soon, &book, |_| false).len(), 1);
    }

    #[test]
    fn a_member_is_dialled_beside_a_dial_that_hangs_three_times_at_most_and_a_stranger_is_not() {
        let (local, other) = pair();
        let start = Instant::now();
        let mut book = Book::new();
        book.learn(other, Source::Kademlia, address(), start);
        let mut policy = Policy::new(local, SECOND, start);
        let mut dials = |book: &Book, until: u32| {
            let mut made = Vec::new();
            for tenth in 0..until * 10 {
                let now = start + SECOND * tenth / 10;
                for order in policy.next(now, book, |_| false) {
                    assert!(policy.has_room(&order.peer, now));
                    policy.dialing(order.peer, now);
                    made.push(tenth / 10);
                }
            }
            made
        };
        assert_eq!(dials(&book, 20), [0], "until it is known to have failed");
        book.succeeded(&other, start);
        assert_eq!(dials(&book, 20), [5, 10]);
        assert!(!policy.has_room(&other, start + 60 * SECOND));
        assert_eq!(policy.dialing_since(start + SECOND), [other]);
        policy.failed(&other, start + 15 * SECOND);
        assert!(policy.is_dialing(&other), "two are still under way");
        policy.aborted(&other);
        assert!(policy.has_room(&other, start + 15 * SECOND) && !policy.is_dialing(&other));
    }

    #[test]
    fn when_one_that_was_lost_is_back_the_others_are_dialled_anew_and_once() {
        let (local, now) = (PeerId::random(), Instant::now());
        let (mut policy, mut book) = (Policy::new(local, SECOND, now), Book::new());
        for _ in 0..25 {
            let peer = PeerId::random();
            book.learn(peer, Source::Kademlia, address(), now);
            book.succeeded(&peer, now);
            policy.dialing(peer, now);
        }
        let early = now + ASLEEP.mul_f64(0.9);
        policy.one_is_back(early);
        assert!(policy.next(early, &book, |_| false).is_empty(), "their first packets may yet be answered");
        policy.one_is_back(now + ASLEEP);
        let orders = policy.next(now + ASLEEP, &book, |_| false);
        assert_eq!(orders.len(), 25);
        orders.iter().for_each(|order| policy.dialing(order.peer, now + ASLEEP));
        assert!(policy.next(now + ASLEEP, &book, |_| false).is_empty());
    }

    #[test]
    fn when_half_of_a_large_cluster_is_gone_nobody_is_dialled_beside_a_dial() {
        let (local, now) = (PeerId::random(), Instant::now());
        let (mut policy, mut book) = (Policy::new(local, SECOND, now), Book::new());
        for _ in 0..=MANY_DIALS {
            let peer = PeerId::random();
            book.learn(peer, Source::Kademlia, address(), now);
            book.succeeded(&peer, now);
            policy.dialing(peer, now);
        }
        assert!(policy.next(now + 2 * BESIDE, &book, |_| false).is_empty());
        let one = book.iter().next().map(|(peer, _)| *peer).unwrap();
        policy.failed(&one, now);
        assert_eq!(policy.next(now + 2 * BESIDE, &book, |_| false).len(), MANY_DIALS + 1);
    }

    #[test]
    fn the_lower_peer_id_dials_at_once_and_the_higher_one_waits() {
        let (lower, higher) = pair();
        let now = Instant::now();
        let dials = |local, other, after| {
            let mut book = Book::new();
            book.learn(other, Source::Mdns, address(), now);
            Policy::new(local, SECOND, now).next(now + after, &book, |_| false).len()
        };
        assert_eq!(dials(lower, higher, Duration::ZERO), 1);
        assert_eq!(dials(higher, lower, Duration::ZERO), 0);
        assert_eq!(dials(higher, lower, SECOND.mul_f64(1.2)), 1);
    }

    #[test]
    fn what_we_asked_for_is_dialled_at_once_by_anybody() {
        let (lower, higher) = pair();
        let now = Instant::now();
        for source in [Source::Kademlia, Source::Remembered] {
            let mut book = Book::new();
            book.learn(lower, source, address(), now);
            assert_eq!(Policy::new(higher, SECOND, now).next(now, &book, |_| false).len(), 1, "{source:?}");
        }
    }

    #[test]
    fn whom_members_tell_of_is_dialled_by_the_lower_one_a_few_at_once_and_then_one_after_the_other() {
        let (lower, higher) = pair();
        let now = Instant::now();
        let dials = |local, other, after| {
            let mut book = Book::new();
            book.learn(other, Source::View(PeerId::random()), address(), now);
            Policy::new(local, SECOND, now).next(now + after, &book, |_| false).len()
        };
        assert_eq!((dials(lower, higher, Duration::ZERO), dials(higher, lower, Duration::ZERO)), (1, 0));
        assert_eq!(dials(higher, lower, TOLD_PATIENCE), 1);
        let mut book = Book::new();
        for _ in 0..60 {
            book.learn(PeerId::random(), Source::View(lower), address(), now);
        }
        let mut policy = Policy::new(lower, SECOND, now);
        let mut dial = |at| {
            let orders = policy.next(at, &book, |_| false);
            orders.iter().for_each(|order| policy.dialing(order.peer, at));
            orders.len()
        };
        let later = now + TOLD_PATIENCE;
        assert_eq!((dial(later), dial(later), dial(later + SECOND)), (8, 0, 4));
        assert!(policy.wake_at().is_some());
    }

    #[test]
    fn failures_wait_longer_each_time_until_the_network_changes() {
        let (lower, higher) = pair();
        let now = Instant::now();
        let mut book = Book::new();
        book.learn(higher, Source::Mdns, address(), now);
        let mut policy = Policy::new(lower, SECOND, now);
        policy.dialing(higher, now);
        assert!(policy.next(now, &book, |_| false).is_empty(), "already dialling");
        policy.failed(&higher, now);
        assert!(policy.next(now + SECOND.mul_f64(0.79), &book, |_| false).is_empty());
        assert!(policy.wake_at().is_some());
        assert_eq!(policy.next(now + SECOND.mul_f64(1.21), &book, |_| false).len(), 1);
        for _ in 0..20 {
            policy.failed(&higher, now);
        }
        assert!(policy.next(now + LONGEST_PAUSE.mul_f64(0.79), &book, |_| false).is_empty());
        assert_eq!(policy.next(now + LONGEST_PAUSE.mul_f64(1.21), &book, |_| false).len(), 1);
        policy.failed(&higher, now + 2 * LONGEST_PAUSE);
        policy.network_changed();
        assert_eq!(policy.next(now + 2 * LONGEST_PAUSE, &book, |_| false).len(), 1);
    }

    #[test]
    fn a_peer_that_hangs_up_before_it_proved_anything_is_dialled_later_and_a_lost_member_at_once() {
        let (lower, higher) = pair();
        let now = Instant::now();
        let mut book = Book::new();
        book.learn(higher, Source::Mdns, address(), now);
        let mut policy = Policy::new(lower, SECOND, now);
        policy.connected(&higher);
        policy.lost(&higher, now);
        assert!(policy.next(now + SECOND.mul_f64(0.79), &book, |_| false).is_empty());
        assert_eq!(policy.next(now + SECOND.mul_f64(1.21), &book, |_| false).len(), 1);
        policy.connected(&higher);
        policy.succeeded(&higher);
        policy.lost(&higher, now);
        assert_eq!(policy.next(now, &book, |_| false).len(), 1);
        policy.lost(&higher, now);
        assert!(policy.next(now, &book, |_| false).is_empty(), "the next connection has to prove itself again");
    }

    #[test]
    fn who_is_told_to_stay_away_does_so_whatever_it_was_before_and_whatever_changes() {
        let (local, other) = pair();
        let now = Instant::now();
        let mut book = Book::new();
        book.learn(other, Source::Kademlia, address(), now);
        book.succeeded(&other, now);
        let mut policy = Policy::new(local, SECOND, now);
        policy.hold(&other, 60 * SECOND, now);
        policy.lost(&other, now);
        policy.failed(&other, now);
        policy.network_changed();
        assert_eq!(policy.held_for(&other, now), 60 * SECOND);
        assert_eq!(policy.pause_left(&other, true, now), 60 * SECOND);
        assert!(policy.next(now + 59 * SECOND, &book, |_| false).is_empty());
        assert_eq!(policy.next(now + 60 * SECOND, &book, |_| false).len(), 1);
    }

    #[test]
    fn what_a_peer_proved_goes_with_its_connection_also_when_it_is_no_candidate() {
        let (local, other) = pair();
        let now = Instant::now();
        let mut policy = Policy::new(local, SECOND, now);
        policy.succeeded(&other);
        policy.parted(&other);
        policy.lost(&other, now);
        assert!(policy.pause_left(&other, false, now) > Duration::ZERO);
    }

    #[test]
    fn providers_that_the_dht_names_count_as_strangers_and_are_paused_too() {
        let (local, other) = pair();
        let now = Instant::now();
        let mut policy = Policy::new(local, SECOND, now);
        assert_eq!((0..100).filter(|_| policy.may_dial(&PeerId::random(), now)).count(), 40);
        assert_eq!((0..100).filter(|_| policy.may_dial(&PeerId::random(), now + SECOND)).count(), 5);
        policy.failed(&other, now + SECOND);
        assert!(!policy.may_dial(&other, now + SECOND.mul_f64(1.5)));
        assert!(policy.may_dial(&other, now + SECOND.mul_f64(2.5)));
    }

    #[test]
    fn strangers_are_dialled_forty_at_once_and_five_a_second() {
        let (local, _) = pair();
        let now = Instant::now();
        let mut book = Book::new();
        for _ in 0..100 {
            book.learn(PeerId::random(), Source::Kademlia, address(), now);
        }
        let mut policy = Policy::new(local, SECOND, now);
        let mut dial = |at| {
            let orders = policy.next(at, &book, |_| false);
            orders.iter().for_each(|order| policy.dialing(order.peer, at));
            orders.len()
        };
        assert_eq!(dial(now), 40);
        assert_eq!(dial(now), 0);
        assert_eq!(dial(now + SECOND), 5);
        assert_eq!(policy.wake_at(), Some(now + SECOND + Duration::from_millis(200)));
    }

    #[test]
    fn connected_peers_are_not_dialled() {
        let (lower, higher) = pair();
        let now = Instant::now();
        let mut book = Book::new();
        book.learn(higher, Source::Kademlia, address(), now);
        assert!(Policy::new(lower, SECOND, now).next(now, &book, |_| true).is_empty());
    }

    proptest! {
        #[test]
        fn nobody_is_dialled_twice_or_too_often_and_nobody_is_forgotten(
            steps in proptest::collection::vec((0_u8..6, 0_usize..60, 0_u64..3000), 1..120),
        ) {
            let peers: Vec<PeerId> = (0..60).map(|_| PeerId::random()).collect();
            let (local, begin) = (PeerId::random(), Instant::now());
            let (mut policy, mut book, mut now) = (Policy::new(local, SECOND, begin), Book::new(), begin);
            let (mut connected, mut dialing) = (HashSet::new(), HashSet::new());
            let mut strangers = 0_u32;
            for (action, who, millis) in steps {
                let peer = peers[who];
                let sources = [Source::Mdns, Source::Kademlia, Source::Bootstrap, Source::View(local), Source::Inbound];
                match action {
                    0 | 1 => drop(book.learn(peer, sources[who % 5], address(), now)),
                    2 => if dialing.remove(&peer) { policy.failed(&peer, now) },
                    3 => if dialing.remove(&peer) { policy.connected(&peer); policy.succeeded(&peer); connected.insert(peer); },
                    4 => drop(connected.remove(&peer)),
                    _ => now += Duration::from_millis(millis),
                }
                for order in policy.next(now, &book, |peer| connected.contains(peer)) {
                    prop_assert!(book.contains(&order.peer) && !connected.contains(&order.peer) && !order.addresses.is_empty());
                    prop_assert!(dialing.insert(order.peer), "is being dialled already");
                    policy.dialing(order.peer, now);
                    strangers += 1;
                }
                let most = BURST + DIALS_PER_SECOND * (now - begin).as_secs_f64();
                prop_assert!(f64::from(strangers) <= most + 1e-6, "{strangers} of {most}");
                let planned = |peer| book.found_by(peer) == Some(Source::Bootstrap.found_by());
                let wanted =
                    book.iter().any(|(peer, _)| !connected.contains(peer) && !dialing.contains(peer) && !planned(peer));
                prop_assert_eq!(policy.wake_at().is_some(), wanted, "who is wanted has a time, and no other wakes us");
                prop_assert!(policy.wake_at().is_none_or(|wake| wake > now && wake <= now + LONGEST_PAUSE.mul_f64(1.2)));
            }
        }
    }
}
