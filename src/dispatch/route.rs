//! Who shall answer: a decision on a snapshot of the members, without a clock and without I/O.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterView, Liveness, Member, ModelOffer, ModelSource, ModelState, NodeId, Offer};
use crate::domain::prompt::{Ask, Failure, FailureKind};
use crate::domain::version::MEMBER_VERSION_TWO;

use super::handle::Options;
use super::tally::Known;

/// The backend that proves the path and nothing else: chosen only when no real model is offered.
pub(super) const ECHO: &str = "echo";

/// Tokens a second of a node that nobody was seen to answer beside.
const USUAL_SPEED: f64 = 30.0;
/// Tokens of an answer, before any was seen.
const USUAL_TOKENS: f64 = 128.0;
/// Round trip to a member before it was measured.
const USUAL_LATENCY: Duration = Duration::from_millis(50);
/// What a model that is not loaded waits for: its file is read this fast, and no faster than in this time.
const LOADED_PER_SECOND: f64 = 500e6;
const LEAST_LOADING: f64 = 0.2;
/// How much more than its time a wait in a queue costs: who waits there keeps others waiting, while a slot elsewhere, if a
/// slower one, stays empty.
const QUEUE_WEIGHT: f64 = 4.0;
/// Candidates whose costs differ by less are as good as each other.
const LIKE: f64 = 1.02;

/// The wish in a form that can be compared with members.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    pub ask: &'a Ask,
    pub options: &'a Options,
    /// Only with a context window of more tokens than this: a node with so many said that they do not suffice.
    pub context_above: Option<u32>,
    /// There is a real model for this prompt, or was when it was asked: the echo is no answer to it, whatever becomes of that.
    pub real_only: bool,
}

/// What is not asked again.
#[derive(Debug)]
pub(super) struct Tried {
    pub id: NodeId,
    /// `None`: none of its models.
    pub model: Option<String>,
}

/// This machine, as one of those that may answer.
#[derive(Debug)]
pub(super) struct Here<'a> {
    pub id: &'a NodeId,
    pub offer: &'a Offer,
    /// It takes work of the cluster, so it is one of those to choose from; else its models are the last choice.
    pub serving: bool,
}

/// Who may answer, and with which model.
#[derive(Debug)]
pub(super) struct Candidate<'a> {
    pub id: &'a NodeId,
    pub model: &'a ModelOffer,
    /// Prompts that it would start at once, by its last report.
    pub free_slots: u32,
    /// Prompts that wait there, by its last report.
    pub queued: u32,
    /// When that report came; `None`: it is what is so now.
    pub heard: Option<SystemTime>,
    latency: Duration,
    member: Option<&'a Arc<Member>>,
}

/// Who was chosen.
#[derive(Debug)]
pub(super) struct Choice {
    /// `None`: this machine.
    pub member: Option<Arc<Member>>,
    /// The model that was counted on.
    pub model: ModelOffer,
}

pub(super) fn is_real(model: &ModelOffer) -> bool {
    model.source != ModelSource::Echo && model.name != ECHO
}

/// Whether it is loaded only once somebody asks.
pub(super) fn is_cold(model: &ModelOffer) -> bool {
    model.source == ModelSource::Engine && model.state != ModelState::Ready
}

/// Whether a member that may be asked has more than the echo.
pub(super) fn has_real_model(view: &ClusterView, options: &Options) -> bool {
    let may = |member: &&Arc<Member>| is_usable(member) && is_wished(member, options);
    let models = view.members.iter().filter(may).flat_map(|member| &member.models);
    models.into_iter().any(|model| is_real(model) && model.state != ModelState::Failed)
}

/// The one of the models of `id` that would answer.
pub(super) fn suited<'a>(id: &NodeId, models: &'a [ModelOffer], wish: &Wish<'_>, tried: &[Tried]) -> Option<&'a ModelOffer> {
    let was_tried =
        |model: &ModelOffer| tried.iter().any(|one| one.id == *id && one.model.as_ref().is_none_or(|tried| *tried == model.name));
    let named = wish.ask.model.is_some();
    models
        .iter()
        .filter(|model| model.state != ModelState::Failed)
        .filter(|model| wish.ask.model.as_ref().is_none_or(|wanted| model.name == *wanted))
        .filter(|model| wish.context_above.is_none_or(|least| model.context_tokens > least))
        .filter(|model| named || !wish.real_only || is_real(model))
        .filter(|model| !was_tried(model))
        .rev()
        .max_by_key(|model| model.rank())
}

fn is_wished(member: &Member, options: &Options) -> bool {
    options.peer.as_deref().is_none_or(|peer| member.id.as_str() == peer)
        && options.node.as_deref().is_none_or(|node| member.name == node || member.id.as_str() == node)
        && options.tier.as_deref().is_none_or(|tier| member.tiers.iter().any(|known| known.eq_ignore_ascii_case(tier)))
}

fn is_usable(member: &Member) -> bool {
    member.serving && !member.draining && member.liveness == Liveness::Alive
}

/// Only known: it may be usable once it is connected.
fn is_reachable(member: &Member) -> bool {
    member.serving && !member.draining && member.liveness == Liveness::Known
}

/// Members that are only known and may have what is wished for: they are connected when nobody else has it. `reached` were
/// tried before.
pub(super) fn to_reach(view: &ClusterView, wish: &Wish<'_>, reached: &[NodeId]) -> Vec<NodeId> {
    let may = |member: &&Arc<Member>| {
        is_reachable(member)
            && !reached.contains(&member.id)
            && is_wished(member, wish.options)
            && suited(&member.id, &member.models, wish, &[]).is_some()
    };
    view.members.iter().filter(may).map(|member| member.id.clone()).collect()
}

fn understands(member: &Member, ask: &Ask) -> bool {
    member.protocol >= MEMBER_VERSION_TWO || !ask.needs_version_two()
}

fn remote<'a>(member: &'a Arc<Member>, wish: &Wish<'_>, tried: &[Tried]) -> Option<Candidate<'a>> {
    Some(Candidate {
        id: &member.id,
        model: suited(&member.id, &member.models, wish, tried)?,
        free_slots: member.free_slots.into(),
        queued: member.queued.into(),
        heard: Some(member.last_seen),
        latency: member.latency_us.map_or(USUAL_LATENCY, Duration::from_micros),
        member: Some(member),
    })
}

fn local<'a>(here: &Here<'a>, wish: &Wish<'_>, tried: &[Tried]) -> Option<Candidate<'a>> {
    let Offer { models, free_slots, queued, .. } = here.offer;
    let model = suited(here.id, models, wish, tried).filter(|model| is_real(model))?;
    let (free_slots, queued) = ((*free_slots).into(), (*queued).into());
    Some(Candidate { id: here.id, model, free_slots, queued, heard: None, latency: Duration::ZERO, member: None })
}

/// Chooses who answers: a member with a model that is not in `tried`, or this machine where `here` says that it may, with a real model.
///
/// The model comes first: the one that was named, else the greatest of all. Of those that have it, who failed a short while
/// ago comes last; of the others, the one from which the answer is to be expected first. What is known of their load may be
/// old, and other nodes see the same: the more of the load is that of others, the more is left to chance, weighted with
/// what each can carry, with the better of two draws taken. `random` gives a number below its argument.
///
/// # Errors
/// `NoEligiblePeer`, `ModelUnavailable` or `InvalidRequest`, saying what is missing and who comes nearest.
pub(super) fn choose(
    view: &ClusterView,
    wish: &Wish<'_>,
    here: Option<&Here<'_>>,
    tried: &[Tried],
    mut known: impl FnMut(&Candidate<'_>) -> Known,
    mut random: impl FnMut(usize) -> usize,
) -> Result<Choice, Failure> {
    if let Some(node) = wish.options.node.as_deref()
        && view.members.iter().filter(|member| member.name == node).count() > 1
    {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            format!("two members of {} are called {node:?}: name the one you mean by its peer id", view.id),
        ));
    }
    let mut able: Vec<Candidate<'_>> = view
        .members
        .iter()
        .filter(|member| is_usable(member) && is_wished(member, wish.options) && understands(member, wish.ask))
        .filter_map(|member| remote(member, wish, tried))
        .chain(here.filter(|here| here.serving).and_then(|here| local(here, wish, tried)))
        .collect();
    if wish.ask.model.is_none() {
        let greatest = able.iter().map(|candidate| candidate.model.rank()).max();
        able.retain(|candidate| Some(candidate.model.rank()) == greatest);
    }
    let mut weighed = weigh(&able, wish, &mut known);
    if weighed.iter().any(|one| !one.failing) {
        weighed.retain(|one| !one.failing);
    }
    if weighed.is_empty() {
        return Err(nobody(view, wish, here));
    }
    let chosen = able.get(draw(&weighed, &mut random)).ok_or_else(|| nobody(view, wish, here))?;
    Ok(Choice { member: chosen.member.cloned(), model: chosen.model.clone() })
}

/// One candidate on the scales.
#[derive(Debug)]
struct Weighed {
    /// Its place among the candidates.
    at: usize,
    /// Seconds until the whole answer is there.
    cost: f64,
    /// Tokens a second of all its slots.
    capacity: f64,
    own: u32,
    others: u32,
    failing: bool,
    here: bool,
}

fn weigh(able: &[Candidate<'_>], wish: &Wish<'_>, known: &mut impl FnMut(&Candidate<'_>) -> Known) -> Vec<Weighed> {
    let known: Vec<Known> = able.iter().map(known).collect();
    let seen = || known.iter().filter_map(|known| known.seen);
    // Who was not seen yet may be as good as the best: so everybody is tried.
    let hoped = seen().map(|seen| seen.tokens_per_second).fold(0.0, f64::max);
    let hoped = if hoped > 0.0 { hoped } else { USUAL_SPEED };
    let count = seen().count();
    let tokens = if count > 0 { seen().map(|seen| seen.tokens).sum::<f64>() / count as f64 } else { USUAL_TOKENS };
    let tokens = tokens.min(wish.ask.max_tokens.map_or(f64::MAX, f64::from));
    let weighed = able.iter().zip(known).enumerate().map(|(at, (candidate, known))| {
        let speed = known.seen.map_or(hoped, |seen| seen.tokens_per_second.powf(seen.belief) * hoped.powf(1.0 - seen.belief));
        let first = known.seen.and_then(|seen| seen.first_token).unwrap_or(candidate.latency).as_secs_f64();
        let slots = match candidate.model.slots {
            0 => (candidate.free_slots + known.in_report).max(1),
            slots => slots.into(),
        };
        let busy = slots.saturating_sub(candidate.free_slots) + candidate.queued;
        let others = busy.saturating_sub(known.in_report);
        let load = others + known.in_flight;
        let service = first + tokens / speed;
        let waits = f64::from((load + 1).saturating_sub(slots)) / f64::from(slots);
        Weighed {
            at,
            cost: service.mul_add(waits.mul_add(QUEUE_WEIGHT, 1.0), loading(candidate.model)),
            capacity: f64::from(slots) * speed,
            own: known.in_flight,
            others,
            failing: known.failing,
            here: candidate.member.is_none(),
        }
    });
    weighed.collect()
}

/// Seconds until a model can begin that is not loaded.
fn loading(model: &ModelOffer) -> f64 {
    let whole = (model.size.unwrap_or(0) as f64 / LOADED_PER_SECOND).max(LEAST_LOADING);
    match (model.state, model.source) {
        (ModelState::Available, ModelSource::Engine) => whole,
        (ModelState::Loading, _) => whole / 2.0,
        _ => 0.0,
    }
}

/// Draws one; its place among the candidates.
fn draw(weighed: &[Weighed], random: &mut impl FnMut(usize) -> usize) -> usize {
    let sum = |of: fn(&Weighed) -> u32| weighed.iter().map(|one| of(one) as usize).sum::<usize>();
    let (own, others) = (sum(|one| one.own), sum(|one| one.others));
    if random(own + others + 1) <= own {
        let least = weighed.iter().map(|one| one.cost).fold(f64::MAX, f64::min);
        let best: Vec<&Weighed> = weighed.iter().filter(|one| one.cost <= least * LIKE).collect();
        // Of those that are as good as each other this machine, which needs no network.
        let here = best.iter().position(|one| one.here);
        return best.get(here.unwrap_or_else(|| random(best.len()))).map_or(0, |one| one.at);
    }
    let first = by_capacity(weighed, None, random);
    let second = by_capacity(weighed, Some(first.at), random);
    if second.cost < first.cost { second.at } else { first.at }
}

/// One at random, each as often as it can carry.
fn by_capacity<'a>(weighed: &'a [Weighed], without: Option<usize>, random: &mut impl FnMut(usize) -> usize) -> &'a Weighed {
    #[allow(clippy::cast_possible_truncation)] // clamped to what a usize holds
    let weight = |one: &Weighed| if Some(one.at) == without { 0 } else { (one.capacity * 100.0).clamp(1.0, 1e9) as usize };
    let whole: usize = weighed.iter().map(weight).sum();
    let mut left = if whole == 0 { 0 } else { random(whole) };
    for one in weighed {
        let weight = weight(one);
        if left < weight {
            return one;
        }
        left -= weight;
    }
    &weighed[0]
}

/// Why nobody can serve, and who comes nearest.
fn nobody(view: &ClusterView, wish: &Wish<'_>, here: Option<&Here<'_>>) -> Failure {
    let cluster = &view.id;
    if view.members.is_empty() {
        if let (Some(model), Some(_)) = (&wish.ask.model, here) {
            return no_model(view, model, &[], here);
        }
        return Failure::new(FailureKind::NoEligiblePeer, format!("no other node is in cluster {cluster}"));
    }
    let wished: Vec<&Arc<Member>> = view.members.iter().filter(|member| is_wished(member, wish.options)).collect();
    if wished.is_empty() {
        let options = wish.options;
        let what = match (&options.peer, &options.node, &options.tier) {
            (Some(wanted), _, _) | (None, Some(wanted), _) => format!("no member of {cluster} is {wanted:?}"),
            (None, None, Some(tier)) => format!("no member of {cluster} qualifies for tier {tier:?}"),
            (None, None, None) => format!("cluster {cluster} has no members"),
        };
        return Failure::new(FailureKind::NoEligiblePeer, what);
    }
    let able: Vec<&Arc<Member>> = wished.iter().copied().filter(|member| is_usable(member)).collect();
    if able.is_empty() {
        let nearest = wished[0];
        let why = match nearest.liveness {
            Liveness::Suspect => "has not been heard for ten seconds",
            Liveness::Known => "is not connected to this node, and was not reached",
            Liveness::Alive if nearest.draining => "is stopping",
            Liveness::Alive => "does not serve",
        };
        let count = wished.len();
        return Failure::new(
            FailureKind::NoEligiblePeer,
            format!("none of the {count} other nodes in {cluster} can serve now; {} {why}", nearest.name.escape_debug()),
        );
    }
    if let Some(old) = able.iter().find(|member| !understands(member, wish.ask) && remote(member, wish, &[]).is_some()) {
        return Failure::new(
            FailureKind::NoEligiblePeer,
            format!(
                "{} could answer, but its OpenGateway ({}) knows no conversations, raw text, top_p or stop texts: upgrade it",
                old.name.escape_debug(),
                old.version.escape_debug()
            ),
        );
    }
    let Some(model) = &wish.ask.model else {
        return Failure::new(FailureKind::NoEligiblePeer, format!("no node in {cluster} offers a model now"));
    };
    no_model(view, model, &able, here)
}

/// Why nobody can answer with the model that was named, of those that are `able` to answer at all.
fn no_model(view: &ClusterView, model: &str, able: &[&Arc<Member>], here: Option<&Here<'_>>) -> Failure {
    let failed = |models: &[ModelOffer]| models.iter().any(|known| known.name == model && known.state == ModelState::Failed);
    let what = if let Some(member) = able.iter().find(|member| failed(&member.models)) {
        format!("{} has model {model:?}, but could not load it", member.name.escape_debug())
    } else if here.is_some_and(|here| failed(&here.offer.models)) {
        format!("this machine has model {model:?}, but could not load it; see why with: ogctl models")
    } else {
        format!("no node in {} has model {model:?}; there are: {}", view.id, models(view, here))
    };
    Failure::new(FailureKind::ModelUnavailable, what)
}

/// The models of a cluster and of this machine, for a message.
fn models(view: &ClusterView, here: Option<&Here<'_>>) -> String {
    let theirs = view.members.iter().filter(|member| is_usable(member)).flat_map(|member| &member.models);
    let ours = here.into_iter().flat_map(|here| here.offer.models.iter().filter(|model| here.serving || is_real(model)));
    let mut names: Vec<String> = theirs
        .chain(ours)
        .filter(|model| model.state != ModelState::Failed)
        .map(|model| model.name.escape_debug().to_string())
        .collect();
    names.sort();
    names.dedup();
    names.truncate(16);
    if names.is_empty() { "none now".to_owned() } else { names.join(", ") }
}

/// The cluster that is meant by no name at all: the only joined one, else the default one when it is joined.
pub(super) fn default_cluster<'a>(joined: impl Iterator<Item = &'a ClusterId>) -> Option<&'a ClusterId> {
    let joined: Vec<&ClusterId> = joined.collect();
    match joined.as_slice() {
        [only] => Some(only),
        several => several.iter().find(|id| id.key() == crate::domain::cluster::DEFAULT_CLUSTER).copied(),
    }
}

#[cfg(test)]
mod tests;
