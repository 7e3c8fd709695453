//! What a number of dials say together. QUIC says nothing of a port that is closed, TCP does; one address may be of a network
//! that is gone while another one tells the reason.

use std::time::Duration;

use super::words::Place;
use crate::domain::network::{Attempt, DialOutcome};
use crate::domain::node::NodeId;

/// Dials within this time belong to one try.
const ONE_TRY: Duration = Duration::from_secs(60);

/// The most telling answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict<'a> {
    Connected(&'a str),
    WrongPeer(&'a str, &'a NodeId),
    Ourselves(&'a str),
    Denied(&'a str, &'a str),
    Refused(&'a str),
    /// All that did not answer.
    TimedOut(Vec<&'a str>),
    Unreachable(Vec<&'a str>),
    Other(&'a str, &'a str),
}

/// The attempts of the last try.
fn last_try(attempts: &[Attempt]) -> impl Iterator<Item = &Attempt> {
    let newest = attempts.iter().map(|attempt| attempt.ago).min().unwrap_or_default();
    attempts.iter().filter(move |attempt| attempt.ago <= newest.saturating_add(ONE_TRY))
}

/// What came of the last try; `None` when nothing was tried.
pub(super) fn verdict(attempts: &[Attempt]) -> Option<Verdict<'_>> {
    let of = |is: fn(&DialOutcome) -> bool| last_try(attempts).find(move |attempt| is(&attempt.outcome));
    let all = |is: fn(&DialOutcome) -> bool| -> Vec<&str> {
        last_try(attempts).filter(|attempt| is(&attempt.outcome)).map(|attempt| attempt.address.as_str()).collect()
    };
    // The newest word counts where two contradict each other: a connection that came up ends what was said before it.
    let newest = attempts.iter().min_by_key(|attempt| attempt.ago)?;
    if newest.outcome == DialOutcome::Connected {
        return Some(Verdict::Connected(&newest.address));
    }
    for attempt in last_try(attempts) {
        match &attempt.outcome {
            DialOutcome::WrongPeer(other) => return Some(Verdict::WrongPeer(&attempt.address, other)),
            DialOutcome::Ourselves => return Some(Verdict::Ourselves(&attempt.address)),
            DialOutcome::Denied(reason) => return Some(Verdict::Denied(&attempt.address, reason)),
            _ => {}
        }
    }
    if let Some(refused) = of(|outcome| *outcome == DialOutcome::Refused) {
        return Some(Verdict::Refused(&refused.address));
    }
    let silent = all(|outcome| *outcome == DialOutcome::TimedOut);
    if !silent.is_empty() {
        return Some(Verdict::TimedOut(silent));
    }
    for attempt in last_try(attempts) {
        if let DialOutcome::Other(reason) = &attempt.outcome {
            return Some(Verdict::Other(&attempt.address, reason));
        }
    }
    let unreachable = all(|outcome| *outcome == DialOutcome::Unreachable);
    if unreachable.is_empty() { Some(Verdict::Connected(&newest.address)) } else { Some(Verdict::Unreachable(unreachable)) }
}

/// QUIC did not get through to a machine that TCP reached, the newest of each.
pub(super) fn only_tcp(attempts: &[Attempt], links: &[&str]) -> bool {
    let carrier = |attempt: &&Attempt, wanted: &str| Place::of(&attempt.address).is_some_and(|place| place.carrier == wanted);
    let quic_silent =
        attempts.iter().filter(|attempt| carrier(attempt, "udp")).all(|attempt| attempt.outcome == DialOutcome::TimedOut)
            && attempts.iter().any(|attempt| carrier(&attempt, "udp"));
    let tcp = attempts.iter().any(|attempt| carrier(&attempt, "tcp") && attempt.outcome == DialOutcome::Connected);
    quic_silent && tcp && links.iter().all(|transport| *transport == "tcp")
}

/// In one phrase, for a list of addresses.
pub(super) fn phrase(outcome: &DialOutcome) -> String {
    match outcome {
        DialOutcome::Connected => "it answered".to_owned(),
        DialOutcome::Refused => "refused: nothing listens there".to_owned(),
        DialOutcome::TimedOut => "no answer".to_owned(),
        DialOutcome::Unreachable => "no way there from this machine".to_owned(),
        DialOutcome::WrongPeer(other) => format!("another node answered, {other}"),
        DialOutcome::Ourselves => "it is this node itself".to_owned(),
        DialOutcome::Denied(reason) | DialOutcome::Other(reason) => super::words::quoted(reason),
    }
}
