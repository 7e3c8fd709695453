//! How a request comes in: when it may begin to take memory, and how slowly it may come once it does.

use std::time::Duration;

use futures::AsyncRead;
use tokio::time::{Instant, timeout};

use super::room::{Room, Stay};
use crate::wire::frame::{FrameError, FrameReader};
use crate::wire::limits::{LARGE_REQUEST_BEGINS, LARGE_REQUEST_PER_SECOND, MAX_REQUEST_FRAME_BYTES, REQUEST_ARRIVES, ROOM_WAIT};

/// Between two looks at how much has come.
const LOOK: Duration = Duration::from_secs(1);

/// What came of a request that began to arrive.
#[derive(Debug)]
pub(super) enum Arrival {
    /// It is in the reader. What a large one takes is held until this is dropped.
    Whole(Option<Stay>),
    /// The stream ended before it.
    Ended,
    /// Others take all the room. Its length was read and no more.
    NoRoom,
    TooSlow,
}

/// Bytes that must be there after so long: room is not for those who only hold it.
fn owed(waited: Duration) -> usize {
    let counted = waited.saturating_sub(LARGE_REQUEST_BEGINS).as_secs();
    usize::try_from(counted).unwrap_or(usize::MAX).saturating_mul(LARGE_REQUEST_PER_SECOND)
}

/// Waits until the request whose first byte has come is in `lane`. Waiting for room does not count as its own time.
pub(super) async fn arrive<S: AsyncRead + Unpin>(lane: &mut FrameReader<S>, room: &Room) -> Result<Arrival, FrameError> {
    let Ok(announced) = timeout(REQUEST_ARRIVES, lane.announced(MAX_REQUEST_FRAME_BYTES)).await else {
        return Ok(Arrival::TooSlow);
    };
    let Ok(stay) = timeout(ROOM_WAIT, room.request(announced?)).await else { return Ok(Arrival::NoRoom) };
    let begun = Instant::now();
    loop {
        if let Ok(whole) = timeout(LOOK, lane.whole(MAX_REQUEST_FRAME_BYTES)).await {
            return Ok(if whole? { Arrival::Whole(stay) } else { Arrival::Ended });
        }
        let waited = begun.elapsed();
        if waited >= REQUEST_ARRIVES || (stay.is_some() && lane.pending() < owed(waited)) {
            return Ok(Arrival::TooSlow);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::room::Rooms;
    use libp2p::PeerId;
    use tokio::io::{AsyncWriteExt as _, DuplexStream};
    use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

    const LARGE: u32 = 1 << 20;

    fn lane() -> (DuplexStream, FrameReader<Compat<DuplexStream>>) {
        let (theirs, ours) = tokio::io::duplex(64 * 1024);
        (theirs, FrameReader::new(ours.compat()))
    }

    /// Sends `bytes` of a frame of `announced` each second, for ever.
    async fn drip(mut stream: DuplexStream, announced: u32, bytes: usize) {
        let _ = stream.write_u32(announced).await;
        while stream.write_all(&vec![b' '; bytes]).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_that_does_not_come_gives_its_room_back_soon() {
        let mut rooms = Rooms::default();
        let room = rooms.lane(PeerId::random()).unwrap();
        for (bytes, least, most) in [(0, 5, 7), (LARGE_REQUEST_PER_SECOND / 2, 5, 12), (LARGE_REQUEST_PER_SECOND + 512, 30, 31)] {
            let (theirs, mut ours) = lane();
            let (dripping, begun) = (tokio::spawn(drip(theirs, LARGE, bytes)), Instant::now());
            assert!(matches!(arrive(&mut ours, &room).await, Ok(Arrival::TooSlow)), "{bytes}");
            let seconds = begun.elapsed().as_secs();
            assert!((least..=most).contains(&seconds), "{bytes}: {seconds} s");
            dripping.abort();
        }
        // A small one holds no room, and has all the time there is.
        let (theirs, mut ours) = lane();
        let dripping = tokio::spawn(drip(theirs, 2000, 100));
        assert!(matches!(arrive(&mut ours, &room).await, Ok(Arrival::Whole(None))));
        dripping.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_is_turned_away_and_the_stream_stays_in_step() {
        let mut rooms = Rooms::default();
        let peer = PeerId::random();
        let lanes: Vec<Room> = (0..2).map(|_| rooms.lane(peer).unwrap()).collect();
        let mut held = Vec::new();
        for lane in &lanes[..1] {
            held.push(lane.request(LARGE as usize).await.unwrap());
        }
        let (mut theirs, mut ours) = lane();
        let sending = tokio::spawn(async move {
            theirs.write_u32(LARGE).await.unwrap();
            theirs.write_all(&vec![b'x'; LARGE as usize]).await.unwrap();
            theirs.write_all(&[0, 0, 0, 2, b'o', b'k']).await.unwrap();
            theirs
        });
        let begun = Instant::now();
        assert!(matches!(arrive(&mut ours, &lanes[1]).await, Ok(Arrival::NoRoom)));
        assert_eq!(begun.elapsed().as_secs(), ROOM_WAIT.as_secs());
        assert_eq!(ours.skip(MAX_REQUEST_FRAME_BYTES, 3).await.unwrap(), b"xxx");
        assert!(matches!(arrive(&mut ours, &lanes[1]).await, Ok(Arrival::Whole(None))));
        assert_eq!(&*ours.next(8).await.unwrap().unwrap(), b"ok");
        drop(sending.await.unwrap());
        assert!(matches!(arrive(&mut ours, &lanes[1]).await, Ok(Arrival::Ended)));
    }
}
