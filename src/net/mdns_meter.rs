//! When to switch mDNS off: the library's list of found nodes has no bound, is searched linearly, and its lifetimes are
//! set by whoever sends.

use std::time::{Duration, Instant};

/// Entries in the library's list above which it is dropped.
const MAX_LISTED: usize = 1024;
/// Records in one second above which it is a flood.
const MAX_PER_SECOND: usize = 200;
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
    fn a_flood_stops_mdns_and_a_crowd_does_not() {
        let now = Instant::now();
        let mut meter = MdnsMeter::new(now);
        assert_eq!(meter.on_records(now, 200, 200), Verdict::Fine);
        assert_eq!(meter.on_records(now, 1, 201), Verdict::Stop);
        assert_eq!(meter.on_records(now + Duration::from_secs(1), 200, 1024), Verdict::Fine);
        assert_eq!(meter.on_records(now + Duration::from_secs(2), 1, 1025), Verdict::Stop);
    }
}
