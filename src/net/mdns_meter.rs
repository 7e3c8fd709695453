//! When to switch mDNS off: the library's list of found nodes has no bound, is searched linearly, and its lifetimes are
//! set by whoever sends.

use std::time::{Duration, Instant};

/// Entries in the library's list above which it is dropped.
const MAX_LISTED: usize = 1024;
/// Records in one second above which it is a flood. A room of 64 machines that are switched on together is none: four
/// addresses each, told over IPv4 and over IPv6, are 512.
const MAX_PER_SECOND: usize = 600;
/// How long it stays off.
pub(crate) const PAUSE: Duration = Duration::from_secs(600);

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    Stop,
}

#[derive(Debug)]
pub(crate) struct MdnsMeter {
    second: Instant,
    records: usize,
}

impl MdnsMeter {
    pub(crate) fn new(now: Instant) -> Self {
        Self { second: now, records: 0 }
    }

    /// A fresh instance was started.
    pub(crate) fn restarted(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// New records came; `listed` is the length of the library's list.
    pub(crate) fn on_records(&mut self, now: Instant, records: usize, listed: usize) -> Verdict {
        if now.duration_since(self.second) >= Duration::from_secs(1) {
            *self = Self::new(now);
        }
        self.records += records;
        if self.records > MAX_PER_SECOND || listed > MAX_LISTED { Verdict::Stop } else { Verdict::Fine }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_four_machines_that_start_together_are_no_flood() {
        let now = Instant::now();
        let mut meter = MdnsMeter::new(now);
        assert!((1..=64 * 2).all(|machine| meter.on_records(now, 4, machine * 4) == Verdict::Fine));
    }

    #[test]
    fn a_flood_stops_mdns_and_a_crowd_does_not() {
        let now = Instant::now();
        let mut meter = MdnsMeter::new(now);
        assert_eq!(meter.on_records(now, MAX_PER_SECOND, 600), Verdict::Fine);
        assert_eq!(meter.on_records(now, 1, 601), Verdict::Stop);
        assert_eq!(meter.on_records(now + Duration::from_secs(1), MAX_PER_SECOND, 1024), Verdict::Fine);
        assert_eq!(meter.on_records(now + Duration::from_secs(2), 1, 1025), Verdict::Stop);
    }
}
