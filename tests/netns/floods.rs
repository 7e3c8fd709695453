//! Floods and liars against a real daemon, while two honest members go on: the figures are a table in `docs/floods.md`.
//!
//! Short here; whole with `OPENGATEWAY_FLOODS=full cargo test --test netns floods -- --nocapture --test-threads 1`.

use super::*;
use crate::lab::Family;
use crate::roles::Role;
use crate::siege::{Siege, either};

/// A machine under test is busy: what is promised in seconds may take this many times as long.
const PATIENCE: u32 = 3;
/// A new member is in within this, whatever goes on.
const JOIN: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_thousand_connections_keep_no_member_out() {
    let Some(siege) = Siege::lay().await else { return };
    let (dials, hosts, seconds) = either(("1000", "20", "10"), ("300", "10", "4"));
    let settings = [("DIALS", dials), ("HOSTS", hosts), ("SECONDS", seconds)];
    let figures = siege.under("connections", "connection flood", &settings).await;
    figures.hold(64);
    assert!(figures.join < JOIN * PATIENCE, "{figures:?}");
}

#[tokio::test]
async fn two_thousand_half_open_sockets_keep_no_member_out() {
    let Some(siege) = Siege::lay().await else { return };
    let (sockets, seconds) = either(("2000", "25"), ("600", "6"));
    let settings = [("SOCKETS", sockets), ("HOSTS", "20"), ("SECONDS", seconds)];
    let figures = siege.under("half-open", "half-open sockets", &settings).await;
    figures.hold(32);
    assert!(figures.join < JOIN * PATIENCE, "{figures:?}");
    let numbers: Vec<usize> = figures.counted.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    assert!(numbers[1] <= 64 + 40, "{figures:?}");
    assert!(numbers[2] <= 12_000, "{figures:?}");
}

#[tokio::test]
async fn first_packets_of_quic_from_everywhere_leave_tcp_open() {
    let Some(siege) = Siege::lay().await else { return };
    let (seconds, kinds) = either(("20", "2000"), ("5", "500"));
    let settings = [("RATE", "20000"), ("SECONDS", seconds), ("KINDS", kinds)];
    let figures = siege.under("initials", "QUIC first packets", &settings).await;
    figures.hold(128);
    assert!(figures.join < JOIN * PATIENCE, "{figures:?}");
}

#[tokio::test]
async fn ten_thousand_streams_of_one_peer_trouble_nobody_else() {
    let Some(siege) = Siege::lay().await else { return };
    for (over, member) in [("quic", ""), ("tcp", ""), ("quic", CLUSTER), ("tcp", CLUSTER)] {
        let title = format!("stream flood, {over}{}", if member.is_empty() { "" } else { ", member" });
        let streams = either("10000", "2000");
        let mut settings = vec![("OVER", over), ("STREAMS", streams), ("SECONDS", either("60", "5"))];
        settings.extend((!member.is_empty()).then_some(("MEMBER", member)));
        siege.under("streams", &title, &settings).await.hold(16);
    }
}

#[tokio::test]
async fn frames_that_are_none_get_their_sender_banned_and_few_lines() {
    let Some(siege) = Siege::lay().await else { return };
    let (seconds, hosts) = either(("30", "8"), ("4", "8"));
    let figures = siege.under("malformed", "malformed frames", &[("SECONDS", seconds), ("HOSTS", hosts)]).await;
    figures.hold(16);
    assert!(figures.lines <= 20, "{figures:?}\n{}", siege.a.log());
    let figures =
        siege.under("huge", "lengths of 4 GiB", &[("ROUNDS", "30"), ("SECONDS", either("10", "4")), ("FIRST", "10")]).await;
    figures.hold(8);
    assert!(figures.lines <= 20, "{figures:?}\n{}", siege.a.log());
    let figures = siege.under("empty", "a million empty frames, twice", &[("FIRST", "20")]).await;
    figures.hold(8);
}

#[tokio::test]
async fn false_provider_records_stay_within_bounds() {
    let Some(siege) = Siege::lay().await else { return };
    for (title, spread) in [("provider records on one key", "0"), ("provider records on a key each", "1")] {
        let settings = [("SPREAD", spread), ("RECORDS", "10000"), ("PEERS", "20"), ("SECONDS", either("60", "5"))];
        siege.under("records", title, &settings).await.hold(16);
    }
}

#[tokio::test]
async fn streams_that_are_filled_and_never_read_cost_their_window_and_no_more() {
    let Some(siege) = Siege::lay().await else { return };
    for (over, member) in [("quic", ""), ("tcp", ""), ("quic", CLUSTER), ("tcp", CLUSTER)] {
        let title = format!("full streams, {over}{}", if member.is_empty() { "" } else { ", member" });
        let mut settings = vec![("OVER", over), ("CONNECTIONS", "4"), ("SECONDS", "4")];
        settings.extend((!member.is_empty()).then_some(("MEMBER", member)));
        siege.under("stuffed", &title, &settings).await.hold(32);
    }
}

#[tokio::test]
async fn members_that_ask_and_never_read_cost_little() {
    let Some(siege) = Siege::lay().await else { return };
    let (peers, seconds) = either(("100", "40"), ("30", "7"));
    let settings = [("PEERS", peers), ("SECONDS", seconds)];
    siege.under("slow-readers", "slow readers", &settings).await.hold(48);
}

#[tokio::test]
async fn lies_about_members_and_addresses_move_nobody() {
    let Some(siege) = Siege::lay().await else { return };
    siege.under("views", "lying views", &[("SECONDS", either("20", "5"))]).await.hold(8);
    for over in ["quic", "tcp"] {
        let settings = [("OVER", over), ("SECONDS", either("20", "4"))];
        siege.under("pushes", &format!("identify pushes, {over}"), &settings).await.hold(8);
        siege.under("pings", &format!("pings, {over}"), &settings).await.hold(8);
    }
}

#[tokio::test]
async fn a_flood_of_mdns_answers_costs_little() {
    let Some(lab) = Lab::one_lan(4, Family::Both) else { return };
    let Some(siege) = Siege::with(lab, &["--no-discover"]).await else { return };
    let (answers, seconds) = either(("50000", "20"), ("10000", "4"));
    let figures = siege.under("mdns", "mDNS answers", &[("ANSWERS", answers), ("SECONDS", seconds)]).await;
    figures.hold(16);
    assert!(figures.lines <= 100, "{figures:?}");
}

/// Nodes that know one bootstrap node and nobody else, after Sybils have settled round the key of their cluster: how long they
/// take to find each other.
async fn besieged(title: &str, bootstrap: &[&str], hosts: &str) -> Duration {
    const HONEST: usize = 5;
    let lab = Lab::one_lan(HONEST + 2, Family::Both).expect("the caller has looked");
    let [a] = cast(&lab, [("a1", "NodeA", bootstrap)]).await;
    let at = address_with(&a, "/ip4/10.71.0.11/udp").await;
    let id = a.json(&["status"]).await["peer_id"].as_str().unwrap().to_owned();
    let (sybils, seconds) = either(("200", "15"), ("200", "8"));
    let settings = [
        ("ATTACK", "sybils"),
        ("VICTIM", "10.71.0.11"),
        ("VICTIM_ID", id.as_str()),
        ("SYBILS", sybils),
        ("HOSTS", hosts),
        ("SECONDS", seconds),
    ];
    let mut rogue = Role::start(&lab, "a2", "rogue", &settings);
    assert_eq!(rogue.told_within(2 * DEADLINE).await, "ready");
    rogue.say("go");
    let counted = rogue.told_within(2 * DEADLINE).await;
    let args = ["--serve", "--connect", CLUSTER, "--no-mdns", "--no-discover", "--bootstrap", at.as_str()];
    let names: Vec<(String, String)> = (0..HONEST).map(|at| (format!("a{}", at + 3), format!("Honest{at}"))).collect();
    let plan: Vec<(&str, &str, &[&str])> = names.iter().map(|(host, name)| (host.as_str(), name.as_str(), &args[..])).collect();
    let nodes = daemons(&lab, &plan).await;
    let begun = Instant::now();
    for node in &nodes {
        let others: Vec<&str> = names.iter().map(|(_, name)| name.as_str()).filter(|name| *name != node.name()).collect();
        let all = |peers: &serde_json::Value| others.iter().all(|other| names_of(peers).contains(other));
        node.until_within(2 * DEADLINE, &["peers", CLUSTER], all).await;
    }
    let time = begun.elapsed();
    eprintln!("| Sybils near the key, {title} | {} | {HONEST} nodes found each other in {:.2} s |", counted, time.as_secs_f64());
    time
}

#[tokio::test]
async fn two_hundred_sybils_round_the_key_do_not_hide_members_from_each_other() {
    if Lab::one_lan(1, Family::Both).is_none() {
        return;
    }
    let member = ["--serve", "--connect", CLUSTER, "--no-mdns", "--no-discover"];
    let time = besieged("bootstrap is a member", &member, "20").await;
    assert!(time < Duration::from_secs(15) * PATIENCE, "{time:?}");
    let time = besieged("bootstrap is no member, one host", &["--no-mdns", "--no-discover"], "1").await;
    assert!(time < Duration::from_secs(15) * PATIENCE, "{time:?}");
}
