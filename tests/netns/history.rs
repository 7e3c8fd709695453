//! What became of prompts, and whether each kept what is promised of every prompt:
//!
//! * it ends once, in an answer or in one named error, and nothing comes after that;
//! * it ends by its limit and a second;
//! * what was shown before the end is the beginning of one server's answer (an echo's answer is the prompt);
//! * an answer is whole;
//! * no work is left when all have ended.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use opengateway::api::stream::Line;

use crate::eye::Eye;

/// What is promised beyond a prompt's limit.
const GRACE: Duration = Duration::from_secs(1);
/// What a busy machine may add before the test process hears of it.
const LATE: Duration = Duration::from_secs(2);

/// How reading what came of a prompt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The call itself was answered with this error.
    Refused(String),
    /// The pipe was closed by the daemon.
    Closed,
    /// The pipe or the bus broke: the daemon that was asked is gone.
    Broken(String),
    /// It did not end.
    Never,
}

/// One prompt and everything that came back.
#[derive(Debug, Clone)]
pub struct Record {
    #[allow(dead_code)] // shown by `Debug` where a promise is broken
    pub from: String,
    pub prompt: String,
    pub limit: Duration,
    pub lines: Vec<(Duration, Line)>,
    pub end: End,
    pub took: Duration,
}

/// The one outcome of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Answered by this node.
    Answer(String),
    /// Ended with this error, without its prefix.
    Error(String),
}

impl Record {
    pub fn new(from: &str, prompt: &str, limit: Duration) -> Self {
        let (from, prompt) = (from.to_owned(), prompt.to_owned());
        Self { from, prompt, limit, lines: Vec::new(), end: End::Never, took: Duration::ZERO }
    }

    /// The outcome, or which promise was broken.
    pub fn outcome(&self) -> Result<Outcome, String> {
        let broken = |what: &str| Err(format!("{what}: {self:?}"));
        if self.took > self.limit + GRACE + LATE {
            return broken("it ended after its limit");
        }
        if let End::Refused(name) = &self.end {
            return Ok(Outcome::Error(short(name)));
        }
        if self.end != End::Closed {
            return broken("it has no end");
        }
        let (mut shown, mut by, mut outcome) = (String::new(), None, None);
        for (_, line) in &self.lines {
            if outcome.is_some() {
                return broken("something comes after the end");
            }
            match line {
                Line::Queued { .. } | Line::Unknown => {}
                Line::Start { served_by, .. } if by.is_none() => by = Some(served_by.name.clone()),
                Line::Start { .. } => return broken("it begins twice"),
                Line::Text { text } => shown.push_str(text),
                Line::End { .. } => outcome = Some(None),
                Line::Error { name, .. } => outcome = Some(Some(short(name))),
            }
        }
        if !self.prompt.starts_with(&shown) {
            return broken("what was shown is not what was asked");
        }
        match (outcome, by) {
            (None, _) => broken("the pipe is closed without an end"),
            (Some(Some(error)), _) => Ok(Outcome::Error(error)),
            (Some(None), None) => broken("nobody has answered"),
            (Some(None), Some(_)) if shown != self.prompt => broken("the answer is not whole"),
            (Some(None), Some(by)) => Ok(Outcome::Answer(by)),
        }
    }
}

fn short(name: &str) -> String {
    name.rsplit('.').next().unwrap_or(name).to_owned()
}

/// All prompts of a test.
#[derive(Debug, Default)]
pub struct History {
    records: Vec<Record>,
}

impl History {
    pub fn add(&mut self, record: Record) {
        self.records.push(record);
    }

    pub fn extend(&mut self, records: impl IntoIterator<Item = Record>) {
        self.records.extend(records);
    }

    /// Judges every prompt; panics with those that broke a promise.
    pub fn judge(&self) -> Figures {
        let (mut figures, mut broken) = (Figures::default(), Vec::new());
        for record in &self.records {
            figures.asked += 1;
            match record.outcome() {
                Ok(Outcome::Answer(_)) => figures.times.push(record.took),
                Ok(Outcome::Error(name)) => *figures.errors.entry(name).or_default() += 1,
                Err(promise) => broken.push(promise),
            }
        }
        figures.times.sort();
        assert!(broken.is_empty(), "{} of {} prompts broke a promise: {:#?}", broken.len(), figures.asked, broken);
        figures
    }

    /// Waits until none of these daemons has work left.
    pub async fn rests(eyes: &[Eye]) {
        let deadline = Instant::now() + Duration::from_secs(30);
        for eye in eyes {
            while eye.jobs().await > 0 {
                assert!(Instant::now() < deadline, "{} still has prompts that have ended", eye.name());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// What there is to say about many prompts.
#[derive(Debug, Default)]
pub struct Figures {
    pub asked: usize,
    pub errors: BTreeMap<String, usize>,
    /// Times of answers, the shortest first.
    times: Vec<Duration>,
}

impl Figures {
    pub fn answered(&self) -> usize {
        self.times.len()
    }

    /// Whether so many of a hundred were answered.
    pub fn at_least(&self, percent: usize) -> bool {
        self.answered() * 100 >= self.asked * percent
    }

    fn quantile(&self, percent: usize) -> f64 {
        let at = (self.times.len() * percent / 100).min(self.times.len().saturating_sub(1));
        self.times.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
    }

    /// Cells for a table: asked, answered, errors by name, p50, p95 and greatest time.
    pub fn cells(&self) -> [String; 6] {
        let mut errors = String::new();
        for (name, count) in &self.errors {
            let _ = write!(errors, "{}{name} {count}", if errors.is_empty() { "" } else { ", " });
        }
        let share = 100.0 * self.answered() as f64 / self.asked.max(1) as f64;
        let milliseconds = |percent| format!("{:.0} ms", self.quantile(percent));
        [
            self.asked.to_string(),
            format!("{share:.1} %"),
            if errors.is_empty() { "none".to_owned() } else { errors },
            milliseconds(50),
            milliseconds(95),
            milliseconds(100),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opengateway::api::stream::{ServedBy, Timings, Usage};

    fn record(lines: Vec<Line>, end: End) -> Record {
        let mut record = Record::new("NodeA", "What is 2+2?", Duration::from_secs(10));
        record.lines = lines.into_iter().map(|line| (Duration::from_millis(1), line)).collect();
        record.end = end;
        record
    }

    fn start() -> Line {
        Line::Start { model: "echo".into(), served_by: ServedBy { peer_id: "12D3".into(), name: "NodeB".into() } }
    }

    fn said(text: &str) -> Line {
        Line::Text { text: text.into() }
    }

    fn done() -> Line {
        Line::End { reason: "stop".into(), usage: Usage::default(), timings: Timings::default() }
    }

    fn failed() -> Line {
        Line::Error { name: "org.opengateway.Gateway1.Error.Interrupted".into(), message: String::new() }
    }

    #[test]
    fn the_judge_passes_what_is_promised_and_nothing_else() {
        let whole = vec![start(), said("What is "), said("2+2?"), done()];
        assert_eq!(record(whole.clone(), End::Closed).outcome(), Ok(Outcome::Answer("NodeB".into())));
        let partial = vec![start(), said("What is "), failed()];
        assert_eq!(record(partial, End::Closed).outcome(), Ok(Outcome::Error("Interrupted".into())));
        assert_eq!(record(vec![], End::Refused("a.b.Busy".into())).outcome(), Ok(Outcome::Error("Busy".into())));
        let mut late = record(whole.clone(), End::Closed);
        late.took = Duration::from_secs(14);
        assert!(late.outcome().is_err());
        for (lines, end) in [
            (whole.clone(), End::Never),
            (whole.clone(), End::Broken("cut".into())),
            (vec![start(), said("What is "), done()], End::Closed),
            (vec![start(), said("nonsense"), failed()], End::Closed),
            (vec![start(), said("What is 2+2?")], End::Closed),
            ([whole.clone(), vec![done()]].concat(), End::Closed),
            ([whole.clone(), vec![said("!")]].concat(), End::Closed),
            ([vec![start()], whole].concat(), End::Closed),
            (vec![said("What is 2+2?"), done()], End::Closed),
        ] {
            assert!(record(lines.clone(), end).outcome().is_err(), "{lines:?}");
        }
    }
}
