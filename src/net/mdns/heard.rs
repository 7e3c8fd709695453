//! Who was heard by mDNS, and where. Bounded in every direction, whatever is sent: how long an entry stays is decided here,
//! not by the sender, and no single machine can fill the list.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};

use super::Leg;

/// Entries: 1,024 nodes with IPv4 and IPv6.
const MAX_ENTRIES: usize = 2048;
/// Nodes that one machine may be.
const MAX_PER_SOURCE: usize = 64;
/// An entry that is not heard again goes after this, whatever lifetime its sender wished for.
pub(super) const KEPT: Duration = Duration::from_secs(600);
/// A node that goes on being heard is told of again after this: those who were told forget as well.
const TELL_AGAIN: Duration = Duration::from_secs(240);

#[derive(Debug)]
struct Entry {
    addresses: Vec<Multiaddr>,
    source: IpAddr,
    heard: Instant,
    told: Option<Instant>,
}

/// What a packet brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// Nothing new.
    Known,
    /// So many addresses are new, or it is time to tell of them again.
    Tell { fresh: usize },
    /// This source has told of too many nodes.
    Refused,
}

#[derive(Debug, Default)]
pub(super) struct Heard {
    entries: HashMap<(PeerId, Leg), Entry>,
}

impl Heard {
    /// Notes that `peer` was heard at `leg`.
    pub(super) fn learn(&mut self, leg: Leg, peer: PeerId, addresses: &[Multiaddr], source: IpAddr, now: Instant) -> News {
        if let Some(entry) = self.entries.get_mut(&(peer, leg)) {
            entry.heard = now;
            entry.source = source;
            let fresh = addresses.iter().filter(|address| !entry.addresses.contains(address)).count();
            if entry.addresses != addresses {
                entry.addresses = addresses.to_vec();
            }
            let due = entry.told.is_none_or(|told| now.duration_since(told) >= TELL_AGAIN);
            if fresh == 0 && !due {
                return News::Known;
            }
            entry.told = Some(now);
            return News::Tell { fresh };
        }
        if self.entries.iter().filter(|((_, at), entry)| *at == leg && entry.source == source).count() >= MAX_PER_SOURCE {
            return News::Refused;
        }
        if self.entries.len() >= MAX_ENTRIES
            && let Some(oldest) = self.entries.iter().min_by_key(|(_, entry)| entry.heard).map(|(&key, _)| key)
        {
            self.entries.remove(&oldest);
        }
        self.entries.insert((peer, leg), Entry { addresses: addresses.to_vec(), source, heard: now, told: Some(now) });
        News::Tell { fresh: addresses.len() }
    }

    /// `peer` said goodbye at `leg`, from where it was heard; true when it is heard nowhere else.
    pub(super) fn gone(&mut self, leg: Leg, peer: PeerId, source: IpAddr) -> bool {
        if self.entries.get(&(peer, leg)).is_none_or(|entry| entry.source != source) {
            return false;
        }
        self.entries.remove(&(peer, leg));
        !self.entries.keys().any(|(known, _)| *known == peer)
    }

    /// Forgets what is old.
    pub(super) fn expire(&mut self, now: Instant) {
        self.entries.retain(|_, entry| now.duration_since(entry.heard) < KEPT);
    }

    /// Forgets what was heard at `leg`.
    pub(super) fn clear(&mut self, leg: Leg) {
        self.entries.retain(|(_, at), _| *at != leg);
    }

    /// Everybody who is heard from now on is told of again.
    pub(super) fn tell_all_again(&mut self) {
        for entry in self.entries.values_mut() {
            entry.told = None;
        }
    }

    /// Nodes heard at `leg` in the last ten minutes.
    pub(super) fn nodes(&self, leg: Leg, now: Instant) -> usize {
        self.entries.iter().filter(|((_, at), entry)| *at == leg && now.duration_since(entry.heard) < KEPT).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEG: Leg = Leg { index: 2, ipv6: false };

    fn source(last: usize) -> IpAddr {
        IpAddr::from([10, 0, u8::try_from(last / 256).unwrap(), u8::try_from(last % 256).unwrap()])
    }

    fn addresses(port: u16) -> Vec<Multiaddr> {
        vec![format!("/ip4/10.0.0.1/tcp/{port}").parse().unwrap()]
    }

    #[test]
    fn a_node_is_told_of_when_it_is_new_moves_or_was_told_of_long_ago() {
        let (mut heard, now, peer) = (Heard::default(), Instant::now(), PeerId::random());
        assert_eq!(heard.learn(LEG, peer, &addresses(1), source(1), now), News::Tell { fresh: 1 });
        assert_eq!(heard.learn(LEG, peer, &addresses(1), source(1), now), News::Known);
        assert_eq!(heard.learn(LEG, peer, &addresses(2), source(1), now), News::Tell { fresh: 1 });
        assert_eq!(heard.learn(LEG, peer, &addresses(2), source(1), now + TELL_AGAIN), News::Tell { fresh: 0 });
        heard.tell_all_again();
        assert_eq!(heard.learn(LEG, peer, &addresses(2), source(1), now + TELL_AGAIN), News::Tell { fresh: 0 });
    }

    #[test]
    fn one_machine_is_at_most_so_many_nodes() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        let mut add = |from| heard.learn(LEG, PeerId::random(), &addresses(1), source(from), now);
        assert!((0..MAX_PER_SOURCE).all(|_| add(1) == News::Tell { fresh: 1 }));
        assert_eq!(add(1), News::Refused);
        assert_eq!(add(2), News::Tell { fresh: 1 });
    }

    #[test]
    fn a_full_list_gives_up_who_was_heard_longest_ago() {
        let (mut heard, now, first) = (Heard::default(), Instant::now(), PeerId::random());
        heard.learn(LEG, first, &addresses(1), source(0), now);
        for number in 1..=MAX_ENTRIES {
            heard.learn(LEG, PeerId::random(), &addresses(1), source(number), now + Duration::from_secs(1));
        }
        assert_eq!(heard.entries.len(), MAX_ENTRIES);
        assert!(!heard.entries.contains_key(&(first, LEG)));
    }

    #[test]
    fn a_goodbye_counts_from_where_the_node_was_heard_and_when_it_is_the_last() {
        let (mut heard, now, peer) = (Heard::default(), Instant::now(), PeerId::random());
        let other = Leg { index: 2, ipv6: true };
        for leg in [LEG, other] {
            heard.learn(leg, peer, &addresses(1), source(1), now);
        }
        assert!(!heard.gone(LEG, peer, source(2)), "somebody else's word");
        assert!(!heard.gone(LEG, peer, source(1)), "still heard at the other leg");
        assert!(heard.gone(other, peer, source(1)));
        assert!(!heard.gone(other, peer, source(1)));
    }

    #[test]
    fn what_is_not_heard_again_goes() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        heard.learn(LEG, PeerId::random(), &addresses(1), source(1), now);
        heard.expire(now + KEPT - Duration::from_secs(1));
        assert_eq!((heard.entries.len(), heard.nodes(LEG, now)), (1, 1));
        heard.expire(now + KEPT);
        assert_eq!(heard.entries.len(), 0);
    }
}
