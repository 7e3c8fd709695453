use super::*;
use crate::domain::node::ModelState;
use crate::wire::models::Details;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn table() -> (Members, ClusterId, PeerId, Instant) {
    (Members::new(10 * SECOND, 15 * SECOND), ClusterId::new("home").unwrap(), PeerId::random(), Instant::now())
}

fn enter(members: &mut Members, cluster: &ClusterId, peer: PeerId, generation: Generation, now: Instant) -> Option<Generation> {
    let link = Link { addresses: Vec::new(), direct: true, relay: None, transport: "quic" };
    members.insert(cluster, peer, generation, 1, FoundBy::Mdns, link, now)
}

#[test]
fn an_old_stream_that_ends_late_does_not_remove_what_a_newer_one_made() {
    let (mut members, cluster, peer, now) = table();
    assert_eq!(enter(&mut members, &cluster, peer, 1, now), None);
    assert_eq!(enter(&mut members, &cluster, peer, 2, now), Some(1));
    assert_eq!(members.remove(&cluster, &peer, 1), None);
    assert!(members.is_member(&peer));
    assert!(members.remove(&cluster, &peer, 2).is_some());
    assert!(!members.is_member(&peer));
}

#[test]
fn silence_makes_a_suspect_after_ten_seconds_and_a_dead_one_after_fifteen() {
    let (mut members, cluster, peer, now) = table();
    enter(&mut members, &cluster, peer, 1, now);
    assert_eq!(members.expire(now + 9 * SECOND), []);
    assert_eq!(members.next_deadline(), Some(now + 10 * SECOND));
    assert_eq!(members.expire(now + 10 * SECOND), [Transition::Suspect]);
    assert_eq!(members.expire(now + 11 * SECOND), []);
    assert_eq!(members.next_deadline(), Some(now + 15 * SECOND));
    assert_eq!(members.expire(now + 15 * SECOND), [Transition::Dead { cluster, peer, generation: 1 }]);
}

#[test]
fn a_frame_of_an_older_session_proves_nothing() {
    let (mut members, cluster, peer, now) = table();
    enter(&mut members, &cluster, peer, 2, now);
    members.heard(&cluster, &peer, 1, now + 9 * SECOND);
    assert_eq!(members.expire(now + 10 * SECOND), [Transition::Suspect]);
    assert!(members.heard(&cluster, &peer, 2, now + 11 * SECOND), "the suspect is back");
}

#[test]
fn a_member_is_visible_once_it_has_told_its_state() {
    let (mut members, cluster, peer, now) = table();
    enter(&mut members, &cluster, peer, 1, now);
    assert!(members.list(&cluster).is_empty());
    let state = State { node_name: "NodeA".to_owned(), ..State::default() };
    assert!(members.on_state(&cluster, &peer, 1, state.clone(), now));
    assert!(!members.on_state(&cluster, &peer, 1, state, now));
    assert_eq!(members.list(&cluster)[0].name, "NodeA");
    assert!(members.list(&ClusterId::new("other").unwrap()).is_empty());
}

#[test]
fn details_of_models_count_with_the_state_that_they_belong_to() {
    let (mut members, cluster, peer, now) = table();
    enter(&mut members, &cluster, peer, 1, now);
    let models = vec![ModelOffer::named("m"), ModelOffer::named("n")];
    let state = State { version: 4, models, ..State::default() };
    let details = |state_version| Models {
        state_version,
        details: vec![Details { state: ModelState::Ready, slots: 2, size: Some(9), ..Details::default() }],
    };
    assert!(!members.on_models(&cluster, &peer, 1, details(4), now), "no state yet");
    members.on_state(&cluster, &peer, 1, state.clone(), now);
    let known = |members: &Members| members.list(&cluster)[0].models.clone();
    let ready = ModelOffer { state: ModelState::Ready, slots: 2, size: Some(9), ..ModelOffer::named("m") };
    assert_eq!(known(&members), [ready.clone(), ModelOffer::named("n")]);
    assert!(!members.on_models(&cluster, &peer, 1, details(3), now));
    assert_eq!(known(&members), state.models);
    assert!(members.on_models(&cluster, &peer, 1, details(4), now));
    assert_eq!(known(&members)[0], ready);
    members.on_state(&cluster, &peer, 1, State { version: 5, ..state.clone() }, now);
    assert_eq!(known(&members), state.models);
}

#[test]
fn the_echo_of_a_heartbeat_gives_the_round_trip_without_the_wait_at_the_other_side() {
    let (mut members, cluster, peer, now) = table();
    enter(&mut members, &cluster, peer, 1, now);
    members.on_state(&cluster, &peer, 1, State::default(), now);
    members.sent(&cluster, &peer, 5, now);
    let beat = Heartbeat { seq: 1, echo_seq: 5, echo_delay_us: 1_000_000, ..Heartbeat::default() };
    members.on_heartbeat(&cluster, &peer, 1, &beat, now + SECOND + Duration::from_micros(700));
    assert_eq!(members.list(&cluster)[0].latency_us, Some(700));
    // A delay past the limit, or longer than the whole, tells nothing.
    for (seq, delay, whole) in [(6, 6_000_001, 7 * SECOND), (7, 900_000, SECOND / 2), (8, u32::MAX, SECOND)] {
        members.sent(&cluster, &peer, seq, now);
        let beat = Heartbeat { seq, echo_seq: seq, echo_delay_us: delay, ..Heartbeat::default() };
        members.on_heartbeat(&cluster, &peer, 1, &beat, now + whole);
        assert_eq!(members.list(&cluster)[0].latency_us, Some(700), "{seq}");
    }
}

proptest! {
    #[test]
    fn only_the_session_that_holds_a_member_keeps_it_or_ends_it(
        steps in proptest::collection::vec((0_u8..6, 0_usize..2, 0_u64..4, 0_u64..8), 0..80),
    ) {
        let (mut members, cluster, first, mut now) = table();
        let peers = [first, PeerId::random()];
        // The plain model: who holds each member, and when that session was heard last.
        let mut model: [Option<(Generation, Instant)>; 2] = [None; 2];
        for (action, who, generation, seconds) in steps {
            now += Duration::from_secs(seconds);
            let (peer, held) = (peers[who], model[who].is_some_and(|(holder, _)| holder == generation));
            match action {
                0 => {
                    let replaced = enter(&mut members, &cluster, peer, generation, now);
                    prop_assert_eq!(replaced, model[who].map(|(holder, _)| holder));
                    model[who] = Some((generation, now));
                }
                1 => {
                    prop_assert_eq!(members.remove(&cluster, &peer, generation).is_some(), held);
                    if held { model[who] = None }
                }
                2 => drop(members.heard(&cluster, &peer, generation, now)),
                3 => {
                    let beat = Heartbeat { seq: seconds, echo_seq: seconds, echo_delay_us: u32::MAX, ..Heartbeat::default() };
                    members.sent(&cluster, &peer, seconds, now);
                    members.on_heartbeat(&cluster, &peer, generation, &beat, now);
                }
                4 => drop(members.on_state(&cluster, &peer, generation, State::default(), now)),
                _ => for transition in members.expire(now) {
                    if let Transition::Dead { peer, generation, .. } = transition {
                        let who = usize::from(peer == peers[1]);
                        let (holder, heard) = model[who].unwrap();
                        prop_assert!(holder == generation && now - heard >= 15 * SECOND);
                        prop_assert!(members.remove(&cluster, &peer, generation).is_some());
                        model[who] = None;
                    }
                },
            }
            if (2..5).contains(&action) && held {
                model[who] = Some((generation, now));
            }
            for (peer, model) in peers.iter().zip(&model) {
                prop_assert_eq!(members.generation(&cluster, peer), model.map(|(holder, _)| holder));
            }
            prop_assert!(members.list(&cluster).len() <= model.iter().flatten().count());
            prop_assert_eq!(members.next_deadline().is_some(), model.iter().any(Option::is_some));
        }
    }
}
