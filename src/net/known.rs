//! Members that this node is not connected to: what others told of them, who told it, and how long it counts.
//!
//! Pure: the time is given from outside. Nothing here makes a member: a known one is a name in a list and an address to
//! dial, on the word of members. One teller's word is worth little: it fills few places, it is not passed on, and it is
//! looked after (`to_probe`); of two who say the same, one may lie.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use crate::domain::cluster::ClusterId;
use crate::domain::node::{FoundBy, Liveness, Member, ModelOffer, NodeId};
use crate::wire::limits::MAX_VIEW_ADDRESSES;

/// Known members of all clusters together.
pub(crate) const MAX_KNOWN: usize = 4096;
/// Of them, those that one member alone tells of.
pub(crate) const MAX_PER_TELLER: usize = 256;
/// Without a fresh word a known member is forgotten.
pub(crate) const TTL: Duration = Duration::from_secs(300);
/// What the list shows is made anew when the word is this much fresher.
const SHOWN_ANEW: Duration = Duration::from_secs(15);
/// Whom one member alone tells of is dialled to see for ourselves, after this.
const DOUBTFUL: Duration = Duration::from_secs(60);
/// A peer that could not be dialled is not dialled again for this long; one that a single member tells of is no longer
/// listed meanwhile.
const DENIED: Duration = Duration::from_secs(600);
/// Graves and refusals that are remembered.
const MAX_GRAVES: usize = 1024;

/// What a member is said to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Card {
    pub name: String,
    pub serving: bool,
    pub draining: bool,
    pub models: Vec<String>,
    pub addresses: Vec<Multiaddr>,
}

/// One word about one member.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub teller: PeerId,
    pub peer: PeerId,
    pub card: Card,
    /// The teller is connected to it.
    pub first_hand: bool,
    /// When anybody heard it last.
    pub heard: Instant,
}

/// What a word changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Learnt {
    /// The list has one more.
    New,
    /// The list shows something else of it.
    Changed,
    /// It is fresher, no more.
    Fresher,
    /// It is old news, or there is no room for it.
    Nothing,
}

#[derive(Debug)]
struct Entry {
    card: Card,
    heard: Instant,
    since: Instant,
    met: SystemTime,
    /// The first two that told of it, and whether each is connected to it.
    tellers: Vec<(PeerId, bool)>,
    /// Who said that it lost it, since it was heard last.
    lost_by: Option<PeerId>,
    /// Not to be dialled before.
    dial_after: Option<Instant>,
    shown: Arc<Member>,
    shown_heard: Instant,
}

impl Entry {
    /// Two members are connected to it, or we were.
    fn is_vouched(&self) -> bool {
        self.tellers.iter().filter(|(_, first_hand)| *first_hand).count() >= 2
    }

    /// Somebody is connected to it.
    fn is_held(&self) -> bool {
        self.tellers.iter().any(|(_, first_hand)| *first_hand)
    }

    fn show(&mut self, peer: &PeerId, now: Instant) {
        self.shown_heard = self.heard;
        self.shown = shown(peer, &self.card, self.met, now.saturating_duration_since(self.heard));
    }

    fn hear(&mut self, teller: PeerId, card: Card, first_hand: bool, heard: Instant) -> Learnt {
        let known = self.tellers.iter().position(|(known, _)| *known == teller);
        // Who is connected to it is worth more than hearsay.
        let hearsay = || self.tellers.iter().position(|(_, connected)| !connected).filter(|_| first_hand);
        match known.or_else(|| if self.tellers.len() < 2 { None } else { hearsay() }) {
            Some(at) => self.tellers[at] = (teller, first_hand),
            None if self.tellers.len() < 2 => self.tellers.push((teller, first_hand)),
            None => {}
        }
        let fresher = heard > self.heard;
        let changed = fresher && !self.card.is_like(&card);
        if fresher {
            self.heard = heard;
            self.lost_by = None;
            self.card.take_over(card);
        }
        match (changed, fresher) {
            (true, _) => Learnt::Changed,
            (_, true) => Learnt::Fresher,
            _ => Learnt::Nothing,
        }
    }
}

impl Card {
    /// The same but for the addresses, which each teller knows others of.
    fn is_like(&self, other: &Self) -> bool {
        (&self.name, self.serving, self.draining, &self.models) == (&other.name, other.serving, other.draining, &other.models)
    }

    /// What is told now comes first; of addresses, what was told before may still be of use.
    fn take_over(&mut self, newer: Self) {
        let before = std::mem::replace(self, newer);
        for address in before.addresses {
            if self.addresses.len() < MAX_VIEW_ADDRESSES && !self.addresses.contains(&address) {
                self.addresses.push(address);
            }
        }
    }
}

/// What lists show of it.
fn shown(peer: &PeerId, card: &Card, met: SystemTime, ago: Duration) -> Arc<Member> {
    Arc::new(Member {
        id: NodeId::new(peer.to_string()),
        name: card.name.clone(),
        version: String::new(),
        protocol: 0,
        addresses: card.addresses.iter().map(ToString::to_string).collect(),
        found_by: FoundBy::View,
        direct: false,
        relay: None,
        transport: "",
        connected_at: met,
        last_seen: SystemTime::now() - ago,
        latency_us: None,
        serving: card.serving,
        draining: card.draining,
        free_slots: 0,
        queued: 0,
        models: card.models.iter().map(ModelOffer::named).collect(),
        tiers: Vec::new(),
        liveness: Liveness::Known,
    })
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Known {
    entries: BTreeMap<(ClusterId, PeerId), Entry>,
    /// When a member was lost, or may be listed again: older words do not count.
    graves: HashMap<(ClusterId, PeerId), Instant>,
}

impl Known {
    fn key(cluster: &ClusterId, peer: &PeerId) -> (ClusterId, PeerId) {
        (cluster.clone(), *peer)
    }

    /// Somebody tells of a member that this node is not connected to.
    pub(crate) fn told(&mut self, cluster: &ClusterId, told: Told, now: Instant) -> Learnt {
        let Told { teller, peer, card, first_hand, heard } = told;
        let key = Self::key(cluster, &peer);
        if now.saturating_duration_since(heard) >= TTL || self.graves.get(&key).is_some_and(|&grave| heard <= grave) {
            return Learnt::Nothing;
        }
        if let Some(entry) = self.entries.get_mut(&key) {
            let learnt = entry.hear(teller, card, first_hand, heard);
            let stale = entry.heard.saturating_duration_since(entry.shown_heard) >= SHOWN_ANEW;
            if learnt == Learnt::Changed || stale {
                entry.show(&peer, now);
            }
            return learnt;
        }
        if self.entries.len() >= MAX_KNOWN || self.only_by(&teller) >= MAX_PER_TELLER {
            return Learnt::Nothing;
        }
        self.graves.remove(&key);
        self.entries.insert(key, Self::entry(peer, card, vec![(teller, first_hand)], heard, now));
        Learnt::New
    }

    fn entry(peer: PeerId, card: Card, tellers: Vec<(PeerId, bool)>, heard: Instant, now: Instant) -> Entry {
        let met = SystemTime::now();
        let shown = shown(&peer, &card, met, now.saturating_duration_since(heard));
        Entry { card, heard, since: now, met, tellers, lost_by: None, dial_after: None, shown, shown_heard: heard }
    }

    /// Places that are taken on the word of `teller` alone.
    fn only_by(&self, teller: &PeerId) -> usize {
        self.entries.values().filter(|entry| matches!(entry.tellers.as_slice(), [(only, _)] if only == teller)).count()
    }

    /// A member from which this node parted as a friend: it was heard until `heard`.
    pub(crate) fn parted(&mut self, cluster: &ClusterId, local: PeerId, peer: PeerId, card: Card, heard: Instant, now: Instant) {
        if self.entries.len() < MAX_KNOWN {
            // This node was connected to it, which is worth two others.
            let tellers = vec![(local, true), (peer, true)];
            self.entries.insert(Self::key(cluster, &peer), Self::entry(peer, card, tellers, heard, now));
        }
    }

    /// `teller` was connected to it and lost it at `when`. True when it is listed no more: nobody that we hear of is connected
    /// to it any more, or a second one lost it too.
    pub(crate) fn lost(&mut self, cluster: &ClusterId, teller: PeerId, peer: &PeerId, when: Instant) -> bool {
        let key = Self::key(cluster, peer);
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.heard <= when) else { return false };
        let held = entry.is_held();
        entry.tellers.retain(|(known, _)| *known != teller);
        let second = entry.lost_by.is_some_and(|first| first != teller);
        entry.lost_by.get_or_insert(teller);
        if !second && (entry.is_held() || !held) {
            return false;
        }
        self.entries.remove(&key);
        self.dig(key, when);
        true
    }

    /// A member is gone, and with it its word.
    pub(crate) fn teller_gone(&mut self, cluster: &ClusterId, teller: &PeerId) {
        for (_, entry) in self.entries.iter_mut().filter(|((of, _), _)| of == cluster) {
            entry.tellers.retain(|(known, _)| known != teller);
        }
    }

    /// This node itself lost a member: what was heard of it until `when` does not count.
    pub(crate) fn buried(&mut self, cluster: &ClusterId, peer: &PeerId, when: Instant) {
        let key = Self::key(cluster, peer);
        self.entries.remove(&key);
        self.dig(key, when);
    }

    fn dig(&mut self, key: (ClusterId, PeerId), until: Instant) {
        if self.graves.len() >= MAX_GRAVES
            && let Some(oldest) = self.graves.iter().min_by_key(|(_, when)| **when).map(|(key, _)| key.clone())
        {
            self.graves.remove(&oldest);
        }
        self.graves.insert(key, until);
    }

    /// A dial to it failed: one that a single member tells of was no member.
    pub(crate) fn undialable(&mut self, peer: &PeerId, now: Instant) -> bool {
        let keys: Vec<_> = self.entries.keys().filter(|(_, known)| known == peer).cloned().collect();
        let mut dropped = false;
        for key in keys {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            if entry.tellers.len() < 2 {
                self.entries.remove(&key);
                self.dig(key, now + DENIED);
                dropped = true;
            } else {
                entry.dial_after = Some(now + DENIED);
            }
        }
        dropped
    }

    /// It is connected now, or the cluster was left.
    pub(crate) fn remove(&mut self, cluster: &ClusterId, peer: &PeerId) {
        self.entries.remove(&Self::key(cluster, peer));
        self.graves.remove(&Self::key(cluster, peer));
    }

    pub(crate) fn forget(&mut self, cluster: &ClusterId) {
        self.entries.retain(|(of, _), _| of != cluster);
        self.graves.retain(|(of, _), _| of != cluster);
    }

    /// Forgets those of whom there was no word for too long; true when somebody was.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let before = self.entries.len();
        self.entries.retain(|_, entry| now.saturating_duration_since(entry.heard) < TTL);
        self.graves.retain(|_, until| now.saturating_duration_since(*until) < TTL);
        self.entries.len() < before
    }

    fn of<'a>(&'a self, cluster: &'a ClusterId) -> impl Iterator<Item = (PeerId, &'a Entry)> {
        self.entries.iter().filter(move |((of, _), _)| of == cluster).map(|((_, peer), entry)| (*peer, entry))
    }

    pub(crate) fn contains(&self, cluster: &ClusterId, peer: &PeerId) -> bool {
        self.entries.contains_key(&Self::key(cluster, peer))
    }

    pub(crate) fn count(&self, cluster: &ClusterId) -> usize {
        self.of(cluster).count()
    }

    pub(crate) fn serving(&self, cluster: &ClusterId) -> usize {
        self.of(cluster).filter(|(_, entry)| entry.card.serving && !entry.card.draining).count()
    }

    pub(crate) fn list<'a>(&'a self, cluster: &'a ClusterId) -> impl Iterator<Item = (PeerId, &'a Arc<Member>)> {
        self.of(cluster).map(|(peer, entry)| (peer, &entry.shown))
    }

    pub(crate) fn addresses(&self, cluster: &ClusterId, peer: &PeerId) -> &[Multiaddr] {
        self.entries.get(&Self::key(cluster, peer)).map_or(&[], |entry| entry.card.addresses.as_slice())
    }

    pub(crate) fn is_vouched(&self, cluster: &ClusterId, peer: &PeerId) -> bool {
        self.entries.get(&Self::key(cluster, peer)).is_some_and(Entry::is_vouched)
    }

    /// Those that two members vouch for, which may be passed on.
    pub(crate) fn vouched<'a>(&'a self, cluster: &'a ClusterId) -> impl Iterator<Item = PeerId> + 'a {
        self.of(cluster).filter(|(_, entry)| entry.is_vouched()).map(|(peer, _)| peer)
    }

    /// What may be passed on of one of them, and when it was heard last.
    pub(crate) fn vouched_card(&self, cluster: &ClusterId, peer: &PeerId) -> Option<(&Card, Instant)> {
        let entry = self.entries.get(&Self::key(cluster, peer)).filter(|entry| entry.is_vouched())?;
        Some((&entry.card, entry.heard))
    }

    /// Those that may be dialled now.
    pub(crate) fn dialable<'a>(&'a self, cluster: &'a ClusterId, now: Instant) -> impl Iterator<Item = PeerId> + 'a {
        self.of(cluster)
            .filter(move |(_, entry)| !entry.card.addresses.is_empty() && entry.dial_after.is_none_or(|after| now >= after))
            .map(|(peer, _)| peer)
    }

    /// One that a single member tells of, and has for a while: is there anybody?
    pub(crate) fn to_probe(&self, cluster: &ClusterId, now: Instant) -> Option<PeerId> {
        let doubtful = |entry: &Entry| entry.tellers.len() < 2 && now.saturating_duration_since(entry.since) >= DOUBTFUL;
        self.of(cluster).filter(|(_, entry)| doubtful(entry)).min_by_key(|(_, entry)| entry.since).map(|(peer, _)| peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn cluster() -> ClusterId {
        ClusterId::new("home").unwrap()
    }

    fn card() -> Card {
        Card {
            name: "NodeA".to_owned(),
            serving: true,
            addresses: vec!["/ip4/192.0.2.1/tcp/1".parse().unwrap()],
            ..Card::default()
        }
    }

    fn told(teller: PeerId, peer: PeerId, heard: Instant) -> Told {
        Told { teller, peer, card: card(), first_hand: true, heard }
    }

    /// A time late enough to be counted back from.
    fn begin() -> Instant {
        Instant::now() + 10 * TTL
    }

    #[test]
    fn a_word_counts_five_minutes_and_a_fresher_one_longer() {
        let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
        assert_eq!(known.told(&cluster(), told(PeerId::random(), peer, now), now), Learnt::New);
        let listed = known.list(&cluster()).next().unwrap().1.clone();
        assert_eq!((listed.name.as_str(), listed.liveness, listed.serving), ("NodeA", Liveness::Known, true));
        let later = now + TTL - SECOND;
        assert!(!known.expire(later));
        assert_eq!(known.told(&cluster(), told(PeerId::random(), peer, later), later), Learnt::Fresher);
        assert!(!known.expire(now + TTL));
        assert!(known.expire(later + TTL));
        assert_eq!(
            known.told(&cluster(), told(PeerId::random(), peer, now), now + TTL),
            Learnt::Nothing,
            "too old to begin with"
        );
    }

    #[test]
    fn one_member_fills_few_places_and_all_of_them_together_no_more_than_there_are() {
        let (mut known, now, liar) = (Known::default(), begin(), PeerId::random());
        let mut fill = |teller, count: usize| {
            (0..count).filter(|_| known.told(&cluster(), told(teller, PeerId::random(), now), now) == Learnt::New).count()
        };
        assert_eq!(fill(liar, 2 * MAX_PER_TELLER), MAX_PER_TELLER);
        let others: usize = (0..30).map(|_| fill(PeerId::random(), MAX_PER_TELLER)).sum();
        assert_eq!(others + MAX_PER_TELLER, MAX_KNOWN);
    }

    #[test]
    fn whom_a_single_member_tells_of_is_looked_after_and_goes_when_nobody_is_there() {
        let (mut known, now, [liar, honest], [ghost, real]) =
            (Known::default(), begin(), [PeerId::random(), PeerId::random()], [PeerId::random(), PeerId::random()]);
        known.told(&cluster(), told(liar, ghost, now), now);
        known.told(&cluster(), told(liar, real, now), now);
        known.told(&cluster(), told(honest, real, now), now);
        assert_eq!(known.to_probe(&cluster(), now), None, "not at once");
        let later = now + DOUBTFUL;
        assert_eq!(known.to_probe(&cluster(), later), Some(ghost));
        assert!(known.undialable(&ghost, later) && !known.undialable(&real, later));
        assert_eq!(known.told(&cluster(), told(liar, ghost, later), later), Learnt::Nothing);
        assert_eq!(known.list(&cluster()).map(|(peer, _)| peer).collect::<Vec<_>>(), [real]);
        assert_eq!(known.dialable(&cluster(), later).count(), 0, "not again for a while");
        assert_eq!(known.dialable(&cluster(), later + DENIED).count(), 1);
        // Only what two tell is passed on.
        assert_eq!(known.vouched(&cluster()).collect::<Vec<_>>(), [real]);
    }

    #[test]
    fn it_takes_two_to_bury_and_older_words_do_not_call_back() {
        let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
        let tellers = [PeerId::random(), PeerId::random(), PeerId::random()];
        for teller in tellers {
            known.told(&cluster(), told(teller, peer, now), now);
        }
        let then = now + SECOND;
        assert!(!known.lost(&cluster(), tellers[0], &peer, now - SECOND), "it was heard since");
        assert!(!known.lost(&cluster(), tellers[0], &peer, then));
        assert!(!known.lost(&cluster(), tellers[0], &peer, then), "saying it twice makes no two");
        assert!(known.lost(&cluster(), tellers[1], &peer, then));
        assert_eq!(known.told(&cluster(), told(tellers[2], peer, now), then), Learnt::Nothing);
        assert_eq!(known.told(&cluster(), told(tellers[2], peer, then + SECOND), then + SECOND), Learnt::New, "it is back");
        // A fresh word takes the first one's loss back.
        known.told(&cluster(), told(tellers[1], peer, then + SECOND), then + SECOND);
        assert!(!known.lost(&cluster(), tellers[0], &peer, then + 2 * SECOND));
        known.told(&cluster(), told(tellers[1], peer, then + 3 * SECOND), then + 3 * SECOND);
        assert!(!known.lost(&cluster(), tellers[1], &peer, then + 4 * SECOND));
    }

    #[test]
    fn the_newest_word_is_shown_with_every_address_that_may_do() {
        let (mut known, now, peer, teller) = (Known::default(), begin(), PeerId::random(), PeerId::random());
        known.told(&cluster(), told(teller, peer, now), now);
        let moved = Card { addresses: vec!["/ip4/192.0.2.2/tcp/1".parse().unwrap()], ..card() };
        let word = |card: Card, heard| Told { card, ..told(teller, peer, heard) };
        assert_eq!(known.told(&cluster(), word(moved, now + SECOND), now), Learnt::Fresher);
        assert_eq!(known.addresses(&cluster(), &peer).len(), 2);
        let renamed = Card { name: "NodeB".to_owned(), ..card() };
        assert_eq!(known.told(&cluster(), word(renamed.clone(), now), now), Learnt::Nothing, "older than what is known");
        assert_eq!(known.told(&cluster(), word(renamed, now + 2 * SECOND), now), Learnt::Changed);
        assert_eq!(known.list(&cluster()).next().unwrap().1.name, "NodeB");
    }

    proptest! {
        #[test]
        fn whatever_is_told_the_bounds_hold(steps in proptest::collection::vec((0_u8..6, 0_usize..6, 0_usize..9, 0_u64..60), 0..300)) {
            let (mut known, mut now) = (Known::default(), begin());
            let tellers: Vec<PeerId> = (0..6).map(|_| PeerId::random()).collect();
            let peers: Vec<PeerId> = (0..9).map(|_| PeerId::random()).collect();
            for (action, teller, peer, seconds) in steps {
                let (teller, peer) = (tellers[teller], peers[peer]);
                match action {
                    0 | 1 => drop(known.told(&cluster(), Told { first_hand: action == 0, ..told(teller, peer, now) }, now)),
                    2 => drop(known.lost(&cluster(), teller, &peer, now)),
                    3 => known.buried(&cluster(), &peer, now),
                    4 => drop(known.undialable(&peer, now)),
                    _ => { now += Duration::from_secs(seconds); known.expire(now); }
                }
                prop_assert!(known.count(&cluster()) <= peers.len());
                prop_assert!(known.entries.values().all(|entry| entry.tellers.len() <= 2 && now - entry.heard < TTL));
                prop_assert!(known.vouched(&cluster()).all(|peer| known.contains(&cluster(), &peer)));
            }
        }
    }
}
