//! Which addresses are worth dialling, announcing, telling to others. Hints come from strangers: what cannot lead to a
//! member is dropped before it is stored.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

use crate::wire::limits::MAX_ADDRESS_BYTES;

/// Longest address as text in a configuration.
const MAX_TEXT_BYTES: usize = 256;

/// A range of private addresses that this machine has an address in. Addresses of others in the same range may be
/// reachable (routed networks without NAT); those of another range are somebody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    TenSlash8,
    OneSevenTwoSlash12,
    OneNineTwoSlash16,
    CarrierNat,
    UniqueLocal,
    Loopback,
}

fn network(ip: IpAddr) -> Option<Network> {
    match ip {
        IpAddr::V4(ip) => match ip.octets() {
            [10, ..] => Some(Network::TenSlash8),
            [172, second, ..] if (16..32).contains(&second) => Some(Network::OneSevenTwoSlash12),
            [192, 168, ..] => Some(Network::OneNineTwoSlash16),
            [100, second, ..] if (64..128).contains(&second) => Some(Network::CarrierNat),
            [127, ..] => Some(Network::Loopback),
            _ => None,
        },
        IpAddr::V6(ip) if ip.is_unique_local() => Some(Network::UniqueLocal),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(Network::Loopback),
        IpAddr::V6(_) => None,
    }
}

/// The networks that `addresses` of this machine lie in.
pub(crate) fn networks_of<'a>(addresses: impl Iterator<Item = &'a Multiaddr>) -> Vec<Network> {
    let ips: Vec<IpAddr> = addresses.filter_map(ip_of).collect();
    // A link-local address leads nowhere: it is neither dialled nor announced.
    let only_loopback = ips.iter().all(|ip| ip.is_loopback() || is_link_local(*ip));
    let mut found: Vec<Network> = Vec::new();
    for network in ips.into_iter().filter_map(network) {
        // Every machine has a loopback interface: as a hint it means something only where there is nothing else.
        if !found.contains(&network) && (network != Network::Loopback || only_loopback) {
            found.push(network);
        }
    }
    found
}

/// The IP that an address begins with.
pub(crate) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// QUIC version 1 or TCP on an IP address, or a circuit of a relay that is there: all that this node can dial without a
/// name.
fn is_transport(address: &Multiaddr) -> bool {
    let mut parts = address.iter();
    let ip = matches!(parts.next(), Some(Protocol::Ip4(_) | Protocol::Ip6(_)));
    let carrier = match parts.next() {
        Some(Protocol::Tcp(port)) => port != 0,
        Some(Protocol::Udp(port)) => port != 0 && parts.next() == Some(Protocol::QuicV1),
        _ => false,
    };
    let end = |part: Option<Protocol<'_>>| matches!(part, None | Some(Protocol::P2p(_)));
    ip && carrier
        && match (parts.next(), parts.next()) {
            // A circuit of a circuit is nobody's address.
            (Some(Protocol::P2p(_)), Some(Protocol::P2pCircuit)) => end(parts.next()) && parts.next().is_none(),
            (last, more) => end(last) && more.is_none(),
        }
}

/// Through a relay.
pub(crate) fn is_circuit(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// The relay of a circuit, when the address names it.
pub(crate) fn relay_of(address: &Multiaddr) -> Option<PeerId> {
    let mut before = None;
    for part in address {
        match part {
            Protocol::P2p(peer) => before = Some(peer),
            Protocol::P2pCircuit => return before,
            _ => before = None,
        }
    }
    None
}

/// The circuit to this node at a relay that is reached at `relay_address`.
pub(crate) fn circuit(relay_address: &Multiaddr, relay: PeerId) -> Multiaddr {
    without_peer(relay_address).with(Protocol::P2p(relay)).with(Protocol::P2pCircuit)
}

/// Over QUIC; of a circuit, the way to its relay.
pub(crate) fn is_quic(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::QuicV1)
}

/// On the loopback interface.
pub(crate) fn is_loopback(address: &Multiaddr) -> bool {
    ip_of(address).is_some_and(|ip| ip.is_loopback())
}

/// What other machines can do something with, of the addresses that this one listens on: neither loopback nor link-local.
/// All of them where there is nothing else, for nodes on one machine without a network.
pub(crate) fn for_others<'a>(listening: impl Iterator<Item = &'a Multiaddr> + Clone) -> Vec<&'a Multiaddr> {
    let usable = |address: &&Multiaddr| ip_of(address).is_some_and(|ip| !ip.is_loopback() && !is_link_local(ip));
    let mut chosen: Vec<&Multiaddr> = listening.clone().filter(usable).collect();
    if chosen.is_empty() {
        chosen.extend(listening);
    }
    // IPv4 first: it is what most people paste. QUIC before TCP, as it is dialled.
    chosen.sort_by_key(|address| (ip_of(address).is_some_and(|ip| ip.is_ipv6()), !is_quic(address)));
    chosen
}

/// An address of the machine itself that strangers everywhere may use: neither private nor special, nor a relay's.
pub(crate) fn is_global(address: &Multiaddr) -> bool {
    !is_circuit(address)
        && ip_of(address)
            .is_some_and(|ip| network(ip).is_none() && !is_link_local(ip) && !ip.is_unspecified() && !ip.is_multicast())
}

/// Whether a hint is worth a dial: a transport of ours, not too long, an address that can be another node's, and a private
/// one only where this machine is in the same range. Loopback passes when this machine listens on nothing else.
pub(crate) fn dialable(address: &Multiaddr, ours: &[Network]) -> bool {
    let Some(ip) = ip_of(address) else { return false };
    let broadcast = matches!(ip, IpAddr::V4(Ipv4Addr::BROADCAST));
    address.len() <= MAX_ADDRESS_BYTES
        && is_transport(address)
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !broadcast
        && !is_link_local(ip)
        && network(ip).is_none_or(|network| ours.contains(&network))
}

/// Whether a listening address may be announced: never link-local or unspecified, and loopback only by a node that
/// listens on nothing else (several nodes on one machine without a network).
pub(crate) fn announceable(address: &Multiaddr, ours: &[Network]) -> bool {
    let Some(ip) = ip_of(address) else { return false };
    let loopback = ip.is_loopback() && !ours.contains(&Network::Loopback);
    let circuit = is_circuit(address);
    is_transport(address) && !circuit && !ip.is_unspecified() && !loopback && !is_link_local(ip) && !ip.is_multicast()
}

/// Whether an address says something of the way to others: none are dialled by their link-local addresses, and containers that
/// come and go take such addresses with them all day.
pub(crate) fn leads_elsewhere(address: &Multiaddr) -> bool {
    ip_of(address).is_some_and(|ip| !is_link_local(ip))
}

/// The IP address that this machine lost with the listener `lost`; `None` where another of its listeners still has it, and
/// for one that says nothing of the way to others.
pub(crate) fn lost_ip<'a>(lost: &Multiaddr, mut left: impl Iterator<Item = &'a Multiaddr>) -> Option<IpAddr> {
    let ip = ip_of(lost).filter(|&ip| !ip.is_loopback() && leads_elsewhere(lost))?;
    (!left.any(|known| ip_of(known) == Some(ip))).then_some(ip)
}

/// The `listening` addresses with the IP address of `seen`. The port does not matter: it is that of a listener only where
/// the dial left from it, and TCP dials of a node that has just started do not.
pub(crate) fn same_host<'a>(seen: &Multiaddr, listening: impl Iterator<Item = &'a Multiaddr>) -> Vec<Multiaddr> {
    let ip = ip_of(seen);
    listening.filter(|address| ip.is_some() && ip_of(address) == ip).cloned().collect()
}

/// Whether a member's address may be told to a member that we reach over loopback (or not).
pub(crate) fn for_view(address: &Multiaddr, to_loopback: bool) -> bool {
    let Some(ip) = ip_of(address) else { return false };
    address.len() <= MAX_ADDRESS_BYTES && is_transport(address) && !is_link_local(ip) && (to_loopback || !ip.is_loopback())
}

/// Without `/p2p/…` at the end. The relay of a circuit is part of the way, and stays.
pub(crate) fn without_peer(address: &Multiaddr) -> Multiaddr {
    let mut bare = address.clone();
    while let Some(Protocol::P2p(_)) = bare.iter().last() {
        bare.pop();
    }
    bare
}

/// The same address with port 0: any free port.
pub(crate) fn any_port(address: &Multiaddr) -> Multiaddr {
    address
        .iter()
        .map(|part| match part {
            Protocol::Tcp(_) => Protocol::Tcp(0),
            Protocol::Udp(_) => Protocol::Udp(0),
            other => other,
        })
        .collect()
}

/// A configured address to dial at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BootstrapAddress {
    /// As it is dialled; holds the name, when there is one, until it is resolved.
    pub address: Multiaddr,
    /// Whom it must lead to. Without it whoever answers there is believed.
    pub peer: Option<PeerId>,
    /// A DNS name to resolve first, and which family is wanted.
    pub name: Option<String>,
}

/// Why a text is no bootstrap address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BootstrapError {
    #[error("longer than {MAX_TEXT_BYTES} bytes")]
    TooLong,
    #[error("not a multiaddr: {0}")]
    Syntax(String),
    #[error("it must be /ip4|ip6|dns|dns4|dns6/…/udp/PORT/quic-v1 or …/tcp/PORT, best followed by /p2p/PEER-ID")]
    Shape,
    #[error("the address 0.0.0.0 or :: is no place to dial")]
    Unspecified,
    #[error("an address through a relay ends with the node behind it: …/p2p-circuit/p2p/PEER-ID")]
    NoDestination,
}

impl BootstrapAddress {
    /// As it was given.
    pub(crate) fn text(&self) -> String {
        match self.peer {
            Some(peer) => format!("{}/p2p/{peer}", self.address),
            None => self.address.to_string(),
        }
    }

    /// Reads an address as people paste it.
    pub(crate) fn parse(text: &str) -> Result<Self, BootstrapError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(BootstrapError::TooLong);
        }
        let whole: Multiaddr = text.trim().parse().map_err(|error| BootstrapError::Syntax(format!("{error}")))?;
        let peer = match whole.iter().last() {
            Some(Protocol::P2p(peer)) => Some(peer),
            _ => None,
        };
        let address = without_peer(&whole);
        let name = match address.iter().next() {
            Some(Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name)) => Some(name.into_owned()),
            _ => None,
        };
        let parsed = Self { address, peer, name };
        let sample = if parsed.name.is_some() {
            match parsed.address.iter().next() {
                Some(Protocol::Dns6(_)) => parsed.with_ip(Ipv6Addr::LOCALHOST.into()),
                _ => parsed.with_ip(Ipv4Addr::LOCALHOST.into()),
            }
        } else {
            Some(parsed.address.clone())
        };
        match sample {
            Some(sample) if is_transport(&sample) => {
                if is_circuit(&sample) && parsed.peer.is_none() {
                    Err(BootstrapError::NoDestination)
                } else if ip_of(&sample).is_some_and(|ip| ip.is_unspecified()) {
                    Err(BootstrapError::Unspecified)
                } else {
                    Ok(parsed)
                }
            }
            _ => Err(BootstrapError::Shape),
        }
    }

    /// The address with its name replaced by `ip`; `None` when the name asks for the other family.
    pub(crate) fn with_ip(&self, ip: IpAddr) -> Option<Multiaddr> {
        let mut parts = self.address.iter();
        let fits = match parts.next()? {
            Protocol::Dns4(_) => ip.is_ipv4(),
            Protocol::Dns6(_) => ip.is_ipv6(),
            _ => true,
        };
        let first = match ip {
            IpAddr::V4(ip) => Protocol::Ip4(ip),
            IpAddr::V6(ip) => Protocol::Ip6(ip),
        };
        fits.then(|| std::iter::once(first).chain(parts).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn only_addresses_that_can_be_another_node_are_dialled() {
        let ours = [Network::TenSlash8];
        for good in ["/ip4/10.1.2.3/tcp/4001", "/ip4/198.51.100.7/udp/4001/quic-v1", "/ip6/2001:db8::1/tcp/4001"] {
            assert!(dialable(&addr(good), &ours), "{good}");
        }
        for bad in [
            "/ip4/127.0.0.1/tcp/4001",
            "/ip4/0.0.0.0/tcp/4001",
            "/ip4/169.254.1.1/tcp/4001",
            "/ip4/224.0.0.251/udp/4001/quic-v1",
            "/ip4/255.255.255.255/tcp/4001",
            "/ip4/192.168.1.1/tcp/4001",
            "/ip6/fe80::1/tcp/4001",
            "/ip6/fd00::1/tcp/4001",
            "/ip4/198.51.100.7/tcp/0",
            "/ip4/198.51.100.7/udp/4001",
            "/dns4/example.org/tcp/4001",
            "/ip4/198.51.100.7/tcp/80/ws",
        ] {
            assert!(!dialable(&addr(bad), &ours), "{bad}");
        }
        assert!(dialable(&addr("/ip4/127.0.0.1/tcp/4001"), &[Network::Loopback]));
    }

    const RELAY: &str = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";

    #[test]
    fn a_circuit_is_as_good_as_the_way_to_its_relay() {
        let circuit = |carrier: &str| addr(&format!("{carrier}/p2p/{RELAY}/p2p-circuit"));
        for good in ["/ip4/198.51.100.7/udp/4001/quic-v1", "/ip6/2001:db8::1/tcp/4001", "/ip4/10.1.2.3/tcp/4001"] {
            assert!(dialable(&circuit(good), &[Network::TenSlash8]), "{good}");
            assert!(for_view(&circuit(good), false), "{good}");
            assert!(circuit(good).len() <= MAX_ADDRESS_BYTES);
            assert!(!announceable(&circuit(good), &[Network::TenSlash8]) && !is_global(&circuit(good)), "{good}");
        }
        for bad in ["/ip4/192.168.1.1/tcp/4001", "/ip4/127.0.0.1/tcp/4001", "/ip4/198.51.100.7/tcp/0", "/dns4/a.example/tcp/1"] {
            assert!(!dialable(&circuit(bad), &[]), "{bad}");
        }
        let there = "/ip4/198.51.100.7/tcp/4001";
        for bad in [
            format!("{there}/p2p-circuit"),
            format!("{there}/p2p/{RELAY}/p2p-circuit/p2p/{RELAY}/p2p-circuit"),
            format!("{there}/p2p/{RELAY}/p2p-circuit/tcp/1"),
            format!("/p2p/{RELAY}/p2p-circuit"),
        ] {
            assert!(!dialable(&addr(&bad), &[]), "{bad}");
        }
    }

    #[test]
    fn the_peer_at_the_end_is_taken_away_and_the_relay_is_not() {
        let there = "/ip4/198.51.100.7/udp/4001/quic-v1";
        assert_eq!(without_peer(&addr(&format!("{there}/p2p/{RELAY}"))), addr(there));
        let whole = addr(&format!("{there}/p2p/{RELAY}/p2p-circuit/p2p/{RELAY}"));
        let bare = addr(&format!("{there}/p2p/{RELAY}/p2p-circuit"));
        assert_eq!((without_peer(&whole), without_peer(&bare)), (bare.clone(), bare.clone()));
        assert_eq!(circuit(&addr(there), RELAY.parse().unwrap()), bare);
        assert_eq!(relay_of(&whole).unwrap().to_string(), RELAY);
        assert_eq!(relay_of(&addr(&format!("{there}/p2p-circuit"))), None);
        assert_eq!(relay_of(&addr(&format!("{there}/p2p/{RELAY}"))), None);
        assert!(is_quic(&bare) && is_circuit(&bare) && !is_circuit(&addr(there)));
    }

    #[test]
    fn loopback_counts_as_a_network_only_where_there_is_no_other() {
        let of = |texts: &[&str]| networks_of(texts.iter().map(|text| addr(text)).collect::<Vec<_>>().iter());
        assert_eq!(of(&["/ip4/127.0.0.1/tcp/1"]), [Network::Loopback]);
        assert_eq!(of(&["/ip4/127.0.0.1/tcp/1", "/ip6/fe80::1/tcp/1"]), [Network::Loopback]);
        assert_eq!(of(&["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1"]), [Network::TenSlash8]);
        assert_eq!(of(&["/ip4/127.0.0.1/tcp/1", "/ip4/198.51.100.7/tcp/1"]), []);
    }

    #[test]
    fn loopback_is_told_to_loopback_only() {
        assert!(for_view(&addr("/ip4/127.0.0.1/tcp/1"), true));
        assert!(!for_view(&addr("/ip4/127.0.0.1/tcp/1"), false));
        assert!(!for_view(&addr("/ip6/fe80::1/tcp/1"), true));
    }

    #[test]
    fn loopback_and_link_local_are_never_announced() {
        assert!(announceable(&addr("/ip4/10.0.0.1/tcp/1"), &[]));
        assert!(announceable(&addr("/ip4/127.0.0.1/tcp/1"), &[Network::Loopback]));
        for bad in ["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/ip6/fe80::1/tcp/1", "/ip4/0.0.0.0/tcp/1"] {
            assert!(!announceable(&addr(bad), &[Network::TenSlash8]), "{bad}");
        }
    }

    #[test]
    fn who_is_seen_at_its_own_ip_is_reachable_at_all_its_listeners_there() {
        let listening =
            ["/ip4/10.0.0.1/udp/4001/quic-v1", "/ip4/10.0.0.1/tcp/4001", "/ip4/10.1.0.1/tcp/4001", "/ip6/fd00::1/tcp/4001"];
        let listening: Vec<Multiaddr> = listening.iter().map(|text| addr(text)).collect();
        let seen = |at: &str| same_host(&addr(at), listening.iter());
        assert_eq!(seen("/ip4/10.0.0.1/tcp/54321"), listening[..2]);
        assert_eq!(seen("/ip4/198.51.100.7/tcp/4001"), []);
        assert_eq!(seen("/dns4/node.example/tcp/4001"), []);
    }

    #[test]
    fn bootstrap_addresses_are_checked_before_they_are_dialled() {
        let peer = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
        let pinned = BootstrapAddress::parse(&format!("/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{peer}")).unwrap();
        assert_eq!(pinned.peer.unwrap().to_string(), peer);
        assert_eq!(pinned.address, addr("/ip4/192.0.2.1/udp/4001/quic-v1"));
        let relayed = BootstrapAddress::parse(&format!("/ip4/192.0.2.1/tcp/4001/p2p/{peer}/p2p-circuit/p2p/{peer}")).unwrap();
        assert_eq!(relayed.text(), format!("/ip4/192.0.2.1/tcp/4001/p2p/{peer}/p2p-circuit/p2p/{peer}"));
        let named = BootstrapAddress::parse("/dns4/node.example/tcp/4001").unwrap();
        assert_eq!(named.with_ip(Ipv4Addr::new(192, 0, 2, 9).into()), Some(addr("/ip4/192.0.2.9/tcp/4001")));
        assert_eq!(named.with_ip(Ipv6Addr::LOCALHOST.into()), None);
        for (bad, error) in [
            ("/ip4/0.0.0.0/tcp/4001", BootstrapError::Unspecified),
            ("/ip4/192.0.2.1", BootstrapError::Shape),
            ("/ip4/192.0.2.1/udp/4001", BootstrapError::Shape),
            ("/ip4/192.0.2.1/tcp/4001/p2p-circuit", BootstrapError::Shape),
            (&format!("/ip4/192.0.2.1/tcp/4001/p2p/{peer}/p2p-circuit"), BootstrapError::NoDestination),
        ] {
            assert_eq!(BootstrapAddress::parse(bad), Err(error), "{bad}");
        }
        assert!(matches!(BootstrapAddress::parse("192.0.2.1:4001"), Err(BootstrapError::Syntax(_))));
        let long = format!("/dns4/{}/tcp/1", "a".repeat(300));
        assert_eq!(BootstrapAddress::parse(&long), Err(BootstrapError::TooLong));
    }

    #[test]
    fn an_address_is_lost_with_its_last_listener_and_link_local_ones_never() {
        let at = |text: &str| text.parse::<Multiaddr>().unwrap();
        let left = [at("/ip4/10.0.0.5/tcp/4001"), at("/ip6/2001:db8::5/tcp/4001")];
        for (lost, ip) in [
            ("/ip4/10.0.0.5/udp/4001/quic-v1", None),
            ("/ip4/10.0.0.6/udp/4001/quic-v1", Some("10.0.0.6")),
            ("/ip6/2001:db8::6/udp/4001/quic-v1", Some("2001:db8::6")),
            ("/ip6/fe80::6/udp/4001/quic-v1", None),
            ("/ip4/169.254.0.6/udp/4001/quic-v1", None),
            ("/ip4/127.0.0.2/udp/4001/quic-v1", None),
        ] {
            assert_eq!(lost_ip(&at(lost), left.iter()), ip.map(|ip| ip.parse().unwrap()), "{lost}");
        }
    }
}
