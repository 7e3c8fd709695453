//! The choice on snapshots that the test makes.

use std::collections::HashMap;

use super::*;
use crate::dispatch::speed::Seen;
use crate::domain::node::{ClusterState, FoundBy};
use crate::domain::prompt::{Role, Text, Turn};

fn member(name: &str, models: &[&str], free_slots: u16) -> Member {
    Member {
        id: NodeId::new(format!("id-{name}")),
        name: name.to_owned(),
        version: "0.1.0".to_owned(),
        protocol: 1,
        addresses: Vec::new(),
        found_by: FoundBy::Mdns,
        direct: true,
        relay: None,
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

/// Who is chosen, by name, by somebody who knows nothing but the snapshot.
fn ask(view: &ClusterView, model: Option<&str>, options: &Options) -> Result<String, FailureKind> {
    pick(view, model, options, None, |_| Known::default()).map_err(|failure| failure.kind)
}

fn pick(
    view: &ClusterView,
    model: Option<&str>,
    options: &Options,
    here: Option<&Here<'_>>,
    known: impl FnMut(&Candidate<'_>) -> Known,
) -> Result<String, Failure> {
    let asked = Ask { model: model.map(str::to_owned), ..Ask::default() };
    pick_for(view, &Wish { ask: &asked, options, context_above: None, real_only: false }, here, known)
}

fn pick_for(
    view: &ClusterView,
    wish: &Wish<'_>,
    here: Option<&Here<'_>>,
    known: impl FnMut(&Candidate<'_>) -> Known,
) -> Result<String, Failure> {
    choose(view, wish, here, &[], known, |_| 0)
        .map(|choice| choice.member.map_or_else(|| "here".to_owned(), |member| member.name.clone()))
}

fn seen(tokens_per_second: f64) -> Option<Seen> {
    Some(Seen { tokens_per_second, first_token: None, tokens: 100.0, belief: 1.0 })
}

fn model(name: &str, size: u64, state: ModelState) -> ModelOffer {
    ModelOffer { size: Some(size), state, source: ModelSource::Engine, slots: 1, ..ModelOffer::named(name) }
}

fn with(name: &str, models: Vec<ModelOffer>) -> Member {
    Member { models, protocol: 2, ..member(name, &[], 1) }
}

const BIG: u64 = 4_000_000_000;

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
    let known = |one: &Candidate<'_>| Known { in_flight: if one.id.as_str() == "id-a" { 2 } else { 0 }, ..Known::default() };
    assert_eq!(pick(&view, None, &options, None, known), Ok("b".to_owned()));
}

#[test]
fn who_failed_lately_is_asked_last() {
    let view = view(vec![member("bad", &["m"], 9), member("good", &["m"], 0)]);
    let options = Options::default();
    let known = |one: &Candidate<'_>| Known { failing: one.id.as_str() == "id-bad", ..Known::default() };
    assert_eq!(pick(&view, None, &options, None, known), Ok("good".to_owned()));
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
    let (asked, options) = (Ask::default(), Options::default());
    let wish = Wish { ask: &asked, options: &options, context_above: None, real_only: false };
    let mut in_flight = HashMap::<NodeId, u32>::new();
    let mut seed = 1_u64;
    for _ in 0..800 {
        let known = |one: &Candidate<'_>| Known { in_flight: in_flight.get(one.id).copied().unwrap_or(0), ..Known::default() };
        let chosen = choose(&view, &wish, None, &[], known, |below| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(seed >> 33).unwrap() % below
        });
        *in_flight.entry(chosen.unwrap().member.unwrap().id.clone()).or_default() += 1;
    }
    assert!(in_flight.values().all(|&count| (90..=110).contains(&count)), "{in_flight:?}");
}

#[test]
fn the_fast_one_is_asked_until_its_queue_takes_longer_than_the_slow_one() {
    let view = view(vec![
        with("slow", vec![model("m", BIG, ModelState::Ready)]),
        with("fast", vec![model("m", BIG, ModelState::Ready)]),
    ]);
    let with_load = |load: u32| {
        pick(&view, Some("m"), &Options::default(), None, |one| {
            let fast = one.id.as_str() == "id-fast";
            Known { in_flight: if fast { load } else { 0 }, seen: seen(if fast { 40.0 } else { 5.0 }), ..Known::default() }
        })
        .unwrap()
    };
    assert_eq!([0, 1, 2, 4, 5].map(with_load), ["fast", "fast", "slow", "slow", "slow"]);
}

#[test]
fn who_was_not_seen_yet_is_tried_and_what_is_doubted_is_tried_again() {
    let view = view(vec![
        with("known", vec![model("m", BIG, ModelState::Ready)]),
        with("new", vec![model("m", BIG, ModelState::Ready)]),
    ]);
    let known = |one: &Candidate<'_>| {
        let busy = u32::from(one.id.as_str() == "id-known");
        Known { in_flight: busy, seen: (busy > 0).then(|| seen(40.0)).flatten(), ..Known::default() }
    };
    assert_eq!(pick(&view, Some("m"), &Options::default(), None, known), Ok("new".to_owned()));
    let doubted = |belief: f64| {
        pick(&view, Some("m"), &Options::default(), None, |one| {
            let slow = one.id.as_str() == "id-new";
            let speed = Seen { belief: if slow { belief } else { 1.0 }, ..seen(if slow { 2.0 } else { 40.0 }).unwrap() };
            Known { in_flight: u32::from(!slow), seen: Some(speed), ..Known::default() }
        })
    };
    assert_eq!((doubted(1.0), doubted(0.2)), (Ok("known".to_owned()), Ok("new".to_owned())));
}

#[test]
fn a_model_that_failed_is_never_asked_for_and_a_loaded_one_before_one_that_is_not() {
    let of = |state| with(state_name(state), vec![model("m", BIG, state)]);
    let options = Options::default();
    let all = view([ModelState::Failed, ModelState::Available, ModelState::Loading, ModelState::Ready].map(of).into());
    assert_eq!(ask(&all, Some("m"), &options), Ok("ready".to_owned()));
    let unloaded = view([ModelState::Failed, ModelState::Available, ModelState::Loading].map(of).into());
    assert_eq!(ask(&unloaded, Some("m"), &options), Ok("loading".to_owned()));
    let failed = view(vec![of(ModelState::Failed)]);
    let failure = pick(&failed, Some("m"), &options, None, |_| Known::default()).unwrap_err();
    assert_eq!(failure.kind, FailureKind::ModelUnavailable);
    assert!(failure.detail.contains("failed has model \"m\", but could not load it"), "{failure}");
    assert_eq!(ask(&failed, None, &options), Err(FailureKind::NoEligiblePeer));
}

fn state_name(state: ModelState) -> &'static str {
    state.as_str()
}

#[test]
fn no_model_means_the_greatest_one_that_works_wherever_it_is() {
    let big = with("big", vec![model("echo", 0, ModelState::Ready), model("b", BIG, ModelState::Ready)]);
    let toy = with("toy", vec![model("t", 900_000, ModelState::Ready)]);
    let broken = with("broken", vec![model("x", 2 * BIG, ModelState::Failed)]);
    let options = Options::default();
    assert_eq!(ask(&view(vec![toy.clone(), broken.clone(), big.clone()]), None, &options), Ok("big".to_owned()));
    assert_eq!(ask(&view(vec![member("e", &["echo"], 9), toy.clone(), broken]), None, &options), Ok("toy".to_owned()));
    // This machine is one of them.
    let offer = |models| Offer { models, free_slots: 1, ..Offer::default() };
    let id = NodeId::new("id-me");
    let mine = offer(vec![model("h", BIG / 2, ModelState::Ready)]);
    let here = Here { id: &id, offer: &mine, serving: true };
    let with_me = |members: Vec<Member>| pick(&view(members), None, &options, Some(&here), |_| Known::default());
    assert_eq!(with_me(vec![toy.clone()]), Ok("here".to_owned()));
    assert_eq!(with_me(vec![toy, big]), Ok("big".to_owned()));
    // Its echo is not.
    let echo = offer(vec![ModelOffer { source: ModelSource::Echo, ..ModelOffer::named("echo") }]);
    let here = Here { id: &id, offer: &echo, serving: true };
    let members = view(vec![member("e", &["echo"], 0)]);
    assert_eq!(pick(&members, None, &options, Some(&here), |_| Known::default()), Ok("e".to_owned()));
}

#[test]
fn of_equal_nodes_this_machine_answers_until_it_is_busy() {
    let ready = || vec![model("m", BIG, ModelState::Ready)];
    let view = view(vec![with("far", ready())]);
    let (id, offer) = (NodeId::new("id-me"), Offer { models: ready(), free_slots: 1, ..Offer::default() });
    let here = Here { id: &id, offer: &offer, serving: true };
    let with_own = |mine: u32| {
        pick(&view, Some("m"), &Options::default(), Some(&here), |one| Known {
            in_flight: if one.id.as_str() == "id-me" { mine } else { 0 },
            ..Known::default()
        })
    };
    assert_eq!((with_own(0), with_own(1)), (Ok("here".to_owned()), Ok("far".to_owned())));
}

#[test]
fn what_an_old_node_would_misunderstand_is_not_sent_to_it() {
    let old = Member { protocol: 1, ..with("old", vec![model("m", BIG, ModelState::Ready)]) };
    let new = with("new", vec![model("m", BIG, ModelState::Loading)]);
    let turn = Turn { role: Role::User, text: Text::new("before") };
    let options = Options::default();
    for asked in [
        Ask { history: vec![turn], ..Ask::default() },
        Ask { raw: true, ..Ask::default() },
        Ask { top_p: Some(0.5), ..Ask::default() },
        Ask { stop: vec![Text::new("x")], ..Ask::default() },
    ] {
        let wish = Wish { ask: &asked, options: &options, context_above: None, real_only: false };
        let both = view(vec![old.clone(), new.clone()]);
        assert_eq!(pick_for(&both, &wish, None, |_| Known::default()), Ok("new".to_owned()));
        let failure = pick_for(&view(vec![old.clone()]), &wish, None, |_| Known::default()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::NoEligiblePeer);
        assert!(failure.detail.contains("old could answer") && failure.detail.contains("upgrade"), "{failure}");
    }
    assert_eq!(ask(&view(vec![old, new]), None, &options), Ok("old".to_owned()));
}

#[test]
fn a_larger_context_window_can_be_asked_for() {
    let sized =
        |name: &str, context_tokens| with(name, vec![ModelOffer { context_tokens, ..model("m", BIG, ModelState::Ready) }]);
    let view = view(vec![sized("unknown", 0), sized("small", 4096), sized("large", 8192)]);
    let (asked, options) = (Ask { model: Some("m".to_owned()), ..Ask::default() }, Options::default());
    let above = |context| {
        pick_for(&view, &Wish { ask: &asked, options: &options, context_above: Some(context), real_only: false }, None, |_| {
            Known::default()
        })
    };
    assert_eq!(above(4096), Ok("large".to_owned()));
    assert!(above(8192).is_err());
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

#[test]
fn the_echo_is_no_answer_where_there_is_a_real_model_and_other_models_of_a_node_are() {
    let two = vec![model("b", BIG, ModelState::Ready), model("s", BIG / 2, ModelState::Ready), ModelOffer::named("echo")];
    let view = view(vec![with("a", two), member("e", &["echo"], 9)]);
    let (asked, options) = (Ask::default(), Options::default());
    assert!(has_real_model(&view, &options));
    assert!(!has_real_model(&view, &Options { node: Some("e".to_owned()), ..Options::default() }));
    let wish = |real_only| Wish { ask: &asked, options: &options, context_above: None, real_only };
    let tried = |names: &[&str]| {
        names.iter().map(|&name| Tried { id: NodeId::new("id-a"), model: Some(name.to_owned()) }).collect::<Vec<_>>()
    };
    let after = |real_only, tried: &[Tried]| {
        choose(&view, &wish(real_only), None, tried, |_| Known::default(), |_| 0).map(|choice| choice.model.name)
    };
    assert_eq!(after(true, &[]).unwrap(), "b");
    assert_eq!(after(true, &tried(&["b"])).unwrap(), "s");
    assert_eq!(after(true, &tried(&["b", "s"])).unwrap_err().kind, FailureKind::NoEligiblePeer);
    assert_eq!(after(false, &tried(&["b", "s"])).unwrap(), "echo");
    assert!(after(true, &[Tried { id: NodeId::new("id-a"), model: None }]).is_err());
}

#[test]
fn who_asks_for_a_model_that_is_not_there_is_told_of_those_that_are() {
    let mine = Offer { models: vec![model("mine", BIG, ModelState::Ready), ModelOffer::named("echo")], ..Offer::default() };
    let id = NodeId::new("id-me");
    let told = |members: Vec<Member>, serving| {
        let here = Here { id: &id, offer: &mine, serving };
        let failure = pick(&view(members), Some("x"), &Options::default(), Some(&here), |_| Known::default()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::ModelUnavailable);
        failure.detail
    };
    assert_eq!(told(vec![member("a", &["far"], 1)], true), "no node in home has model \"x\"; there are: echo, far, mine");
    assert_eq!(told(vec![], false), "no node in home has model \"x\"; there are: mine");
}

#[test]
fn only_an_engines_model_that_is_not_loaded_is_cold() {
    assert!(is_cold(&model("m", BIG, ModelState::Available)) && is_cold(&model("m", BIG, ModelState::Loading)));
    assert!(!is_cold(&model("m", BIG, ModelState::Ready)) && !is_cold(&ModelOffer::named("m")));
}
