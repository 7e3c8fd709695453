//! What a relayed connection has carried, so that a cut by its relay is known for what it is.
//!
//! A relay that has a limit ends a circuit without a word. Both ends count the bytes of the circuit, below Noise, and
//! know the limit from the relay's own answer: whoever loses a stream asks the [`Meter`] whether that was the reason.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::io::{AsyncRead, AsyncWrite};
use libp2p::PeerId;
use libp2p::core::ConnectedPoint;
use libp2p::multiaddr::Protocol;

/// Bytes that the relay has counted and this end has not seen when the cut comes: what was under way is thrown away.
const UNDER_WAY: u64 = 4 << 20;
/// The clock of the relay began a little earlier.
const CLOCK: Duration = Duration::from_secs(2);

/// What the relay allows one circuit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Limit {
    /// Both directions together; `None` is as much as one likes.
    pub bytes: Option<u64>,
    pub duration: Option<Duration>,
}

/// The count of one relayed connection.
#[derive(Debug)]
pub(crate) struct Meter {
    bytes: AtomicU64,
    since: Instant,
    limit: OnceLock<Limit>,
}

impl Meter {
    fn new() -> Self {
        Self { bytes: AtomicU64::new(0), since: Instant::now(), limit: OnceLock::new() }
    }

    /// The relay has said what it allows.
    pub(crate) fn allow(&self, limit: Limit) {
        let _ = self.limit.set(limit);
    }

    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Why the relay ended the connection, if its limit explains that.
    pub(crate) fn spent(&self, now: Instant) -> Option<String> {
        let limit = self.limit.get()?;
        let carried = self.bytes.load(Ordering::Relaxed);
        if let Some(most) = limit.bytes.filter(|&most| most > 0)
            && carried + UNDER_WAY.min(most / 4) >= most
        {
            return Some(format!("the relay carries {most} bytes for one connection, and they are used up"));
        }
        let most = limit.duration.filter(|most| now.duration_since(self.since) + CLOCK >= *most)?;
        Some(format!("the relay carries a connection for {} s, and they are over", most.as_secs()))
    }
}

/// Meters by the peer at the other end, and whether this node dialled.
type Waiting = HashMap<(PeerId, bool), Vec<Weak<Meter>>>;

/// Meters of connections that are not established yet: the transport makes them, the swarm's side takes them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meters(Arc<Mutex<Waiting>>);

impl Meters {
    /// Counts what `stream` carries from now on.
    pub(crate) fn measure<S>(&self, stream: S, point: &ConnectedPoint) -> Metered<S> {
        let meter = Arc::new(Meter::new());
        if let Some(peer) = other_end(point) {
            self.with(|meters| {
                // Connections that were refused before they were established are gone, and their meters with them.
                meters.retain(|_, waiting| {
                    waiting.retain(|meter| meter.strong_count() > 0);
                    !waiting.is_empty()
                });
                meters.entry((peer, point.is_dialer())).or_default().push(Arc::downgrade(&meter));
            });
        }
        Metered { stream, meter }
    }

    /// The meter of a connection to `peer` that is established now.
    pub(crate) fn take(&self, peer: PeerId, dialed: bool) -> Option<Arc<Meter>> {
        self.with(|meters| {
            let waiting = meters.get_mut(&(peer, dialed))?;
            let alive = waiting.iter().position(|meter| meter.strong_count() > 0)?;
            waiting.drain(..=alive).next_back()?.upgrade()
        })
    }

    fn with<T>(&self, change: impl FnOnce(&mut HashMap<(PeerId, bool), Vec<Weak<Meter>>>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whom a circuit leads to: the relay's word, which Noise then proves.
fn other_end(point: &ConnectedPoint) -> Option<PeerId> {
    match point.get_remote_address().iter().last()? {
        Protocol::P2p(peer) => Some(peer),
        _ => None,
    }
}

/// A circuit whose bytes are counted.
#[derive(Debug)]
pub(crate) struct Metered<S> {
    stream: S,
    meter: Arc<Meter>,
}

impl<S> Metered<S> {
    fn count(&self, done: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &done {
            self.meter.add(*bytes);
        }
        done
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.count(done)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, buffer);
        self.count(done)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffers: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, buffers);
        self.count(done)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{AsyncReadExt as _, AsyncWriteExt as _};

    fn dialled(peer: PeerId) -> ConnectedPoint {
        ConnectedPoint::Dialer {
            address: format!("/ip4/192.0.2.1/tcp/1/p2p/{}/p2p-circuit/p2p/{peer}", PeerId::random()).parse().unwrap(),
            role_override: libp2p::core::Endpoint::Dialer,
            port_use: libp2p::core::transport::PortUse::Reuse,
        }
    }

    #[tokio::test]
    async fn both_directions_count_and_the_limit_explains_a_cut_only_near_it() {
        let (meters, peer) = (Meters::default(), PeerId::random());
        let mut stream = meters.measure(futures::io::Cursor::new(vec![0; 4096]), &dialled(peer));
        let meter = meters.take(peer, true).unwrap();
        let spent = || meter.spent(Instant::now());
        assert_eq!(spent(), None, "nothing is known of a limit");
        meter.allow(Limit { bytes: Some(1000), duration: None });
        assert_eq!(spent(), None);
        stream.read_exact(&mut [0; 400]).await.unwrap();
        assert_eq!(spent(), None);
        stream.write_all(&[0; 350]).await.unwrap();
        assert!(spent().unwrap().contains("1000 bytes"), "{:?}", spent());
    }

    #[test]
    fn time_is_a_limit_too_and_none_is_none() {
        let meter = Meter::new();
        meter.allow(Limit { bytes: Some(0), duration: Some(Duration::from_secs(60)) });
        assert_eq!(meter.spent(meter.since + Duration::from_secs(57)), None);
        assert!(meter.spent(meter.since + Duration::from_secs(59)).unwrap().contains("60 s"));
    }

    #[test]
    fn a_connection_takes_the_meter_of_its_own_peer_and_direction_and_dead_ones_are_forgotten() {
        let (meters, peer, other) = (Meters::default(), PeerId::random(), PeerId::random());
        let refused = meters.measure((), &dialled(peer));
        let first = meters.measure((), &dialled(peer));
        drop(refused);
        let second = meters.measure((), &dialled(peer));
        assert!(meters.take(other, true).is_none());
        assert!(meters.take(peer, false).is_none());
        assert!(Arc::ptr_eq(&meters.take(peer, true).unwrap(), &first.meter));
        assert!(Arc::ptr_eq(&meters.take(peer, true).unwrap(), &second.meter));
        assert!(meters.take(peer, true).is_none());
    }
}
