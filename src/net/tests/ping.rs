//! Signs of life: asked for by id and by name, on connections that are there or come up for it; given to anybody, sparingly.

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::identity::Keypair;

use super::rogue::{Rogue, rest};
use super::*;
use crate::domain::network::PingError;
use crate::wire::limits::{MAX_PING_STREAMS, PING_BYTES};
use crate::wire::version::PING_PROTOCOL;

/// Two members of "home".
async fn pair() -> [Node; 2] {
    let a = plan("a").start().await;
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    for node in [&a, &b] {
        node.join("home", true, &[]).await;
    }
    a.sees("home", &["b"]).await;
    b.sees("home", &["a"]).await;
    [a, b]
}

#[tokio::test]
async fn a_member_answers_by_name_and_by_id_as_often_as_it_is_asked() {
    let [a, b] = pair().await;
    let by_name = a.handle.ping("b".to_owned(), 3).await.unwrap();
    assert_eq!((by_name.id.clone(), by_name.name.as_deref()), (b.id(), Some("b")));
    assert_eq!(by_name.round_trips.len(), 3);
    assert!(by_name.round_trips.iter().all(|trip| *trip > Duration::ZERO && *trip < Duration::from_secs(5)));
    assert_eq!((by_name.link.transport, by_name.link.relay), ("quic", None));
    let by_id = b.handle.ping(a.id().to_string(), 1).await.unwrap();
    assert_eq!((by_id.id, by_id.round_trips.len(), by_id.link.dialed), (a.id(), 1, true));
    // None at all is one.
    assert_eq!(b.handle.ping("a".to_owned(), 0).await.unwrap().round_trips.len(), 1);
}

#[tokio::test]
async fn whoever_is_not_known_not_one_or_oneself_is_named() {
    let [a, b] = pair().await;
    assert_eq!(a.handle.ping("nobody".to_owned(), 1).await, Err(PingError::NoSuchPeer("nobody".to_owned())));
    let stranger = Identity::generate().peer_id().to_string();
    assert_eq!(a.handle.ping(stranger.clone(), 1).await, Err(PingError::NoSuchPeer(stranger)));
    assert_eq!(a.handle.ping(a.id().to_string(), 1).await, Err(PingError::Ourselves));
    assert_eq!(a.handle.ping("a".to_owned(), 1).await, Err(PingError::Ourselves));
    let twin = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    twin.join("home", true, &[]).await;
    a.sees("home", &["b", "b"]).await;
    match a.handle.ping("b".to_owned(), 1).await {
        Err(PingError::Ambiguous(name, ids)) => {
            assert!(name == "b" && ids.contains(b.id().as_str()) && ids.contains(twin.id().as_str()), "{ids}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_peer_that_is_known_and_not_connected_is_dialled() {
    let a = plan("a").start().await;
    // Known by the bootstrap list alone; with no cluster nobody is greeted.
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    b.until("a connection", |snapshot| snapshot.connections == 1).await;
    assert_eq!(b.handle.ping(a.id().to_string(), 1).await.unwrap().id, a.id());
    let (id, began) = (a.id(), tokio::time::Instant::now());
    a.handle.shutdown().await;
    b.until("nobody", |snapshot| snapshot.connections == 0).await;
    assert!(matches!(b.handle.ping(id.to_string(), 1).await, Err(PingError::NotConnected(..))));
    assert!(began.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn a_peer_that_is_too_old_or_mute_is_told_from_one_that_is_gone() {
    let node = plan("a").start().await;
    let mut old = Rogue::start().await;
    old.connect(&node.address().await).await;
    node.until("the old one", |snapshot| snapshot.connections == 1).await;
    let old = old.peer.to_string();
    assert_eq!(node.handle.ping(old.clone(), 1).await, Err(PingError::Unsupported(old)));
    let mut mute = Rogue::speaking(Keypair::generate_ed25519(), &[PING_PROTOCOL]).await;
    mute.connect(&node.address().await).await;
    node.until("the mute one", |snapshot| snapshot.connections == 2).await;
    let (asked, _held) = tokio::join!(node.handle.ping(mute.peer.to_string(), 1), mute.accepted(PING_PROTOCOL));
    assert_eq!(asked, Err(PingError::NoAnswer(mute.peer.to_string())));
}

#[tokio::test]
async fn anybody_is_answered_on_two_streams_and_on_no_third() {
    let node = plan("a").start().await;
    let mut rogue = Rogue::start().await;
    let connection = rogue.connect(&node.address().await).await;
    let mut streams = Vec::new();
    for round in 0..=MAX_PING_STREAMS {
        let mut stream = rogue.open(&node, connection, PING_PROTOCOL).await;
        if round == MAX_PING_STREAMS {
            let _ = stream.write_all(&[7; PING_BYTES]).await;
            assert!(rest(&mut stream).await.is_empty());
            break;
        }
        for sent in 0..3_u8 {
            stream.write_all(&[sent; PING_BYTES]).await.unwrap();
            stream.flush().await.unwrap();
            let mut back = [9; PING_BYTES];
            timeout(DEADLINE, stream.read_exact(&mut back)).await.expect("an answer").unwrap();
            assert_eq!(back, [sent; PING_BYTES]);
        }
        streams.push(stream);
    }
    // One that ends makes room.
    drop(streams.pop());
    loop {
        let mut stream = rogue.open(&node, connection, PING_PROTOCOL).await;
        let _ = stream.write_all(&[7; PING_BYTES]).await;
        let _ = stream.flush().await;
        if stream.read_exact(&mut [0; PING_BYTES]).await.is_ok() {
            break;
        }
    }
}
