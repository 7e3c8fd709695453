//! Candidates: peers worth a dial, with where they were heard of. Bounded in every direction; nothing here is trusted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};

use crate::domain::node::FoundBy;

const MAX_CANDIDATES: usize = 1024;
const MAX_MDNS: usize = 256;
/// Candidates that the views of one member may add.
const MAX_PER_TELLER: usize = 64;
const MAX_ADDRESSES: usize = 8;
/// A hint that nobody repeats is forgotten.
const TTL: Duration = Duration::from_secs(600);

/// Where a candidate was heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Mdns,
    Kademlia,
    Bootstrap,
    /// A view of this member.
    View(PeerId),
    /// It connected to us.
    Inbound,
    /// It was a member before: of an earlier run, or of this one before the network was lost.
    Remembered,
}

impl Source {
    pub(super) fn found_by(self) -> FoundBy {
        match self {
            Self::Mdns => FoundBy::Mdns,
            Self::Kademlia => FoundBy::Kademlia,
            Self::Bootstrap => FoundBy::Bootstrap,
            Self::View(_) => FoundBy::View,
            Self::Inbound => FoundBy::Inbound,
            Self::Remembered => FoundBy::Remembered,
        }
    }

    /// The word of this node's owner, or its own memory; both lists are short.
    fn is_own(self) -> bool {
        matches!(self, Self::Bootstrap | Self::Remembered)
    }

    /// Both ends hear of each other at the same moment, so that one of them has to hold back.
    pub(crate) fn is_mutual(self) -> bool {
        matches!(self, Self::Mdns)
    }
}

#[derive(Debug)]
pub(crate) struct Candidate {
    pub source: Source,
    pub addresses: Vec<Multiaddr>,
    pub heard: Instant,
    /// When it was heard of first, since its last success: the higher peer id counts its patience from here.
    pub since: Instant,
    pub failures: u32,
    /// It was a member since it was noted.
    pub was_member: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    candidates: HashMap<PeerId, Candidate>,
}

impl Book {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Notes a candidate; false when there is no room for it.
    pub(crate) fn learn(&mut self, peer: PeerId, source: Source, addresses: Vec<Multiaddr>, now: Instant) -> bool {
        if let Some(known) = self.candidates.get_mut(&peer) {
            known.heard = now;
            if source == Source::Remembered {
                // Whatever was heard since is newer.
                for address in addresses {
                    if !known.addresses.contains(&address) && known.addresses.len() < MAX_ADDRESSES {
                        known.addresses.push(address);
                    }
                }
                return true;
            }
            for address in addresses {
                known.addresses.retain(|old| *old != address);
                known.addresses.insert(0, address);
            }
            known.addresses.truncate(MAX_ADDRESSES);
            if source == Source::Bootstrap {
                known.source = source;
            }
            return true;
        }
        let room = match source {
            Source::Bootstrap | Source::Remembered => usize::MAX,
            Source::Mdns => MAX_MDNS - self.count(|candidate| candidate.source == Source::Mdns).min(MAX_MDNS),
            Source::View(_) => MAX_PER_TELLER - self.count(|candidate| candidate.source == source).min(MAX_PER_TELLER),
            Source::Kademlia | Source::Inbound => MAX_CANDIDATES,
        };
        if room == 0 || (!source.is_own() && self.candidates.len() >= MAX_CANDIDATES && !self.evict()) {
            return false;
        }
        let addresses = addresses.into_iter().take(MAX_ADDRESSES).collect();
        self.candidates.insert(peer, Candidate { source, addresses, heard: now, since: now, failures: 0, was_member: false });
        true
    }

    fn count(&self, is: impl Fn(&Candidate) -> bool) -> usize {
        self.candidates.values().filter(|candidate| is(candidate)).count()
    }

    /// Makes room: the candidate that failed most goes, never a configured one.
    fn evict(&mut self) -> bool {
        let worst = self
            .candidates
            .iter()
            .filter(|(_, candidate)| !candidate.source.is_own() && candidate.failures > 0)
            .max_by_key(|(_, candidate)| candidate.failures)
            .map(|(&peer, _)| peer);
        worst.is_some_and(|peer| self.candidates.remove(&peer).is_some())
    }

    /// Forgets hints that nobody repeated, and of those that stay that they were members: they are missed no longer, and
    /// dialled as seldom as others. `keep` names peers that are members now.
    pub(crate) fn expire(&mut self, now: Instant, keep: impl Fn(&PeerId) -> bool) {
        self.candidates.retain(|peer, candidate| {
            if keep(peer) {
                candidate.heard = now;
            }
            let fresh = now.duration_since(candidate.heard) < TTL;
            candidate.was_member &= fresh;
            fresh || candidate.source.is_own()
        });
    }

    /// Drops a candidate that was told wrongly; it may be told anew. A bootstrap node stays: it is the operator's word.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.candidates.retain(|known, candidate| known != peer || candidate.source == Source::Bootstrap);
    }

    /// Forgets what mDNS told, but of those that `keep` names. Who was a member once proved to be real.
    pub(crate) fn forget_heard(&mut self, keep: impl Fn(&PeerId) -> bool) {
        self.candidates.retain(|peer, candidate| candidate.source != Source::Mdns || candidate.was_member || keep(peer));
    }

    /// Counts a failed dial; gives the number in a row.
    pub(crate) fn failed(&mut self, peer: &PeerId) -> u32 {
        self.candidates.get_mut(peer).map_or(0, |candidate| {
            candidate.failures = candidate.failures.saturating_add(1);
            candidate.failures
        })
    }

    /// The member whose views alone name this candidate, if it was never seen otherwise.
    pub(crate) fn told_by(&self, peer: &PeerId) -> Option<PeerId> {
        let candidate = self.candidates.get(peer).filter(|candidate| !candidate.was_member)?;
        if let Source::View(teller) = candidate.source { Some(teller) } else { None }
    }

    /// It proved to be a member.
    pub(crate) fn succeeded(&mut self, peer: &PeerId, now: Instant) {
        if let Some(candidate) = self.candidates.get_mut(peer) {
            candidate.failures = 0;
            candidate.since = now;
            candidate.was_member = true;
        }
    }

    pub(crate) fn get(&self, peer: &PeerId) -> Option<&Candidate> {
        self.candidates.get(peer)
    }

    pub(crate) fn contains(&self, peer: &PeerId) -> bool {
        self.candidates.contains_key(peer)
    }

    pub(crate) fn found_by(&self, peer: &PeerId) -> Option<FoundBy> {
        self.candidates.get(peer).map(|candidate| candidate.source.found_by())
    }

    pub(crate) fn addresses(&self, peer: &PeerId) -> &[Multiaddr] {
        self.candidates.get(peer).map_or(&[], |candidate| candidate.addresses.as_slice())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&PeerId, &Candidate)> {
        self.candidates.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Multiaddr {
        format!("/ip4/192.0.2.1/tcp/{port}").parse().unwrap()
    }

    #[test]
    fn mdns_and_each_teller_have_their_own_bounds() {
        let (mut book, now, teller) = (Book::new(), Instant::now(), PeerId::random());
        let mut add =
            |source, count: usize| (0..count).filter(|_| book.learn(PeerId::random(), source, vec![address(1)], now)).count();
        assert_eq!(add(Source::Mdns, 300), MAX_MDNS);
        assert_eq!(add(Source::View(teller), 100), MAX_PER_TELLER);
        assert_eq!(add(Source::View(PeerId::random()), 100), MAX_PER_TELLER);
        assert_eq!(add(Source::Kademlia, 2000), MAX_CANDIDATES - MAX_MDNS - 2 * MAX_PER_TELLER);
        assert_eq!(add(Source::Bootstrap, 2), 2);
    }

    #[test]
    fn a_full_book_gives_up_who_failed_for_who_is_new() {
        let (mut book, now, failing) = (Book::new(), Instant::now(), PeerId::random());
        book.learn(failing, Source::Kademlia, vec![address(1)], now);
        while book.learn(PeerId::random(), Source::Kademlia, Vec::new(), now) {}
        book.failed(&failing);
        assert!(book.learn(PeerId::random(), Source::Kademlia, Vec::new(), now));
        assert!(!book.contains(&failing));
    }

    #[test]
    fn hints_expire_and_configured_addresses_do_not() {
        let (mut book, now) = (Book::new(), Instant::now());
        let (hint, configured, member) = (PeerId::random(), PeerId::random(), PeerId::random());
        book.learn(hint, Source::Mdns, vec![address(1)], now);
        book.learn(configured, Source::Bootstrap, vec![address(1)], now);
        book.learn(member, Source::Mdns, vec![address(1)], now);
        book.expire(now + TTL, |peer| *peer == member);
        assert_eq!([book.contains(&hint), book.contains(&configured), book.contains(&member)], [false, true, true]);
    }

    #[test]
    fn a_candidate_of_views_alone_is_its_tellers_until_it_is_a_member() {
        let (mut book, now) = (Book::new(), Instant::now());
        let [peer, teller] = [(); 2].map(|()| PeerId::random());
        book.learn(peer, Source::View(teller), vec!["/ip4/192.0.2.1/tcp/1".parse().unwrap()], now);
        assert_eq!(book.told_by(&peer), Some(teller));
        book.succeeded(&peer, now);
        assert_eq!(book.told_by(&peer), None);
        assert_eq!(book.told_by(&teller), None);
    }

    #[test]
    fn a_member_of_before_is_missed_for_ten_minutes_after_it_was_one() {
        let (mut book, now, peer) = (Book::new(), Instant::now(), PeerId::random());
        for source in [Source::Remembered, Source::Bootstrap] {
            book.learn(peer, source, vec![address(1)], now);
            book.succeeded(&peer, now);
            book.expire(now + 2 * TTL, |_| true);
            book.expire(now + 3 * TTL - Duration::from_secs(1), |_| false);
            assert!(book.get(&peer).unwrap().was_member);
            book.expire(now + 3 * TTL, |_| false);
            assert!(!book.get(&peer).unwrap().was_member);
        }
    }

    #[test]
    fn at_most_eight_addresses_are_kept_the_newest_first() {
        let (mut book, now, peer) = (Book::new(), Instant::now(), PeerId::random());
        for port in 1..20 {
            book.learn(peer, Source::Mdns, vec![address(port)], now);
        }
        assert_eq!(book.addresses(&peer).len(), MAX_ADDRESSES);
        assert_eq!(book.addresses(&peer)[0], address(19));
    }
}
