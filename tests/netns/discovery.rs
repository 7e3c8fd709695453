//! How nodes find each other.

use super::*;
use crate::lab::Family;

const SERVE: &[&str] = &["--serve", "--connect", CLUSTER];
const CONSUME: &[&str] = &["--consume", "--connect", CLUSTER];

#[tokio::test]
async fn nodes_on_one_lan_find_each_other_by_mdns_and_answer_a_prompt() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let begun = Instant::now();
    let [a, b, c] = cast(&lab, [("a1", "NodeA", SERVE), ("a2", "NodeB", SERVE), ("a3", "NodeC", CONSUME)]).await;
    measured("three nodes on one LAN", all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await);
    let said = c.ogctl(&["prompt", "What is 2+2?"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "What is 2+2?\n"), "{said:?}");
    assert!(said.stderr.contains("served by NodeA") || said.stderr.contains("served by NodeB"), "{said:?}");
    // What an installed daemon listens on: both transports, both families.
    let status = c.json(&["status"]).await;
    let listening: Vec<&str> =
        status["listen_addresses"].as_array().unwrap().iter().filter_map(|address| address.as_str()).collect();
    for ip in ["/ip4/10.71.0.13", "/ip6/fd71::13"] {
        for transport in ["udp/4001/quic-v1", "tcp/4001"] {
            let wanted = format!("{ip}/{transport}");
            assert!(listening.iter().any(|address| address.starts_with(&wanted)), "{wanted} is not in {listening:?}");
        }
    }
    for node in [&a, &b, &c] {
        assert!(node.log().contains("joined cluster gatewayai-poc"), "{}", node.log());
    }
    assert!(c.log().contains("peers: NodeA, NodeB"), "{}", c.log());
}

#[tokio::test]
async fn a_lan_with_ipv6_alone_is_enough() {
    let Some(lab) = Lab::one_lan(3, Family::Ipv6) else { return };
    let begun = Instant::now();
    let [a, b, c] = cast(&lab, [("a1", "NodeA", SERVE), ("a2", "NodeB", SERVE), ("a3", "NodeC", CONSUME)]).await;
    measured("three nodes on one LAN with IPv6 alone", all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await);
    echoed(&c, "What is 2+2?").await;
}

/// A bootstrap in LAN a that is in no cluster; NodeA and NodeB in LANs b and c, NodeC in LAN a.
async fn routed(lab: &Lab) -> (Node, [Node; 3]) {
    let [bootstrap] = cast(lab, [("a1", "Bootstrap", &["--no-mdns"])]).await;
    let at = address_with(&bootstrap, "/ip4/10.71.0.11/udp").await;
    let serve = ["--serve", "--connect", CLUSTER, "--no-mdns", "--bootstrap", &at];
    let consume = ["--consume", "--connect", CLUSTER, "--no-mdns", "--bootstrap", &at];
    let [a, b] = cast(lab, [("b1", "NodeA", &serve[..]), ("c1", "NodeB", &serve)]).await;
    let begun = Instant::now();
    measured("two nodes in two subnets, by the DHT", all_see_each_other(&[&a, &b], begun, DEADLINE).await);
    let begun = Instant::now();
    let [c] = cast(lab, [("a2", "NodeC", &consume[..])]).await;
    measured("a third one in a third subnet", all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await);
    (bootstrap, [a, b, c])
}

#[tokio::test]
async fn members_in_three_subnets_find_each_other_through_a_bootstrap_that_is_in_no_cluster() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let (bootstrap, [a, b, c]) = routed(&lab).await;
    let by = echoed(&c, "What is 2+2?").await;
    assert!(by == "NodeA" || by == "NodeB", "{by}");
    // The lonely one is in no cluster and nobody lists it.
    assert_eq!(bootstrap.json(&["clusters"]).await["clusters"].as_array().map(Vec::len), Some(0));
    for node in [&a, &b, &c] {
        let peers = node.json(&["peers", CLUSTER]).await;
        assert!(!names_of(&peers).contains("Bootstrap"), "{peers}");
    }
}

#[tokio::test]
async fn members_in_three_subnets_that_start_together_find_each_other_over_either_transport() {
    for transport in ["udp", "tcp"] {
        let Some(lab) = Lab::routed([2, 1, 1]) else { return };
        let [bootstrap] = cast(&lab, [("a1", "Bootstrap", &["--no-mdns"])]).await;
        let at = address_with(&bootstrap, &format!("/ip4/10.71.0.11/{transport}")).await;
        let args = ["--serve", "--connect", CLUSTER, "--no-mdns", "--bootstrap", &at];
        let begun = Instant::now();
        let [a, b, c] = cast(&lab, [("b1", "NodeA", &args[..]), ("c1", "NodeB", &args), ("a2", "NodeC", &args)]).await;
        let found = all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await;
        measured(&format!("three nodes in three subnets together, bootstrap over {transport}"), found);
        assert!(found < DEAD, "{found:?}");
    }
}

#[tokio::test]
async fn members_remain_when_the_bootstrap_dies() {
    let Some(lab) = Lab::routed([2, 1, 1]) else { return };
    let (mut bootstrap, [a, b, c]) = routed(&lab).await;
    bootstrap.signal(rustix::process::Signal::KILL);
    bootstrap.ended().await;
    // Longer than anything that hangs on a lost connection takes to be noticed.
    let until = Instant::now() + DEAD + 5 * TOLERANCE;
    while Instant::now() < until {
        all_see_each_other(&[&a, &b, &c], Instant::now(), Duration::ZERO).await;
        echoed(&c, "still there?").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn three_nodes_on_one_host_find_each_other() {
    let Some(lab) = Lab::one_lan(1, Family::Both) else { return };
    let begun = Instant::now();
    let [a, b, c] = cast(&lab, [("a1", "NodeA", SERVE), ("a1", "NodeB", SERVE), ("a1", "NodeC", CONSUME)]).await;
    measured("three nodes on one host", all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await);
    echoed(&c, "What is 2+2?").await;
    // No two of them answer at one address.
    let mut seen: Vec<String> = Vec::new();
    for node in [&a, &b, &c] {
        let status = node.json(&["status"]).await;
        for address in status["listen_addresses"].as_array().unwrap() {
            let address = address.as_str().unwrap().split("/p2p/").next().unwrap().to_owned();
            assert!(!seen.contains(&address), "two daemons listen on {address}");
            seen.push(address);
        }
    }
}
