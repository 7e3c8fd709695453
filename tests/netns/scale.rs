//! A room full of machines that are switched on together.

use super::*;
use crate::lab::Family;

const NODES: usize = 20;

/// How often a daemon has told a change of its members.
fn changes(log: &str) -> usize {
    log.lines().filter(|line| line.contains(" peers: ")).count()
}

#[tokio::test]
async fn twenty_nodes_that_start_together_list_each_other_and_keep_one_connection_to_each() {
    let Some(lab) = Lab::one_lan(NODES, Family::Both) else { return };
    let hosts: Vec<(String, String)> = (1..=NODES).map(|at| (format!("a{at}"), format!("Node{at:02}"))).collect();
    let args: &[&str] = &["--serve", "--connect", CLUSTER, "--log", "debug"];
    let plan: Vec<(&str, &str, &[&str])> = hosts.iter().map(|(host, name)| (host.as_str(), name.as_str(), args)).collect();
    let begun = Instant::now();
    let nodes = daemons(&lab, &plan).await;
    measured("twenty daemons are on their buses after", begun.elapsed());
    let everybody: Vec<&Node> = nodes.iter().collect();
    let joined = all_see_each_other(&everybody, begun, 2 * DEADLINE).await;
    measured("twenty nodes see each other after", joined);
    assert!(joined < DEADLINE, "{joined:?}");
    for node in &nodes {
        assert_ne!(echoed(node, "What is 2+2?").await, node.name());
    }
    let told: Vec<usize> = nodes.iter().map(|node| changes(&node.log())).collect();
    let extra = |node: &Node| connections(&node.log()).values().filter(|&&open| open > 1).count();
    eprintln!("MEASURED pairs with more than one connection at first: {}", nodes.iter().map(extra).sum::<usize>() / 2);
    // Ten seconds of grace for both connections of a pair, then one of them moves the membership and goes.
    let deadline = begun + joined + DEADLINE;
    while nodes.iter().any(|node| extra(node) > 0) {
        let busy: Vec<_> = nodes.iter().map(|node| connections(&node.log())).collect();
        assert!(Instant::now() < deadline, "more than one connection to a peer: {busy:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    measured("one connection to each is left after", begun.elapsed());
    // Nobody came or went by that.
    all_see_each_other(&everybody, Instant::now(), Duration::ZERO).await;
    for (node, told) in nodes.iter().zip(told) {
        assert_eq!(changes(&node.log()), told, "members of {} came or went: {}", node.name(), node.log());
    }
    for node in &nodes {
        assert_eq!(connections(&node.log()).values().filter(|&&open| open == 1).count(), NODES - 1);
    }
}
