//! A connection that is closed within a moment, also when nobody answers any more.
//!
//! Closing Yamux over TCP writes what is left and then a last frame, and waits for as long as the kernel waits for a cable that
//! was pulled: a minute and more. Until then the swarm takes the peer for connected and nobody dials it anew. (QUIC needs none
//! of this: it closes at once.) <https://github.com/libp2p/rust-libp2p/issues/4912> is one of several about connections that
//! outlive their use.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use tokio::time::{Sleep, sleep};

/// What a goodbye needs at most on a connection that works.
const CLOSE: Duration = Duration::from_millis(500);

/// A muxer that gives up a close that takes too long.
#[derive(Debug)]
pub(crate) struct Hasty<M> {
    inner: M,
    closing: Option<Pin<Box<Sleep>>>,
}

impl<M> Hasty<M> {
    pub(crate) fn new(inner: M) -> Self {
        Self { inner, closing: None }
    }
}

impl<M: StreamMuxer + Unpin> StreamMuxer for Hasty<M> {
    type Substream = M::Substream;
    type Error = M::Error;

    fn poll_inbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.get_mut().inner).poll_inbound(cx)
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.get_mut().inner).poll_outbound(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let this = self.get_mut();
        if let Poll::Ready(closed) = Pin::new(&mut this.inner).poll_close(cx) {
            return Poll::Ready(closed);
        }
        let closing = this.closing.get_or_insert_with(|| Box::pin(sleep(CLOSE)));
        // Dropping the muxer, which follows, closes the socket.
        closing.as_mut().poll(cx).map(Ok)
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        Pin::new(&mut self.get_mut().inner).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never done, or at once.
    struct Closes(bool);

    impl StreamMuxer for Closes {
        type Substream = futures::io::Cursor<Vec<u8>>;
        type Error = std::io::Error;

        fn poll_inbound(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
            Poll::Pending
        }
        fn poll_outbound(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<Self::Substream, Self::Error>> {
            Poll::Pending
        }
        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            if self.0 { Poll::Ready(Ok(())) } else { Poll::Pending }
        }
        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_close_ends_at_once_or_after_a_moment() {
        for (closes, within) in [(true, Duration::ZERO), (false, CLOSE)] {
            let mut muxer = Hasty::new(Closes(closes));
            let begun = tokio::time::Instant::now();
            std::future::poll_fn(|cx| Pin::new(&mut muxer).poll_close(cx)).await.unwrap();
            assert_eq!(begun.elapsed(), within);
        }
    }
}
