//! A timer of the kernel's for moments some seconds away.
//!
//! Tokio sorts a timer into finer and finer slots as its moment comes near, and wakes for each step: about three times for
//! five seconds. An idle node would wake mostly for that. This one wakes once.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// One moment to wake at.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: AsyncFd<OwnedFd>,
    at: Option<Instant>,
}

impl Alarm {
    /// An alarm that is not set.
    ///
    /// # Errors
    /// The system has no file descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[expect(deprecated, reason = "its unsafe successor is for types whose descriptor may change; an owned one does not")]
        let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self { timer, at: None })
    }

    /// Wakes at `at`, and no more at what was set before.
    pub(crate) fn set(&mut self, at: Instant) {
        if self.at == Some(at) {
            return;
        }
        // Zero would switch it off: what is due now is due in a nanosecond.
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        match timerfd_settime(self.timer.get_ref(), TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value }) {
            Ok(_) => self.at = Some(at),
            // Only a wrong descriptor or time could fail.
            Err(error) => tracing::error!(%error, "the timer cannot be set: {error}"),
        }
    }

    /// Resolves at the moment that was set, once. Cancel-safe.
    pub(crate) async fn rings(&mut self) {
        loop {
            let Ok(mut ready) = self.timer.readable().await else { return std::future::pending().await };
            let read = ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut [0_u8; 8])?));
            if let Ok(Ok(_)) = read {
                self.at = None;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[tokio::test]
    async fn it_rings_once_and_at_the_last_moment_set() {
        let mut alarm = Alarm::new().unwrap();
        let begun = Instant::now();
        alarm.set(begun + Duration::from_secs(60));
        alarm.set(begun + Duration::from_millis(20));
        timeout(Duration::from_secs(5), alarm.rings()).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(20));
        assert!(timeout(Duration::from_millis(50), alarm.rings()).await.is_err());
    }

    #[tokio::test]
    async fn a_moment_that_has_passed_rings_now() {
        let mut alarm = Alarm::new().unwrap();
        alarm.set(Instant::now() - Duration::from_secs(1));
        timeout(Duration::from_secs(5), alarm.rings()).await.unwrap();
    }
}
