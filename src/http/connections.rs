//! Which connections there are, and which of them waste a place.
//!
//! One task looks at all of them once a second, so that a request sets no timers. When all places are taken, the one that
//! has been without a request for longest makes room: who opens connections and says nothing keeps nobody out.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The head of a request is there within this time.
pub(super) const HEAD: Duration = Duration::from_secs(5);
/// Between two requests of a connection.
const IDLE: Duration = Duration::from_secs(75);
/// A client that takes nothing for this long is given up.
pub(super) const SLOW: Duration = Duration::from_secs(30);
/// A new connection has this long to send its request before it may have to make room: in a crowd, all have just come.
const GRACE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(1);

/// Waits for the head of a request, of which a part may be there.
const READING: u8 = 0;
/// Between two requests.
const RESTING: u8 = 1;
/// A request is being answered.
const BUSY: u8 = 2;
/// The body of a request is on its way; its own clock ends it.
const ARRIVING: u8 = 3;
/// What is left of a refused request is read away.
const LEAVING: u8 = 4;

/// Never a moment: nothing is waited for.
const NEVER: u64 = u64::MAX;

/// What is known of one connection.
#[derive(Debug)]
pub(super) struct Watch {
    phase: AtomicU8,
    /// When the phase began, in milliseconds since the start.
    since: AtomicU64,
    /// Since when the client takes nothing.
    stalled: AtomicU64,
    began: Instant,
    busy: Arc<AtomicUsize>,
    /// Ends the connection.
    pub close: Notify,
}

impl Watch {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(NEVER - 1)
    }

    fn enter(&self, phase: u8) {
        self.since.store(self.now(), Ordering::Relaxed);
        self.phase.store(phase, Ordering::Relaxed);
    }

    /// The body of its request is awaited.
    pub fn arriving(&self) {
        self.enter(ARRIVING);
    }

    /// Its request is refused, and the rest of it read away.
    pub fn leaving(&self) {
        self.enter(LEAVING);
    }

    /// Its request is being answered.
    pub fn working(&self) {
        self.enter(BUSY);
    }

    /// It may be ended to make room for another one.
    fn may_go(&self) -> bool {
        match self.phase.load(Ordering::Relaxed) {
            RESTING | LEAVING => true,
            READING | ARRIVING => self.now().saturating_sub(self.since.load(Ordering::Relaxed)) >= millis(GRACE),
            _ => false,
        }
    }

    fn overstayed(&self) -> bool {
        let now = self.now();
        let stalled = self.stalled.load(Ordering::Relaxed);
        if stalled != NEVER && now.saturating_sub(stalled) >= millis(SLOW) {
            return true;
        }
        let patience = match self.phase.load(Ordering::Relaxed) {
            READING => HEAD,
            RESTING => IDLE,
            _ => return false,
        };
        now.saturating_sub(self.since.load(Ordering::Relaxed)) >= millis(patience)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(NEVER)
}

/// A request that is being answered; ends with the response.
#[derive(Debug)]
pub(super) struct Busy(Arc<Watch>);

impl Busy {
    pub fn begin(watch: &Arc<Watch>) -> Self {
        watch.enter(BUSY);
        watch.busy.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(watch))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
        self.0.enter(RESTING);
    }
}

/// All connections.
#[derive(Debug)]
pub(super) struct Connections {
    most: usize,
    began: Instant,
    busy: Arc<AtomicUsize>,
    /// Held for one look through it, never across an await.
    open: Mutex<Vec<Arc<Watch>>>,
    /// There is one again.
    some: Notify,
}

impl Connections {
    pub fn new(most: usize) -> Self {
        Self { most, began: Instant::now(), busy: Arc::default(), open: Mutex::default(), some: Notify::new() }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Vec<Arc<Watch>>) -> T) -> T {
        change(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Requests that are being answered.
    pub fn busy(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    /// A place for a new connection; `None` when no other one can make room.
    pub fn enter(&self) -> Option<Arc<Watch>> {
        let watch = Arc::new(Watch {
            phase: AtomicU8::new(READING),
            since: AtomicU64::new(0),
            stalled: AtomicU64::new(NEVER),
            began: self.began,
            busy: Arc::clone(&self.busy),
            close: Notify::new(),
        });
        watch.enter(READING);
        self.with(|open| {
            if open.len() >= self.most {
                let idle = open.iter().enumerate().filter(|(_, other)| other.may_go());
                let (at, _) = idle.min_by_key(|(_, other)| other.since.load(Ordering::Relaxed))?;
                open.swap_remove(at).close.notify_one();
            }
            open.push(Arc::clone(&watch));
            self.some.notify_one();
            Some(watch)
        })
    }

    /// The connection has ended.
    pub fn leave(&self, watch: &Arc<Watch>) {
        self.with(|open| {
            if let Some(at) = open.iter().position(|other| Arc::ptr_eq(other, watch)) {
                open.swap_remove(at);
            }
        });
    }

    /// Ends what overstays, for as long as it is polled.
    pub async fn watch(&self) {
        loop {
            let empty = self.with(|open| {
                for watch in open.iter().filter(|watch| watch.overstayed()) {
                    watch.close.notify_one();
                }
                open.is_empty()
            });
            if empty {
                self.some.notified().await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// A stream that tells its [`Watch`] what moves.
#[derive(Debug)]
pub(super) struct Watched<S> {
    pub stream: S,
    pub watch: Arc<Watch>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before && self.watch.phase.load(Ordering::Relaxed) == RESTING {
            self.watch.enter(READING);
        }
        read
    }
}

impl<S> Watched<S> {
    fn note<T>(&self, written: Poll<T>) -> Poll<T> {
        let stalled = self.watch.stalled.load(Ordering::Relaxed);
        match (&written, stalled) {
            (Poll::Pending, NEVER) => self.watch.stalled.store(self.watch.now(), Ordering::Relaxed),
            (Poll::Ready(_), since) if since != NEVER => self.watch.stalled.store(NEVER, Ordering::Relaxed),
            _ => {}
        }
        written
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_longest_without_a_request_makes_room_and_one_that_is_answered_does_not() {
        let connections = Connections::new(2);
        let first = connections.enter().unwrap();
        tokio::time::advance(Duration::from_millis(10)).await;
        let second = connections.enter().unwrap();
        let busy = Busy::begin(&first);
        assert!(connections.enter().is_none(), "one that has just come may still send its request");
        tokio::time::advance(GRACE).await;
        let third = connections.enter().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(1), second.close.notified()).await.is_ok());
        let also = Busy::begin(&third);
        assert_eq!(connections.busy(), 2);
        assert!(connections.enter().is_none());
        drop((busy, also));
        assert_eq!(connections.busy(), 0);
        assert!(connections.enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn each_phase_has_its_patience() {
        let connections = Connections::new(2);
        let watch = connections.enter().unwrap();
        tokio::time::advance(HEAD - Duration::from_millis(1)).await;
        assert!(!watch.overstayed());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(watch.overstayed());
        let busy = Busy::begin(&watch);
        tokio::time::advance(Duration::from_secs(4000)).await;
        assert!(!watch.overstayed(), "an answer may take its time");
        drop(busy);
        tokio::time::advance(IDLE - Duration::from_millis(1)).await;
        assert!(!watch.overstayed());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(watch.overstayed());
    }
}
