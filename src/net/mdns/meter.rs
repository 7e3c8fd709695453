//! When to stop listening to mDNS for a while: reading a flood costs more than an honest network ever sends.

use std::time::{Duration, Instant};

/// Addresses in one second that were not known. A room of 64 machines that are switched on together is no flood: four
/// each, and as many again when they have got all of theirs.
const MAX_FRESH: usize = 600;
/// Packets in one second. Two hundred nodes that start together send three each, and a question has an answer of each.
const MAX_PACKETS: usize = 2000;
/// First pause, and the longest: each is twice as long as the one before when the flood goes on.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// So long without a flood, and the next one is the first again.
const CALM: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Meter {
    second: Option<Instant>,
    packets: usize,
    fresh: usize,
    pause: Duration,
    /// When the last pause ended or will end.
    until: Option<Instant>,
}

impl Meter {
    pub(super) fn new() -> Self {
        Self { second: None, packets: 0, fresh: 0, pause: FIRST_PAUSE, until: None }
    }

    /// A packet came.
    pub(super) fn packet(&mut self, now: Instant) {
        if self.second.is_none_or(|second| now.duration_since(second) >= Duration::from_secs(1)) {
            (self.second, self.packets, self.fresh) = (Some(now), 0, 0);
        }
        self.packets += 1;
    }

    /// So many addresses in it were not known.
    pub(super) fn fresh(&mut self, addresses: usize) {
        self.fresh += addresses;
    }

    /// Until when not to listen, when this is a flood.
    pub(super) fn flooded(&mut self, now: Instant) -> Option<Instant> {
        if self.packets <= MAX_PACKETS && self.fresh <= MAX_FRESH {
            return None;
        }
        let goes_on = self.until.is_some_and(|until| now.duration_since(until) < CALM);
        self.pause = if goes_on { (self.pause * 2).min(LONGEST_PAUSE) } else { FIRST_PAUSE };
        let until = now + self.pause;
        (self.second, self.until) = (None, Some(until));
        Some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `packets` at `now`, each with `fresh` new addresses.
    fn hear(meter: &mut Meter, packets: usize, fresh: usize, now: Instant) -> Option<Duration> {
        for _ in 0..packets {
            meter.packet(now);
            meter.fresh(fresh);
            if let Some(until) = meter.flooded(now) {
                return Some(until - now);
            }
        }
        None
    }

    #[test]
    fn sixty_four_machines_that_start_together_are_no_flood() {
        assert_eq!(hear(&mut Meter::new(), 64 * 2, 4, Instant::now()), None);
    }

    #[test]
    fn too_many_packets_or_addresses_in_a_second_are_one() {
        let (mut meter, now) = (Meter::new(), Instant::now());
        assert_eq!(hear(&mut meter, MAX_PACKETS, 0, now), None);
        assert_eq!(hear(&mut meter, MAX_PACKETS, 0, now + Duration::from_secs(1)), None);
        assert_eq!(hear(&mut meter, 1, 0, now + Duration::from_secs(1)), Some(FIRST_PAUSE));
        let mut meter = Meter::new();
        assert_eq!(hear(&mut meter, MAX_FRESH, 1, now), None);
        assert_eq!(hear(&mut meter, 1, 1, now), Some(FIRST_PAUSE));
    }

    #[test]
    fn a_flood_that_goes_on_is_listened_to_less_and_less_often() {
        let (mut meter, mut now) = (Meter::new(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let pause = hear(&mut meter, MAX_PACKETS + 1, 0, now).unwrap();
            pauses.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        assert_eq!(hear(&mut meter, MAX_PACKETS + 1, 0, now + CALM), Some(FIRST_PAUSE));
    }
}
