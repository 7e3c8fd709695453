//! How much memory the prompts of other nodes may take while they arrive and while their answers leave, and how many streams
//! a member may hold for them.
//!
//! A request may be a mebibyte, and a member may have many streams on several connections: without these bounds one that
//! sends large halves, or asks for large echoes and reads none of them, takes hundreds of mebibytes. Small requests, which are
//! nearly all, pass without being counted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use libp2p::PeerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::transport::MAX_STREAMS;

/// Lanes that one member may have here, over all its connections: as many as one connection carries.
pub(crate) const MAX_LANES_OF_PEER: usize = MAX_STREAMS as usize;
/// Requests up to this size are not counted.
const SMALL_BYTES: usize = 16 * 1024;
/// What the larger ones of one member may take at a time, and those of all; who comes later waits.
const PEER_BYTES: usize = 1 << 20;
const ALL_BYTES: usize = 8 << 20;
/// Bytes are counted by the page.
const PAGE_BYTES: usize = 16 * 1024;
/// Peers that are remembered though they have no lane now.
const MAX_IDLE: usize = 64;

#[derive(Debug)]
struct OfPeer {
    lanes: AtomicUsize,
    pages: Arc<Semaphore>,
}

/// The rooms of all members.
#[derive(Debug)]
pub(crate) struct Rooms {
    pages: Arc<Semaphore>,
    peers: HashMap<PeerId, Arc<OfPeer>>,
}

impl Default for Rooms {
    fn default() -> Self {
        Self { pages: Arc::new(Semaphore::new(ALL_BYTES / PAGE_BYTES)), peers: HashMap::new() }
    }
}

impl Rooms {
    /// A lane more for `peer`; `None` when it has enough.
    pub(crate) fn lane(&mut self, peer: PeerId) -> Option<Room> {
        if self.peers.len() > MAX_IDLE {
            self.peers.retain(|_, of_peer| Arc::strong_count(of_peer) > 1);
        }
        let of_peer = self.peers.entry(peer).or_insert_with(|| {
            Arc::new(OfPeer { lanes: AtomicUsize::new(0), pages: Arc::new(Semaphore::new(PEER_BYTES / PAGE_BYTES)) })
        });
        // Only this task adds; others take away.
        if of_peer.lanes.load(Ordering::Relaxed) >= MAX_LANES_OF_PEER {
            return None;
        }
        of_peer.lanes.fetch_add(1, Ordering::Relaxed);
        Some(Room { of_peer: Arc::clone(of_peer), pages: Arc::clone(&self.pages) })
    }
}

/// The room of one lane.
#[derive(Debug)]
pub(crate) struct Room {
    of_peer: Arc<OfPeer>,
    pages: Arc<Semaphore>,
}

impl Room {
    /// Waits until a request of so many bytes may arrive; it may stay until what is given is dropped.
    pub(crate) async fn request(&self, bytes: usize) -> Option<Stay> {
        if bytes <= SMALL_BYTES {
            return None;
        }
        let pages = u32::try_from(bytes.min(PEER_BYTES).div_ceil(PAGE_BYTES)).unwrap_or(u32::MAX);
        // Its own first: who waits for itself must not hold what others could have. Neither is ever closed.
        let own = Arc::clone(&self.of_peer.pages).acquire_many_owned(pages).await.ok()?;
        let all = Arc::clone(&self.pages).acquire_many_owned(pages).await.ok()?;
        Some(Stay { _own: own, _all: all })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.of_peer.lanes.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Room that is taken.
#[derive(Debug)]
pub(crate) struct Stay {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const LARGE: usize = 256 << 10;

    #[test]
    fn sixty_four_lanes_of_a_member_and_not_one_more() {
        let (mut rooms, peer) = (Rooms::default(), PeerId::random());
        let mut held: Vec<Room> = (0..MAX_LANES_OF_PEER).map(|_| rooms.lane(peer).unwrap()).collect();
        assert!(rooms.lane(peer).is_none());
        assert!(rooms.lane(PeerId::random()).is_some(), "another one is not affected");
        held.pop();
        assert!(rooms.lane(peer).is_some());
    }

    #[test]
    fn a_mebibyte_of_a_member_and_the_next_waits() {
        let (mut rooms, peer) = (Rooms::default(), PeerId::random());
        let lanes: Vec<Room> = (0..5).map(|_| rooms.lane(peer).unwrap()).collect();
        let mut stays: Vec<Stay> = lanes[..4].iter().map(|lane| lane.request(LARGE).now_or_never().unwrap().unwrap()).collect();
        assert!(lanes[4].request(LARGE).now_or_never().is_none());
        assert!(lanes[4].request(SMALL_BYTES).now_or_never().unwrap().is_none(), "a small one is not counted");
        assert!(lanes[4].request(SMALL_BYTES + 1).now_or_never().is_none());
        stays.pop();
        assert!(lanes[4].request(LARGE).now_or_never().unwrap().is_some());
    }

    #[test]
    fn eight_mebibytes_of_all_and_the_next_waits() {
        let mut rooms = Rooms::default();
        let mut held = Vec::new();
        for _ in 0..ALL_BYTES / PEER_BYTES {
            let lane = rooms.lane(PeerId::random()).unwrap();
            held.extend((0..PEER_BYTES / LARGE).map(|_| lane.request(LARGE).now_or_never().unwrap().unwrap()));
        }
        let late = rooms.lane(PeerId::random()).unwrap();
        assert!(late.request(LARGE).now_or_never().is_none());
        held.pop();
        assert!(late.request(LARGE).now_or_never().unwrap().is_some());
    }

    #[test]
    fn peers_without_a_lane_are_forgotten() {
        let mut rooms = Rooms::default();
        for _ in 0..1000 {
            drop(rooms.lane(PeerId::random()));
        }
        assert!(rooms.peers.len() <= MAX_IDLE + 1);
    }
}
