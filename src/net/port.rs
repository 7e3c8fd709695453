//! Whether a TCP port is free, before libp2p listens on it.
//!
//! libp2p sets `SO_REUSEPORT` on its listeners, to dial from the port that it listens on. So a second daemon of the same
//! user can listen on the same port without an error, and the kernel gives each connection to either of them.

use std::io;
use std::net::SocketAddr;

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use rustix::net::{AddressFamily, SocketType, bind, socket, sockopt};

/// Fails as a listener without `SO_REUSEPORT` would. Other transports tell by themselves.
///
/// # Errors
/// The port is taken, or may not be used.
pub(crate) fn check(address: &Multiaddr) -> io::Result<()> {
    let mut parts = address.iter();
    let (ip, port) = match (super::address::ip_of(address), parts.nth(1)) {
        (Some(ip), Some(Protocol::Tcp(port))) if port != 0 => (ip, port),
        _ => return Ok(()),
    };
    let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let probe = socket(family, SocketType::STREAM, None)?;
    if ip.is_ipv6() {
        sockopt::set_ipv6_v6only(&probe, true)?;
    }
    // Connections of an earlier daemon that are still winding down do not count.
    sockopt::set_socket_reuseaddr(&probe, true)?;
    bind(&probe, &SocketAddr::new(ip, port))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_another_daemon_shares_willingly_is_taken_all_the_same() {
        let other = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseaddr(&other, true).unwrap();
        sockopt::set_socket_reuseport(&other, true).unwrap();
        bind(&other, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&other, 1).unwrap();
        let port = SocketAddr::try_from(rustix::net::getsockname(&other).unwrap()).unwrap().port();
        let tcp: Multiaddr = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
        assert_eq!(check(&tcp).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        for free in
            [format!("/ip4/127.0.0.1/udp/{port}/quic-v1"), format!("/ip6/::1/tcp/{port}"), "/ip4/127.0.0.1/tcp/0".to_owned()]
        {
            check(&free.parse().unwrap()).unwrap_or_else(|error| panic!("{free}: {error}"));
        }
        drop(other);
        check(&tcp).unwrap();
    }
}
