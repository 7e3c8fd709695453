//! Connections: how many, from whom, which of two stays, and the way back to a bootstrap node.

use std::time::{Duration, Instant};

use super::rogue::{Heard, Rogue};
use super::*;
use crate::net::behaviour::{Behaviour, Parts};
use crate::net::gate::Gate;
use crate::net::meter::Meters;

fn caps() -> ConnectionCaps {
    plan("caps").caps
}

#[test]
fn the_bounds_are_those_of_the_description() {
    let caps = ConnectionCaps::default();
    assert_eq!((caps.pending_incoming, caps.pending_outgoing), (64, 64));
    assert_eq!((caps.established_incoming, caps.established, caps.per_peer, caps.memory_bytes), (256, 384, 4, 512 << 20));
    let timings = Timings::default();
    let seconds =
        [timings.heartbeat, timings.suspect, timings.dead, timings.views, timings.duplicates].map(|time| time.as_secs());
    assert_eq!(seconds, [5, 10, 15, 30, 10]);
    assert_eq!([timings.patience, timings.lookup_lonely, timings.lookup].map(|time| time.as_secs()), [1, 30, 300]);
}

#[tokio::test]
async fn the_door_closes_at_the_bound_and_members_pass_it() {
    let node = Plan { caps: ConnectionCaps { established_incoming: 4, ..caps() }, ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    let address = node.address().await;
    // A member first: it stays exempt.
    let mut member = Rogue::beside(&node, true).await;
    let connection = member.connect(&address).await;
    let session = member.greet(&node, connection, "home").await;
    session.introduces("rogue");
    node.sees("home", &["rogue"]).await;
    let mut strangers = Vec::new();
    for _ in 0..3 {
        let mut stranger = Rogue::start().await;
        stranger.connect(&address).await;
        strangers.push(stranger);
    }
    // One place is always free for who may become a member: the oldest stranger makes it.
    strangers[0].hears("that it has to go", |heard| matches!(heard, Heard::Closed(_)).then_some(())).await;
    node.until("the member and two strangers", |snapshot| snapshot.connections == 3).await;
    for _ in 0..7 {
        member.connect(&address).await;
    }
    node.until("the member's eight", |snapshot| snapshot.connections == 2 + 8).await;
    member.dial(&address);
    member
        .hears("that nine are too many", |heard| matches!(heard, Heard::Closed(_) | Heard::NotConnected(_)).then_some(()))
        .await;
}

#[tokio::test]
async fn a_stranger_gets_four_connections() {
    let node = plan("a").start().await;
    let address = node.address().await;
    let mut stranger = Rogue::start().await;
    for _ in 0..4 {
        stranger.connect(&address).await;
    }
    stranger.dial(&address);
    stranger
        .hears("that five are too many", |heard| matches!(heard, Heard::Closed(_) | Heard::NotConnected(_)).then_some(()))
        .await;
    node.until("four", |snapshot| snapshot.connections == 4).await;
}

#[tokio::test]
async fn a_crowd_of_strangers_does_not_keep_a_member_out() {
    let node = Plan { caps: ConnectionCaps { established_incoming: 8, ..caps() }, ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    let address = node.address().await;
    let mut crowd = Vec::new();
    for _ in 0..20 {
        let rogue = Rogue::start().await;
        rogue.dial(&address);
        crowd.push(rogue);
    }
    let friend = Plan { bootstrap: vec![address], ..plan("b") }.start().await;
    friend.join("home", true, &[]).await;
    node.sees("home", &["b"]).await;
    friend.sees("home", &["a"]).await;
}

fn behaviour(keypair: &libp2p::identity::Keypair) -> Behaviour {
    let (_, relay_client) = libp2p::relay::client::new(keypair.public().to_peer_id());
    let parts = Parts { gate: Gate::default(), inbound: mpsc::channel(1).0, relay_client, meters: Meters::default() };
    Behaviour::new(keypair, caps(), &Relaying::default(), parts)
}

#[test]
fn an_external_address_alone_makes_no_dht_server() {
    use libp2p::kad::Mode;
    use libp2p::swarm::derive_prelude::ExternalAddrConfirmed;
    use libp2p::swarm::{FromSwarm, NetworkBehaviour as _};
    let keypair = libp2p::identity::Keypair::generate_ed25519();
    let mut behaviour = behaviour(&keypair);
    assert_eq!(behaviour.kad.mode(), Mode::Client);
    // A relayed address, as a node behind a NAT gets one: the library's own choice would be to serve.
    let addr = "/ip4/198.51.100.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN/p2p-circuit".parse().unwrap();
    behaviour.kad.on_swarm_event(FromSwarm::ExternalAddrConfirmed(ExternalAddrConfirmed { addr: &addr }));
    assert_eq!(behaviour.kad.mode(), Mode::Client);
}

/// Starts pairs that dial each other in the same moment; each ends with one connection and members that never left.
async fn pairs(count: usize, listen: &str) {
    let timings = Timings { duplicates: Duration::from_millis(1500), ..plan("p").timings };
    let mut nodes = Vec::new();
    for _ in 0..count {
        let a = Plan { timings, listen: listen.to_owned(), ..plan("a") }.start().await;
        let b = Plan { timings, listen: listen.to_owned(), ..plan("b") }.start().await;
        let boot = [vec![b.address().await], vec![a.address().await]];
        let events = (a.handle.events(), b.handle.events());
        let start = tokio::spawn({
            let (a, b) = (a.handle.clone(), b.handle.clone());
            let [to_b, to_a] = boot;
            async move {
                let join = |bootstrap| JoinOptions { bootstrap, serve: true };
                let both = tokio::join!(a.join(id("home"), join(to_b)), b.join(id("home"), join(to_a)));
                both.0.unwrap();
                both.1.unwrap();
            }
        });
        nodes.push((a, b, events, start));
    }
    for (a, b, (mut events_of_a, mut events_of_b), start) in nodes {
        start.await.unwrap();
        a.sees("home", &["b"]).await;
        b.sees("home", &["a"]).await;
        let one = |snapshot: &Arc<Snapshot>| snapshot.connections == 1;
        a.until("one connection", one).await;
        b.until("one connection", one).await;
        for events in [&mut events_of_a, &mut events_of_b] {
            let seen = drained(events);
            assert!(matches!(seen.as_slice(), [Event::MemberUp { .. }]), "{seen:?}");
        }
    }
}

#[tokio::test]
async fn fifty_pairs_that_start_together_over_quic_end_with_one_connection_each() {
    pairs(50, QUIC).await;
}

#[tokio::test]
async fn fifty_pairs_that_start_together_over_tcp_end_with_one_connection_each() {
    pairs(50, TCP).await;
}

#[tokio::test]
async fn a_second_connection_is_kept_while_a_prompt_runs_on_it() {
    let timings = Timings { duplicates: Duration::from_millis(300), ..plan("a").timings };
    let mut node = Plan { interactive: true, timings, ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    // The node is lower: closing is its business.
    let mut rogue = Rogue::beside(&node, false).await;
    rogue.connect(&node.address().await).await;
    let session = rogue.is_greeted(&node, "home").await;
    session.introduces("rogue");
    node.sees("home", &["rogue"]).await;
    let second = rogue.connect(&node.address().await).await;
    let mut lane = rogue.open(&node, second, crate::wire::version::INFERENCE_PROTOCOL).await;
    super::lanes::request(&mut lane, "home", "x", 1).await;
    let prompt = node.prompt().await;
    node.until("two connections", |snapshot| snapshot.connections == 2).await;
    let end = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < end {
        assert!(node.handle.probe().await);
        assert_eq!(node.handle.snapshot().connections, 2);
        tokio::task::yield_now().await;
    }
    prompt.reply.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    node.until("one connection", |snapshot| snapshot.connections == 1).await;
}

#[tokio::test]
async fn a_bootstrap_address_by_name_or_without_a_peer_id_is_recognised() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let bare = a.bare_address().await;
    for address in
        [bare.clone(), bare.replace("/ip4/127.0.0.1", "/dns4/localhost"), format!("/dns4/localhost{}", &a.address().await[14..])]
    {
        let b = Plan { bootstrap: vec![address.clone()], ..plan("b") }.start().await;
        b.join("home", true, &[]).await;
        b.sees("home", &["a"]).await;
        // It is not dialled again beside its own connection: two rounds of the first pause.
        let end = Instant::now() + Duration::from_millis(3500);
        while Instant::now() < end {
            assert!(b.handle.probe().await);
            assert_eq!(b.handle.snapshot().connections, 1, "{address}");
            tokio::task::yield_now().await;
        }
        b.handle.shutdown().await;
        a.sees("home", &[]).await;
    }
}

#[tokio::test]
async fn a_bootstrap_node_that_was_dead_is_found_again_under_another_key() {
    let a = Plan { listen: TCP.to_owned(), ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    let bare = a.bare_address().await;
    let b = Plan { listen: TCP.to_owned(), bootstrap: vec![bare.clone()], ..plan("b") }.start().await;
    b.join("home", true, &[]).await;
    b.sees("home", &["a"]).await;
    a.handle.shutdown().await;
    b.sees("home", &[]).await;
    drop(a);
    let again = Plan { listen: bare, ..plan("again") }.start().await;
    again.join("home", true, &[]).await;
    b.sees("home", &["again"]).await;
}

#[tokio::test]
async fn a_bootstrap_node_that_is_not_there_yet_is_dialled_until_it_is() {
    // A port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("/ip4/127.0.0.1/tcp/{free}");
    let b = Plan { listen: TCP.to_owned(), bootstrap: vec![address.clone()], ..plan("b") }.start().await;
    b.join("home", true, &[]).await;
    assert!(b.handle.probe().await);
    let a = Plan { listen: address, ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    b.sees("home", &["a"]).await;
}

#[tokio::test]
async fn a_peer_that_accepts_and_hangs_up_is_not_dialled_without_end() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut teller = Rogue::beside(&node, true).await;
    let connection = teller.connect(&node.address().await).await;
    let session = teller.greet(&node, connection, "home").await;
    session.introduces("teller");
    node.sees("home", &["teller"]).await;
    // It hangs up on whoever comes: a rogue that never answers and is told to go.
    let mut rude = Rogue::start().await;
    let entry =
        crate::wire::control::ViewEntry { peer: rude.peer.to_bytes(), age_seconds: 0, addresses: vec![rude.address.to_vec()] };
    session.says(&crate::wire::control::Control::View(crate::wire::control::View { entries: vec![entry] }));
    rude.hang_up_on_everybody();
    let mut connections = 0;
    let end = tokio::time::sleep(Duration::from_secs(4));
    tokio::pin!(end);
    loop {
        tokio::select! {
            heard = rude.heard.recv() => connections += usize::from(matches!(heard, Some(Heard::Connected(_)))),
            () = &mut end => break,
        }
    }
    // At once, after 1 s, after 2 s more.
    assert!((1..=4).contains(&connections), "{connections}");
}

#[tokio::test]
async fn who_leaves_and_joins_again_at_once_is_a_member_and_serves() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    for round in 0..40 {
        b.join("home", true, &[]).await;
        if round % 3 != 0 {
            b.sees("home", &["a"]).await;
            let mut stream = b.ask("home", &a.id(), "x").unwrap();
            assert_eq!(whole(&mut stream).await.unwrap(), "x", "round {round}");
        }
        b.handle.leave(id("home"), Duration::ZERO).await.unwrap();
    }
    b.join("home", true, &[]).await;
    b.sees("home", &["a"]).await;
    a.sees("home", &["b"]).await;
    let mut stream = a.ask("home", &b.id(), "x").unwrap();
    assert_eq!(whole(&mut stream).await.unwrap(), "x");
}

/// Sooner than the other side tries again whom it found outside, after five seconds, a fifth more or less.
const UNASKED: Duration = Duration::from_secs(3);

#[tokio::test]
async fn whoever_joins_on_a_connection_that_is_there_greets_without_patience() {
    let patient = || Timings { patience: Duration::from_secs(3600), ..plan("x").timings };
    let a = Plan { timings: patient(), ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    let bootstrap = vec![a.address().await];
    // Of these about half have the higher peer id of the two.
    for name in ["b", "c", "d", "e", "f", "g"] {
        let b = Plan { bootstrap: bootstrap.clone(), timings: patient(), ..plan(name) }.start().await;
        b.until("a connection", |snapshot| snapshot.connected_peers > 0).await;
        let begun = Instant::now();
        b.join("home", true, &[]).await;
        b.sees("home", &["a"]).await;
        a.sees("home", &[name]).await;
        assert!(begun.elapsed() < UNASKED, "{name}: {:?}", begun.elapsed());
        b.handle.leave(id("home"), Duration::ZERO).await.unwrap();
        a.sees("home", &[]).await;
    }
}

#[tokio::test]
async fn a_join_while_prompts_drain_takes_the_leave_back() {
    let mut a = Plan { interactive: true, ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    b.join("home", true, &[]).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let asking = |text: &'static str| {
        let mut stream = b.ask("home", &member, text).unwrap();
        tokio::spawn(async move { whole(&mut stream).await })
    };
    let first = asking("first");
    let held = a.prompt().await;
    let leave = |handle: Handle| tokio::spawn(async move { handle.leave(id("home"), Duration::from_secs(20)).await });
    let leaving = [leave(a.handle.clone()), leave(a.handle.clone())];
    b.until("that a takes no more", |snapshot| snapshot.clusters[&id("home")].members.iter().any(|member| !member.serving)).await;
    assert_eq!(asking("refused").await.unwrap().unwrap_err().kind, FailureKind::NotAuthorized);
    a.join("home", true, &[]).await;
    for leaving in leaving {
        leaving.await.unwrap().unwrap();
    }
    held.reply.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    assert_eq!(first.await.unwrap().unwrap(), "");
    let second = asking("second");
    let prompt = a.prompt().await;
    prompt.reply.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    assert_eq!(second.await.unwrap().unwrap(), "");
    b.until("that a serves", |snapshot| snapshot.clusters[&id("home")].members.iter().all(|member| member.serving)).await;
}

#[tokio::test]
async fn leaving_waits_for_the_running_prompt_and_no_longer() {
    let mut a = Plan { interactive: true, ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    b.join("home", true, &[]).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let mut stream = b.ask("home", &member, "x").unwrap();
    let answer = tokio::spawn(async move { whole(&mut stream).await });
    let prompt = a.prompt().await;
    let handle = a.handle.clone();
    let leaving = tokio::spawn(async move { handle.leave(id("home"), Duration::from_secs(25)).await });
    b.until("that a takes no more", |snapshot| snapshot.clusters[&id("home")].members.iter().any(|member| !member.serving)).await;
    assert!(!leaving.is_finished());
    prompt.reply.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    assert_eq!(answer.await.unwrap().unwrap(), "");
    timeout(Duration::from_secs(5), leaving).await.expect("it leaves now").unwrap().unwrap();
    b.sees("home", &[]).await;
}

#[tokio::test]
async fn peers_that_share_two_clusters_lose_one_and_keep_the_other() {
    let a = plan("a").start().await;
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    for cluster in ["home", "lab"] {
        a.join(cluster, true, &[]).await;
        b.join(cluster, true, &[]).await;
    }
    a.sees("home", &["b"]).await;
    a.sees("lab", &["b"]).await;
    b.sees("lab", &["a"]).await;
    b.handle.leave(id("home"), Duration::ZERO).await.unwrap();
    a.sees("home", &[]).await;
    let mut stream = a.ask("lab", &b.id(), "x").unwrap();
    assert_eq!(whole(&mut stream).await.unwrap(), "x");
    a.sees("lab", &["b"]).await;
}
