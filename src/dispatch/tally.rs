//! What this node knows of those that may answer, beyond their own words: prompts in flight, failures, speeds. The time is
//! given from outside.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::route::Candidate;
use super::speed::{Sample, Seen, Speeds};
use crate::domain::node::NodeId;

/// A node that failed a prompt is asked last for this long.
const GRUDGE: Duration = Duration::from_secs(10);
/// Nodes of which something is remembered.
const MAX_ACCOUNTS: usize = 4096;

/// What is known of one candidate.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Known {
    /// Prompts of this node that it is answering now.
    pub in_flight: u32,
    /// Those that were among the ones it told of in its last report.
    pub in_report: u32,
    /// It failed a prompt a short while ago.
    pub failing: bool,
    /// How fast it was seen to be with the model in question.
    pub seen: Option<Seen>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Account {
    in_flight: u32,
    /// Most prompts in flight since the last report came: it was written at some moment of that time.
    peak: u32,
    report: Option<(u32, u32, Option<SystemTime>)>,
    in_report: u32,
    failed_at: Option<Instant>,
}

/// One account for each node.
#[derive(Debug, Default)]
pub(super) struct Tallies {
    accounts: HashMap<NodeId, Account>,
    speeds: Speeds,
}

impl Tallies {
    fn account(&mut self, id: &NodeId, now: Instant) -> &mut Account {
        if self.accounts.len() >= MAX_ACCOUNTS && !self.accounts.contains_key(id) {
            self.accounts.retain(|_, account| {
                account.in_flight > 0 || account.failed_at.is_some_and(|at| now.duration_since(at) < GRUDGE)
            });
        }
        self.accounts.entry(id.clone()).or_default()
    }

    /// A prompt goes to `id`.
    pub(super) fn begin(&mut self, id: &NodeId, now: Instant) {
        let account = self.account(id, now);
        account.in_flight += 1;
        account.peak = account.peak.max(account.in_flight);
    }

    /// It is over, however it ended.
    pub(super) fn end(&mut self, id: &NodeId) {
        if let Some(account) = self.accounts.get_mut(id) {
            account.in_flight = account.in_flight.saturating_sub(1);
        }
    }

    /// It failed in a way that says something of the node.
    pub(super) fn failed(&mut self, id: &NodeId, now: Instant) {
        self.account(id, now).failed_at = Some(now);
    }

    /// A whole answer came.
    pub(super) fn saw(&mut self, id: &NodeId, model: &str, sample: Sample, now: Instant) {
        self.speeds.saw(id, model, sample, now);
    }

    pub(super) fn seen(&self, id: &NodeId, model: &str, now: Instant) -> Option<Seen> {
        self.speeds.get(id, model, now)
    }

    /// What is known of a candidate; takes note of what it reports.
    pub(super) fn known(&mut self, candidate: &Candidate<'_>, now: Instant) -> Known {
        let seen = self.speeds.get(candidate.id, &candidate.model.name, now);
        let account = self.account(candidate.id, now);
        let report = (candidate.free_slots, candidate.queued, candidate.heard);
        if account.report.replace(report) != Some(report) || candidate.heard.is_none() {
            account.in_report = std::mem::replace(&mut account.peak, account.in_flight);
        }
        Known {
            in_flight: account.in_flight,
            in_report: account.in_report,
            failing: account.failed_at.is_some_and(|at| now.duration_since(at) < GRUDGE),
            seen,
        }
    }
}
