//! Nodes that nobody reaches directly, and a relay between them.

use super::*;
use crate::domain::network::{Facts, Nat};
use crate::domain::node::Liveness;

/// Nobody hears of a listener on 127.0.0.2: what leaves from there is seen as 127.0.0.1, as if behind NAT.
const HIDDEN: &str = "/ip4/127.0.0.2/tcp/0";

fn relay() -> Plan {
    Plan { relaying: Relaying { enabled: true, ..Relaying::default() }, ..plan("relay") }
}

fn hidden(name: &'static str, relay: &str) -> Plan {
    let timings = Timings { lookup_lonely: Duration::from_millis(500), ..plan(name).timings };
    Plan { listen: HIDDEN.to_owned(), bootstrap: vec![relay.to_owned()], timings, ..plan(name) }
}

/// Polls the facts until they are as wanted.
async fn until(node: &Node, what: &str, wanted: impl Fn(&Facts) -> bool) -> Facts {
    let limit = tokio::time::Instant::now() + DEADLINE;
    loop {
        let facts = node.handle.facts(None).await.unwrap();
        if wanted(&facts) {
            return facts;
        }
        assert!(tokio::time::Instant::now() < limit, "{what}: not within {DEADLINE:?}: {facts:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until `node` is connected to a member: it is listed before that, as known.
async fn connected(node: &Node, name: &str) -> Member {
    let found = |snapshot: &Snapshot| {
        let members = &snapshot.clusters.get(&id("home"))?.members;
        let alive = |member: &&Arc<Member>| member.name == name && member.liveness == Liveness::Alive;
        members.iter().find(alive).map(|member| Member::clone(member))
    };
    let snapshot = node.until(&format!("a connection to {name}"), |snapshot| found(snapshot).is_some()).await;
    found(&snapshot).unwrap()
}

fn has_place(facts: &Facts) -> bool {
    facts.reach.reservations.iter().any(|place| place.accepted)
}

/// A relay, and two members that know of nothing else.
async fn pair(relay: Plan, interactive: bool) -> (Node, Node, Node) {
    let relay = relay.start().await;
    let at = relay.address().await;
    let a = Plan { interactive, ..hidden("a", &at) }.start().await;
    let b = hidden("b", &at).start().await;
    a.join("home", true, &[]).await;
    b.join("home", true, &[]).await;
    (relay, a, b)
}

#[tokio::test]
async fn two_nodes_that_meet_only_at_a_relay_answer_each_other_over_either_transport() {
    for listen in [QUIC, TCP] {
        let (relay, a, b) = pair(Plan { listen: listen.to_owned(), ..self::relay() }, false).await;
        let member = connected(&b, "a").await;
        assert!(!member.direct);
        // The relay is in no cluster, and so has no name.
        assert_eq!(member.relay.as_ref().map(|relay| (&relay.id, &relay.name)), Some((&relay.id(), &None)), "{member:?}");
        assert_eq!(member.transport, if listen == QUIC { "quic" } else { "tcp" });
        assert_eq!(whole(&mut b.ask("home", &member.id, "hello").unwrap()).await.unwrap(), "hello");
        let back = connected(&a, "b").await;
        assert!(!back.direct && back.relay.is_some(), "{back:?}");
        assert_eq!(whole(&mut a.ask("home", &back.id, "world").unwrap()).await.unwrap(), "world");
        let carried = until(&relay, "a circuit", |facts| facts.reach.relaying.is_some_and(|load| load.circuits > 0)).await;
        assert_eq!(carried.reach.relaying.unwrap().reservations, 2);
    }
}

#[tokio::test]
async fn a_relay_that_is_a_member_is_called_by_its_name() {
    let (relay, a, b) = pair(self::relay(), false).await;
    relay.join("home", false, &[]).await;
    assert!(connected(&b, "relay").await.direct);
    a.sees("home", &["b", "relay"]).await;
    connected(&b, "a").await;
    // The name is known as soon as the relay has told it.
    let through = |snapshot: &Arc<Snapshot>| {
        let members = &snapshot.clusters[&id("home")].members;
        members.iter().find(|member| member.name == "a").and_then(|member| member.relay.clone()?.name)
    };
    b.until("the name of the relay", |snapshot| through(snapshot).as_deref() == Some("relay")).await;
}

#[tokio::test]
async fn a_node_with_a_place_at_a_relay_stays_a_client_of_the_dht_and_announces_the_relay() {
    let relay = relay().start().await;
    let a = hidden("a", &relay.address().await).start().await;
    a.join("home", true, &[]).await;
    let facts = until(&a, "a place", has_place).await;
    assert!(!facts.dht.server, "{facts:?}");
    assert_ne!(facts.reach.nat, Nat::None);
    let circuit = format!("{}/p2p-circuit", relay.address().await);
    assert_eq!(facts.reach.announced, std::slice::from_ref(&circuit));
    assert_eq!(facts.reach.reservations[0].relay.id, relay.id());
    assert!(until(&relay, "the mode of the relay", |facts| facts.dht.server).await.reach.reservations.is_empty());
    // It is shown for pasting, and is no listener of this machine.
    let snapshot = a.until("the address", |snapshot| snapshot.dialable_addresses.contains(&circuit)).await;
    assert!(snapshot.listen_addresses.iter().all(|address| !address.contains("p2p-circuit")), "{snapshot:?}");
}

#[tokio::test]
async fn a_cut_by_the_limit_of_the_relay_is_named_and_never_a_short_answer() {
    let relaying = Relaying { enabled: true, circuit_bytes: 3 << 20, ..Relaying::default() };
    let (_relay, mut a, b) = pair(Plan { relaying, ..relay() }, true).await;
    let member = connected(&b, "a").await.id;
    let mut answer = b.ask("home", &member, "write much").unwrap();
    let asking = tokio::spawn(async move { whole(&mut answer).await });
    let prompt = a.prompt().await;
    let writing = tokio::spawn(async move {
        let _ = prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await;
        while prompt.reply.send(AnswerEvent::Text("x".repeat(1024))).await.is_ok() {}
    });
    let failure = asking.await.unwrap().unwrap_err();
    assert_eq!(failure.kind, FailureKind::RelayLimit, "{failure:?}");
    assert!(failure.detail.contains("3145728 bytes"), "{failure:?}");
    timeout(DEADLINE, writing).await.expect("the serving node hears of it too").unwrap();
    // The next circuit has a budget of its own.
    tokio::spawn(async move {
        while let Some(prompt) = a.prompts.recv().await {
            let _ = prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await;
            let _ = prompt.reply.send(AnswerEvent::End(Ok(done()))).await;
        }
    });
    let again = async {
        loop {
            if let Ok(mut answer) = b.ask("home", &member, "and again")
                && whole(&mut answer).await.is_ok()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, again).await.expect("an answer over the next circuit");
}

#[tokio::test]
async fn a_lost_place_is_taken_again_when_the_relay_is_back() {
    let identity = crate::net::identity::Identity::generate();
    let again = || Plan { identity: identity.clone(), ..relay() };
    let first = again().start().await;
    let (at, bare) = (first.address().await, first.bare_address().await);
    let a = hidden("a", &at).start().await;
    a.join("home", true, &[]).await;
    until(&a, "a place", has_place).await;
    first.handle.shutdown().await;
    drop(first);
    let lost = until(&a, "the place is lost", |facts| !has_place(facts)).await;
    assert!(lost.reach.announced.is_empty() && lost.reach.reservations[0].problem.is_some(), "{lost:?}");
    let port = bare.split('/').nth(4).unwrap();
    while std::net::UdpSocket::bind(format!("127.0.0.1:{port}")).is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let _second = Plan { listen: bare, ..again() }.start().await;
    let back = tokio::time::Instant::now();
    until(&a, "a place again", has_place).await;
    assert!(back.elapsed() < Duration::from_secs(15), "{:?}", back.elapsed());
}

#[tokio::test]
async fn a_full_relay_says_so() {
    let relaying = Relaying { enabled: true, reservations: 1, ..Relaying::default() };
    let relay = Plan { relaying, ..relay() }.start().await;
    let at = relay.address().await;
    let a = hidden("a", &at).start().await;
    a.join("home", true, &[]).await;
    until(&a, "a place", has_place).await;
    let b = hidden("b", &at).start().await;
    b.join("home", true, &[]).await;
    let facts = until(&b, "a refusal", |facts| facts.reach.reservations.iter().any(|place| place.problem.is_some())).await;
    let problem = facts.reach.reservations[0].problem.clone().unwrap();
    assert!(problem.contains("limit"), "{problem}");
    until(&relay, "the count", |facts| facts.reach.relaying.is_some_and(|load| load.refused > 0 && load.reservations == 1)).await;
    // The one with a place is found by the one without.
    connected(&b, "a").await;
}

#[tokio::test]
async fn a_configured_address_is_announced_and_makes_the_node_one_that_is_reached() {
    let relay = relay().start().await;
    let plan = hidden("a", &relay.address().await);
    let offer = watch::channel(Offer { models: Vec::new(), tiers: Vec::new(), free_slots: 1, queued: 0, draining: false }).1;
    let config = Config {
        listen: vec![plan.listen],
        bootstrap: plan.bootstrap,
        announce: vec!["/ip4/198.51.100.7/udp/4001/quic-v1".to_owned(), "/ip4/0.0.0.0/tcp/1".to_owned(), "rubbish".to_owned()],
        ..Config::default()
    };
    let (handle, _) = start(config, &plan.identity, Arc::new(Stub { offer, prompts: None })).await.unwrap();
    let facts = handle.facts(None).await.unwrap();
    assert_eq!(facts.reach.announced, ["/ip4/198.51.100.7/udp/4001/quic-v1"]);
    assert!(facts.dht.server);
    let snapshot = handle.snapshot();
    assert_eq!(snapshot.dialable_addresses[0], "/ip4/198.51.100.7/udp/4001/quic-v1");
    assert!(snapshot.problems.iter().any(|problem| problem.contains("network.announce")), "{:?}", snapshot.problems);
}
