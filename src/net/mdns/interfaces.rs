//! The interfaces of this machine, read from the kernel when it says that something about them has changed.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::watch;

/// Changes come in bundles: a cable that is plugged in is a handful of them.
const SETTLE: Duration = Duration::from_millis(10);

/// An address of an interface, and how many of its bits say which network it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Net {
    pub ip: IpAddr,
    pub prefix: u8,
}

impl Net {
    /// Whether `other` is a neighbour. With DHCPv6 an address has a prefix of its own, while its neighbours share 64 bits.
    pub(super) fn contains(&self, other: IpAddr) -> bool {
        match (self.ip, other) {
            (IpAddr::V4(ip), IpAddr::V4(other)) => {
                let differ = u32::from(ip) ^ u32::from(other);
                differ.checked_shr(32_u32.saturating_sub(self.prefix.into())).unwrap_or(0) == 0
            }
            (IpAddr::V6(ip), IpAddr::V6(other)) => {
                let differ = u128::from(ip) ^ u128::from(other);
                differ.checked_shr(128_u32.saturating_sub(self.prefix.min(64).into())).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub index: u32,
    pub name: String,
    /// It is switched on and has a carrier.
    pub up: bool,
    pub multicast: bool,
    pub loopback: bool,
    /// Those that can be used: an IPv6 address is not before the kernel has made sure that nobody else has it.
    pub addresses: Vec<Net>,
}

fn other(error: rtnetlink::Error) -> io::Error {
    io::Error::other(error)
}

fn address(message: &AddressMessage) -> Option<Net> {
    if message.header.flags.intersects(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed) {
        return None;
    }
    let (mut own, mut shown) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => own = Some(*ip),
            // Of a point-to-point link this is the other end.
            AddressAttribute::Address(ip) => shown = Some(*ip),
            _ => {}
        }
    }
    own.or(shown).map(|ip| Net { ip, prefix: message.header.prefix_len })
}

async fn list(handle: &Handle) -> io::Result<Vec<Interface>> {
    let mut found: BTreeMap<u32, Interface> = BTreeMap::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(other)? {
        let (index, flags) = (link.header.index, link.header.flags);
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let interface = Interface {
            index,
            name: name.unwrap_or_else(|| format!("interface {index}")),
            up: flags.contains(LinkFlags::Up | LinkFlags::Running),
            multicast: flags.contains(LinkFlags::Multicast),
            loopback: flags.contains(LinkFlags::Loopback),
            addresses: Vec::new(),
        };
        found.insert(index, interface);
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(other)? {
        if let (Some(net), Some(interface)) = (address(&message), found.get_mut(&message.header.index)) {
            interface.addresses.push(net);
        }
    }
    Ok(found.into_values().collect())
}

/// Tells all interfaces, now and after each change, for ever.
///
/// # Errors
/// The kernel does not tell, or not any more.
pub(super) async fn watch(tell: watch::Sender<Vec<Interface>>) -> io::Error {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut changes) = match new_multicast_connection(&groups) {
        Ok(opened) => opened,
        Err(error) => return error,
    };
    let telling = async {
        loop {
            match list(&handle).await {
                Ok(interfaces) => drop(tell.send_if_modified(|known| {
                    let changed = *known != interfaces;
                    *known = interfaces;
                    changed
                })),
                Err(error) => return error,
            }
            if changes.next().await.is_none() {
                return io::ErrorKind::BrokenPipe.into();
            }
            tokio::time::sleep(SETTLE).await;
            while changes.try_recv().is_ok() {}
        }
    };
    tokio::select! {
        () = connection => io::ErrorKind::BrokenPipe.into(),
        error = telling => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(ip: &str, prefix: u8) -> Net {
        Net { ip: ip.parse().unwrap(), prefix }
    }

    #[test]
    fn neighbours_share_the_first_bits() {
        for (net, other, expected) in [
            (net("10.1.2.3", 24), "10.1.2.200", true),
            (net("10.1.2.3", 24), "10.1.3.3", false),
            (net("10.1.2.3", 32), "10.1.2.3", true),
            (net("10.1.2.3", 32), "10.1.2.4", false),
            (net("10.1.2.3", 0), "192.0.2.1", true),
            (net("fd71::1", 64), "fd71::2:1", true),
            (net("fd71::1", 64), "fd72::1", false),
            (net("fd71::1", 128), "fd71::2", true),
            (net("fd71::1", 200), "fd72::2", false),
            (net("fd71::1", 64), "10.1.2.3", false),
        ] {
            assert_eq!(net.contains(other.parse().unwrap()), expected, "{net:?} {other}");
        }
    }

    #[tokio::test]
    async fn the_loopback_interface_is_among_those_of_this_machine() {
        let (tell, mut told) = watch::channel(Vec::new());
        tokio::select! {
            error = watch(tell) => eprintln!("SKIPPED: no netlink here: {error}"),
            interfaces = told.wait_for(|interfaces| !interfaces.is_empty()) => {
                let interfaces = interfaces.unwrap();
                let loopback = interfaces.iter().find(|interface| interface.loopback).unwrap();
                assert_eq!(loopback.name, "lo");
            }
        }
    }
}
