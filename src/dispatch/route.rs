//! Who shall answer: a decision on a snapshot of the members, without a clock and without I/O.

use std::sync::Arc;

use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterView, Liveness, Member, NodeId};
use crate::domain::prompt::{Failure, FailureKind};

use super::handle::Options;

/// The backend that proves the path and nothing else: chosen only when no real model is offered.
pub(super) const ECHO: &str = "echo";

/// What this node knows of a member beyond the member's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally {
    /// Prompts of this node that it is answering now.
    pub in_flight: u32,
    /// It failed a prompt a short while ago.
    pub failing: bool,
}

/// The wish in a form that can be compared with members.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    pub model: Option<&'a str>,
    pub options: &'a Options,
}

fn offers(member: &Member, model: Option<&str>) -> bool {
    match model {
        Some(wanted) => member.models.iter().any(|model| model.name == wanted),
        None => !member.models.is_empty(),
    }
}

fn offers_real_model(member: &Member) -> bool {
    member.models.iter().any(|model| model.name != ECHO)
}

fn is_wished(member: &Member, options: &Options) -> bool {
    options.peer.as_deref().is_none_or(|peer| member.id.as_str() == peer)
        && options.node.as_deref().is_none_or(|node| member.name == node || member.id.as_str() == node)
        && options.tier.as_deref().is_none_or(|tier| member.tiers.iter().any(|known| known.eq_ignore_ascii_case(tier)))
}

fn is_usable(member: &Member) -> bool {
    member.serving && !member.draining && member.liveness == Liveness::Alive
}

/// Chooses a member that is not in `tried`.
///
/// Among the members that can serve, two are drawn at random and the better of them taken (power of two choices), so
/// that nodes which see the same snapshot do not all run to the same member. `random` gives a number below its argument.
///
/// # Errors
/// `NoEligiblePeer`, `ModelUnavailable` or `InvalidRequest`, saying what is missing and who comes nearest.
pub(super) fn choose(
    view: &ClusterView,
    wish: &Wish<'_>,
    tried: &[NodeId],
    tally: impl Fn(&NodeId) -> Tally,
    mut random: impl FnMut(usize) -> usize,
) -> Result<Arc<Member>, Failure> {
    if let Some(node) = wish.options.node.as_deref()
        && view.members.iter().filter(|member| member.name == node).count() > 1
    {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            format!("two members of {} are called {node:?}: name the one you mean by its peer id", view.id),
        ));
    }
    let mut able: Vec<&Arc<Member>> = view
        .members
        .iter()
        .filter(|member| is_usable(member) && is_wished(member, wish.options) && offers(member, wish.model))
        .filter(|member| !tried.contains(&member.id))
        .collect();
    if wish.model.is_none() && able.iter().any(|member| offers_real_model(member)) {
        able.retain(|member| offers_real_model(member));
    }
    // The classes: a free slot before a queue, a good record before a bad one.
    let class = |member: &Member| {
        let tally = tally(&member.id);
        (tally.failing, u32::from(member.free_slots) <= tally.in_flight)
    };
    let Some(best) = able.iter().map(|member| class(member)).min() else {
        return Err(nobody(view, wish));
    };
    able.retain(|member| class(member) == best);
    let cost = |member: &Member| {
        let tally = tally(&member.id);
        (tally.in_flight + u32::from(member.queued), member.latency_us.unwrap_or(u64::MAX))
    };
    let first = random(able.len());
    if able.len() == 1 {
        return Ok(Arc::clone(able[first]));
    }
    let second = (first + 1 + random(able.len() - 1)) % able.len();
    Ok(Arc::clone(if cost(able[second]) < cost(able[first]) { able[second] } else { able[first] }))
}

/// Why nobody can serve, and who comes nearest.
fn nobody(view: &ClusterView, wish: &Wish<'_>) -> Failure {
    let cluster = &view.id;
    if view.members.is_empty() {
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
    let able: Vec<&&Arc<Member>> = wished.iter().filter(|member| is_usable(member)).collect();
    if able.is_empty() {
        let nearest = wished[0];
        let why = match nearest.liveness {
            Liveness::Suspect => "has not been heard for ten seconds",
            Liveness::Known => "is not connected to this node",
            Liveness::Alive if nearest.draining => "is stopping",
            Liveness::Alive => "does not serve",
        };
        let count = wished.len();
        return Failure::new(
            FailureKind::NoEligiblePeer,
            format!("none of the {count} other nodes in {cluster} can serve now; {} {why}", nearest.name.escape_debug()),
        );
    }
    let Some(model) = wish.model else {
        return Failure::new(FailureKind::NoEligiblePeer, format!("no node in {cluster} offers a model now"));
    };
    Failure::new(FailureKind::ModelUnavailable, format!("no node in {cluster} has model {model:?}; there are: {}", models(view)))
}

/// The models of a cluster, for a message.
fn models(view: &ClusterView) -> String {
    let mut names: Vec<String> = view
        .members
        .iter()
        .filter(|member| is_usable(member))
        .flat_map(|member| member.models.iter().map(|model| model.name.escape_debug().to_string()))
        .collect();
    names.sort();
    names.dedup();
    names.truncate(16);
    names.join(", ")
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
mod tests {
    use super::*;
    use crate::domain::node::{ClusterState, FoundBy, ModelOffer};
    use std::time::SystemTime;

    fn member(name: &str, models: &[&str], free_slots: u16) -> Member {
        Member {
            id: NodeId::new(format!("id-{name}")),
            name: name.to_owned(),
            version: "0.1.0".to_owned(),
            protocol: 1,
            addresses: Vec::new(),
            found_by: FoundBy::Mdns,
            direct: true,
            transport: "quic",
            connected_at: SystemTime::UNIX_EPOCH,
            last_seen: SystemTime::UNIX_EPOCH,
            latency_us: Some(100),
            serving: true,
            draining: false,
            free_slots,
            queued: 0,
            models: models.iter().map(|&name| ModelOffer::named(name)).collect(),
            tiers: vec!["SmolLM-360M".to_owned()],
            liveness: Liveness::Alive,
        }
    }

    fn view(members: Vec<Member>) -> ClusterView {
        ClusterView {
            id: ClusterId::new("home").unwrap(),
            state: ClusterState::Connected,
            serving: false,
            joined_at: SystemTime::UNIX_EPOCH,
            announced: true,
            discovery: Vec::new(),
            members: members.into_iter().map(Arc::new).collect(),
        }
    }

    fn ask(view: &ClusterView, model: Option<&str>, options: &Options) -> Result<String, FailureKind> {
        choose(view, &Wish { model, options }, &[], |_| Tally::default(), |_| 0)
            .map(|member| member.name.clone())
            .map_err(|failure| failure.kind)
    }

    #[test]
    fn a_real_model_is_preferred_and_echo_is_the_last_choice() {
        let both = view(vec![member("a", &["echo"], 64), member("b", &["llama", "echo"], 0)]);
        assert_eq!(ask(&both, None, &Options::default()), Ok("b".to_owned()));
        let alone = view(vec![member("a", &["echo"], 64)]);
        assert_eq!(ask(&alone, None, &Options::default()), Ok("a".to_owned()));
    }

    #[test]
    fn a_free_slot_is_preferred_to_a_queue() {
        let view = view(vec![member("full", &["m"], 0), member("free", &["m"], 1)]);
        assert_eq!(ask(&view, Some("m"), &Options::default()), Ok("free".to_owned()));
    }

    #[test]
    fn own_prompts_in_flight_count_against_the_slots_that_a_member_reported() {
        let view = view(vec![member("a", &["m"], 2), member("b", &["m"], 1)]);
        let options = Options::default();
        let tally = |id: &NodeId| Tally { in_flight: if id.as_str() == "id-a" { 2 } else { 0 }, failing: false };
        let chosen = choose(&view, &Wish { model: None, options: &options }, &[], tally, |_| 0).unwrap();
        assert_eq!(chosen.name, "b");
    }

    #[test]
    fn who_failed_lately_is_asked_last() {
        let view = view(vec![member("bad", &["m"], 9), member("good", &["m"], 0)]);
        let options = Options::default();
        let tally = |id: &NodeId| Tally { in_flight: 0, failing: id.as_str() == "id-bad" };
        let chosen = choose(&view, &Wish { model: None, options: &options }, &[], tally, |_| 0).unwrap();
        assert_eq!(chosen.name, "good");
    }

    #[test]
    fn suspects_drainers_and_consumers_are_never_asked() {
        let mut suspect = member("a", &["m"], 9);
        suspect.liveness = Liveness::Suspect;
        let mut draining = member("b", &["m"], 9);
        draining.draining = true;
        let mut consumer = member("c", &["m"], 9);
        consumer.serving = false;
        let view = view(vec![suspect, draining, consumer]);
        assert_eq!(ask(&view, None, &Options::default()), Err(FailureKind::NoEligiblePeer));
    }

    #[test]
    fn a_wish_is_refused_and_never_widened() {
        let view = view(vec![member("a", &["m"], 1), member("b", &["m"], 1)]);
        let node = |name: &str| Options { node: Some(name.to_owned()), ..Options::default() };
        assert_eq!(ask(&view, None, &node("b")), Ok("b".to_owned()));
        assert_eq!(ask(&view, None, &node("id-a")), Ok("a".to_owned()));
        assert_eq!(ask(&view, None, &node("c")), Err(FailureKind::NoEligiblePeer));
        assert_eq!(ask(&view, Some("other"), &Options::default()), Err(FailureKind::ModelUnavailable));
        let tier = Options { tier: Some("Llama-3.1-405B".to_owned()), ..Options::default() };
        assert_eq!(ask(&view, None, &tier), Err(FailureKind::NoEligiblePeer));
    }

    #[test]
    fn a_name_that_two_members_have_is_ambiguous() {
        let mut twin = member("a", &["m"], 1);
        twin.id = NodeId::new("id-twin");
        let view = view(vec![member("a", &["m"], 1), twin]);
        let options = Options { node: Some("a".to_owned()), ..Options::default() };
        assert_eq!(ask(&view, None, &options), Err(FailureKind::InvalidRequest));
    }

    #[test]
    fn eight_equal_members_share_the_work() {
        let view = view((0..8).map(|at| member(&format!("n{at}"), &["m"], 4)).collect());
        let options = Options::default();
        let mut in_flight = std::collections::HashMap::<NodeId, u32>::new();
        let mut seed = 1_u64;
        for _ in 0..800 {
            let chosen = choose(
                &view,
                &Wish { model: None, options: &options },
                &[],
                |id| Tally { in_flight: in_flight.get(id).copied().unwrap_or(0), failing: false },
                |below| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    usize::try_from(seed >> 33).unwrap() % below
                },
            )
            .unwrap();
            *in_flight.entry(chosen.id.clone()).or_default() += 1;
        }
        assert!(in_flight.values().all(|&count| (90..=110).contains(&count)), "{in_flight:?}");
    }

    #[test]
    fn no_name_means_the_only_cluster_or_the_default_one() {
        let ids = |names: &[&str]| names.iter().map(|name| ClusterId::new(name).unwrap()).collect::<Vec<_>>();
        let name = |names: &[&str]| default_cluster(ids(names).iter()).map(ToString::to_string);
        assert_eq!(name(&["home"]), Some("home".to_owned()));
        assert_eq!(name(&["home", "gatewayai-poc"]), Some("gatewayai-poc".to_owned()));
        assert_eq!(name(&["home", "lab"]), None);
        assert_eq!(name(&[]), None);
    }
}
