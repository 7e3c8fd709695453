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
/// A peer that could not be dialled is not dialled again for this long; to one who alone told of it nobody listens
/// meanwhile.
const DENIED: Duration = Duration::from_secs(600);
/// Graves that are remembered, and as many denials.
const MAX_GRAVES: usize = 1024;
/// Tellers of one member that are not believed at the same time.
const MAX_DENIED: usize = 4;
/// So many who lost a member are believed, whoever says that it is there.
const LOSERS: usize = 4;
/// Addresses of a member that a second teller may add.
const MORE_ADDRESSES: usize = 2;

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

/// What the doctor wants to know of a known member.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard<'a> {
    pub name: &'a str,
    pub addresses: &'a [Multiaddr],
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

/// One whose word counts.
#[derive(Debug)]
struct Teller {
    peer: PeerId,
    /// It is connected to whom it tells of.
    first_hand: bool,
    card: Card,
    /// What it told last was heard then; `None` when it tells us nothing any more.
    told: Option<Instant>,
}

impl Teller {
    /// It has said nothing for so long that a word of `heard` is worth more.
    fn is_silent(&self, heard: Instant) -> bool {
        self.told.is_none_or(|told| heard.saturating_duration_since(told) >= TTL)
    }
}

#[derive(Debug)]
struct Entry {
    /// What its tellers say, as far as the elder one does not say otherwise.
    card: Card,
    heard: Instant,
    since: Instant,
    met: SystemTime,
    /// The first two that told of it, the elder one first.
    tellers: Vec<Teller>,
    /// Who said that they lost it, since it was heard last.
    lost_by: Vec<PeerId>,
    /// Not to be dialled before.
    dial_after: Option<Instant>,
    shown: Arc<Member>,
    shown_heard: Instant,
}

impl Entry {
    /// Two members are connected to it, or we were.
    fn is_vouched(&self) -> bool {
        self.tellers.iter().filter(|teller| teller.first_hand).count() >= 2
    }

    /// Somebody is connected to it, as far as we heard.
    fn is_held(&self) -> bool {
        self.tellers.iter().any(|teller| teller.first_hand)
    }

    /// Somebody is connected to it, and would tell us of its loss.
    fn is_watched(&self) -> bool {
        self.tellers.iter().any(|teller| teller.first_hand && teller.told.is_some())
    }

    /// Somebody lost it. True when it is not to be listed any more.
    fn lose(&mut self, loser: PeerId) -> bool {
        let was_held = self.is_held();
        self.tellers.retain(|kept| kept.peer != loser);
        if !self.lost_by.contains(&loser) && self.lost_by.len() < LOSERS {
            self.lost_by.push(loser);
        }
        match self.lost_by.len() {
            LOSERS.. => true,
            // A stream may end where the member lives: as long as one holds it whose word of its end would reach us, it is.
            2.. => !self.is_watched(),
            _ => was_held && !self.is_held(),
        }
    }

    fn show(&mut self, peer: &PeerId, now: Instant) {
        self.shown_heard = self.heard;
        self.shown = shown(peer, &self.card, self.met, now.saturating_duration_since(self.heard));
    }

    /// Takes a word in. Only who has one of the two places says what the member is; anybody says that it was heard.
    fn hear(&mut self, teller: PeerId, card: Card, first_hand: bool, heard: Instant) -> Learnt {
        let fresher = heard > self.heard;
        if fresher {
            self.heard = heard;
            self.lost_by.clear();
        }
        if let Some(place) = self.place(&teller, first_hand, heard) {
            match self.tellers.get_mut(place) {
                Some(kept) if kept.peer == teller => kept.tells(card, first_hand, heard),
                Some(kept) => *kept = Teller { peer: teller, first_hand, card, told: Some(heard) },
                None => self.tellers.push(Teller { peer: teller, first_hand, card, told: Some(heard) }),
            }
        }
        let before = std::mem::take(&mut self.card);
        self.card = composed(&self.tellers).unwrap_or_default();
        match (self.card.is_like(&before), fresher) {
            (false, _) => Learnt::Changed,
            (true, true) => Learnt::Fresher,
            (true, false) => Learnt::Nothing,
        }
    }

    /// The place of a teller: its own, a free one, that of one that says nothing any more, or, as who is connected is worth
    /// more than hearsay, that of one that is not. Nobody moves into the elder's place by waiting: it is filled anew.
    fn place(&self, teller: &PeerId, first_hand: bool, heard: Instant) -> Option<usize> {
        let position = |which: &dyn Fn(&Teller) -> bool| self.tellers.iter().position(which);
        position(&|kept| kept.peer == *teller)
            .or((self.tellers.len() < 2).then_some(self.tellers.len()))
            .or_else(|| position(&|kept| !kept.first_hand && first_hand))
            .or_else(|| position(&|kept| kept.is_silent(heard)))
    }
}

impl Teller {
    fn tells(&mut self, card: Card, first_hand: bool, heard: Instant) {
        self.first_hand = first_hand;
        if self.told.is_none_or(|told| heard > told) {
            self.told = Some(heard);
            self.card.take_over(card);
        }
    }
}

/// The elder's card; of the other one no more than a few addresses: it may be the elder who lies of them.
fn composed(tellers: &[Teller]) -> Option<Card> {
    let (elder, others) = tellers.split_first()?;
    let mut card = elder.card.clone();
    for other in others {
        let more = other.card.addresses.iter().filter(|address| !elder.card.addresses.contains(address));
        card.addresses.extend(more.take(MORE_ADDRESSES).cloned());
    }
    Some(card)
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
    /// Those who alone told of a member that could not be dialled.
    denied: HashMap<(ClusterId, PeerId), Denial>,
}

/// Whose word of one member does not count, and how long.
#[derive(Debug)]
struct Denial {
    tellers: Vec<PeerId>,
    until: Instant,
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
        if self.denied.get(&key).is_some_and(|denial| now < denial.until && denial.tellers.contains(&teller)) {
            return Learnt::Nothing;
        }
        if let Some(entry) = self.entries.get_mut(&key) {
            let learnt = entry.hear(teller, card, first_hand, heard);
            if entry.is_vouched() {
                self.denied.remove(&key); // two others are connected to it: the dial proved nothing
            }
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
        let tellers = vec![Teller { peer: teller, first_hand, card: card.clone(), told: Some(heard) }];
        self.entries.insert(key, Self::entry(peer, card, tellers, heard, now));
        Learnt::New
    }

    fn entry(peer: PeerId, card: Card, tellers: Vec<Teller>, heard: Instant, now: Instant) -> Entry {
        let met = SystemTime::now();
        let shown = shown(&peer, &card, met, now.saturating_duration_since(heard));
        Entry { card, heard, since: now, met, tellers, lost_by: Vec::new(), dial_after: None, shown, shown_heard: heard }
    }

    /// Places that are taken on the word of `teller` alone.
    fn only_by(&self, teller: &PeerId) -> usize {
        self.entries.values().filter(|entry| matches!(entry.tellers.as_slice(), [only] if only.peer == *teller)).count()
    }

    /// A member from which this node parted as a friend: it was heard until `heard`.
    pub(crate) fn parted(&mut self, cluster: &ClusterId, local: PeerId, peer: PeerId, card: Card, heard: Instant, now: Instant) {
        if self.entries.len() < MAX_KNOWN {
            // This node was connected to it, which is worth two others, until others tell something newer.
            let vouches = |teller| Teller { peer: teller, first_hand: true, card: card.clone(), told: None };
            let tellers = vec![vouches(local), vouches(peer)];
            self.entries.insert(Self::key(cluster, &peer), Self::entry(peer, card, tellers, heard, now));
        }
    }

    /// `teller` was connected to it and lost it at `when`. True when it is listed no more: nobody that we hear of is connected
    /// to it any more, or a second one lost it and nobody would tell us of its end, or so many did that whoever holds it errs.
    pub(crate) fn lost(&mut self, cluster: &ClusterId, teller: PeerId, peer: &PeerId, when: Instant) -> bool {
        let key = Self::key(cluster, peer);
        let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.heard <= when) else { return false };
        if !entry.lose(teller) {
            return false;
        }
        self.entries.remove(&key);
        self.dig(key, when);
        true
    }

    /// A member is gone, and with it its word.
    pub(crate) fn teller_gone(&mut self, cluster: &ClusterId, teller: &PeerId) {
        for (_, entry) in self.entries.iter_mut().filter(|((of, _), _)| of == cluster) {
            entry.tellers.retain(|kept| kept.peer != *teller);
        }
    }

    /// This node parted from a member as a friend: what it told stands until another one tells.
    pub(crate) fn teller_parted(&mut self, cluster: &ClusterId, teller: &PeerId) {
        let entries = self.entries.iter_mut().filter(|((of, _), _)| of == cluster);
        for kept in entries.flat_map(|(_, entry)| &mut entry.tellers).filter(|kept| kept.peer == *teller) {
            kept.told = None;
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
                let teller = entry.tellers.first().map(|teller| teller.peer);
                self.entries.remove(&key);
                if let Some(teller) = teller {
                    self.deny(key, teller, now);
                }
                dropped = true;
            } else {
                entry.dial_after = Some(now + DENIED);
            }
        }
        dropped
    }

    /// Only the one who told of it: where nobody answers may be its lie, and the member there all the same.
    fn deny(&mut self, key: (ClusterId, PeerId), teller: PeerId, now: Instant) {
        if self.denied.len() >= MAX_GRAVES
            && let Some(oldest) = self.denied.iter().min_by_key(|(_, denial)| denial.until).map(|(key, _)| key.clone())
        {
            self.denied.remove(&oldest);
        }
        let denial = self.denied.entry(key).or_insert_with(|| Denial { tellers: Vec::new(), until: now });
        denial.tellers.insert(0, teller);
        denial.tellers.truncate(MAX_DENIED);
        denial.until = now + DENIED;
    }

    /// It is connected now, or the cluster was left.
    pub(crate) fn remove(&mut self, cluster: &ClusterId, peer: &PeerId) {
        self.entries.remove(&Self::key(cluster, peer));
        self.graves.remove(&Self::key(cluster, peer));
        self.denied.remove(&Self::key(cluster, peer));
    }

    pub(crate) fn forget(&mut self, cluster: &ClusterId) {
        self.entries.retain(|(of, _), _| of != cluster);
        self.graves.retain(|(of, _), _| of != cluster);
        self.denied.retain(|(of, _), _| of != cluster);
    }

    /// Forgets those of whom there was no word for too long; true when somebody was.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let before = self.entries.len();
        self.entries.retain(|_, entry| now.saturating_duration_since(entry.heard) < TTL);
        self.graves.retain(|_, until| now.saturating_duration_since(*until) < TTL);
        self.denied.retain(|_, denial| now < denial.until);
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

    /// What is told of one, and when it was heard last.
    pub(crate) fn get(&self, cluster: &ClusterId, peer: &PeerId) -> Option<Heard<'_>> {
        let entry = self.entries.get(&Self::key(cluster, peer))?;
        Some(Heard { name: &entry.card.name, addresses: &entry.card.addresses, heard: entry.heard })
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
        let doubtful = |entry: &Entry| {
            entry.tellers.len() < 2 && !entry.card.addresses.is_empty() && now.saturating_duration_since(entry.since) >= DOUBTFUL
        };
        self.of(cluster).filter(|(_, entry)| doubtful(entry)).min_by_key(|(_, entry)| entry.since).map(|(peer, _)| peer)
    }
}

#[cfg(test)]
mod tests;
