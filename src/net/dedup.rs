//! Request ids that were seen: a prompt is never run twice, also when it is sent twice.
//!
//! Two generations of a set: an id is remembered for ten to twenty minutes, or until 16,384 to 32,768 newer ones came.
//! A repeated request comes within seconds of the first. What is kept of an id is a keyed hash of eight bytes: with a
//! whole peer id and request id it was a hundred, and a busy node held 28 MB of them.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use uuid::Uuid;

const MAX_IDS: usize = 16_384;
const AGE: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(crate) struct Seen {
    /// Its key is secret and this process's own: nobody can send an id that collides with another's. By chance it happens
    /// once in 10^14 prompts.
    hash: RandomState,
    young: HashSet<u64>,
    old: HashSet<u64>,
    turned: Instant,
}

impl Seen {
    pub(crate) fn new(now: Instant) -> Self {
        Self { hash: RandomState::new(), young: HashSet::new(), old: HashSet::new(), turned: now }
    }

    /// Notes an id; false when this peer sent it before.
    pub(crate) fn insert(&mut self, peer: PeerId, id: Uuid, now: Instant) -> bool {
        if self.young.len() >= MAX_IDS || now.duration_since(self.turned) >= AGE {
            self.old = std::mem::take(&mut self.young);
            self.turned = now;
        }
        let mark = self.hash.hash_one((peer, id));
        !self.old.contains(&mark) && self.young.insert(mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_accepted_once_per_peer() {
        let now = Instant::now();
        let mut seen = Seen::new(now);
        let (peer, id) = (PeerId::random(), Uuid::from_u128(1));
        assert!(seen.insert(peer, id, now));
        assert!(!seen.insert(peer, id, now + AGE));
        assert!(seen.insert(PeerId::random(), id, now));
    }

    #[test]
    fn memory_is_bounded_and_the_newest_ids_stay() {
        let now = Instant::now();
        let mut seen = Seen::new(now);
        let peer = PeerId::random();
        let count = 3 * MAX_IDS as u128;
        for id in 0..count {
            assert!(seen.insert(peer, Uuid::from_u128(id), now));
        }
        assert!(seen.young.len() + seen.old.len() <= 2 * MAX_IDS);
        assert!(!seen.insert(peer, Uuid::from_u128(count - MAX_IDS as u128), now));
    }
}
