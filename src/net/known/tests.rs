use super::*;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn cluster() -> ClusterId {
    ClusterId::new("home").unwrap()
}

fn card() -> Card {
    Card { name: "NodeA".to_owned(), serving: true, addresses: vec!["/ip4/192.0.2.1/tcp/1".parse().unwrap()], ..Card::default() }
}

fn told(teller: PeerId, peer: PeerId, heard: Instant) -> Told {
    Told { teller, peer, card: card(), first_hand: true, heard }
}

/// A time late enough to be counted back from.
fn begin() -> Instant {
    Instant::now() + 10 * TTL
}

#[test]
fn a_word_counts_five_minutes_and_a_fresher_one_longer() {
    let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
    assert_eq!(known.told(&cluster(), told(PeerId::random(), peer, now), now), Learnt::New);
    let listed = known.list(&cluster()).next().unwrap().1.clone();
    assert_eq!((listed.name.as_str(), listed.liveness, listed.serving), ("NodeA", Liveness::Known, true));
    let later = now + TTL - SECOND;
    assert!(!known.expire(later));
    assert_eq!(known.told(&cluster(), told(PeerId::random(), peer, later), later), Learnt::Fresher);
    assert!(!known.expire(now + TTL));
    assert!(known.expire(later + TTL));
    assert_eq!(known.told(&cluster(), told(PeerId::random(), peer, now), now + TTL), Learnt::Nothing, "too old to begin with");
}

#[test]
fn one_member_fills_few_places_and_all_of_them_together_no_more_than_there_are() {
    let (mut known, now, liar) = (Known::default(), begin(), PeerId::random());
    let mut fill = |teller, count: usize| {
        (0..count).filter(|_| known.told(&cluster(), told(teller, PeerId::random(), now), now) == Learnt::New).count()
    };
    assert_eq!(fill(liar, 2 * MAX_PER_TELLER), MAX_PER_TELLER);
    let others: usize = (0..30).map(|_| fill(PeerId::random(), MAX_PER_TELLER)).sum();
    assert_eq!(others + MAX_PER_TELLER, MAX_KNOWN);
}

#[test]
fn whom_a_single_member_tells_of_is_looked_after_and_goes_when_nobody_is_there() {
    let (mut known, now, [liar, honest], [ghost, real]) =
        (Known::default(), begin(), [PeerId::random(), PeerId::random()], [PeerId::random(), PeerId::random()]);
    known.told(&cluster(), told(liar, ghost, now), now);
    known.told(&cluster(), told(liar, real, now), now);
    known.told(&cluster(), told(honest, real, now), now);
    assert_eq!(known.to_probe(&cluster(), now), None, "not at once");
    let later = now + DOUBTFUL;
    assert_eq!(known.to_probe(&cluster(), later), Some(ghost));
    assert!(known.undialable(&ghost, later) && !known.undialable(&real, later));
    assert_eq!(known.told(&cluster(), told(liar, ghost, later), later), Learnt::Nothing);
    assert_eq!(known.list(&cluster()).map(|(peer, _)| peer).collect::<Vec<_>>(), [real]);
    assert_eq!(known.dialable(&cluster(), later).count(), 0, "not again for a while");
    assert_eq!(known.dialable(&cluster(), later + DENIED).count(), 1);
    // Only what two tell is passed on.
    assert_eq!(known.vouched(&cluster()).collect::<Vec<_>>(), [real]);
}

#[test]
fn it_takes_two_to_bury_and_older_words_do_not_call_back() {
    let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
    let tellers = [PeerId::random(), PeerId::random(), PeerId::random()];
    for teller in tellers {
        known.told(&cluster(), told(teller, peer, now), now);
    }
    let then = now + SECOND;
    assert!(!known.lost(&cluster(), tellers[0], &peer, now - SECOND), "it was heard since");
    assert!(!known.lost(&cluster(), tellers[0], &peer, then));
    assert!(!known.lost(&cluster(), tellers[0], &peer, then), "saying it twice makes no two");
    assert!(known.lost(&cluster(), tellers[1], &peer, then));
    assert_eq!(known.told(&cluster(), told(tellers[2], peer, now), then), Learnt::Nothing);
    assert_eq!(known.told(&cluster(), told(tellers[2], peer, then + SECOND), then + SECOND), Learnt::New, "it is back");
    // A fresh word takes the first one's loss back.
    known.told(&cluster(), told(tellers[1], peer, then + SECOND), then + SECOND);
    assert!(!known.lost(&cluster(), tellers[0], &peer, then + 2 * SECOND));
    known.told(&cluster(), told(tellers[1], peer, then + 3 * SECOND), then + 3 * SECOND);
    assert!(!known.lost(&cluster(), tellers[1], &peer, then + 4 * SECOND));
}

#[test]
fn whom_somebody_still_holds_is_not_buried_by_two_and_is_by_four() {
    let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
    let [holder, elder] = [PeerId::random(), PeerId::random()];
    let losers: Vec<PeerId> = (0..LOSERS).map(|_| PeerId::random()).collect();
    let listed = |known: &Known| known.contains(&cluster(), &peer);
    known.told(&cluster(), told(elder, peer, now), now);
    known.told(&cluster(), told(holder, peer, now), now);
    let then = now + SECOND;
    assert!(!known.lost(&cluster(), elder, &peer, then));
    for &loser in &losers[1..LOSERS - 1] {
        assert!(!known.lost(&cluster(), loser, &peer, then));
    }
    assert!(listed(&known), "one of {LOSERS} is missing");
    assert!(known.lost(&cluster(), losers[0], &peer, then) && !listed(&known), "whoever holds it errs, or lies");
    // Whoever held it went as a friend, and would not tell: two are enough.
    let later = then + SECOND;
    known.told(&cluster(), told(holder, peer, later), later);
    known.teller_parted(&cluster(), &holder);
    assert!(!known.lost(&cluster(), losers[0], &peer, later));
    assert!(known.lost(&cluster(), losers[1], &peer, later));
    // Or it is gone itself.
    let latest = later + SECOND;
    for teller in [holder, elder] {
        known.told(&cluster(), told(teller, peer, latest), latest);
    }
    known.teller_gone(&cluster(), &holder);
    assert!(known.lost(&cluster(), elder, &peer, latest));
}

#[test]
fn the_newest_word_is_shown_with_every_address_that_may_do() {
    let (mut known, now, peer, teller) = (Known::default(), begin(), PeerId::random(), PeerId::random());
    known.told(&cluster(), told(teller, peer, now), now);
    let moved = Card { addresses: vec!["/ip4/192.0.2.2/tcp/1".parse().unwrap()], ..card() };
    let word = |card: Card, heard| Told { card, ..told(teller, peer, heard) };
    assert_eq!(known.told(&cluster(), word(moved, now + SECOND), now), Learnt::Fresher);
    assert_eq!(known.addresses(&cluster(), &peer).len(), 2);
    let renamed = Card { name: "NodeB".to_owned(), ..card() };
    assert_eq!(known.told(&cluster(), word(renamed.clone(), now), now), Learnt::Nothing, "older than what is known");
    assert_eq!(known.told(&cluster(), word(renamed, now + 2 * SECOND), now), Learnt::Changed);
    assert_eq!(known.list(&cluster()).next().unwrap().1.name, "NodeB");
}

proptest! {
    #[test]
    fn whatever_is_told_the_bounds_hold(steps in proptest::collection::vec((0_u8..6, 0_usize..6, 0_usize..9, 0_u64..60), 0..300)) {
        let (mut known, mut now) = (Known::default(), begin());
        let tellers: Vec<PeerId> = (0..6).map(|_| PeerId::random()).collect();
        let peers: Vec<PeerId> = (0..9).map(|_| PeerId::random()).collect();
        for (action, teller, peer, seconds) in steps {
            let (teller, peer) = (tellers[teller], peers[peer]);
            match action {
                0 | 1 => drop(known.told(&cluster(), Told { first_hand: action == 0, ..told(teller, peer, now) }, now)),
                2 => drop(known.lost(&cluster(), teller, &peer, now)),
                3 => known.buried(&cluster(), &peer, now),
                4 => drop(known.undialable(&peer, now)),
                _ => { now += Duration::from_secs(seconds); known.expire(now); }
            }
            prop_assert!(known.count(&cluster()) <= peers.len());
            prop_assert!(known.entries.values().all(|entry| entry.tellers.len() <= 2 && now - entry.heard < TTL));
            prop_assert!(known.vouched(&cluster()).all(|peer| known.contains(&cluster(), &peer)));
        }
    }
}

#[test]
fn one_teller_does_not_rewrite_what_another_one_told_first() {
    let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
    let [honest, liar, third] = [PeerId::random(), PeerId::random(), PeerId::random()];
    let forged = |host: u8| Card {
        name: "Forged".to_owned(),
        addresses: (0..8).map(|port| format!("/ip4/198.51.100.{host}/tcp/{port}").parse().unwrap()).collect(),
        ..Card::default()
    };
    let word = |teller, card, heard| Told { card, ..told(teller, peer, heard) };
    known.told(&cluster(), told(honest, peer, now), now);
    // The second place adds two addresses, one without a place nothing, however fresh.
    for (seconds, teller) in [(1, liar), (2, liar), (3, third)] {
        let heard = now + seconds * SECOND;
        assert_eq!(known.told(&cluster(), word(teller, forged(7), heard), heard), Learnt::Fresher);
    }
    assert_eq!(known.told(&cluster(), word(third, forged(8), now + 4 * SECOND), now + 4 * SECOND), Learnt::Fresher);
    let (shown, _) = known.vouched_card(&cluster(), &peer).unwrap();
    assert!(shown.is_like(&card()));
    assert_eq!(shown.addresses[0], card().addresses[0]);
    assert_eq!(shown.addresses.len(), 1 + MORE_ADDRESSES);
    assert!(!shown.addresses.iter().any(|address| address.to_string().contains("100.8")));
    // Who has the elder's place changes its mind, and nobody gets there by being the only one that talks.
    let renamed = Card { name: "NodeB".to_owned(), ..card() };
    assert_eq!(known.told(&cluster(), word(honest, renamed.clone(), now + 5 * SECOND), now), Learnt::Changed);
    known.teller_parted(&cluster(), &honest);
    known.told(&cluster(), word(liar, forged(7), now + 6 * SECOND), now);
    assert_eq!(known.list(&cluster()).next().unwrap().1.name, "NodeB");
    assert_eq!(known.told(&cluster(), told(third, peer, now + 7 * SECOND), now), Learnt::Changed);
    assert_eq!(known.list(&cluster()).next().unwrap().1.name, "NodeA", "the silent one is replaced");
}

#[test]
fn what_others_tell_of_a_friend_that_went_is_news() {
    let (mut known, now, [local, friend, teller]) =
        (Known::default(), begin(), [PeerId::random(), PeerId::random(), PeerId::random()]);
    known.parted(&cluster(), local, friend, card(), now, now);
    assert_eq!(known.serving(&cluster()), 1);
    let stopped = Card { serving: false, ..card() };
    let word = Told { card: stopped, ..told(teller, friend, now + SECOND) };
    assert_eq!(known.told(&cluster(), word, now + SECOND), Learnt::Changed);
    assert_eq!(known.serving(&cluster()), 0);
    assert!(known.is_vouched(&cluster(), &friend));
}

#[test]
fn a_failed_dial_denies_who_told_and_nobody_else() {
    let (mut known, now, peer) = (Known::default(), begin(), PeerId::random());
    let [liar, second, third] = [PeerId::random(), PeerId::random(), PeerId::random()];
    let listed = |known: &Known| known.contains(&cluster(), &peer);
    known.told(&cluster(), told(liar, peer, now), now);
    assert!(known.undialable(&peer, now) && !listed(&known));
    let later = now + SECOND;
    assert_eq!(known.told(&cluster(), told(liar, peer, later), later), Learnt::Nothing);
    assert_eq!(known.told(&cluster(), told(second, peer, later), later), Learnt::New);
    assert_eq!(known.told(&cluster(), told(liar, peer, later + SECOND), later), Learnt::Nothing, "it is no second teller");
    assert!(!known.is_vouched(&cluster(), &peer));
    // Two others are connected to it: the first one was right.
    known.told(&cluster(), told(third, peer, later + SECOND), later);
    assert!(known.is_vouched(&cluster(), &peer));
    assert_eq!(known.told(&cluster(), told(liar, peer, later + 2 * SECOND), later), Learnt::Fresher);
}

#[test]
fn a_denial_ends_and_few_are_remembered() {
    let (mut known, now, peer, cluster) = (Known::default(), begin(), PeerId::random(), cluster());
    let tellers: Vec<PeerId> = (0..=MAX_DENIED).map(|_| PeerId::random()).collect();
    for &teller in &tellers {
        assert_eq!(known.told(&cluster, told(teller, peer, now), now), Learnt::New);
        assert!(known.undialable(&peer, now));
    }
    let last = told(tellers[MAX_DENIED], peer, now + DENIED - SECOND);
    assert_eq!(known.told(&cluster, last, now + DENIED - SECOND), Learnt::Nothing);
    assert_eq!(known.told(&cluster, told(tellers[0], peer, now + SECOND), now + SECOND), Learnt::New, "one more is forgotten");
    known.remove(&cluster, &peer);
    for _ in 0..=MAX_GRAVES {
        let (teller, other) = (PeerId::random(), PeerId::random());
        known.told(&cluster, told(teller, other, now), now);
        known.undialable(&other, now);
    }
    assert_eq!(known.denied.len(), MAX_GRAVES);
    known.expire(now + DENIED);
    assert!(known.denied.is_empty());
}
