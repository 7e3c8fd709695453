//! Members that play false. In a public cluster anybody is one who knows its name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::AsyncWriteExt as _;
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, PeerId};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::prompt::{Ask, Text};
use opengateway::wire::control::{Control, View, ViewEntry};
use opengateway::wire::infer;
use opengateway::wire::keys::Root;
use opengateway::wire::version::INFERENCE_PROTOCOL;
use tokio::time::{sleep, timeout};

use super::wire::{Dialer, Membership, Over, Wire, over as transport};
use super::{addresses, go, number, over, victim};
use crate::common::seeded::Seeded;

/// PEERS members that ask LANES times each for the echo of BYTES, and read nothing of it, with receive windows of 4 KiB.
pub async fn slow_readers() {
    let (peers, lanes, bytes): (u32, u32, usize) = (number("PEERS", 100), number("LANES", 4), number("BYTES", 200_000));
    let seconds: u64 = number("SECONDS", 40);
    let from = addresses(number("HOSTS", 20));
    go().await;
    let reference = Root::public(&ClusterId::new(crate::CLUSTER).unwrap()).cluster_ref();
    let mut running = tokio::task::JoinSet::new();
    for at in 0..peers {
        let from = from[at as usize % from.len()];
        running.spawn(async move {
            let mut dialer = Dialer::with(Keypair::generate_ed25519(), from, Some(4096));
            let over = if at % 2 == 0 { Over::Quic } else { Over::Tcp };
            let wire = dialer.dial(over, victim().into()).await.ok()?;
            let membership = wire.join(crate::CLUSTER, &format!("Slow{at}")).await.ok()?;
            let mut held = Vec::new();
            for _ in 0..lanes {
                let asking = async {
                    let mut stream = wire.speak(INFERENCE_PROTOCOL).await?;
                    let mut request = Vec::new();
                    let ask = Ask { prompt: Text::new("x".repeat(bytes)), ..Ask::default() };
                    let patience = Duration::from_secs(60);
                    infer::encode_request(&mut request, &uuid::Uuid::new_v4(), &reference, &ask, patience).unwrap();
                    stream.write_all(&request).await?;
                    stream.flush().await?;
                    std::io::Result::Ok(stream)
                };
                if let Ok(Ok(stream)) = timeout(Duration::from_secs(2), asking).await {
                    held.push(stream);
                }
            }
            Some((wire, membership, held, dialer))
        });
    }
    let begun = Instant::now();
    let mut members: Vec<(Wire, Membership, Vec<_>, Dialer)> = Vec::new();
    while let Ok(Some(member)) = timeout(Duration::from_secs(seconds).saturating_sub(begun.elapsed()), running.join_next()).await
    {
        members.extend(member.ok().flatten());
    }
    sleep(Duration::from_secs(seconds).saturating_sub(begun.elapsed())).await;
    let asked: usize = members.iter().map(|(_, _, held, _)| held.len()).sum();
    let up = members.iter().filter(|(_, membership, ..)| membership.is_up()).count();
    over(format!("{} of {peers} became members, {asked} prompts sent, {up} members left", members.len())).await;
}

/// VIEWS views of 32 members each that nobody has ever seen, at addresses where nobody is.
pub async fn views() {
    let (views, seconds): (u32, u64) = (number("VIEWS", 200), number("SECONDS", 10));
    let mut dialer = Dialer::new(addresses(1)[0]);
    let wire = dialer.dial(transport(), victim().into()).await.expect("connected");
    let membership = wire.join(crate::CLUSTER, "Teller").await.expect("a member");
    let mut random = Seeded(0x7e11);
    go().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut told = 0;
    while told < views && Instant::now() < end && membership.is_up() {
        let entry = || ViewEntry {
            peer: PeerId::random().to_bytes(),
            age_seconds: 0,
            addresses: vec![format!("/ip4/10.71.0.{}/tcp/4001", 200 + random.below(50)).parse::<Multiaddr>().unwrap().to_vec()],
        };
        let entries = std::iter::repeat_with(entry).take(32).collect();
        told += u32::from(membership.say(Control::View(View { entries })).await);
    }
    sleep(end.saturating_duration_since(Instant::now())).await;
    over(format!("{told} views of 32 told, still a member: {}", membership.is_up())).await;
}

/// What identify calls a push, with other addresses each time: PUSHES of them, a few streams at a time.
pub async fn pushes() {
    let (pushes, seconds): (u32, u64) = (number("PUSHES", 10_000), number("SECONDS", 10));
    let mut dialer = Dialer::new(addresses(1)[0]);
    let wire = Arc::new(dialer.dial(transport(), victim().into()).await.expect("connected"));
    go().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut running = tokio::task::JoinSet::new();
    for worker in 0..16_u32 {
        let wire = Arc::clone(&wire);
        running.spawn(async move {
            let (mut pushed, mut random) = (0_u32, Seeded(1 + u64::from(worker)));
            while pushed < pushes / 16 && Instant::now() < end && wire.is_open() {
                let field =
                    |number: u8, bytes: &[u8]| [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()][..], bytes].concat();
                let mut message = field(3, b"/opengateway/kad/1");
                for _ in 0..20 {
                    let at: Multiaddr = format!("/ip4/10.71.0.77/tcp/{}", 1 + random.below(65_000)).parse().unwrap();
                    message.extend(field(2, &at.to_vec()));
                }
                let [low, high] = [message.len() & 0x7f | 0x80, message.len() >> 7].map(|part| u8::try_from(part).unwrap());
                let push = async {
                    let mut stream = wire.speak("/ipfs/id/push/1.0.0").await?;
                    stream.write_all(&[&[low, high][..], &message].concat()).await?;
                    stream.close().await
                };
                pushed += u32::from(matches!(timeout(Duration::from_secs(1), push).await, Ok(Ok(()))));
            }
            pushed
        });
    }
    let pushed: u32 = running.join_all().await.into_iter().sum();
    over(format!("{pushed} pushes of 20 addresses, connection open: {}", wire.is_open())).await;
}

/// As many pings as go through in SECONDS, on 32 streams, and nothing is read.
pub async fn pings() {
    let seconds: u64 = number("SECONDS", 10);
    let mut dialer = Dialer::new(addresses(1)[0]);
    let wire = Arc::new(dialer.dial(transport(), victim().into()).await.expect("connected"));
    go().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let wire = Arc::clone(&wire);
        running.spawn(async move {
            let mut sent = 0_u64;
            while Instant::now() < end && wire.is_open() {
                let flood = async {
                    let mut stream = wire.speak("/ipfs/ping/1.0.0").await?;
                    loop {
                        stream.write_all(&[7; 32 * 128]).await?;
                        stream.flush().await?;
                        sent += 128;
                    }
                };
                let _: Result<std::io::Result<()>, _> = timeout(end.saturating_duration_since(Instant::now()), flood).await;
                sleep(Duration::from_millis(10)).await;
            }
            sent
        });
    }
    let sent: u64 = running.join_all().await.into_iter().sum();
    over(format!("{sent} pings, connection open: {}", wire.is_open())).await;
}
