//! Coming back: a way that is cut without a word, a peer that is somewhere else all at once, bootstrap nodes that were down,
//! members that are known from before.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::UdpSocket;
use tokio::time::Instant;

use super::rogue::Rogue;
use super::*;
use crate::domain::node::{FoundBy, GoneReason};
use crate::net::Remembered;

/// What the issue promises, and what a machine that does other things besides may add.
const SOON: Duration = Duration::from_secs(5);
const TOLERANCE: Duration = Duration::from_secs(2);

/// A way to a node that can be cut without a word to either side.
struct Way {
    address: String,
    open: Arc<AtomicBool>,
}

impl Way {
    /// `target` is where the node listens, over QUIC on loopback.
    async fn to(target: &str) -> Self {
        let port: u16 = target.split('/').nth(4).unwrap().parse().unwrap();
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let socket = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let address = format!("/ip4/127.0.0.1/udp/{}/quic-v1", socket.local_addr().unwrap().port());
        let open = Arc::new(AtomicBool::new(true));
        let is_open = Arc::clone(&open);
        tokio::spawn(async move {
            let ends: Mutex<HashMap<SocketAddr, Arc<UdpSocket>>> = Mutex::default();
            let mut packet = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut packet).await {
                let known = ends.lock().unwrap().get(&from).cloned();
                let end = match known {
                    Some(end) => end,
                    None => {
                        let end = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
                        ends.lock().unwrap().insert(from, Arc::clone(&end));
                        let (back, socket, is_open) = (Arc::clone(&end), Arc::clone(&socket), Arc::clone(&is_open));
                        tokio::spawn(async move {
                            let mut packet = [0; 2048];
                            while let Ok(length) = back.recv(&mut packet).await {
                                if is_open.load(Ordering::Relaxed) {
                                    let _ = socket.send_to(&packet[..length], from).await;
                                }
                            }
                        });
                        end
                    }
                };
                if is_open.load(Ordering::Relaxed) {
                    let _ = end.send_to(&packet[..length], target).await;
                }
            }
        });
        Self { address, open }
    }

    fn cut(&self) {
        self.open.store(false, Ordering::Relaxed);
    }

    fn heal(&self) {
        self.open.store(true, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn after_a_change_of_the_network_nobody_who_answers_is_lost_and_who_does_not_is_gone_soon_and_back_soon() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let way = Way::to(&a.bare_address().await).await;
    let b = plan("b").start().await;
    b.join("home", true, &[format!("{}/p2p/{}", way.address, a.id())]).await;
    // A third one, on a way of its own.
    let c = plan("c").start().await;
    c.join("home", true, &[b.address().await]).await;
    b.sees("home", &["a", "c"]).await;
    let mut events = b.handle.events();
    b.handle.change_network();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(drained(&mut events).is_empty(), "everybody answers");
    way.cut();
    let cut = Instant::now();
    b.handle.change_network();
    b.sees("home", &["c"]).await;
    assert!(cut.elapsed() < SOON + TOLERANCE, "QUIC alone would take ten seconds: {:?}", cut.elapsed());
    let gone = drained(&mut events);
    assert!(matches!(&gone[..], [Event::MemberDown { reason: GoneReason::Timeout, .. }]), "{gone:?}");
    // Dials hang in the cut way while it is healed; no event tells of that.
    tokio::time::sleep(Duration::from_secs(8)).await;
    way.heal();
    let healed = Instant::now();
    b.sees("home", &["a", "c"]).await;
    assert!(healed.elapsed() < SOON + TOLERANCE, "{:?}", healed.elapsed());
}

#[tokio::test]
async fn dials_that_went_into_the_old_network_are_made_again_when_it_changes() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let way = Way::to(&a.bare_address().await).await;
    way.cut();
    let b = plan("b").start().await;
    b.join("home", true, &[format!("{}/p2p/{}", way.address, a.id())]).await;
    // The handshake has repeated itself after one and three seconds, and would after seven.
    tokio::time::sleep(Duration::from_millis(3500)).await;
    way.heal();
    let healed = Instant::now();
    b.handle.change_network();
    b.sees("home", &["a"]).await;
    assert!(healed.elapsed() < TOLERANCE, "{:?}", healed.elapsed());
}

#[tokio::test]
async fn a_dial_that_hangs_beside_a_lost_connection_keeps_no_other_waiting() {
    let [a, b] = [plan("a").start().await, plan("b").start().await];
    let [there, back] = [Way::to(&a.bare_address().await).await, Way::to(&b.bare_address().await).await];
    // Their dials cross, and one of them hangs: it repeats itself after one, three and seven seconds.
    there.cut();
    b.join("home", true, &[format!("{}/p2p/{}", there.address, a.id())]).await;
    a.join("home", true, &[format!("{}/p2p/{}", back.address, b.id())]).await;
    b.sees("home", &["a"]).await;
    back.cut();
    b.handle.change_network();
    b.sees("home", &[]).await;
    there.heal();
    let healed = Instant::now();
    b.sees("home", &["a"]).await;
    assert!(healed.elapsed() < TOLERANCE, "{:?}", healed.elapsed());
}

#[tokio::test]
async fn a_lost_member_that_came_by_itself_is_dialled_where_it_said_that_it_is() {
    let b = plan("b").start().await;
    b.join("home", true, &[]).await;
    let way = Way::to(&b.bare_address().await).await;
    let a = Plan { bootstrap: vec![format!("{}/p2p/{}", way.address, b.id())], ..plan("a") }.start().await;
    b.until("a connection", |snapshot| snapshot.connected_peers == 1).await;
    a.join("home", true, &[]).await;
    b.sees("home", &["a"]).await;
    way.cut();
    let cut = Instant::now();
    b.handle.change_network();
    b.sees("home", &[]).await;
    b.sees("home", &["a"]).await;
    assert!(cut.elapsed() < SOON + TOLERANCE, "{:?}", cut.elapsed());
}

#[tokio::test]
async fn a_peer_that_connects_from_elsewhere_is_not_spoken_to_where_it_was() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let way = Way::to(&a.bare_address().await).await;
    let mut rogue = Rogue::start().await;
    let before = rogue.connect(&format!("{}/p2p/{}", way.address, a.id())).await;
    let session = rogue.greet(&a, before, "home").await;
    session.introduces("rogue");
    a.sees("home", &["rogue"]).await;
    // Old enough to be doubted.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let mut events = a.handle.events();
    way.cut();
    let cut = Instant::now();
    let now = rogue.connect(&a.address().await).await;
    let moved = rogue.greet(&a, now, "home").await;
    moved.introduces("rogue");
    a.until("the old connection gone", |snapshot| snapshot.connections == 1).await;
    assert!(cut.elapsed() < Duration::from_secs(3) + TOLERANCE, "{:?}", cut.elapsed());
    a.sees("home", &["rogue"]).await;
    assert!(drained(&mut events).iter().all(|event| !matches!(event, Event::MemberDown { .. })), "it was never gone");
}

#[tokio::test]
async fn a_bootstrap_node_that_comes_up_late_is_found_within_seconds() {
    let a = plan("a").start().await;
    let address = a.address().await;
    let way = Way::to(&a.bare_address().await).await;
    a.join("home", true, &[]).await;
    way.cut();
    let b = plan("b").start().await;
    // Whoever answers there will do: the address names nobody.
    b.join("home", true, std::slice::from_ref(&way.address)).await;
    b.until("a problem", |snapshot| !snapshot.problems.is_empty() || snapshot.clusters.len() == 1).await;
    tokio::time::sleep(Duration::from_secs(11)).await;
    way.heal();
    let healed = Instant::now();
    b.sees("home", &["a"]).await;
    assert!(healed.elapsed() < SOON + TOLERANCE, "{:?} ({address})", healed.elapsed());
}

#[tokio::test]
async fn a_bootstrap_node_with_an_address_that_answers_is_not_kept_waiting_by_one_that_is_silent() {
    let a = Plan { listen: "/ip4/127.0.0.1/tcp/0".to_owned(), ..plan("a") }.start().await;
    a.join("home", true, &[]).await;
    // UDP is blocked: a handshake over QUIC takes six seconds to give up.
    let blocked = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let silent = format!("/ip4/127.0.0.1/udp/{}/quic-v1/p2p/{}", blocked.local_addr().unwrap().port(), a.id());
    let good = a.address().await;
    let named = good.replace("/ip4/127.0.0.1", "/dns4/localhost");
    for (when, at_the_start, later) in [
        ("both at the start", vec![silent.clone(), good.clone()], vec![]),
        ("the other way round", vec![good.clone(), silent.clone()], vec![]),
        ("by a name", vec![silent.clone(), named], vec![]),
        ("the good one later", vec![silent.clone()], vec![silent.clone(), good]),
    ] {
        let b = Plan { bootstrap: at_the_start, ..plan("b") }.start().await;
        let begun = Instant::now();
        b.join("home", true, &later).await;
        b.sees("home", &["a"]).await;
        assert!(begun.elapsed() < Duration::from_secs(3), "{when}: {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn members_of_before_are_found_without_anybody_s_help() {
    let a = plan("a").start().await;
    a.join("home", true, &[]).await;
    let identity = Identity::generate();
    let before = Plan { identity: identity.clone(), bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    before.join("home", true, &[]).await;
    before.sees("home", &["a"]).await;
    let mut told = before.handle.remembered();
    let remembered = timeout(DEADLINE, told.wait_for(|list| !list.is_empty())).await.unwrap().unwrap().clone();
    assert_eq!((remembered.len(), &remembered[0].id), (1, &a.id()));
    assert!(remembered[0].addresses.contains(&a.bare_address().await), "{remembered:?}");
    before.handle.shutdown().await;
    a.sees("home", &[]).await;
    // The same node, which has been told of nobody, and remembers somebody who is gone too.
    let gone = Remembered { id: NodeId::new(Identity::generate().peer_id().to_string()), ..remembered[0].clone() };
    let remembered = vec![gone, remembered[0].clone()];
    let after = Plan { identity, remembered, ..plan("b") }.start().await;
    after.join("home", true, &[]).await;
    let members = after.sees("home", &["a"]).await;
    assert_eq!(members[0].found_by, FoundBy::Remembered);
}

#[tokio::test]
async fn what_is_remembered_at_the_end_is_what_was_known_at_the_end() {
    let a = plan("a").start().await;
    let b = Plan { bootstrap: vec![a.address().await], ..plan("b") }.start().await;
    for node in [&a, &b] {
        node.join("home", true, &[]).await;
    }
    b.sees("home", &["a"]).await;
    let remembered = b.handle.remembered();
    let before = std::time::SystemTime::now();
    b.handle.shutdown().await;
    let list = remembered.borrow().clone();
    assert!(list[0].id == a.id() && list[0].last_seen >= before, "{list:?}");
}
