//! Asks an address that did not answer once more, past the swarm: QUIC says of a closed port and of a dropped packet the same,
//! nothing at all. A plain socket hears what the network says of it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::domain::network::DialOutcome;

/// An answer from the other end of the world takes a third of a second; one lost packet is made good.
const PATIENCE: Duration = Duration::from_millis(700);
const TRIES: usize = 2;
/// The least size of a first packet of QUIC (RFC 9000, 14.1): a server need not answer a smaller one.
const INITIAL_BYTES: usize = 1200;
/// Versions of this form are reserved to be unknown (RFC 9000, 15): whoever speaks QUIC answers with the list of those that
/// it knows, and begins nothing.
const UNKNOWN_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Somebody who speaks QUIC answers.
    Answered,
    /// As before: nothing.
    Silent,
    /// More than the dial told.
    Outcome(DialOutcome),
}

fn packet() -> Vec<u8> {
    let mut packet = vec![0xc0]; // long header
    packet.extend_from_slice(&UNKNOWN_VERSION);
    packet.push(8); // connection ids, of which the answer quotes both
    packet.extend_from_slice(b"ogdoctor");
    packet.push(8);
    packet.extend_from_slice(b"ogdoctor");
    packet.resize(INITIAL_BYTES, 0);
    packet
}

fn said(error: &std::io::Error) -> Found {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::ConnectionRefused => Found::Outcome(DialOutcome::Refused),
        ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown | ErrorKind::AddrNotAvailable => {
            Found::Outcome(DialOutcome::Unreachable)
        }
        // A rule of this machine's own firewall that rejects.
        ErrorKind::PermissionDenied => {
            Found::Outcome(DialOutcome::Other("the firewall of this machine does not let it out".to_owned()))
        }
        _ => Found::Silent,
    }
}

/// Sends a packet or two to `address` and listens for what comes back.
pub(super) async fn knock(address: SocketAddr) -> Found {
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let asked = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(address).await?;
        let mut answer = [0; 1500];
        for _ in 0..TRIES {
            socket.send(&packet()).await?;
            if let Ok(heard) = timeout(PATIENCE, socket.recv(&mut answer)).await {
                heard?;
                return Ok(Found::Answered);
            }
        }
        Ok(Found::Silent)
    };
    asked.await.unwrap_or_else(|error| said(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_a_silent_one_and_one_that_answers_are_told_apart() {
        let here = |socket: &UdpSocket| socket.local_addr().unwrap();
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        assert_eq!(knock(here(&silent)).await, Found::Silent);
        let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = here(&closed);
        drop(closed);
        assert_eq!(knock(at).await, Found::Outcome(DialOutcome::Refused));
        let answering = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = here(&answering);
        let asked = tokio::spawn(knock(at));
        let mut packet = [0; 1500];
        let (length, from) = answering.recv_from(&mut packet).await.unwrap();
        assert_eq!((length, packet[0] & 0x80, &packet[1..5]), (INITIAL_BYTES, 0x80, UNKNOWN_VERSION.as_slice()));
        answering.send_to(b"x", from).await.unwrap();
        assert_eq!(asked.await.unwrap(), Found::Answered);
    }
}
