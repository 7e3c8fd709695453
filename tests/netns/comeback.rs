//! How soon a node is of use again after something happened to its network, its bootstrap, or itself: all within the five
//! seconds that are promised, without a restart.

use super::*;
use crate::lab::Family;
use rustix::process::Signal;

/// What is promised.
const SOON: Duration = Duration::from_secs(5);

const SERVE: [&str; 3] = ["--serve", "--connect", CLUSTER];

/// A bootstrap in LAN a that is in no cluster, and three members, each in a LAN of its own, which see each other.
async fn routed(lab: &Lab) -> (Node, [Node; 3]) {
    let [bootstrap] = cast(lab, [("a1", "Bootstrap", &["--no-mdns"])]).await;
    let at = address_with(&bootstrap, "/ip4/10.71.0.11/udp").await;
    let args = [&SERVE[..], &["--no-mdns", "--bootstrap", &at]].concat();
    let nodes = cast(lab, [("a2", "NodeA", &args[..]), ("b1", "NodeB", &args), ("c1", "NodeC", &args)]).await;
    let [a, b, c] = &nodes;
    all_see_each_other(&[a, b, c], Instant::now(), DEADLINE).await;
    (bootstrap, nodes)
}

/// Waits until `node` and one of `others` answer each other's prompts; gives the time since `begun`.
async fn usable(node: &Node, others: &[&Node], begun: Instant) -> Duration {
    for other in others {
        for (asker, asked) in [(node, *other), (*other, node)] {
            loop {
                let args = ["prompt", "back?", "--cluster", CLUSTER, "--node", asked.name(), "--timeout", "2", "--json"];
                let said = asker.ogctl(&args).await;
                if said.code == 0 && said.stdout.contains("back?") {
                    break;
                }
                assert!(begun.elapsed() < DEADLINE, "{} asks {}: {said:?}\n{}", asker.name(), asked.name(), asker.log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    begun.elapsed()
}

/// The same, which must be within what is promised.
async fn usable_soon(what: &str, node: &Node, others: &[&Node], begun: Instant) {
    let took = usable(node, others, begun).await;
    measured(what, took);
    assert!(took < SOON + TOLERANCE, "{what}: {took:?}\n{}", node.log());
}

#[tokio::test]
async fn a_node_whose_address_is_replaced_is_of_use_again_within_five_seconds() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let (_bootstrap, [a, b, c]) = routed(&lab).await;
    let begun = Instant::now();
    lab.renumber("b1");
    usable_soon("a node with another address is of use again after", &b, &[&a, &c], begun).await;
    // What was of use stays so while the old connections are cleared away.
    let until = Instant::now() + DEAD;
    while Instant::now() < until {
        all_see_each_other(&[&a, &b, &c], Instant::now(), Duration::ZERO).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn with_the_cable_in_again_a_node_is_of_use_within_five_seconds() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let (_bootstrap, [a, b, c]) = routed(&lab).await;
    lab.cut("b1");
    b.sees_in(CLUSTER, &[], DEADLINE).await;
    a.sees_in(CLUSTER, &["NodeC"], DEADLINE).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let begun = Instant::now();
    lab.heal("b1");
    usable_soon("with the cable in again after half a minute a node is of use after", &b, &[&a, &c], begun).await;
}

#[tokio::test]
async fn a_bootstrap_node_that_was_restarted_brings_newcomers_in() {
    let Some(lab) = Lab::routed([2, 1, 2]) else { return };
    let (mut bootstrap, [a, b, c]) = routed(&lab).await;
    bootstrap.signal(Signal::KILL);
    bootstrap.ended().await;
    let begun = Instant::now();
    bootstrap.restart().await;
    let at = address_with(&bootstrap, "/ip4/10.71.0.11/udp").await;
    let args = [&SERVE[..], &["--no-mdns", "--bootstrap", &at]].concat();
    let [d] = cast(&lab, [("c2", "NodeD", &args[..])]).await;
    let found = all_see_each_other(&[&a, &b, &c, &d], begun, DEADLINE).await;
    measured("a newcomer is a member, by a bootstrap node that was killed and started again, after", found);
    assert!(found < DEAD, "{found:?}");
}

#[tokio::test]
async fn a_cluster_lives_on_without_its_bootstrap_and_a_node_that_starts_again_remembers_it() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let (mut bootstrap, [a, mut b, c]) = routed(&lab).await;
    bootstrap.signal(Signal::KILL);
    bootstrap.ended().await;
    for how in ["stopped", "killed"] {
        // Who is killed has no time to write: what it knew a moment after it saw the others is on the disk.
        wait_for_file(&b, "peers.json").await;
        b.signal(if how == "stopped" { Signal::TERM } else { Signal::KILL });
        b.ended().await;
        let begun = Instant::now();
        b.restart().await;
        usable_soon(&format!("a {how} node that starts again without any bootstrap is of use after"), &b, &[&a, &c], begun).await;
        let peers = b.json(&["peers", CLUSTER]).await;
        let mut ways = peers["peers"].as_array().unwrap().iter().map(|peer| &peer["via"]);
        assert!(ways.any(|way| way == "remembered"), "{peers}");
    }
    all_see_each_other(&[&a, &b, &c], Instant::now(), DEADLINE).await;
}

/// Waits until a daemon has written a file in its state directory.
async fn wait_for_file(node: &Node, name: &str) {
    let path = node.bus.dir().join("state").join(name);
    let deadline = Instant::now() + DEADLINE;
    while !path.exists() {
        assert!(Instant::now() < deadline, "no {name}: {}", node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_node_that_stood_still_is_of_use_again_within_five_seconds() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let (_bootstrap, [a, b, c]) = routed(&lab).await;
    b.signal(Signal::STOP);
    let stopped = Instant::now();
    a.sees_in(CLUSTER, &["NodeC"], DEADLINE).await;
    c.sees_in(CLUSTER, &["NodeA"], DEADLINE).await;
    tokio::time::sleep_until((stopped + Duration::from_secs(20)).into()).await;
    let begun = Instant::now();
    b.signal(Signal::CONT);
    usable_soon("a node that stood still for 20 s is of use after", &b, &[&a, &c], begun).await;
    // What is of use stays so: nobody drops it a moment later for the silence before.
    let until = Instant::now() + Duration::from_secs(6);
    while Instant::now() < until {
        all_see_each_other(&[&a, &b, &c], Instant::now(), Duration::ZERO).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn bootstrap_nodes_that_come_up_late_are_found_within_seconds() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let [mut bootstrap] = cast(&lab, [("a1", "Bootstrap", &["--no-mdns"])]).await;
    let at = address_with(&bootstrap, "/ip4/10.71.0.11/udp").await;
    bootstrap.kill().await;
    let args = [&SERVE[..], &["--no-mdns", "--bootstrap", &at]].concat();
    let [a, b] = cast(&lab, [("b1", "NodeA", &args[..]), ("c1", "NodeB", &args)]).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    bootstrap.launch();
    bootstrap.ready().await;
    let begun = Instant::now();
    let found = all_see_each_other(&[&a, &b], begun, DEADLINE).await;
    measured("two members find each other by a bootstrap node that comes up late after", found);
    // Each tries every five seconds, a fifth more or less; then one has to hear of the other.
    assert!(found < Duration::from_secs(10), "{found:?}");
}

#[tokio::test]
async fn a_node_that_changes_between_two_networks_takes_its_members_along() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let nodes = cast(&lab, [("a1", "NodeA", &SERVE[..]), ("a2", "NodeB", &SERVE), ("a3", "NodeC", &SERVE)]).await;
    let [a, b, c] = &nodes;
    all_see_each_other(&[a, b, c], Instant::now(), DEADLINE).await;
    lab.cut("a3");
    c.sees_in(CLUSTER, &[], DEADLINE).await;
    let begun = Instant::now();
    lab.heal("a3");
    lab.renumber("a3");
    usable_soon("a node that lost its network and joined it with another address is of use after", c, &[a, b], begun).await;
}
