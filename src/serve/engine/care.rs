//! Looking after a child: is it alive, is it in time, has it nothing to do?

use std::time::Duration;

use opengateway_engine_protocol::Down;
use tokio::time::Instant;

use super::request::Request;
use super::task::{CANCEL, State, TICK, Task};
use crate::domain::prompt::{Failure, FailureKind};

/// Between two pings of a child that works.
const PING: Duration = Duration::from_secs(1);
/// A child that says nothing for so long is dead.
const SILENCE: Duration = Duration::from_secs(10);
/// The same while it starts and loads: a slow disk may hold it.
const SILENT_START: Duration = Duration::from_secs(30);
/// A prompt is told that the model is being loaded so long before its deadline.
const BEFORE_DEADLINE: Duration = Duration::from_millis(300);

impl Task {
    /// When the child is ended for having nothing to do.
    pub(super) fn idle_end(&self) -> Option<Instant> {
        let policy = *self.policy.borrow();
        match (policy.keep, policy.idle, self.idle_since) {
            (false, Some(idle), Some(since)) => Some(since + idle),
            _ => None,
        }
    }

    pub(super) fn on_alarm(&mut self) {
        self.refuse_late();
        let now = Instant::now();
        self.next_tick = now + TICK;
        let idle_over = self.idle_end().is_some_and(|end| end <= now);
        let busy = !self.flights.is_empty();
        let stuck = self.flights.values().any(|flight| flight.cancelled.is_some_and(|until| until <= now));
        let State::Up(running) = &mut self.state else { return };
        if let Some(until) = running.ending {
            if until <= now {
                self.on_lost("it did not end when it was told to");
            }
            return;
        }
        let silence = if running.ready.is_some() { SILENCE } else { SILENT_START };
        let since = if running.ready.is_none() { Some(running.heard) } else { running.ping.map(|_| running.pinged) };
        if since.is_some_and(|since| now.saturating_duration_since(since) >= silence) {
            return self.on_lost(&format!("it did not answer for {} s", silence.as_secs()));
        }
        if stuck {
            return self.on_lost(&format!("it did not let go of a cancelled prompt in {} s", CANCEL.as_secs()));
        }
        if running.ready.is_some() && idle_over && !busy && self.waiting.is_empty() {
            return self.end_child();
        }
        if running.greeted && busy && running.ping.is_none() && now.saturating_duration_since(running.pinged) >= PING {
            self.next_ping += 1;
            running.ping = Some(self.next_ping);
            running.pinged = now;
            let _ = running.child.send(&Down::Ping { nonce: self.next_ping });
        }
    }

    /// Prompts whose deadline comes before the model is there are told so: another member may be in time.
    fn refuse_late(&mut self) {
        let now = Instant::now();
        let (progress, ready_at) = match &self.state {
            State::Up(running) if running.ready.is_some() => return,
            State::Up(running) => {
                let elapsed = now.saturating_duration_since(running.since);
                // An estimate from the first moments says nothing.
                let whole = (running.progress > 0.05 && elapsed > Duration::from_secs(2))
                    .then(|| elapsed.div_f32(running.progress.clamp(0.05, 1.0)));
                (running.progress, whole.map_or(now, |whole| running.since + whole))
            }
            State::Resting(until) => (0.0, *until),
            State::Asking(_) | State::Down | State::Failed(_) => (0.0, now),
        };
        let late = |request: &Request| request.deadline <= ready_at.max(now + BEFORE_DEADLINE);
        if !self.waiting.iter().any(late) {
            return;
        }
        let (refused, waiting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting).into_iter().partition(late);
        self.waiting = waiting.into();
        for request in refused {
            let detail = format!("{} is being loaded ({:.0} %) and will not be ready in time", self.model(), progress * 100.0);
            request.answer.end(Err(Failure::new(FailureKind::ModelLoading, detail)));
        }
    }
}
