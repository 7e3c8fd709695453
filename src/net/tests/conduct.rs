//! Members and would-be members: hello, goodbye, silence, nonsense.

use std::time::{Duration, Instant};

use futures::AsyncWriteExt as _;

use super::rogue::{Heard, Rogue, put, rest};
use super::*;
use crate::domain::node::{GoneReason, Liveness};
use crate::net::session::End;
use crate::wire::control::{ByeReason, Control, Heartbeat, View, ViewEntry};
use crate::wire::frame::FrameReader;
use crate::wire::hello::{Initiator, Responder};
use crate::wire::keys::Root;
use crate::wire::limits::{MAX_HELLO_FRAME_BYTES, MAX_HELLOS_FROM_PEER};
use crate::wire::version::{INFERENCE_PROTOCOL, MEMBER_PROTOCOL, Versions};

/// A rogue that is a member of "home" as "rogue", and lower than the node, so that the node does not greet it first.
async fn member(node: &Node) -> (Rogue, libp2p::swarm::ConnectionId, super::rogue::Session) {
    let mut rogue = Rogue::beside(node, true).await;
    let connection = rogue.connect(&node.address().await).await;
    let session = rogue.greet(node, connection, "home").await;
    session.introduces("rogue");
    node.sees("home", &["rogue"]).await;
    (rogue, connection, session)
}

#[tokio::test]
async fn a_silent_member_is_suspect_and_then_gone() {
    let timings = Timings { suspect: Duration::from_millis(600), dead: Duration::from_millis(1200), ..plan("a").timings };
    let node = Plan { timings, ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    let mut events = node.handle.events();
    let (mut rogue, connection, _session) = member(&node).await;
    let entered = Instant::now();
    node.until("a suspect", |snapshot| snapshot.clusters[&id("home")].members.iter().any(|m| m.liveness == Liveness::Suspect))
        .await;
    assert!(entered.elapsed() >= Duration::from_millis(500), "{:?}", entered.elapsed());
    node.sees("home", &[]).await;
    assert!(entered.elapsed() >= Duration::from_millis(1100), "{:?}", entered.elapsed());
    let gone = drained(&mut events);
    assert!(matches!(gone.last(), Some(Event::MemberDown { reason: GoneReason::Timeout, .. })), "{gone:?}");
    // Its connection carries no other stream: it is closed too.
    rogue.hears("the close", |heard| matches!(heard, Heard::Closed(id) if id == connection).then_some(())).await;
}

#[tokio::test]
async fn a_member_that_never_stops_talking_does_not_keep_the_loop_from_its_timers() {
    let timings = Timings {
        heartbeat: Duration::from_millis(200),
        suspect: Duration::from_millis(1500),
        dead: Duration::from_millis(3000),
        ..plan("a").timings
    };
    let a = Plan { timings, ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    let b = Plan { timings, bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    b.join("home", true, &[]).await;
    b.sees("home", &["a"]).await;
    let (_rogue, _, session) = {
        let mut rogue = Rogue::beside(&a, true).await;
        let connection = rogue.connect(&a.address().await).await;
        let session = rogue.greet(&a, connection, "home").await;
        session.introduces("rogue");
        (rogue, connection, session)
    };
    a.sees("home", &["b", "rogue"]).await;
    let flood = tokio::spawn(async move {
        let beat = Control::Heartbeat(Heartbeat { seq: 2, ..Heartbeat::default() });
        loop {
            (0..64).for_each(|_| session.says(&beat));
            tokio::task::yield_now().await;
        }
    });
    let mut events = b.handle.events();
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        assert!(timeout(Duration::from_secs(2), a.handle.probe()).await.expect("the loop answers"));
        tokio::task::yield_now().await;
    }
    assert!(!drained(&mut events).iter().any(|event| matches!(event, Event::MemberDown { name, .. } if name == "a")));
    flood.abort();
}

#[tokio::test]
async fn a_stranger_gets_no_byte_and_learns_nothing() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, true).await;
    let connection = rogue.connect(&node.address().await).await;
    let mut stream = rogue.open(&node, connection, MEMBER_PROTOCOL).await;
    let theirs: libp2p::PeerId = node.id().as_str().parse().unwrap();
    let (_, h1) =
        Initiator::new(Versions::OURS, &Root::public(&id("another")), &rogue.peer.to_bytes(), &theirs.to_bytes(), [7; 32]);
    put(&mut stream, &h1).await.unwrap();
    assert!(rest(&mut stream).await.is_empty());
    // The same for a prompt: a node that is a member of nothing is not read.
    let mut stream = rogue.open(&node, connection, INFERENCE_PROTOCOL).await;
    let _ = put(&mut stream, b"{}").await;
    assert!(rest(&mut stream).await.is_empty());
    assert_eq!(node.handle.snapshot().clusters[&id("home")].members.len(), 0);
}

#[tokio::test]
async fn three_malformed_frames_ban_the_peer() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, true).await;
    let connection = rogue.connect(&node.address().await).await;
    for round in 0..3 {
        let mut stream = rogue.open(&node, connection, MEMBER_PROTOCOL).await;
        // The largest length that there is, and not a byte after it.
        stream.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        assert!(rest(&mut stream).await.is_empty(), "round {round}");
    }
    rogue.hears("the close", |heard| matches!(heard, Heard::Closed(_)).then_some(())).await;
    rogue.dial(&node.address().await);
    rogue.hears("that it is not let in", |heard| matches!(heard, Heard::Closed(_) | Heard::NotConnected(_)).then_some(())).await;
    node.until("nobody", |snapshot| snapshot.connected_peers == 0).await;
}

#[tokio::test]
async fn a_member_that_talks_nonsense_is_gone_and_may_come_back_twice() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut events = node.handle.events();
    let (rogue, connection, mut session) = member(&node).await;
    session.says_raw(vec![0, 0, 0, 1, 0x42]);
    node.sees("home", &[]).await;
    assert!(matches!(session.ends().await, End::Io(_) | End::Closed));
    let gone = drained(&mut events);
    assert!(matches!(gone.last(), Some(Event::MemberDown { reason: GoneReason::Error, .. })), "{gone:?}");
    let session = rogue.greet(&node, connection, "home").await;
    session.introduces("rogue");
    node.sees("home", &["rogue"]).await;
}

#[tokio::test]
async fn a_goodbye_in_place_of_the_first_heartbeat_is_no_violation() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let theirs: libp2p::PeerId = node.id().as_str().parse().unwrap();
    // The node is lower: it greets.
    let mut rogue = Rogue::beside(&node, false).await;
    for _ in 0..4 {
        let connection = rogue.connect(&node.address().await).await;
        let inbound = rogue.accepted(MEMBER_PROTOCOL).await;
        let mut reader = FrameReader::new(inbound.stream);
        let h1 = reader.next(MAX_HELLO_FRAME_BYTES).await.unwrap().unwrap().to_vec();
        let root = Root::public(&id("home"));
        let (_, responder) =
            Responder::on_h1(Versions::OURS, &[&root], &theirs.to_bytes(), &rogue.peer.to_bytes(), &h1, [1; 32]).unwrap();
        put(reader.get_mut(), responder.h2()).await.unwrap();
        responder.on_h3(&reader.next(MAX_HELLO_FRAME_BYTES).await.unwrap().unwrap()).unwrap();
        put(reader.get_mut(), &Control::Bye(ByeReason::Duplicate).encode()).await.unwrap();
        // The next round is a new connection; the old one goes with its rogue's will.
        let session = rogue.greet(&node, connection, "home").await;
        session.introduces("rogue");
        node.sees("home", &["rogue"]).await;
        session.leaves();
        node.sees("home", &[]).await;
        rogue.disconnect(&node);
        rogue = Rogue::with(rogue.keypair.clone()).await;
        node.until("the old connection gone", |snapshot| snapshot.connections == 0).await;
    }
}

#[tokio::test]
async fn a_refused_cluster_is_not_tried_again_until_a_member_says_that_the_peer_is_in_it() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, false).await;
    rogue.connect(&node.address().await).await;
    drop(rogue.accepted(MEMBER_PROTOCOL).await);
    // Another member, whose views name the one that refused.
    let (_other, _, session) = member(&node).await;
    let pause = tokio::time::sleep(Duration::from_millis(700));
    tokio::select! {
        again = rogue.accepted(MEMBER_PROTOCOL) => panic!("greeted again: {again:?}"),
        () = pause => {}
    }
    let entry = ViewEntry { peer: rogue.peer.to_bytes(), age_seconds: 0, addresses: vec![rogue.address.to_vec()] };
    session.says(&Control::View(View { entries: vec![entry] }));
    let session = rogue.is_greeted(&node, "home").await;
    session.introduces("late");
    node.sees("home", &["late", "rogue"]).await;
}

#[tokio::test]
async fn a_member_that_let_go_of_a_hello_for_want_of_time_is_greeted_again_on_the_same_connection() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, false).await;
    rogue.connect(&node.address().await).await;
    drop(rogue.accepted(MEMBER_PROTOCOL).await);
    let session = rogue.is_greeted(&node, "home").await;
    session.introduces("busy");
    node.sees("home", &["busy"]).await;
}

#[tokio::test]
async fn a_hello_that_nobody_answers_is_tried_again() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, false).await;
    rogue.connect(&node.address().await).await;
    let _held = rogue.accepted(MEMBER_PROTOCOL).await;
    // Five seconds for the hello, five until the next.
    let session = rogue.is_greeted(&node, "home").await;
    session.introduces("slow");
    node.sees("home", &["slow"]).await;
}

#[tokio::test]
async fn hellos_of_one_peer_are_bounded_and_those_of_others_go_on() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, true).await;
    let connection = rogue.connect(&node.address().await).await;
    let mut held = Vec::new();
    for _ in 0..MAX_HELLOS_FROM_PEER {
        held.push(rogue.open(&node, connection, MEMBER_PROTOCOL).await);
    }
    let began = Instant::now();
    for _ in 0..12 {
        let mut stream = rogue.open(&node, connection, MEMBER_PROTOCOL).await;
        assert!(rest(&mut stream).await.is_empty());
    }
    assert!(began.elapsed() < Duration::from_secs(4), "they were not answered but reset: {:?}", began.elapsed());
    let (_other, _, _session) = member(&node).await;
}

#[tokio::test]
async fn a_node_in_sixteen_clusters_enters_all_of_them_four_at_a_time() {
    let a = plan("a").start().await;
    let b = plan("b").start().await;
    let clusters: Vec<String> = (0..16).map(|number| format!("c{number}")).collect();
    for cluster in &clusters {
        a.join(cluster, true, &[]).await;
        b.join(cluster, true, &[]).await;
    }
    b.join("c0", true, &[a.address().await]).await;
    for cluster in &clusters {
        a.sees(cluster, &["b"]).await;
        b.sees(cluster, &["a"]).await;
    }
}

#[tokio::test]
async fn a_peer_that_is_started_anew_is_a_member_again_at_once() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    // Higher than the node: the node opened the stream that it now takes for alive.
    let mut before = Rogue::beside(&node, false).await;
    before.connect(&node.address().await).await;
    let mut ghost = before.is_greeted(&node, "home").await;
    ghost.introduces("rogue");
    node.sees("home", &["rogue"]).await;
    let mut events = node.handle.events();
    let mut after = Rogue::with(before.keypair.clone()).await;
    let connection = after.connect(&node.address().await).await;
    let own = after.open(&node, connection, MEMBER_PROTOCOL).await;
    let theirs: libp2p::PeerId = node.id().as_str().parse().unwrap();
    // Its own greeting is told that another stream stays, which it does not know of …
    let mut reader = FrameReader::new(own);
    let (opener, h1) =
        Initiator::new(Versions::OURS, &Root::public(&id("home")), &after.peer.to_bytes(), &theirs.to_bytes(), [7; 32]);
    put(reader.get_mut(), &h1).await.unwrap();
    let h2 = reader.next(MAX_HELLO_FRAME_BYTES).await.unwrap().unwrap().to_vec();
    put(reader.get_mut(), &opener.on_h2(&h2).unwrap().1).await.unwrap();
    let word = Control::decode(&reader.next(MAX_HELLO_FRAME_BYTES).await.unwrap().unwrap()).unwrap();
    assert_eq!(word, Control::Bye(ByeReason::Duplicate));
    // … and gets one that it does know, on its own connection.
    let session = after.is_greeted(&node, "home").await;
    session.introduces("reborn");
    node.sees("home", &["reborn"]).await;
    assert!(matches!(ghost.ends().await, End::Bye(ByeReason::Duplicate)));
    assert!(drained(&mut events).is_empty(), "the member never left");
}

#[tokio::test]
async fn a_goodbye_that_overtakes_the_stream_that_stays_does_not_unmake_the_member() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let (rogue, connection, session) = member(&node).await;
    let mut events = node.handle.events();
    session.says(&Control::Bye(ByeReason::Duplicate));
    let second = rogue.greet(&node, connection, "home").await;
    second.introduces("rogue two");
    node.sees("home", &["rogue two"]).await;
    assert!(drained(&mut events).is_empty());
}

#[tokio::test]
async fn two_nodes_with_one_key_do_not_confuse_the_others() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let boot = vec![a.address().await];
    let c = Plan { bootstrap: boot.clone(), ..plan("c") }.start().await;
    c.join("home", true, &[]).await;
    let twin = Identity::generate();
    let timings = Timings { duplicates: Duration::from_millis(500), ..plan("t").timings };
    let first = Plan { identity: twin.clone(), bootstrap: boot.clone(), timings, ..plan("twin") }.start().await;
    let second = Plan { identity: twin, bootstrap: boot, timings, ..plan("twin") }.start().await;
    first.join("home", true, &[]).await;
    second.join("home", true, &[]).await;
    a.sees("home", &["c", "twin"]).await;
    let twin = first.id();
    // Whatever they do to each other: everybody else goes on, and every prompt to the key has an outcome.
    for _ in 0..20 {
        if let Ok(mut stream) = a.ask("home", &twin, "x") {
            let _ = whole(&mut stream).await;
        }
        let mut stream = a.ask("home", &c.id(), "y").unwrap();
        assert_eq!(whole(&mut stream).await.unwrap(), "y");
    }
    let members = a.handle.snapshot().clusters[&id("home")].members.clone();
    assert!(members.iter().filter(|member| member.id == twin).count() <= 1);
}

#[tokio::test]
async fn a_swarm_that_panics_is_rebuilt_with_its_identity_its_port_and_its_members() {
    let mut a = Plan { interactive: true, ..plan("a") }.start().await;
    // A port that was free a moment ago: the next swarm must have it again.
    let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let b = Plan { listen: format!("/ip4/127.0.0.1/udp/{port}/quic-v1"), ..plan("b") }.start().await;
    let address = b.address().await;
    a.join("home", true, &[]).await;
    // Given with the join and nowhere else: it has to be remembered.
    let boot = [a.address().await];
    b.join("home", true, &boot).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let before = b.id();
    let mut stream = b.ask("home", &member, "x").unwrap();
    let answer = tokio::spawn(async move { whole(&mut stream).await });
    let prompt = a.prompt().await;
    prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
    prompt.reply.send(AnswerEvent::Text("one".to_owned())).await.unwrap();
    let mut events = b.handle.events();
    let panicked = Instant::now();
    b.handle.panic();
    let failure = timeout(Duration::from_secs(5), answer).await.expect("an outcome at once").unwrap().unwrap_err();
    assert!(matches!(failure.kind, FailureKind::Interrupted | FailureKind::PeerLost), "{failure}");
    timeout(DEADLINE, prompt.reply.closed()).await.expect("the serving node frees the slot");
    let gone = timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
    assert!(matches!(gone, Event::MemberDown { .. }), "{gone:?}");
    assert!(timeout(DEADLINE, b.handle.probe()).await.unwrap());
    assert!(panicked.elapsed() < Duration::from_secs(2), "{:?}", panicked.elapsed());
    assert_eq!(b.id(), before);
    assert_eq!(b.address().await, address);
    let back = timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
    assert!(matches!(back, Event::MemberUp { .. }), "{back:?}");
    b.sees("home", &["a"]).await;
    a.sees("home", &["b"]).await;
}

#[test]
fn a_name_in_a_log_line_is_one_short_printable_word() {
    let shown = crate::net::membership::loggable(&format!("a\nb\u{1b}[2J\u{202e}{}", "x".repeat(1000)));
    assert!(shown.starts_with("a\\nb\\u{1b}[2J\\u{202e}x"), "{shown}");
    assert_eq!(shown.chars().count(), 128);
}

#[tokio::test]
async fn five_panics_in_a_minute_end_the_network() {
    let node = plan("a").start().await;
    for _ in 0..5 {
        node.handle.panic();
        // Each round waits for the next swarm, or for the end of all.
        let _ = timeout(DEADLINE, node.handle.probe()).await.unwrap();
    }
    assert!(!timeout(DEADLINE, node.handle.probe()).await.unwrap());
}
