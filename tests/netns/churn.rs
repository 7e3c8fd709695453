//! A cluster in which somebody always comes and somebody always goes.

use std::collections::VecDeque;

use rustix::process::Signal;

use super::*;
use crate::common::seeded::{Seeded, seed};
use crate::eye::{Eye, Seen, eyes, until};
use crate::history::{History, Record};
use crate::lab::Family;
use crate::report::{Table, long};

const LIMIT: Duration = Duration::from_secs(30);
/// Nodes that ask, and are never killed.
const ASKERS: usize = 4;
/// Down at any time: a node stays down for longer than others remember it, or its return could not be told from its past.
const DOWN: usize = 8;
/// A node that starts gets prompts after this.
const USABLE: Duration = Duration::from_secs(10);

const TABLE: Table = Table {
    title: "Churn: one node is killed and one starts, again and again",
    head: &[
        "nodes",
        "every",
        "time",
        "killed",
        "prompts",
        "answered",
        "errors",
        "p50",
        "p95",
        "longest",
        "a started node is usable after (median, longest)",
        "RSS of an asking node before, after",
        "descriptors before, after",
        "connections before, after",
    ],
};

/// Nodes that come and go, by their place in the list.
struct Crowd {
    nodes: Vec<Node>,
    down: VecDeque<usize>,
    random: Seeded,
}

impl Crowd {
    /// Kills one that is up, and starts the one that has been down the longest. Gives the name of that.
    fn turn(&mut self, turn: usize) -> String {
        let up: Vec<usize> = (ASKERS..self.nodes.len()).filter(|at| !self.down.contains(at)).collect();
        let dies = up[self.random.below(up.len())];
        // Most fall dead, some say goodbye.
        self.nodes[dies].signal(if turn.is_multiple_of(4) { Signal::TERM } else { Signal::KILL });
        self.down.push_back(dies);
        let Some(comes) = (self.down.len() > DOWN).then(|| self.down.pop_front()).flatten() else { return String::new() };
        let node = &mut self.nodes[comes];
        // It was killed long ago; whatever is left of it must not stay.
        assert!(!node.is_running(), "{} has not ended", node.name());
        node.launch();
        node.name().to_owned()
    }
}

/// Asks until told to stop, from one node.
async fn asking(eye: Eye, stopped: tokio::sync::watch::Receiver<bool>) -> Vec<Record> {
    let mut records = Vec::new();
    while !*stopped.borrow() {
        records.push(eye.ask(&format!("{}: What is 2+2?", records.len()), None, LIMIT).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    records
}

/// Notes when nodes that were started are first given prompts, by one who looks twice a second.
async fn watching(
    eye: Eye,
    mut started: tokio::sync::mpsc::UnboundedReceiver<(String, Instant)>,
    stopped: tokio::sync::watch::Receiver<bool>,
) -> Vec<Duration> {
    let (mut waiting, mut times): (Vec<(String, Instant)>, Vec<Duration>) = Default::default();
    while !*stopped.borrow() || waiting.iter().any(|(_, at)| at.elapsed() < 2 * USABLE) {
        while let Ok(node) = started.try_recv() {
            waiting.push(node);
        }
        let peers = eye.peers().await;
        waiting.retain(|(name, at)| {
            let there = peers.iter().any(|peer| peer.name == *name && peer.usable());
            if there {
                times.push(at.elapsed());
            } else if at.elapsed() > 2 * USABLE {
                // Killed again before it was there, or too slow: the longest time shows it.
                return false;
            }
            !there
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    times.sort();
    times
}

/// Memory in KiB, descriptors and connections of a node.
async fn level(node: &Node) -> [u64; 3] {
    let doctor = node.json(&["doctor"]).await;
    let connections = doctor["facts"]["connections"].as_u64().unwrap_or_else(|| panic!("no connections: {doctor}"));
    [node.kib("VmRSS"), u64::try_from(node.descriptors()).unwrap(), connections]
}

/// A cluster of `count` nodes, of which every `beat` one dies and one comes, for `time`.
async fn churn(count: usize, beat: Duration, time: Duration) {
    let total = count + DOWN;
    let Some(lab) = Lab::one_lan(total, Family::Both) else { return };
    let hosts: Vec<(String, String)> = (1..=total).map(|at| (format!("a{at}"), format!("Node{at:02}"))).collect();
    let args: &[&str] = &["--serve", "--connect", CLUSTER];
    let plan: Vec<(&str, &str, &[&str])> =
        hosts[..count].iter().map(|(host, name)| (host.as_str(), name.as_str(), args)).collect();
    let mut crowd = Crowd { nodes: daemons(&lab, &plan).await, down: VecDeque::new(), random: Seeded(seed()) };
    let watched = eyes(&crowd.nodes).await;
    let all = |_: &str, peers: &[Seen]| peers.iter().filter(|peer| peer.usable()).count() == count - 1;
    until(&watched, 4 * DEADLINE, all).await.unwrap_or_else(|lists| panic!("not all met: {lists:#?}"));
    let before = level(&crowd.nodes[0]).await;
    for (host, name) in &hosts[count..] {
        // Known to the crowd, and down: the first to come.
        let mut node = daemons(&lab, &[(host.as_str(), name.as_str(), args)]).await.remove(0);
        node.kill().await;
        crowd.down.push_back(crowd.nodes.len());
        crowd.nodes.push(node);
    }
    let alone = |_: &str, peers: &[Seen]| peers.len() == count - 1;
    until(&watched, DEADLINE, alone).await.unwrap_or_else(|lists| panic!("the dead stay: {lists:#?}"));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let (starts, started) = tokio::sync::mpsc::unbounded_channel();
    // Two of each: a prompt to one who has just died waits, others go on.
    let twice = watched[..ASKERS].iter().chain(&watched[..ASKERS]);
    let askers: Vec<_> = twice.map(|eye| tokio::spawn(asking(eye.clone(), stopped.clone()))).collect();
    let watcher = tokio::spawn(watching(watched[0].clone(), started, stopped));
    let (begun, mut turns) = (tokio::time::Instant::now(), 0);
    while begun.elapsed() < time {
        turns += 1;
        let comes = crowd.turn(turns);
        starts.send((comes, Instant::now())).unwrap();
        tokio::time::sleep_until(begun + beat * u32::try_from(turns).unwrap()).await;
    }
    stop.send_replace(true);
    let mut history = History::default();
    for asker in askers {
        history.extend(asker.await.unwrap());
    }
    let usable = watcher.await.unwrap();
    let figures = history.judge();
    History::rests(&watched[..ASKERS]).await;
    // Those who were killed last are forgotten, those who came last are known.
    let living =
        |_: &str, peers: &[Seen]| peers.iter().filter(|peer| peer.usable()).count() == count - 1 && peers.len() == count - 1;
    until(&watched[..ASKERS], 3 * DEADLINE, living).await.unwrap_or_else(|lists| panic!("not all are back: {lists:#?}"));
    let after = settled(&crowd.nodes[0], before).await;
    let both = |at: usize, unit: u64| format!("{}, {}", before[at] / unit, after[at] / unit);
    let median = usable.get(usable.len() / 2).copied().unwrap_or_default();
    let longest = usable.last().copied().unwrap_or_default();
    let cells = [
        vec![count.to_string(), format!("{} s", beat.as_secs()), format!("{} s", time.as_secs()), turns.to_string()],
        figures.cells().to_vec(),
        vec![format!("{:.1} s, {:.1} s ({} of {turns})", median.as_secs_f64(), longest.as_secs_f64(), usable.len())],
        vec![format!("{} MiB", both(0, 1024)), both(1, 1), both(2, 1)],
    ];
    TABLE.row(cells.concat());
    assert!(figures.at_least(99), "{figures:?}");
    assert!(longest < USABLE + TOLERANCE, "usable after {usable:?}");
    assert!(after[1] <= before[1] + 10 && after[2] <= before[2] + 5, "descriptors or connections stay: {before:?}, {after:?}");
}

/// The level of a node when it has come down to what it was before, or after a minute.
async fn settled(node: &Node, before: [u64; 3]) -> [u64; 3] {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = level(node).await;
        if (now[1] <= before[1] + 5 && now[2] <= before[2]) || Instant::now() > deadline {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test]
async fn ten_nodes_that_come_and_go_for_half_a_minute_answer_all_the_while() {
    // Twice as often as with fifty, for each that is there.
    churn(10, Duration::from_secs(5), Duration::from_secs(30)).await;
}

#[tokio::test]
async fn fifty_nodes_that_come_and_go_for_five_minutes_answer_all_the_while() {
    if long() {
        churn(50, Duration::from_secs(2), Duration::from_secs(300)).await;
    }
}
