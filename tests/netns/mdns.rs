//! Discovery on the local network where it is not as simple as one cable.

use super::*;
use crate::lab::Family;
use crate::neighbours::{Neighbour, forger_on, stranger_on};

/// Answers that are forged in a flood.
const FORGED: usize = 50_000;
/// Most that the memory of a daemon may grow by that.
const MAX_GROWTH_KIB: u64 = 16 * 1024;
/// The first pause after a flood, and a question after it.
const FLOOD_PAUSE: Duration = Duration::from_secs(10);

fn number(leg: &serde_json::Value, key: &str) -> u64 {
    leg[key].as_u64().unwrap()
}

#[tokio::test]
async fn each_family_is_counted_by_itself() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let (mut a, _b) = (Neighbour::start(&lab, "a1", CLUSTER).await, Neighbour::start(&lab, "a2", CLUSTER).await);
    for ipv6 in [false, true] {
        let leg = a.leg("eth0", ipv6, |leg| number(leg, "nodes") == 1).await;
        assert!(number(&leg, "sent") > 0 && number(&leg, "heard") > 0 && leg["problem"].is_null(), "{leg}");
    }
}

#[tokio::test]
async fn a_node_with_two_interfaces_finds_who_is_at_either() {
    let Some(lab) = Lab::two_islands([2, 1]) else { return };
    lab.second_interface("a1", 'b');
    let mut middle = Neighbour::start(&lab, "a1", CLUSTER).await;
    let (_a, _b) = (Neighbour::start(&lab, "a2", CLUSTER).await, Neighbour::start(&lab, "b1", CLUSTER).await);
    for interface in ["eth0", "eth1"] {
        for ipv6 in [false, true] {
            middle.leg(interface, ipv6, |leg| number(leg, "nodes") == 1).await;
        }
    }
    assert_eq!(middle.facts().await["members"], 2);
}

#[tokio::test]
async fn of_two_interfaces_one_may_be_dead_and_the_facts_tell_which() {
    let Some(lab) = Lab::two_islands([2, 1]) else { return };
    lab.second_interface("a1", 'b');
    lab.dead("a1");
    let (mut a, _other) = (Neighbour::start(&lab, "a1", CLUSTER).await, Neighbour::start(&lab, "a2", CLUSTER).await);
    let _b = Neighbour::start(&lab, "b1", CLUSTER).await;
    a.leg("eth1", false, |leg| number(leg, "nodes") == 1).await;
    let dead = a.leg("eth0", false, |leg| number(leg, "sent") >= 3).await;
    assert_eq!((number(&dead, "heard"), number(&dead, "nodes")), (0, 0), "{dead}");
    // A cable that is pulled is told as such, and taken up again when it is back.
    lab.second_cable("a1", 'b', false);
    let pulled = a.leg("eth1", false, |leg| !leg["problem"].is_null()).await;
    assert!(pulled["problem"].as_str().unwrap().contains("no carrier"), "{pulled}");
    lab.second_cable("a1", 'b', true);
    a.leg("eth1", false, |leg| leg["problem"].is_null() && number(leg, "nodes") == 1).await;
}

#[tokio::test]
async fn where_multicast_is_dropped_nothing_is_heard_and_that_can_be_seen() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    lab.no_multicast('a');
    let (mut a, mut b) = (Neighbour::start(&lab, "a1", CLUSTER).await, Neighbour::start(&lab, "a2", CLUSTER).await);
    for node in [&mut a, &mut b] {
        for ipv6 in [false, true] {
            let leg = node.leg("eth0", ipv6, |leg| number(leg, "sent") >= 5).await;
            assert_eq!((number(&leg, "heard"), number(&leg, "nodes")), (0, 0), "{leg}");
        }
    }
}

#[tokio::test]
async fn an_interface_that_is_plugged_in_later_is_used_at_once() {
    let Some(lab) = Lab::two_islands([1, 1]) else { return };
    let (mut a, _b) = (Neighbour::start(&lab, "a1", CLUSTER).await, Neighbour::start(&lab, "b1", CLUSTER).await);
    a.leg("eth0", false, |leg| number(leg, "sent") > 0).await;
    lab.second_interface("a1", 'b');
    let begun = Instant::now();
    a.leg("eth1", false, |leg| number(leg, "nodes") == 1).await;
    measured("a neighbour is heard at a new interface after", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn nodes_on_a_machine_without_a_network_find_each_other() {
    let Some(lab) = Lab::one_lan(1, Family::Both) else { return };
    lab.address("a1", false);
    let (mut a, _b) = (Neighbour::start(&lab, "a1", CLUSTER).await, Neighbour::start(&lab, "a1", CLUSTER).await);
    a.leg("lo", false, |leg| number(leg, "nodes") == 1).await;
    let begun = Instant::now();
    while a.facts().await["members"] != 1 {
        assert!(begun.elapsed() < DEADLINE, "they hear each other and do not become members");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Once there is a network, it is there that others are looked for.
    lab.address("a1", true);
    a.leg("eth0", false, |leg| number(leg, "nodes") == 1).await;
}

#[tokio::test]
async fn other_libp2p_programs_are_heard_and_hear_us() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let mut a = Neighbour::start(&lab, "a1", CLUSTER).await;
    let (mut stranger, _) = stranger_on(&lab, "a2").await;
    let mut missing = vec![format!("/ip4/{}/tcp/", lab.ipv4("a1")), format!("/ip6/{}/tcp/", lab.ipv6("a1"))];
    while !missing.is_empty() {
        let told = stranger.told().await;
        let address = told.strip_prefix(&format!("found {} ", a.id)).unwrap_or_else(|| panic!("{told}"));
        missing.retain(|prefix| !address.starts_with(prefix));
    }
    for ipv6 in [false, true] {
        a.leg("eth0", ipv6, |leg| number(leg, "nodes") == 1).await;
    }
}

#[tokio::test]
async fn who_stops_is_gone_at_once_for_those_who_only_heard_of_it() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let (mut a, b) = (Neighbour::start(&lab, "a1", "red").await, Neighbour::start(&lab, "a2", "blue").await);
    for ipv6 in [false, true] {
        a.leg("eth0", ipv6, |leg| number(leg, "nodes") == 1).await;
    }
    b.stop().await;
    let begun = Instant::now();
    for ipv6 in [false, true] {
        a.leg("eth0", ipv6, |leg| number(leg, "nodes") == 0).await;
    }
    assert!(begun.elapsed() < TOLERANCE, "{:?}", begun.elapsed());
}

/// Floods a LAN from `sources`; then a real member must be found within `limit`, and the daemon must not have grown.
async fn flood(what: &str, sources: impl Fn(&Lab) -> Vec<String>, limit: Duration) {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let sources = sources(&lab);
    for extra in &sources[1..] {
        lab.extra_address("a3", extra);
    }
    let [a] = cast(&lab, [("a1", "NodeA", &["--serve", "--connect", CLUSTER])]).await;
    let (idle, lines) = (a.kib("VmRSS"), a.log().lines().count());
    let begun = Instant::now();
    let mut forger = forger_on(&lab, "a3", FORGED, &sources);
    assert_eq!(forger.told().await, "done");
    measured(&format!("{FORGED} forged answers {what} are sent after"), begun.elapsed());
    let begun = Instant::now();
    let [b] = cast(&lab, [("a2", "NodeB", &["--consume", "--connect", CLUSTER])]).await;
    let found = all_see_each_other(&[&a, &b], begun, DEADLINE).await;
    measured(&format!("a member is found after the flood {what} after"), found);
    let (growth, written) = (a.kib("VmHWM").saturating_sub(idle), a.log().lines().count() - lines);
    eprintln!("MEASURED growth by the flood {what}: {growth} KiB at its peak, {written} lines in the log");
    assert!(growth <= MAX_GROWTH_KIB, "{growth} KiB");
    assert!(written <= 100, "{written} lines: {}", a.log());
    assert!(found < limit, "{found:?}");
    echoed(&b, "still there?").await;
}

#[tokio::test]
async fn a_flood_of_forged_answers_from_one_machine_keeps_nobody_from_being_found() {
    flood("of one machine", |lab| vec![lab.ipv4("a3")], DEADLINE).await;
}

#[tokio::test]
async fn nor_does_one_from_two_hundred_machines() {
    let sources = |lab: &Lab| {
        let network = lab.ipv4("a3").rsplit_once('.').unwrap().0.to_owned();
        std::iter::once(lab.ipv4("a3")).chain((40..240).map(|host| format!("{network}.{host}"))).collect()
    };
    flood("of many machines", sources, FLOOD_PAUSE + DEADLINE).await;
}
