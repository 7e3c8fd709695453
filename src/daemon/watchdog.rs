//! The watchdog: systemd is told that the daemon lives only after its parts have answered.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, MissedTickBehavior};

use crate::dbus::Pinger;
use crate::{net, serve};

/// A part that is busy is asked again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// What has to answer.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    /// The network task: through its own queue.
    pub net: net::Handle,
    /// The serving task: through its own queue.
    pub serve: serve::Handle,
    /// The bus, our own objects on it, and dispatch behind them.
    pub bus: Pinger,
}

/// Feeds the watchdog as long as the parts answer, if the service manager wants that; ends with the process.
pub(super) fn start(parts: Parts) {
    if let Some(limit) = sd_notify::watchdog_enabled() {
        tokio::spawn(feed(parts, limit, || super::status::notify(&[NotifyState::Watchdog])));
    }
}

/// Calls `fed` every half of `limit` when every part has answered within a quarter of it. Never ends.
async fn feed(parts: Parts, limit: Duration, mut fed: impl FnMut()) {
    let mut beat = tokio::time::interval(limit / 2);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        let silent = silent(&parts, limit / 4).await;
        if silent.is_empty() {
            fed();
        } else {
            let parts = silent.join(", ");
            tracing::error!(parts, "no answer from {parts}: unless one comes, the service manager restarts this daemon");
        }
    }
}

/// The parts that do not answer within `patience`, by name.
async fn silent(parts: &Parts, patience: Duration) -> Vec<&'static str> {
    let deadline = Instant::now() + patience;
    // dispatch has no loop of its own: GetStatus on the bus reads its state.
    let (net, serve, bus) = tokio::join!(
        answers(deadline, || parts.net.probe()),
        answers(deadline, || parts.serve.probe()),
        answers(deadline, || parts.bus.ping()),
    );
    [("network", net), ("serving", serve), ("bus", bus)]
        .into_iter()
        .filter_map(|(name, answered)| (!answered).then_some(name))
        .collect()
}

/// Whether a probe succeeds before `deadline`; one that fails at once, as with a full queue, is tried again.
async fn answers<F: Future<Output = bool>>(deadline: Instant, probe: impl Fn() -> F) -> bool {
    let tried = async {
        while !probe().await {
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::time::timeout_at(deadline, tried).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn a_busy_part_is_asked_again_and_a_silent_one_is_given_up_in_time() {
        let tries = Cell::new(0);
        let third = || {
            tries.set(tries.get() + 1);
            std::future::ready(tries.get() == 3)
        };
        let start = Instant::now();
        assert!(answers(start + Duration::from_secs(7), third).await);
        assert_eq!((tries.get(), start.elapsed()), (3, AGAIN * 2));
        assert!(!answers(start + Duration::from_secs(7), std::future::pending).await);
        assert_eq!(start.elapsed(), Duration::from_secs(7));
    }
}
