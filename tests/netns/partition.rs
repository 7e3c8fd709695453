//! A network that falls in two, and comes together again.

use std::collections::BTreeSet;

use super::*;
use crate::eye::{Eye, Seen, eyes, pace, until};
use crate::history::History;
use crate::lab::Family;
use crate::report::{Table, long};

/// A member that is cut off is a suspect, or gone, after this.
const SUSPECT: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(30);

const TABLE: Table = Table {
    title: "Partitions",
    head: &[
        "nodes",
        "round",
        "all suspect or gone after",
        "all gone after",
        "95 % of pairs usable after healing",
        "all pairs after",
        "prompts meanwhile",
        "answered",
        "errors",
    ],
};

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// The half of a node: the numbers below the middle, or the others.
fn half<'a>(all: &'a [String], name: &str) -> (&'a [String], &'a [String]) {
    let (one, other) = all.split_at(all.len() / 2);
    if one.iter().any(|node| node == name) { (one, other) } else { (other, one) }
}

/// Pairs, in order, of which the first would give the second a prompt.
async fn usable_pairs(eyes: &[Eye]) -> usize {
    let mut usable = 0;
    for eye in eyes {
        usable += eye.peers().await.iter().filter(|peer| peer.usable()).count();
    }
    usable
}

/// Asks from two nodes, one of each half, until told to stop.
async fn asking(eyes: [&Eye; 2], stopped: tokio::sync::watch::Receiver<bool>) -> History {
    let mut history = History::default();
    let mut number = 0;
    while !*stopped.borrow() {
        number += 1;
        let prompt = format!("{number}: still there?");
        let (one, other) = tokio::join!(eyes[0].ask(&prompt, None, LIMIT), eyes[1].ask(&prompt, None, LIMIT));
        history.extend([one, other]);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    history
}

/// Splits `nodes` nodes in halves and heals them, so many times.
async fn partition(nodes: usize, rounds: usize) {
    let Some(lab) = Lab::one_lan(nodes, Family::Both) else { return };
    let hosts: Vec<String> = (1..=nodes).map(|at| format!("a{at}")).collect();
    let names: Vec<String> = (1..=nodes).map(|at| format!("Node{at:02}")).collect();
    let args: &[&str] = &["--serve", "--connect", CLUSTER];
    let plan: Vec<(&str, &str, &[&str])> =
        hosts.iter().zip(&names).map(|(host, name)| (host.as_str(), name.as_str(), args)).collect();
    let begun = Instant::now();
    let running = daemons(&lab, &plan).await;
    let eyes = eyes(&running).await;
    let whole = |_: &str, peers: &[Seen]| peers.iter().filter(|peer| peer.usable()).count() == nodes - 1;
    until(&eyes, 4 * DEADLINE, whole).await.unwrap_or_else(|lists| panic!("not all met: {lists:#?}"));
    measured(&format!("{nodes} nodes see each other after"), begun.elapsed());
    let ends: [Vec<&str>; 2] = {
        let (one, other) = hosts.split_at(nodes / 2);
        [one, other].map(|half| half.iter().map(String::as_str).collect())
    };
    for round in 1..=rounds {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let one_of_each = [eyes.first().unwrap().clone(), eyes.last().unwrap().clone()];
        let prompts = tokio::spawn(async move { asking(one_of_each.each_ref(), stopped).await });
        let split = Instant::now();
        lab.split(&ends[0], &ends[1]);
        let strangers = |name: &str, peers: &[Seen], wanted: fn(&Seen) -> bool| {
            let others: BTreeSet<&str> = half(&names, name).1.iter().map(String::as_str).collect();
            !peers.iter().any(|peer| others.contains(peer.name.as_str()) && wanted(peer))
        };
        let suspected = until(&eyes, DEADLINE, |name, peers| strangers(name, peers, Seen::usable)).await;
        suspected.unwrap_or_else(|lists| panic!("members across the cut are alive: {lists:#?}"));
        let suspected = split.elapsed();
        let gone = until(&eyes, DEADLINE, |name, peers| strangers(name, peers, |_| true)).await;
        gone.unwrap_or_else(|lists| panic!("members across the cut stay: {lists:#?}"));
        let gone = split.elapsed();
        // Each half is whole in itself.
        let own = |name: &str, peers: &[Seen]| {
            let seen: BTreeSet<&str> = peers.iter().filter(|peer| peer.usable()).map(|peer| peer.name.as_str()).collect();
            half(&names, name).0.iter().map(String::as_str).filter(|own| *own != name).collect::<BTreeSet<_>>() == seen
        };
        until(&eyes, Duration::ZERO, own).await.unwrap_or_else(|lists| panic!("a half is not whole: {lists:#?}"));
        let healed = Instant::now();
        lab.unsplit();
        let pairs = nodes * (nodes - 1);
        let mut most = None;
        let all = loop {
            let usable = usable_pairs(&eyes).await;
            if most.is_none() && usable * 100 >= pairs * 95 {
                most = Some(healed.elapsed());
            }
            if usable == pairs {
                break healed.elapsed();
            }
            assert!(healed.elapsed() < 3 * DEADLINE, "{usable} of {pairs} pairs are usable");
            tokio::time::sleep(pace(nodes)).await;
        };
        let most = most.unwrap_or(all);
        stop.send_replace(true);
        let history = prompts.await.unwrap();
        let figures = history.judge();
        let [asked, answered, errors, ..] = figures.cells();
        let halves = format!("{0} and {0}", nodes / 2);
        let times = [suspected, gone, most, all].map(seconds);
        TABLE.row([vec![halves, round.to_string()], times.to_vec(), vec![asked, answered, errors]].concat());
        // Between two looks, and what looking takes.
        let looking = TOLERANCE + 2 * pace(nodes);
        assert!(suspected < SUSPECT + looking && gone < DEAD + looking, "suspect after {suspected:?}, gone after {gone:?}");
        assert!(most < DEAD + looking, "95 % of pairs are usable after {most:?}");
        assert!(figures.at_least(95), "{figures:?}");
    }
    History::rests(&eyes).await;
}

#[tokio::test]
async fn three_and_three_notice_a_cut_and_come_together_again() {
    partition(6, 1).await;
}

#[tokio::test]
async fn twenty_five_and_twenty_five_do_it_ten_times() {
    if long() {
        partition(50, 10).await;
    }
}
