//! How a list of members spreads, simulated: the rules of `views` and `mesh` without a network, a second at a time.
//!
//! What a node keeps of another one is one `Word`; who tells whom what, how often, and who dials whom are those of the task.

use std::collections::{HashSet, VecDeque};

use super::config::Mesh;
use super::known::TTL;
use super::views::{NEWS_AT_ONCE, VOUCHED_TO, share};
use crate::wire::limits::MAX_VIEW_ENTRIES;

/// Bytes of a roster entry with a name of 8 bytes, two models and two addresses.
const ENTRY_BYTES: usize = 120;
const REFRESH: u32 = 30;
const NEVER: i32 = i32::MIN / 2;
const NOBODY: u32 = u32::MAX;

/// xorshift64*: the same numbers every time.
struct Random(u64);

impl Random {
    fn below(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33).unwrap_or(0) % below.max(1)
    }

    fn sample<T>(&mut self, mut all: Vec<T>, most: usize) -> Vec<T> {
        for at in 0..most.min(all.len()) {
            let other = at + self.below(all.len() - at);
            all.swap(at, other);
        }
        all.truncate(most);
        all
    }
}

/// What a node has heard of another one.
#[derive(Clone, Copy)]
struct Word {
    heard: i32,
    holders: [u32; 2],
}

const UNHEARD: Word = Word { heard: NEVER, holders: [NOBODY; 2] };

struct Link {
    to: usize,
    /// How much of this node's news it was told.
    told: usize,
    listed: usize,
}

struct Node {
    alive: bool,
    links: Vec<Link>,
    /// Neighbours in the order in which they came: the news.
    news: Vec<usize>,
    words: Vec<Word>,
    vouched: VecDeque<usize>,
    dials: f64,
    refresh_at: u32,
    sent: usize,
}

struct Cluster {
    nodes: Vec<Node>,
    mesh: Mesh,
    random: Random,
    now: i32,
    expired: usize,
}

impl Cluster {
    /// Node 0 is the bootstrap of all others, who start within two seconds.
    fn new(count: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let nodes = (0..count)
            .map(|_| Node {
                alive: true,
                links: Vec::new(),
                news: Vec::new(),
                words: vec![UNHEARD; count],
                vouched: VecDeque::new(),
                dials: 40.0,
                refresh_at: u32::try_from(random.below(REFRESH as usize)).unwrap(),
                sent: 0,
            })
            .collect();
        Self { nodes, mesh: Mesh::default(), random, now: 0, expired: 0 }
    }

    fn is_linked(&self, one: usize, other: usize) -> bool {
        self.nodes[one].links.iter().any(|link| link.to == other)
    }

    fn lists(&self, node: usize, other: usize) -> bool {
        let ttl = i32::try_from(TTL.as_secs()).unwrap();
        self.is_linked(node, other) || self.now - self.nodes[node].words[other].heard < ttl
    }

    fn listed(&self, node: usize) -> usize {
        let ttl = i32::try_from(TTL.as_secs()).unwrap();
        let linked: HashSet<usize> = self.nodes[node].links.iter().map(|link| link.to).collect();
        let known = |(other, word): (usize, &Word)| !linked.contains(&other) && self.now - word.heard < ttl;
        linked.len() + self.nodes[node].words.iter().enumerate().filter(|&word| known(word)).count()
    }

    fn is_vouched(&self, node: usize, other: usize) -> bool {
        self.nodes[node].words[other].holders.iter().all(|holder| *holder != NOBODY)
    }

    fn connect(&mut self, one: usize, other: usize) {
        if one == other || self.is_linked(one, other) || !self.nodes[one].alive || !self.nodes[other].alive {
            return;
        }
        for (at, to) in [(one, other), (other, one)] {
            self.nodes[at].links.push(Link { to, told: 0, listed: 0 });
            self.nodes[at].news.push(to);
        }
        for (at, to) in [(one, other), (other, one)] {
            let all = self.tellable(at, to);
            let chosen = self.random.sample(all, MAX_VIEW_ENTRIES);
            self.tell(at, to, &chosen);
        }
    }

    fn tellable(&self, node: usize, to: usize) -> Vec<usize> {
        let linked = self.nodes[node].links.iter().map(|link| link.to);
        let ttl = i32::try_from(TTL.as_secs()).unwrap();
        let vouched = (0..self.nodes.len()).filter(|&other| {
            self.is_vouched(node, other) && self.now - self.nodes[node].words[other].heard < ttl && !self.is_linked(node, other)
        });
        linked.chain(vouched).filter(|&other| other != to).collect()
    }

    fn tell(&mut self, from: usize, to: usize, entries: &[usize]) {
        let listed = self.listed(from) + 1;
        self.nodes[from].sent += entries.len();
        if let Some(link) = self.nodes[to].links.iter_mut().find(|link| link.to == from) {
            link.listed = listed;
        }
        for &entry in entries.iter().filter(|&&entry| entry != to && entry != from) {
            let first_hand = self.is_linked(from, entry);
            let heard = if first_hand {
                self.now - i32::try_from(self.random.below(5)).unwrap()
            } else {
                self.nodes[from].words[entry].heard
            };
            let was_vouched = self.is_vouched(to, entry);
            let word = &mut self.nodes[to].words[entry];
            word.heard = word.heard.max(heard);
            let from = u32::try_from(from).unwrap();
            if first_hand
                && !word.holders.contains(&from)
                && let Some(free) = word.holders.iter_mut().find(|holder| **holder == NOBODY)
            {
                *free = from;
            }
            if self.is_vouched(to, entry) && !was_vouched && !self.is_linked(to, entry) {
                self.nodes[to].vouched.push_back(entry);
            }
        }
    }

    fn kill(&mut self, node: usize) {
        self.nodes[node].alive = false;
        self.nodes[node].links.clear();
        for other in &mut self.nodes {
            other.links.retain(|link| link.to != node);
            other.news.retain(|news| *news != node);
            for word in &mut other.words {
                word.holders.iter_mut().filter(|holder| **holder as usize == node).for_each(|holder| *holder = NOBODY);
            }
            other.words[node] = UNHEARD;
        }
    }

    fn second(&mut self) {
        self.now += 1;
        for node in 0..self.nodes.len() {
            if self.nodes[node].alive {
                self.dial(node);
                self.tell_vouched(node);
                self.tell_news(node);
                self.refresh(node);
            }
        }
    }

    fn dial(&mut self, node: usize) {
        let told = self.nodes[node].links.iter().map(|link| link.listed).max().unwrap_or(0);
        let partial = told.max(self.listed(node) + 1) > self.mesh.full;
        let wanted = self.mesh.random + self.mesh.near;
        self.nodes[node].dials = (self.nodes[node].dials + 5.0).min(40.0);
        let side = self.nodes[node].links.len();
        let mut burst = if partial { 8_usize.saturating_sub(side).max(4).min(wanted.saturating_sub(side)) } else { 40 };
        let known: Vec<usize> = (0..self.nodes.len())
            .filter(|&other| other != node && self.lists(node, other) && !self.is_linked(node, other))
            .collect();
        for other in self.random.sample(known, burst) {
            if burst == 0 || self.nodes[node].dials < 1.0 {
                return;
            }
            burst -= 1;
            self.nodes[node].dials -= 1.0;
            self.connect(node, other);
        }
    }

    fn tell_news(&mut self, node: usize) {
        let news = self.nodes[node].news.len();
        let lagging: Vec<usize> = self.nodes[node].links.iter().filter(|link| link.told < news).map(|link| link.to).collect();
        let at_once = NEWS_AT_ONCE.max(lagging.len() / 3);
        for to in self.random.sample(lagging, at_once) {
            let link = self.nodes[node].links.iter().position(|link| link.to == to).unwrap();
            let from = self.nodes[node].links[link].told.min(news);
            let until = news.min(from + MAX_VIEW_ENTRIES);
            self.nodes[node].links[link].told = until;
            let entries = self.nodes[node].news[from..until].to_vec();
            self.tell(node, to, &entries);
        }
    }

    fn tell_vouched(&mut self, node: usize) {
        let count = self.nodes[node].vouched.len().min(MAX_VIEW_ENTRIES);
        let entries: Vec<usize> = self.nodes[node].vouched.drain(..count).collect();
        if !entries.is_empty() {
            let all = self.nodes[node].links.iter().map(|link| link.to).collect();
            for to in self.random.sample(all, VOUCHED_TO) {
                self.tell(node, to, &entries);
            }
        }
    }

    fn refresh(&mut self, node: usize) {
        if u32::try_from(self.now).unwrap() < self.nodes[node].refresh_at {
            return;
        }
        self.nodes[node].refresh_at += REFRESH;
        let most = share(self.listed(node), self.nodes[node].links.len());
        let all: Vec<usize> = self.nodes[node].links.iter().map(|link| link.to).collect();
        for to in all {
            let tellable = self.tellable(node, to);
            let chosen = self.random.sample(tellable, most);
            self.tell(node, to, &chosen);
        }
    }

    /// Pairs of living nodes of which the one does not list the other.
    fn missing(&self) -> usize {
        let alive: Vec<usize> = (0..self.nodes.len()).filter(|&node| self.nodes[node].alive).collect();
        alive.iter().map(|&node| alive.iter().filter(|&&other| other != node && !self.lists(node, other)).count()).sum()
    }

    /// Living nodes that can be come to from one of them, over connections.
    fn reachable(&self) -> usize {
        let Some(begin) = self.nodes.iter().position(|node| node.alive) else { return 0 };
        let (mut seen, mut open) = (HashSet::from([begin]), vec![begin]);
        while let Some(node) = open.pop() {
            for link in &self.nodes[node].links {
                if seen.insert(link.to) {
                    open.push(link.to);
                }
            }
        }
        seen.len()
    }

    fn degrees(&self) -> Vec<usize> {
        let mut degrees: Vec<usize> = self.nodes.iter().filter(|node| node.alive).map(|node| node.links.len()).collect();
        degrees.sort_unstable();
        degrees
    }
}

/// A cluster whose nodes start within two seconds; the bootstrap dies when told. Gives it when everybody lists everybody, or at
/// the deadline, and the second.
fn started(count: usize, seed: u64, dies_at: Option<i32>, deadline: i32) -> (Cluster, i32) {
    let mut cluster = Cluster::new(count, seed);
    for second in 0..deadline {
        if second < 2 {
            for node in (1..count).filter(|node| node % 2 == usize::try_from(second).unwrap()) {
                cluster.connect(node, 0);
            }
        }
        if dies_at == Some(second) {
            cluster.kill(0);
        }
        cluster.second();
        if second > dies_at.unwrap_or(2) && cluster.missing() == 0 {
            return (cluster, second);
        }
    }
    (cluster, deadline)
}

#[test]
fn two_hundred_nodes_list_each_other_long_before_thirty_seconds_with_or_without_their_bootstrap() {
    for seed in 1..=5 {
        for dies_at in [None, Some(5)] {
            let (cluster, second) = started(200, seed, dies_at, 30);
            assert!(second < 30, "seed {seed}, {dies_at:?}: {} pairs are missing", cluster.missing());
            assert_eq!(cluster.reachable(), 200 - usize::from(dies_at.is_some()));
        }
    }
}

#[test]
fn nobody_is_forgotten_while_a_cluster_rests() {
    let (mut cluster, _) = started(200, 7, Some(5), 30);
    for _ in 0..600 {
        cluster.second();
        cluster.expired += cluster.missing();
    }
    // Of 39,402 words, each second.
    assert!(cluster.expired < 600, "{} words were missing", cluster.expired);
}

#[test]
fn a_random_half_of_a_cluster_may_vanish_and_the_rest_stays_in_one_piece() {
    for seed in 1..=5 {
        let (mut cluster, _) = started(200, seed, None, 30);
        for node in 0..200 {
            if cluster.random.below(2) == 0 {
                cluster.kill(node);
            }
        }
        assert_eq!(cluster.reachable(), cluster.nodes.iter().filter(|node| node.alive).count());
    }
}

/// Prints the table of `docs/scaling.md`:
/// `cargo test --release --lib net::simulation::table -- --ignored --nocapture`.
#[test]
#[ignore = "prints a table, a minute long"]
fn table() {
    println!(
        "| nodes | bootstrap | all list all | connections min / median / max | entries sent by then | entries/s at rest | bytes/s at rest | missing at rest |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for count in [50, 100, 200, 500, 1000] {
        for dies_at in [None, Some(5)] {
            let (mut cluster, second) = started(count, 11, dies_at, 90);
            let sent = |cluster: &Cluster| cluster.nodes.iter().map(|node| node.sent).sum::<usize>() / count;
            let begin = sent(&cluster);
            for _ in 0..60 {
                cluster.second();
            }
            let settled = sent(&cluster);
            let mut missing = 0;
            for _ in 0..300 {
                cluster.second();
                missing += cluster.missing();
            }
            let rate = (sent(&cluster) - settled) as f64 / 300.0;
            let degrees = cluster.degrees();
            println!(
                "| {count} | {} | {second} s | {} / {} / {} | {begin} | {rate:.1} | {:.0} | {:.4} % |",
                if dies_at.is_some() { "dies after 5 s" } else { "stays" },
                degrees[0],
                degrees[degrees.len() / 2],
                degrees[degrees.len() - 1],
                rate * ENTRY_BYTES as f64,
                missing as f64 / 300.0 / (count * count) as f64 * 100.0,
            );
        }
    }
}
