//! Floods of streams on few connections.

use std::time::{Duration, Instant};

use futures::{AsyncWriteExt as _, StreamExt as _};
use opengateway::wire::version::{INFERENCE_PROTOCOL, MEMBER_PROTOCOL};
use tokio::time::{sleep, timeout};

use super::wire::{Dialer, over as transport};
use super::{addresses, go, number, over, setting, victim};

/// A member's heartbeats go on, if it is one.
async fn dialled() -> (Dialer, super::wire::Wire, Option<super::wire::Membership>) {
    let from = addresses(1)[0];
    let mut dialer = Dialer::new(from);
    let wire = dialer.dial(transport(), victim().into()).await.expect("connected");
    let membership = match setting("MEMBER") {
        Some(cluster) => Some(wire.join(&cluster, "Rogue").await.expect("a member")),
        None => None,
    };
    (dialer, wire, membership)
}

/// STREAMS streams from one peer, a hundred at a time, dropped as soon as they are there: of each protocol, and of none. A connection that is
/// closed is dialled again.
pub async fn open() {
    let (streams, seconds): (u32, u64) = (number("STREAMS", 10_000), number("SECONDS", 30));
    let (mut dialer, mut wire, mut membership) = dialled().await;
    go().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut opened, mut refused, mut redials) = (0_u32, 0_u32, 0_u32);
    while opened + refused < streams && Instant::now() < end {
        if !wire.is_open() {
            redials += 1;
            drop(membership.take());
            match dialer.dial(transport(), victim().into()).await {
                Ok(again) => wire = again,
                Err(_) => sleep(Duration::from_millis(200)).await,
            }
            continue;
        }
        let one = |at: u32| {
            let protocol = [INFERENCE_PROTOCOL, MEMBER_PROTOCOL, "/ipfs/id/1.0.0", "/opengateway/kad/1"][at as usize % 4];
            timeout(Duration::from_secs(1), wire.speak(protocol))
        };
        let mut running = futures::stream::iter(0..500).map(one).buffer_unordered(100);
        while let Some(outcome) = running.next().await {
            match outcome {
                Ok(Ok(_)) => opened += 1,
                _ => refused += 1,
            }
        }
    }
    over(format!("{opened} streams opened, {refused} refused, {redials} dials")).await;
}

/// As many streams as there may be, each filled with as much as its window takes, on CONNECTIONS connections.
pub async fn stuffed() {
    let (connections, seconds): (u32, u64) = (number("CONNECTIONS", 1), number("SECONDS", 6));
    let (mut dialer, wire, membership) = dialled().await;
    let mut wires = vec![wire];
    for _ in 1..connections {
        wires.extend(dialer.dial(transport(), victim().into()).await);
    }
    go().await;
    let mut running = tokio::task::JoinSet::new();
    let wires: Vec<_> = wires.into_iter().map(std::sync::Arc::new).collect();
    for wire in &wires {
        for at in 0..128_usize {
            let wire = std::sync::Arc::clone(wire);
            running.spawn(async move {
                let mut written = 0_usize;
                let protocol = if at % 2 == 0 { INFERENCE_PROTOCOL } else { MEMBER_PROTOCOL };
                let stuff = async {
                    let mut stream = wire.speak(protocol).await?;
                    // The largest request that there may be, and never its last byte.
                    let length = if at % 2 == 0 { 1_u32 << 20 } else { 69 };
                    stream.write_all(&length.to_be_bytes()).await?;
                    let chunk = vec![b' '; 16 * 1024];
                    while written + chunk.len() < length as usize {
                        stream.write_all(&chunk).await?;
                        stream.flush().await?;
                        written += chunk.len();
                    }
                    std::future::pending::<std::io::Result<()>>().await
                };
                let _ = timeout(Duration::from_secs(seconds), stuff).await;
                written
            });
        }
    }
    let written: usize = running.join_all().await.into_iter().sum();
    let open = wires.iter().filter(|wire| wire.is_open()).count();
    let member = membership.is_some_and(|membership| membership.is_up());
    over(format!("{} MiB taken, {open} of {connections} connections open, still a member: {member}", written >> 20)).await;
}
