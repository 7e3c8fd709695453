//! A socket for mDNS at one interface, for one family: it sends there and hears what comes from there, nothing else.
//!
//! It is bound to the group's address: packets to this machine's own address are another program's (Avahi, a resolver), and
//! nobody beyond the link can send to the group.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use rustix::net::sockopt::set_ip_multicast_if_with_ifindex;
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::net::UdpSocket;

use super::Leg;

const PORT: u16 = 5353;
const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
/// As RFC 6762 §11 wants it; nothing that is sent to these groups passes a router.
const HOPS: u32 = 255;
/// What waits to be read: a question that two hundred nodes answer.
const RECEIVE_BUFFER: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Wire {
    leg: Leg,
    socket: UdpSocket,
}

impl Wire {
    /// Opens a socket at `leg`. `source` is what it sends from, over IPv4.
    ///
    /// # Errors
    /// Another program has the port for itself, or the interface does not take it.
    pub(super) fn open(leg: Leg, source: Option<Ipv4Addr>) -> io::Result<Self> {
        let domain = if leg.ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        // Not SO_REUSEPORT: Linux deals out what is for one socket alone among all that share the port, and so a packet of
        // one interface to the socket of another (seen with 6.18). SO_REUSEADDR lets Avahi and others have the port as well.
        socket.set_reuse_address(true)?;
        // More than is needed on a quiet network, less than is allowed everywhere.
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
        if leg.ipv6 {
            socket.set_only_v6(true)?;
            socket.set_multicast_loop_v6(true)?;
            socket.set_multicast_hops_v6(HOPS)?;
            socket.set_multicast_if_v6(leg.index)?;
            // Kernels before 4.20 do not know it; the address that the socket is bound to names the interface anyway.
            let _ = socket.set_multicast_all_v6(false);
        } else {
            socket.set_multicast_loop_v4(true)?;
            socket.set_multicast_ttl_v4(HOPS)?;
            let source = source.unwrap_or(Ipv4Addr::UNSPECIFIED);
            set_ip_multicast_if_with_ifindex(&socket, &Ipv4Addr::UNSPECIFIED, &source, leg.index)?;
            // Else it hears what is sent to the group at any interface at which any program has joined it.
            socket.set_multicast_all_v4(false)?;
        }
        socket.bind(&group(leg))?;
        let wire = Self { leg, socket: UdpSocket::from_std(socket.into())? };
        wire.listen(true)?;
        Ok(wire)
    }

    /// Joins the group, or leaves it: the kernel then drops its packets without waking anybody.
    ///
    /// # Errors
    /// The interface is gone.
    pub(super) fn listen(&self, listen: bool) -> io::Result<()> {
        let socket = SockRef::from(&self.socket);
        let interface = InterfaceIndexOrAddress::Index(self.leg.index);
        match (self.leg.ipv6, listen) {
            (false, true) => socket.join_multicast_v4_n(&GROUP_V4, &interface),
            (false, false) => socket.leave_multicast_v4_n(&GROUP_V4, &interface),
            (true, true) => socket.join_multicast_v6(&GROUP_V6, self.leg.index),
            (true, false) => socket.leave_multicast_v6(&GROUP_V6, self.leg.index),
        }
    }

    /// Sends a packet to the group. It goes into the buffer of the interface or is lost, as packets may be: nobody waits.
    ///
    /// # Errors
    /// It could not be sent.
    pub(super) fn send(&self, packet: &[u8]) -> io::Result<()> {
        SockRef::from(&self.socket).send_to(packet, &group(self.leg)).map(drop)
    }

    /// The next packet, and who sent it.
    pub(super) fn poll_receive(
        &self,
        cx: &mut std::task::Context<'_>,
        buffer: &mut [u8],
    ) -> std::task::Poll<io::Result<(usize, SocketAddr)>> {
        let mut buffer = tokio::io::ReadBuf::new(buffer);
        self.socket.poll_recv_from(cx, &mut buffer).map_ok(|from| (buffer.filled().len(), from))
    }
}

fn group(leg: Leg) -> SockAddr {
    if leg.ipv6 { SocketAddrV6::new(GROUP_V6, PORT, 0, leg.index).into() } else { SocketAddr::from((GROUP_V4, PORT)).into() }
}
