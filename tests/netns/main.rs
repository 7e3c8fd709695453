//! Namespace tests: real daemons on real networks of their own, with cables to pull and processes to kill.
//!
//! They need root, `ip`, `nft` and `dbus-daemon`, and run a few at a time. Where they cannot run they say so and pass;
//! with `CI=true` they fail. What they measure they print: `cargo test --test netns -- --nocapture`.

#![allow(clippy::unwrap_used)] // a test says what it expects by panicking

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[path = "../common/mod.rs"]
mod common;

mod churn;
mod clusters;
mod comeback;
mod discovery;
mod eye;
mod failure;
mod floods;
mod history;
mod lab;
mod liar;
mod mdns;
mod nat;
mod neighbours;
mod old_node;
mod partition;
mod punch;
mod report;
mod rogue;
mod roles;
mod scale;
mod siege;
mod topologies;
mod weather;

use common::bus::{LIMIT, Said, bus_or_skip, ogctl_on};
use common::node::{DEADLINE, Node, Plan, names_of};
use lab::Lab;
use roles::ModelServer;

const CLUSTER: &str = "gatewayai-poc";
/// A member that was killed or cut off is gone after this.
const DEAD: Duration = Duration::from_secs(15);
/// Between two looks, and the start of the program that looks.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Starts daemons together, each as `(host, name, arguments)`, and waits until they are on their buses.
async fn daemons(lab: &Lab, nodes: &[(&str, &str, &[&str])]) -> Vec<Node> {
    let start = |&(host, name, args): &(&str, &str, &[&str])| {
        Node::on(bus_or_skip().expect("the lab has seen dbus-daemon"), Plan::within(&lab.namespace(host), name, args))
    };
    let mut started: Vec<Node> = nodes.iter().map(start).collect();
    for node in &mut started {
        node.ready().await;
    }
    started
}

/// The same, as an array to take apart.
async fn cast<const N: usize>(lab: &Lab, nodes: [(&str, &str, &[&str]); N]) -> [Node; N] {
    daemons(lab, &nodes).await.try_into().unwrap()
}

/// A daemon that serves [`CLUSTER`] with the models of `server`.
async fn with_models(lab: &Lab, host: &str, name: &str, server: &ModelServer, how: &str, args: &[&str]) -> Node {
    let bus = bus_or_skip().expect("the lab has seen dbus-daemon");
    let config = bus.dir().join("opengatewayd.toml");
    std::fs::write(&config, server.config(how)).unwrap();
    let own = ["--serve", "--config", config.to_str().unwrap()];
    let mut node = Node::on(bus, Plan::within(&lab.namespace(host), name, &[&own, args].concat()));
    node.ready().await;
    node
}

/// Waits until each of `nodes` lists all the others in [`CLUSTER`]; gives the time since `begun`.
async fn all_see_each_other(nodes: &[&Node], begun: Instant, limit: Duration) -> Duration {
    for node in nodes {
        let others: Vec<&str> = nodes.iter().map(|other| other.name()).filter(|name| *name != node.name()).collect();
        node.sees_in(CLUSTER, &others, limit.saturating_sub(begun.elapsed())).await;
    }
    begun.elapsed()
}

/// Asks in [`CLUSTER`] from `node`, which must be answered with the prompt; gives who answered.
async fn echoed(node: &Node, text: &str) -> String {
    let said = node.ogctl(&["prompt", text, "--cluster", CLUSTER, "--json"]).await;
    assert_eq!(said.code, 0, "{}: {said:?}\n{}", node.name(), node.log());
    let answer: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(answer["text"], text);
    answer["served_by"]["name"].as_str().unwrap().to_owned()
}

/// Prints what was measured.
fn measured(what: &str, time: Duration) {
    eprintln!("MEASURED {what}: {:.2} s", time.as_secs_f64());
}

/// The address of `node` whose text contains `part`, as it is pasted after `--bootstrap`.
async fn address_with(node: &Node, part: &str) -> String {
    let find = |status: &serde_json::Value| {
        let addresses = status["addresses"].as_array()?.iter().filter_map(|address| address.as_str());
        addresses.filter(|address| address.contains(part)).map(str::to_owned).next()
    };
    let status = node.until(&["status"], |status| find(status).is_some()).await;
    find(&status).unwrap()
}

/// Connections that a daemon has to each peer, by its own log at level debug.
fn connections(log: &str) -> BTreeMap<String, i32> {
    let mut open: BTreeMap<String, i32> = BTreeMap::new();
    for line in log.lines() {
        let change = if line.contains(" connected peer=") {
            1
        } else if line.contains(" connection closed peer=") {
            -1
        } else {
            continue;
        };
        let peer = line.split_once(" peer=").unwrap().1.split_whitespace().next().unwrap();
        *open.entry(peer.to_owned()).or_default() += change;
    }
    open
}
