//! Frames that are none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures::AsyncWriteExt as _;
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::prompt::{Ask, Text};
use opengateway::wire::control::{Control, Heartbeat, State, View, ViewEntry};
use opengateway::wire::hello::Initiator;
use opengateway::wire::infer;
use opengateway::wire::keys::Root;
use opengateway::wire::version::{INFERENCE_PROTOCOL, MEMBER_PROTOCOL, Versions};
use tokio::time::{sleep, timeout};

use super::wire::{Dialer, Over, Wire, put, rest};
use super::{addresses, go, number, over, victim};
use crate::common::seeded::Seeded;

/// One of each message that a node may be sent, whole and well.
fn corpus(local: &[u8], peer: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let cluster = ClusterId::new(crate::CLUSTER).unwrap();
    let root = Root::public(&cluster);
    let (_, h1) = Initiator::new(Versions::OURS, &root, local, peer, [7; 32]);
    let mut request = Vec::new();
    let ask = Ask { prompt: Text::new("What is 2+2?"), ..Ask::default() };
    let second = Duration::from_secs(1);
    infer::encode_request(&mut request, &uuid::Uuid::new_v4(), &root.cluster_ref(), &ask, second).unwrap();
    let entry = ViewEntry { peer: local.to_vec(), age_seconds: 1, addresses: vec![vec![4, 10, 71, 0, 9, 6, 15, 161]] };
    let state = State { version: 1, node_name: "Rogue".to_owned(), ..State::default() };
    let bare = |control: Control| (MEMBER_PROTOCOL, control.encode());
    vec![
        (MEMBER_PROTOCOL, h1),
        (INFERENCE_PROTOCOL, request[4..].to_vec()),
        bare(Control::Heartbeat(Heartbeat { seq: 1, ..Heartbeat::default() })),
        bare(Control::State(state)),
        bare(Control::View(View { entries: vec![entry] })),
    ]
}

/// Says one thing on a new stream of `wire`, and waits until the stream ends.
async fn one(wire: &Wire, protocol: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut stream = wire.speak(protocol).await?;
    let written = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    let _ = written.await;
    // A reset or an end is the answer to nonsense.
    let _ = timeout(Duration::from_secs(2), rest(&mut stream)).await;
    Ok(())
}

/// For SECONDS, damaged messages on CONNECTIONS connections; a peer that is banned comes again under another name.
pub async fn malformed() {
    let (seconds, connections): (u64, u32) = (number("SECONDS", 30), number("CONNECTIONS", 8));
    let from = addresses(number("HOSTS", 1));
    let to = victim().into();
    go().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let (sent, names) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let mut running = tokio::task::JoinSet::new();
    for at in 0..connections {
        let (sent, names, from) = (Arc::clone(&sent), Arc::clone(&names), from[at as usize % from.len()]);
        running.spawn(async move {
            let mut random = Seeded(0x5eed_0000 + u64::from(at));
            while Instant::now() < end {
                let mut dialer = Dialer::new(from);
                names.fetch_add(1, Ordering::Relaxed);
                let over = if at % 2 == 0 { Over::Quic } else { Over::Tcp };
                let Ok(wire) = dialer.dial(over, to).await else {
                    sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let corpus = corpus(&wire.local.to_bytes(), &wire.peer.to_bytes());
                while wire.is_open() && Instant::now() < end {
                    let (protocol, mut body) = corpus[random.below(corpus.len())].clone();
                    let bit = random.below(body.len() * 8);
                    body[bit / 8] ^= 1 << (bit % 8);
                    let mut framed = Vec::new();
                    opengateway::wire::frame::encode(&body, &mut framed);
                    if timeout(Duration::from_secs(3), one(&wire, protocol, &framed)).await.is_ok_and(|said| said.is_ok()) {
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
    }
    running.join_all().await;
    let (sent, names) = (sent.load(Ordering::Relaxed), names.load(Ordering::Relaxed));
    over(format!("{sent} frames under {names} names, {} per second", u64::from(sent) / seconds.max(1))).await;
}

/// Announces 4 GiB less one, again and again under new names, with 64 KiB of it.
pub async fn huge() {
    let rounds: u32 = number("ROUNDS", 100);
    let from = addresses(number("HOSTS", 4));
    go().await;
    let mut bytes = u32::MAX.to_be_bytes().to_vec();
    bytes.resize(64 * 1024, b'x');
    let (mut said, mut wire, mut names) = (0, None::<Wire>, 0_usize);
    let end = Instant::now() + Duration::from_secs(number("SECONDS", 20));
    while said < rounds && Instant::now() < end {
        let Some(up) = wire.take_if(|wire| wire.is_open()) else {
            wire = Dialer::new(from[names % from.len()]).dial(Over::Tcp, victim().into()).await.ok();
            names += 1;
            if wire.is_none() {
                sleep(Duration::from_millis(50)).await;
            }
            continue;
        };
        if timeout(Duration::from_secs(3), one(&up, MEMBER_PROTOCOL, &bytes)).await.is_ok_and(|said| said.is_ok()) {
            said += 1;
        }
        wire = Some(up);
    }
    over(format!("{said} lengths of 4 GiB under {names} names")).await;
}

/// FRAMES empty frames in a row on one stream, as a stranger and as a member.
pub async fn empty() {
    let frames: usize = number("FRAMES", 1_000_000);
    let from = addresses(1)[0];
    let mut stranger = Dialer::new(from);
    let mut friend = Dialer::new(from);
    let wire = stranger.dial(Over::Tcp, victim().into()).await.expect("connected");
    let member = friend.dial(Over::Tcp, victim().into()).await.expect("connected");
    let _membership = member.join(crate::CLUSTER, "Rogue").await.expect("a member");
    go().await;
    let zeros = vec![0; 4 * frames];
    for (wire, protocol) in [(&wire, MEMBER_PROTOCOL), (&member, INFERENCE_PROTOCOL)] {
        let _ = timeout(Duration::from_secs(5), one(wire, protocol, &zeros)).await;
    }
    // And one that is whole, to see whether anybody listens.
    let mut heard = false;
    if let Ok(mut stream) = wire.speak(MEMBER_PROTOCOL).await {
        heard = put(&mut stream, &[0x42]).await.is_ok();
    }
    over(format!("{frames} empty frames, twice; heard afterwards: {heard}")).await;
}
