//! Two machines with one identity, told apart by the run that each names in its hellos.

use super::*;

fn at(host: &str) -> String {
    format!("/ip4/{host}/udp/0/quic-v1")
}

#[tokio::test]
async fn of_two_machines_with_one_identity_the_first_stays_and_both_are_told() {
    let third = plan("third").start().await;
    third.join("home", true, &[]).await;
    let bootstrap = [third.address().await];
    let first = Plan { listen: at("127.0.0.2"), ..plan("first") };
    let second = Plan { listen: at("127.0.0.3"), identity: first.identity.clone(), ..plan("second") };
    let first = first.start().await;
    first.join("home", true, &bootstrap).await;
    third.sees("home", &["first"]).await;
    let mut events = third.handle.events();
    let second = second.start().await;
    second.join("home", true, &bootstrap).await;
    for (node, other) in [(&first, "127.0.0.3"), (&second, "127.0.0.2")] {
        let told = node.until("a word of the other one", |snapshot| !snapshot.problems.is_empty()).await;
        assert!(told.problems[0].contains(other), "{:?}", told.problems);
        let facts = node.handle.facts(None).await.unwrap();
        assert!(facts.same_identity.len() == 1 && facts.same_identity[0].contains(other), "{:?}", facts.same_identity);
    }
    // The first one is still asked, and nobody came or went.
    assert_eq!(whole(&mut third.ask("home", &first.id(), "hello").unwrap()).await, Ok("hello".to_owned()));
    third.until("one connection", |snapshot| snapshot.connections == 1).await;
    assert_eq!(listed(&third.handle.snapshot(), "home"), ["first"]);
    assert!(drained(&mut events).is_empty());
    assert_eq!(listed(&second.handle.snapshot(), "home"), [""; 0]);
}

#[tokio::test]
async fn a_node_that_was_started_anew_at_another_address_replaces_its_dead_self_at_once() {
    let third = plan("third").start().await;
    third.join("home", true, &[]).await;
    let bootstrap = [third.address().await];
    let before = Plan { listen: at("127.0.0.2"), ..plan("before") };
    let identity = before.identity.clone();
    let before = before.start().await;
    before.join("home", true, &bootstrap).await;
    third.sees("home", &["before"]).await;
    // Ends without a goodbye.
    before.handle.panic();
    before.handle.panic();
    before.handle.panic();
    drop(before);
    let after = Plan { listen: at("127.0.0.3"), identity, ..plan("after") }.start().await;
    after.join("home", true, &bootstrap).await;
    third.sees("home", &["after"]).await;
    assert!(after.handle.snapshot().problems.is_empty());
}
