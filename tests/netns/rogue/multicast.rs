//! Lies on the local network.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use libp2p::identity::Keypair;
use tokio::net::UdpSocket;
use tokio::time::sleep;

use super::{go, number, over};

fn name(parts: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.push(u8::try_from(part.len()).unwrap());
        bytes.extend_from_slice(part.as_bytes());
    }
    bytes.push(0);
    bytes
}

/// An answer that names a peer at an address, for as long as a number can say.
fn answer(peer: &str, label: &str) -> Vec<u8> {
    let (service, instance) = (name(&["_p2p", "_udp", "local"]), name(&[label, "_p2p", "_udp", "local"]));
    let record = |owner: &[u8], kind: u8, data: &[u8]| {
        let length = u16::try_from(data.len()).unwrap().to_be_bytes();
        [owner, &[0, kind, 0, 1], &u32::MAX.to_be_bytes(), &length, data].concat()
    };
    let text = format!("dnsaddr=/ip4/10.71.0.77/udp/4001/quic-v1/p2p/{peer}");
    let text = [&[u8::try_from(text.len()).unwrap()][..], text.as_bytes()].concat();
    let head = [0, 0, 0x84, 0, 0, 0, 0, 1, 0, 0, 0, 1];
    [&head[..], &record(&service, 12, &instance), &record(&instance, 16, &text)].concat()
}

/// ANSWERS answers of mDNS about as many peers, within SECONDS.
pub async fn answers() {
    let (answers, seconds): (u32, f64) = (number("ANSWERS", 50_000), number("SECONDS", 20.0));
    // Names are dear to make: each is told with several labels.
    let peers: Vec<String> =
        (0..answers.min(5000)).map(|_| Keypair::generate_ed25519().public().to_peer_id().to_string()).collect();
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
    socket.set_multicast_loop_v4(false).unwrap();
    let to = SocketAddr::from((Ipv4Addr::new(224, 0, 0, 251), 5353));
    go().await;
    let begun = Instant::now();
    let mut sent = 0_u32;
    while sent < answers {
        let due = begun.elapsed().as_secs_f64() / seconds * f64::from(answers);
        while f64::from(sent) < due && sent < answers {
            let packet = answer(&peers[sent as usize % peers.len()], &format!("rogue{sent:032}"));
            let _ = socket.send_to(&packet, to).await;
            sent += 1;
        }
        sleep(Duration::from_millis(1)).await;
    }
    over(format!("{sent} answers in {:.1} s", begun.elapsed().as_secs_f64())).await;
}
