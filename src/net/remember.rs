//! Who was a member last, and where: what a node that starts again knows of its clusters before anybody tells it. Pure; the
//! daemon keeps it on disk.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::config::Remembered;
use super::task::Task;
use super::{address, book::Source};
use crate::domain::node::NodeId;
use crate::wire::limits::MAX_ADDRESS_BYTES;

/// Peers that are remembered: enough to find one of a large cluster again, and few enough to be dialled all at once.
pub(crate) const MAX_PEERS: usize = 64;
/// Addresses of each.
pub(crate) const MAX_ADDRESSES: usize = 8;
/// Who was seen within this time makes room for nobody: in a large cluster the list would change all the time.
const FRESH: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, PartialEq)]
struct Known {
    peer: PeerId,
    addresses: Vec<Multiaddr>,
    last_seen: SystemTime,
    /// The same by a clock that nobody sets; `None` for one of an earlier run.
    seen: Option<Instant>,
}

/// The list, the latest first.
#[derive(Debug, Default)]
pub(crate) struct Recollection {
    peers: Vec<Known>,
}

impl Recollection {
    /// What an earlier run remembered. What is no peer id or no address is left out.
    pub(crate) fn of(remembered: &[Remembered]) -> Self {
        let known = |remembered: &Remembered| {
            let peer = remembered.id.as_str().parse().ok()?;
            let parsed = remembered.addresses.iter().filter_map(|text| text.parse::<Multiaddr>().ok());
            let addresses: Vec<Multiaddr> =
                parsed.filter(|address| address.len() <= MAX_ADDRESS_BYTES).take(MAX_ADDRESSES).collect();
            (!addresses.is_empty()).then_some(Known { peer, addresses, last_seen: remembered.last_seen, seen: None })
        };
        Self { peers: remembered.iter().filter_map(known).take(MAX_PEERS).collect() }
    }

    /// `peer` is a member now and reached at `addresses`, best first; true when that is news.
    pub(crate) fn seen(&mut self, peer: PeerId, mut addresses: Vec<Multiaddr>, at: SystemTime, now: Instant) -> bool {
        addresses.truncate(MAX_ADDRESSES);
        let before = self.peers.iter().position(|known| known.peer == peer);
        if addresses.is_empty() || (before.is_none() && !self.has_room(now)) {
            return false;
        }
        let before = before.map(|at| self.peers.remove(at));
        let news = before.is_none_or(|before| before.addresses != addresses);
        self.peers.insert(0, Known { peer, addresses, last_seen: at, seen: Some(now) });
        news
    }

    /// Makes room if need be, and if somebody has not been seen for long.
    fn has_room(&mut self, now: Instant) -> bool {
        if self.peers.len() < MAX_PEERS {
            return true;
        }
        let stale = |known: &Known| known.seen.is_none_or(|seen| now.duration_since(seen) > FRESH);
        match self.peers.iter().rposition(stale) {
            Some(at) => {
                self.peers.remove(at);
                true
            }
            None => false,
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (PeerId, &[Multiaddr])> {
        self.peers.iter().map(|known| (known.peer, known.addresses.as_slice()))
    }

    /// As others keep it.
    pub(crate) fn list(&self) -> Arc<[Remembered]> {
        let show = |known: &Known| Remembered {
            id: NodeId::new(known.peer.to_string()),
            addresses: known.addresses.iter().map(ToString::to_string).collect(),
            last_seen: known.last_seen,
        };
        self.peers.iter().map(show).collect()
    }
}

impl Task<'_> {
    /// Members of before become candidates, again after a change of the network: the book forgets who is not heard of for
    /// ten minutes, and a cable may be out for longer.
    pub(super) fn recall(&mut self, now: Instant) {
        for (peer, addresses) in self.lasting.recollection.iter() {
            if !self.bans.is_banned(&peer, now.into_std()) && !self.swarm.is_connected(&peer) {
                self.book.learn(peer, Source::Remembered, addresses.to_vec(), now.into_std());
                self.ledger.heard(peer, Source::Remembered.found_by(), now.into_std());
            }
        }
    }

    /// Notes where the members of now are reached.
    pub(super) fn remember_members(&mut self, now: Instant) {
        let mut peers: Vec<PeerId> = self.members.peers().collect();
        peers.dedup();
        let mut news = false;
        for peer in peers {
            news |= self.note(peer, now);
        }
        if news || self.stopping() {
            self.tell_remembered();
        }
    }

    /// Notes where one member is reached.
    pub(super) fn remember_member(&mut self, peer: PeerId, now: Instant) {
        if self.note(peer, now) {
            self.tell_remembered();
        }
    }

    fn note(&mut self, peer: PeerId, now: Instant) -> bool {
        let mut addresses = self.addresses_of(&peer);
        addresses.retain(|found| address::dialable(found, &self.networks));
        self.lasting.recollection.seen(peer, addresses, SystemTime::now(), now)
    }

    fn tell_remembered(&self) {
        self.lasting.remembered.send_replace(self.lasting.recollection.list());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: usize) -> Multiaddr {
        format!("/ip4/192.0.2.1/tcp/{port}").parse().unwrap()
    }

    fn remembered(count: usize, addresses: usize) -> Vec<Remembered> {
        let peer = |_| Remembered {
            id: NodeId::new(PeerId::random().to_string()),
            addresses: (1..=addresses).map(|port| address(port).to_string()).collect(),
            last_seen: SystemTime::UNIX_EPOCH,
        };
        (0..count).map(peer).collect()
    }

    #[test]
    fn what_was_remembered_is_remembered_and_nonsense_is_left_out() {
        let mut list = remembered(3, 2);
        assert_eq!(*Recollection::of(&list).list(), list);
        list[0].id = NodeId::new("nobody");
        list[1].addresses = vec!["nowhere".to_owned()];
        list[2].addresses.push("nowhere".to_owned());
        let kept = Recollection::of(&list).list();
        assert_eq!((kept.len(), kept[0].addresses.len()), (1, 2));
    }

    #[test]
    fn the_list_ends_at_sixty_four_peers_with_eight_addresses_each() {
        for (count, kept) in [(MAX_PEERS, MAX_PEERS), (MAX_PEERS + 1, MAX_PEERS)] {
            assert_eq!(Recollection::of(&remembered(count, 1)).list().len(), kept);
        }
        for (count, kept) in [(MAX_ADDRESSES, MAX_ADDRESSES), (MAX_ADDRESSES + 1, MAX_ADDRESSES)] {
            assert_eq!(Recollection::of(&remembered(1, count)).list()[0].addresses.len(), kept);
            let mut seen = Recollection::default();
            seen.seen(PeerId::random(), (1..=count).map(address).collect(), SystemTime::now(), Instant::now());
            assert_eq!(seen.list()[0].addresses.len(), kept);
        }
    }

    #[test]
    fn the_latest_comes_first_and_takes_the_place_of_whom_nobody_saw_for_long() {
        let (now, at) = (Instant::now(), SystemTime::now());
        let old = remembered(MAX_PEERS, 1);
        let mut list = Recollection::of(&old);
        let new = PeerId::random();
        assert!(list.seen(new, vec![address(1)], at, now));
        assert_eq!(list.peers[0].peer, new);
        let (kept, gone) = (old[0].id.as_str(), old[MAX_PEERS - 1].id.as_str());
        let has = |list: &Recollection, id: &str| list.list().iter().any(|known| known.id.as_str() == id);
        assert!(has(&list, kept) && !has(&list, gone));
        assert!(!list.seen(new, vec![address(1)], at, now), "the same again is no news");
        assert!(list.seen(new, vec![address(2)], at, now), "another address is");
        assert!(!list.seen(PeerId::random(), Vec::new(), at, now), "without an address it is of no use");
    }

    #[test]
    fn in_a_cluster_larger_than_the_list_it_stays_as_it_is() {
        let (now, at) = (Instant::now(), SystemTime::now());
        let mut list = Recollection::default();
        let members: Vec<PeerId> = (0..MAX_PEERS + 10).map(|_| PeerId::random()).collect();
        let news =
            |list: &mut Recollection, now| members.iter().filter(|peer| list.seen(**peer, vec![address(1)], at, now)).count();
        assert_eq!(news(&mut list, now), MAX_PEERS);
        assert_eq!(news(&mut list, now + FRESH / 2), 0);
        // Who left makes room at last.
        let later = now + FRESH * 2;
        assert!(list.seen(PeerId::random(), vec![address(1)], at, later));
    }
}
