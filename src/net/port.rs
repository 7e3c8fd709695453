//! Whether a TCP port is taken by another process.
//!
//! libp2p-tcp listens with `SO_REUSEPORT`, so that dials may leave from the listening port. With it a second daemon of the
//! same user listens on the same port without an error, and the kernel deals out the connections among the two: half of the
//! dials reach the wrong node. A socket without that option tells the truth.

use std::io;
use std::net::SocketAddr;

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};

/// Fails with `AddrInUse` when another socket listens where `address` wants to; anything but TCP on a fixed port passes.
pub(crate) fn check(address: &Multiaddr) -> io::Result<()> {
    let mut parts = address.iter();
    let ip = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    let port = match parts.next() {
        Some(Protocol::Tcp(port)) if port != 0 => port,
        _ => return Ok(()),
    };
    let address = SocketAddr::new(ip, port);
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // Connections of an earlier run that wait for their end do not count; a listener does, with or without this option.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    Ok(bind(&socket, &address)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_port_that_another_socket_listens_on_is_taken_even_if_it_shares() {
        for shares in [false, true] {
            let other = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            sockopt::set_socket_reuseaddr(&other, true).unwrap();
            sockopt::set_socket_reuseport(&other, shares).unwrap();
            bind(&other, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
            rustix::net::listen(&other, 1).unwrap();
            let other = TcpListener::from(other);
            let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", other.local_addr().unwrap().port()).parse().unwrap();
            assert_eq!(check(&address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
            drop(other);
            check(&address).unwrap();
        }
    }

    #[test]
    fn what_is_no_fixed_tcp_port_passes() {
        for address in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/9/quic-v1", "/memory/1"] {
            check(&address.parse().unwrap()).unwrap();
        }
    }
}
