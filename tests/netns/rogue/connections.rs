//! Floods of connections: whole ones, half-open ones, and first packets alone.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use super::initial::Initial;
use super::wire::{Dialer, Over, PORT, Wire, socket};
use super::{addresses, go, number, over, victim};

/// DIALS dials within SECONDS from HOSTS addresses, half of them over QUIC; what comes up is held.
pub async fn dials() {
    let (dials, hosts, seconds): (u32, u32, f64) = (number("DIALS", 1000), number("HOSTS", 20), number("SECONDS", 10.0));
    let mut from: Vec<Dialer> = addresses(hosts).into_iter().map(Dialer::new).collect();
    let to = victim().into();
    go().await;
    let begun = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for at in 0..dials {
        sleep(Duration::from_secs_f64(seconds / f64::from(dials) * f64::from(at)).saturating_sub(begun.elapsed())).await;
        let over = if (at / hosts) % 2 == 0 { Over::Tcp } else { Over::Quic };
        running.spawn(from[(at % hosts) as usize].dial(over, to));
    }
    let held: Vec<Wire> = running.join_all().await.into_iter().flatten().collect();
    let open = held.iter().filter(|wire| wire.is_open()).count();
    over(format!("{} of {dials} came up, {open} are open", held.len())).await;
}

/// SOCKETS raw sockets from HOSTS addresses, each with a byte of the negotiation per second, for SECONDS; those that are
/// closed are opened anew.
pub async fn half_open() {
    const NEGOTIATION: &[u8] = b"\x13/multistream/1.0.0\n";
    let (sockets, hosts, seconds): (u32, u32, u64) = (number("SOCKETS", 2000), number("HOSTS", 20), number("SECONDS", 20));
    let from = addresses(hosts);
    let to = SocketAddr::from((victim(), PORT));
    let (alive, most, longest) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    go().await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut running = tokio::task::JoinSet::new();
    for at in 0..sockets {
        let from = from[(at % hosts) as usize];
        let (alive, most, longest) = (Arc::clone(&alive), Arc::clone(&most), Arc::clone(&longest));
        running.spawn(async move {
            let mut opened = 0_usize;
            while Instant::now() < end {
                let Ok(Ok(mut stream)) = timeout(Duration::from_secs(2), socket(from.into(), None).unwrap().connect(to)).await
                else {
                    sleep(Duration::from_millis(500)).await;
                    continue;
                };
                opened += 1;
                let begun = Instant::now();
                let mut counted = false;
                for byte in NEGOTIATION.iter().cycle() {
                    // Closed by the other side: an end, or an error. Their own first words are read over.
                    let mut buffer = [0; 64];
                    let closed = async { while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {} };
                    if timeout(Duration::from_secs(1), closed).await.is_ok() || stream.write_all(&[*byte]).await.is_err() {
                        break;
                    }
                    // What was closed at once was never let in.
                    if !counted {
                        counted = true;
                        most.fetch_max(alive.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                    }
                    if Instant::now() > end {
                        break;
                    }
                }
                if counted {
                    alive.fetch_sub(1, Ordering::Relaxed);
                    longest.fetch_max(usize::try_from(begun.elapsed().as_millis()).unwrap(), Ordering::Relaxed);
                } else {
                    sleep(Duration::from_millis(200)).await;
                }
            }
            opened
        });
    }
    let opened: usize = running.join_all().await.into_iter().sum();
    let (most, longest) = (most.load(Ordering::Relaxed), longest.load(Ordering::Relaxed));
    over(format!("{opened} opened, at most {most} alive, the longest {longest} ms")).await;
}

/// First packets of so many real QUIC handshakes, as a client of ours makes them.
async fn first_packets(count: u32) -> Vec<Vec<u8>> {
    // A socket that hears them and answers nothing.
    let sink = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, PORT)).await.unwrap();
    let mut dialer = Dialer::new(Ipv4Addr::LOCALHOST);
    let mut packets = Vec::new();
    let mut buffer = [0; 2048];
    for _ in 0..count {
        // Polled until its first packet is out, then dropped.
        let dial = dialer.dial(Over::Quic, Ipv4Addr::LOCALHOST.into());
        tokio::select! {
            _ = dial => {}
            heard = sink.recv(&mut buffer) => packets.push(buffer[..heard.unwrap()].to_vec()),
        }
    }
    packets
}

/// A UDP packet with whatever source it likes; IPv4 needs no checksum for it.
fn forged(from: Ipv4Addr, port: u16, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 8).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&(length + 20).to_be_bytes());
    packet.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend_from_slice(&from.octets());
    packet.extend_from_slice(&to.octets());
    for number in [port, PORT, length, 0] {
        packet.extend_from_slice(&number.to_be_bytes());
    }
    packet.extend_from_slice(payload);
    packet
}

/// RATE first packets of QUIC handshakes per second for SECONDS, from random ports of random addresses of the LAN.
pub async fn initials() {
    let (rate, seconds): (u32, u32) = (number("RATE", 20_000), number("SECONDS", 20));
    let packets: Vec<Initial> = first_packets(16).await.iter().filter_map(|packet| Initial::open(packet)).collect();
    assert!(!packets.is_empty(), "no first packet could be read");
    let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
    raw.set_header_included_v4(true).unwrap();
    let to = victim();
    let mut random = crate::common::seeded::Seeded(0x9e37_79b9_7f4a_7c15);
    go().await;
    let begun = Instant::now();
    let (mut sent, mut lost) = (0_u32, 0_u32);
    while begun.elapsed() < Duration::from_secs(u64::from(seconds)) {
        let due = begun.elapsed().as_secs_f64() * f64::from(rate);
        while f64::from(sent) < due {
            // Nobody is at these addresses.
            let from = Ipv4Addr::from(0x0a47_0000 + 0x80 + u32::try_from(random.below(0x70)).unwrap());
            let port = u16::try_from(1024 + random.below(60_000)).unwrap();
            let packet = packets[random.below(packets.len())].sealed(random.next());
            let at = SocketAddr::from((to, PORT)).into();
            lost += u32::from(raw.send_to(&forged(from, port, to, &packet), &at).is_err());
            sent += 1;
        }
        sleep(Duration::from_millis(1)).await;
    }
    let per_second = f64::from(sent) / begun.elapsed().as_secs_f64();
    over(format!("{sent} packets, {per_second:.0} per second, {lost} not sent")).await;
}
