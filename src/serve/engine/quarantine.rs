//! Prompts that were in an engine when it died: suspects, and after the second time refused. Pure; memory only.
//!
//! An engine that computes several prompts dies of one of them, and nobody knows of which. So each of them is a suspect and
//! runs alone the next time: if it lives, it was not the one; if the engine dies again, it was.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// Names a prompt; see `request.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PromptDigest(pub [u8; 16]);

/// Prompts that are remembered.
const MOST: usize = 1024;
/// Deaths with a prompt until it is refused.
const REFUSED_AFTER: u32 = 2;
/// Then it may have been the machine after all.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// What is to be done with a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is known against it.
    Free,
    /// It runs only while no other does.
    Alone,
    /// It does not run.
    Refused,
}

#[derive(Debug)]
struct Record {
    deaths: u32,
    last: Instant,
}

/// What is known against the prompts of one model.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    records: HashMap<PromptDigest, Record>,
}

impl Quarantine {
    pub(super) fn verdict(&self, prompt: PromptDigest, now: Instant) -> Verdict {
        match self.records.get(&prompt) {
            Some(record) if now.saturating_duration_since(record.last) >= FORGOTTEN_AFTER => Verdict::Free,
            Some(record) if record.deaths >= REFUSED_AFTER => Verdict::Refused,
            Some(_) => Verdict::Alone,
            None => Verdict::Free,
        }
    }

    /// The engine died while it had these. A suspect was alone there, so two deaths are never those of a bystander.
    pub(super) fn died_with(&mut self, prompts: impl IntoIterator<Item = PromptDigest>, now: Instant) {
        for prompt in prompts {
            self.make_room(prompt, now);
            let record = self.records.entry(prompt).or_insert(Record { deaths: 0, last: now });
            record.deaths += 1;
            record.last = now;
        }
    }

    /// It was answered.
    pub(super) fn survived(&mut self, prompt: PromptDigest) {
        self.records.remove(&prompt);
    }

    fn make_room(&mut self, prompt: PromptDigest, now: Instant) {
        if self.records.len() < MOST || self.records.contains_key(&prompt) {
            return;
        }
        self.records.retain(|_, record| now.saturating_duration_since(record.last) < FORGOTTEN_AFTER);
        if self.records.len() >= MOST {
            // Suspects go before those that are refused, the older ones first.
            let gone = self.records.iter().min_by_key(|(_, record)| (record.deaths >= REFUSED_AFTER, record.last));
            if let Some(gone) = gone.map(|(gone, _)| *gone) {
                self.records.remove(&gone);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prompt(number: u16) -> PromptDigest {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        PromptDigest(bytes)
    }

    #[test]
    fn all_in_flight_are_suspects_and_only_the_one_that_kills_alone_is_refused() {
        let (mut quarantine, now) = (Quarantine::default(), Instant::now());
        quarantine.died_with([prompt(1), prompt(2)], now);
        assert_eq!([1, 2, 3].map(|n| quarantine.verdict(prompt(n), now)), [Verdict::Alone, Verdict::Alone, Verdict::Free]);
        quarantine.survived(prompt(1));
        quarantine.died_with([prompt(2)], now);
        assert_eq!([1, 2].map(|n| quarantine.verdict(prompt(n), now)), [Verdict::Free, Verdict::Refused]);
    }

    #[test]
    fn after_an_hour_it_has_another_try() {
        let (mut quarantine, now) = (Quarantine::default(), Instant::now());
        quarantine.died_with([prompt(1)], now);
        quarantine.died_with([prompt(1)], now);
        assert_eq!(quarantine.verdict(prompt(1), now + FORGOTTEN_AFTER - Duration::from_secs(1)), Verdict::Refused);
        assert_eq!(quarantine.verdict(prompt(1), now + FORGOTTEN_AFTER), Verdict::Free);
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_a_refused_prompt_outlives_suspects(others in proptest::collection::vec(1_u16.., 0..4000)) {
            let (mut quarantine, now) = (Quarantine::default(), Instant::now());
            quarantine.died_with([prompt(0)], now);
            quarantine.died_with([prompt(0)], now);
            let distinct: std::collections::HashSet<u16> = others.into_iter().collect();
            for other in distinct {
                quarantine.died_with([prompt(other)], now);
                prop_assert!(quarantine.records.len() <= MOST);
            }
            prop_assert_eq!(quarantine.verdict(prompt(0), now), Verdict::Refused);
        }
    }
}
