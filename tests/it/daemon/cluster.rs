//! Several daemons in one cluster.

use super::*;

#[tokio::test]
async fn three_daemons_one_cluster_one_prompt() {
    let Some(a) = Node::start("NodeA", &["--serve", "--connect", "gatewayai-poc"]).await else { return };
    let boot = a.address().await;
    let b = Node::start("NodeB", &["--serve", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    b.sees(&["NodeA"]).await;
    let c = Node::start("NodeC", &["--consume", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    c.sees(&["NodeA", "NodeB"]).await;
    let said = c.ogctl(&["prompt", "What is 2+2?"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "What is 2+2?\n"), "{said:?}");
    assert!(said.stderr.contains("served by Node"), "{said:?}");
    let said = c.ogctl(&["prompt", "x", "--node", "NodeB"]).await;
    assert!(said.stderr.contains("served by NodeB"), "{said:?}");
    let said = c.ogctl(&["prompt", "x", "--node", "NodeX"]).await;
    assert_eq!(said.code, 5, "{said:?}");
    let said = c.ogctl(&["prompt", "x", "--model", "nonsense"]).await;
    assert!(said.code == 5 && said.stderr.contains("echo"), "{said:?}");
    assert!(a.log().contains("joined cluster gatewayai-poc"), "{}", a.log());
    assert!(c.log().contains("peers: NodeA, NodeB"), "{}", c.log());
}

#[tokio::test]
async fn a_prompt_that_nobody_can_serve_fails_at_once_with_a_reason() {
    let Some(node) = Node::start("alone", &["--consume", "--connect", "gatewayai-poc"]).await else { return };
    let said = node.ogctl(&["prompt", "x"]).await;
    assert!(said.code == 5 && said.stderr.contains("no other node is in cluster gatewayai-poc"), "{said:?}");
    let said = node.ogctl(&["prompt", "x", "--local-first"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "x\n"), "{said:?}");
    let error = node.json(&["prompt", "x"]).await;
    assert_eq!(error["error"]["name"], "NoEligiblePeer");
}

#[tokio::test]
async fn serving_a_tier_needs_the_tier_and_consuming_does_not() {
    let Some(node) = Node::start("a", &[]).await else { return };
    let eligible = node.json(&["eligible"]).await;
    let tiers = eligible["tiers"].as_array().unwrap();
    let Some(beyond) = tiers.iter().find(|tier| tier["eligible"] == false) else {
        eprintln!("SKIPPED: this machine qualifies for every tier");
        return;
    };
    let name = beyond["tier"].as_str().or(beyond["name"].as_str()).or(beyond["id"].as_str()).unwrap();
    let said = node.ogctl(&["connect", name, "--serve", "--wait", "0"]).await;
    assert!(said.code == 6 && said.stderr.contains("missing"), "{said:?}");
    assert_eq!(node.ogctl(&["connect", name, "--consume", "--wait", "0"]).await.code, 0);
}

#[tokio::test]
async fn a_killed_server_is_gone_within_fifteen_seconds_and_a_stopped_one_at_once() {
    let Some(a) = Node::start("NodeA", &["--serve", "--connect", "gatewayai-poc"]).await else { return };
    let boot = a.address().await;
    let b = Node::start("NodeB", &["--serve", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    let c = Node::start("NodeC", &["--consume", "--connect", "gatewayai-poc", "--bootstrap", &boot]).await.unwrap();
    c.sees(&["NodeA", "NodeB"]).await;
    let begun = Instant::now();
    b.signal(rustix::process::Signal::TERM);
    c.sees(&["NodeA"]).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let begun = Instant::now();
    a.signal(rustix::process::Signal::KILL);
    c.sees(&[]).await;
    assert!(begun.elapsed() < Duration::from_secs(16), "{:?}", begun.elapsed());
    let said = c.ogctl(&["prompt", "x"]).await;
    assert_eq!(said.code, 5, "{said:?}");
}
