//! Floods and liars against a real daemon, while two honest members go on: the figures are a table in `docs/floods.md`.
//!
//! Short here; whole with `OPENGATEWAY_FLOODS=full cargo test --test netns floods -- --nocapture --test-threads 1`.

use super::*;
use crate::siege::{Siege, either};

/// A machine under test is busy: what is promised in seconds may take this many times as long.
const PATIENCE: u32 = 3;
/// A new member is in within this, whatever goes on.
const JOIN: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_thousand_connections_keep_no_member_out() {
    let Some(siege) = Siege::lay().await else { return };
    let (dials, hosts, seconds) = either(("1000", "20", "10"), ("300", "10", "4"));
    let settings = [("DIALS", dials), ("HOSTS", hosts), ("SECONDS", seconds)];
    let figures = siege.under("connections", "connection flood", &settings).await;
    figures.hold(64);
    assert!(figures.join < JOIN * PATIENCE, "{figures:?}");
}

#[tokio::test]
async fn two_thousand_half_open_sockets_keep_no_member_out() {
    let Some(siege) = Siege::lay().await else { return };
    let (sockets, seconds) = either(("2000", "25"), ("600", "6"));
    let settings = [("SOCKETS", sockets), ("HOSTS", "20"), ("SECONDS", seconds)];
    let figures = siege.under("half-open", "half-open sockets", &settings).await;
    figures.hold(32);
    assert!(figures.join < JOIN * PATIENCE, "{figures:?}");
    let numbers: Vec<usize> = figures.counted.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    assert!(numbers[1] <= 64 + 40, "{figures:?}");
    assert!(numbers[2] <= 12_000, "{figures:?}");
}

#[tokio::test]
async fn first_packets_of_quic_from_everywhere_leave_tcp_open() {
    let Some(siege) = Siege::lay().await else { return };
    let (seconds, kinds) = either(("20", "2000"), ("5", "500"));
    let settings = [("RATE", "20000"), ("SECONDS", seconds), ("KINDS", kinds)];
    let figures = siege.under("initials", "QUIC first packets", &settings).await;
    figures.hold(128);
    assert!(figures.join < JOIN * PATIENCE, "{figures:?}");
}

#[tokio::test]
async fn ten_thousand_streams_of_one_peer_trouble_nobody_else() {
    let Some(siege) = Siege::lay().await else { return };
    for (over, member) in [("quic", ""), ("tcp", ""), ("quic", CLUSTER), ("tcp", CLUSTER)] {
        let title = format!("stream flood, {over}{}", if member.is_empty() { "" } else { ", member" });
        let streams = either("10000", "2000");
        let mut settings = vec![("OVER", over), ("STREAMS", streams), ("SECONDS", either("60", "5"))];
        settings.extend((!member.is_empty()).then_some(("MEMBER", member)));
        siege.under("streams", &title, &settings).await.hold(16);
    }
}
