//! How fast nodes were seen to answer with a model: a bounded table that forgets. The time is given from outside.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::node::NodeId;

/// Pairs of node and model that are remembered; beyond it the one that was seen longest ago goes.
const MAX_SEEN: usize = 4096;
/// Weight of a new answer in the running means.
const WEIGHT: f64 = 0.3;
/// After this long without an answer half of what was seen is doubted.
const HALF_LIFE: Duration = Duration::from_secs(900);
/// After this long nothing of it is believed.
const FORGET: Duration = Duration::from_secs(3600);
/// No answer counts as faster than this: pieces that came all at once say nothing of a rate.
const MAX_SPEED: f64 = 1e6;

/// One whole answer, as the asker saw it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    /// Tokens of the answer.
    pub tokens: u32,
    /// From the first token to the end.
    pub streamed: Duration,
    /// From asking to the first token; `None` when it waited in a queue, which says nothing about the node's speed.
    pub first_token: Option<Duration>,
}

/// What is known of one node with one model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Seen {
    /// Tokens a second of one answer.
    pub tokens_per_second: f64,
    /// From asking to the first token; `None` when every answer so far waited first.
    pub first_token: Option<Duration>,
    /// Tokens of one answer.
    pub tokens: f64,
    /// From 1 for what was seen just now, falling with the time since then.
    pub belief: f64,
}

#[derive(Debug, Clone, Copy)]
struct Mean {
    tokens_per_second: f64,
    first_token: Option<f64>,
    tokens: f64,
    at: Instant,
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Speeds(HashMap<NodeId, HashMap<String, Mean>>);

fn mix(mean: f64, new: f64) -> f64 {
    mean.mul_add(1.0 - WEIGHT, new * WEIGHT)
}

impl Speeds {
    /// Takes an answer in. One of a single token has no rate and is left out.
    pub(super) fn saw(&mut self, node: &NodeId, model: &str, sample: Sample, now: Instant) {
        if sample.tokens < 2 {
            return;
        }
        let gaps = f64::from(sample.tokens - 1);
        let speed = (gaps / sample.streamed.as_secs_f64().max(1e-6)).min(MAX_SPEED);
        let first = sample.first_token.map(|first| first.as_secs_f64());
        let tokens = f64::from(sample.tokens);
        if let Some(mean) = self.0.get_mut(node).and_then(|models| models.get_mut(model)) {
            mean.tokens_per_second = mix(mean.tokens_per_second, speed);
            mean.tokens = mix(mean.tokens, tokens);
            mean.first_token = match (mean.first_token, first) {
                (Some(mean), Some(first)) => Some(mix(mean, first)),
                (mean, first) => first.or(mean),
            };
            mean.at = now;
            return;
        }
        self.make_room(now);
        let mean = Mean { tokens_per_second: speed, first_token: first, tokens, at: now };
        self.0.entry(node.clone()).or_default().insert(model.to_owned(), mean);
    }

    fn make_room(&mut self, now: Instant) {
        if self.0.values().map(HashMap::len).sum::<usize>() < MAX_SEEN {
            return;
        }
        let oldest = self.0.values().flat_map(HashMap::values).map(|mean| mean.at).min();
        for models in self.0.values_mut() {
            models.retain(|_, mean| now.duration_since(mean.at) < FORGET && Some(mean.at) != oldest);
        }
        self.0.retain(|_, models| !models.is_empty());
    }

    /// What is known of `node` with `model`.
    pub(super) fn get(&self, node: &NodeId, model: &str, now: Instant) -> Option<Seen> {
        let mean = self.0.get(node)?.get(model)?;
        let age = now.duration_since(mean.at);
        (age < FORGET).then(|| Seen {
            tokens_per_second: mean.tokens_per_second,
            first_token: mean.first_token.map(Duration::from_secs_f64),
            tokens: mean.tokens,
            belief: 0.5_f64.powf(age.as_secs_f64() / HALF_LIFE.as_secs_f64()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(tokens: u32, millis: u64) -> Sample {
        Sample { tokens, streamed: Duration::from_millis(millis), first_token: Some(Duration::from_millis(50)) }
    }

    #[test]
    fn the_rate_is_that_of_the_tokens_after_the_first_and_a_running_mean() {
        let (mut speeds, node, now) = (Speeds::default(), NodeId::new("a"), Instant::now());
        speeds.saw(&node, "m", sample(101, 1000), now);
        assert_eq!(speeds.get(&node, "m", now).map(|seen| seen.tokens_per_second), Some(100.0));
        speeds.saw(&node, "m", sample(201, 1000), now);
        let seen = speeds.get(&node, "m", now).unwrap();
        assert!((seen.tokens_per_second - 130.0).abs() < 1e-9, "{seen:?}");
        assert_eq!(speeds.get(&node, "other", now), None);
    }

    #[test]
    fn one_token_has_no_rate_and_a_burst_none_without_an_end() {
        let (mut speeds, node, now) = (Speeds::default(), NodeId::new("a"), Instant::now());
        speeds.saw(&node, "m", sample(1, 0), now);
        assert_eq!(speeds.get(&node, "m", now), None);
        speeds.saw(&node, "m", sample(u32::MAX, 0), now);
        assert_eq!(speeds.get(&node, "m", now).map(|seen| seen.tokens_per_second), Some(MAX_SPEED));
    }

    #[test]
    fn what_was_seen_is_doubted_with_time_and_forgotten_after_an_hour() {
        let (mut speeds, node, now) = (Speeds::default(), NodeId::new("a"), Instant::now());
        speeds.saw(&node, "m", sample(11, 1000), now);
        let belief = |later: Duration| speeds.get(&node, "m", now + later).map(|seen| seen.belief);
        assert_eq!((belief(Duration::ZERO), belief(HALF_LIFE)), (Some(1.0), Some(0.5)));
        assert_eq!(belief(FORGET), None);
    }

    #[test]
    fn the_table_is_bounded_and_the_oldest_goes_first() {
        let (mut speeds, start) = (Speeds::default(), Instant::now());
        let node = |at: usize| NodeId::new(format!("n{}", at % 100));
        for at in 0..=MAX_SEEN {
            speeds.saw(&node(at), &format!("m{at}"), sample(11, 1000), start + Duration::from_millis(at as u64));
        }
        let now = start + Duration::from_secs(10);
        assert_eq!(speeds.0.values().map(HashMap::len).sum::<usize>(), MAX_SEEN);
        assert_eq!(speeds.get(&node(0), "m0", now), None);
        assert!(speeds.get(&node(1), "m1", now).is_some() && speeds.get(&node(MAX_SEEN), &format!("m{MAX_SEEN}"), now).is_some());
    }
}
