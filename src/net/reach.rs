//! What others see of this node, and what that says of the NAT between. Pure; what peers tell is a hint each.

use std::collections::HashMap;
use std::net::IpAddr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

use super::address::{ip_of, is_circuit, is_quic, without_peer};
use crate::domain::network::Nat;

/// Peers whose word is kept.
const MAX_PEERS: usize = 64;

/// Addresses that are tried because of the word of one peer, while it is connected.
const MAX_NAMED: usize = 2;

/// Where one peer sees this node.
#[derive(Debug, Clone)]
struct Seen {
    at: Multiaddr,
    /// On a connection that this node dialled: the source of its packets, as NAT made it. Else where the peer dialled.
    dialed: bool,
}

/// Where peers see this node, the newest word of each for each transport.
#[derive(Debug, Default)]
pub(crate) struct Observations {
    seen: HashMap<(PeerId, bool), Seen>,
    /// What was tried because of each peer's word.
    named: HashMap<PeerId, Vec<Multiaddr>>,
}

fn port_of(address: &Multiaddr) -> Option<u16> {
    address.iter().find_map(|part| match part {
        Protocol::Udp(port) | Protocol::Tcp(port) => Some(port),
        _ => None,
    })
}

fn with_port(address: &Multiaddr, new: u16) -> Multiaddr {
    let changed = address.iter().map(|part| match part {
        Protocol::Udp(_) => Protocol::Udp(new),
        Protocol::Tcp(_) => Protocol::Tcp(new),
        other => other,
    });
    changed.collect()
}

/// Ports that are listened on over the transport and the family of `like`.
fn ports(listening: &[Multiaddr], like: &Multiaddr) -> Vec<u16> {
    let family = |address: &Multiaddr| ip_of(address).map(|ip| ip.is_ipv6());
    let same = |address: &&Multiaddr| is_quic(address) == is_quic(like) && family(address) == family(like);
    let mut found: Vec<u16> = listening.iter().filter(same).filter_map(port_of).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Addresses at which a node that is seen at `at` might be reached while it punches a hole, or at all.
pub(crate) fn candidates(at: &Multiaddr, dialed: bool, listening: &[Multiaddr]) -> Vec<Multiaddr> {
    let at = without_peer(at);
    let ports = ports(listening, &at);
    // QUIC leaves from the port that it listens on, and so what is seen is its mapping. TCP does only where it could.
    if !dialed || is_quic(&at) || port_of(&at).is_some_and(|port| ports.contains(&port)) {
        return vec![at];
    }
    ports.into_iter().map(|port| with_port(&at, port)).collect()
}

impl Observations {
    /// Notes what `peer` says; false when it says the same as before.
    pub(crate) fn note(&mut self, peer: PeerId, at: &Multiaddr, dialed: bool) -> bool {
        if is_circuit(at) || ip_of(at).is_none() {
            return false;
        }
        let key = (peer, is_quic(at));
        if self.seen.len() >= MAX_PEERS && !self.seen.contains_key(&key) && !(dialed && self.make_room()) {
            return false;
        }
        if !dialed && self.seen.get(&key).is_some_and(|known| known.dialed) {
            return false;
        }
        let at = without_peer(at);
        let changed = self.seen.get(&key).is_none_or(|known| known.at != at);
        self.seen.insert(key, Seen { at, dialed });
        changed
    }

    /// Makes room for the word of a peer that was dialled: one that came in by itself goes.
    fn make_room(&mut self) -> bool {
        let undialled = self.seen.iter().find(|(_, seen)| !seen.dialed).map(|(key, _)| *key);
        undialled.is_some_and(|key| self.seen.remove(&key).is_some())
    }

    /// Whether `address` is tried because `peer` named it: a peer has two, one for each transport.
    pub(crate) fn may_name(&mut self, peer: PeerId, address: &Multiaddr) -> bool {
        let named = self.named.entry(peer).or_default();
        if named.len() < MAX_NAMED && !named.contains(address) {
            named.push(address.clone());
        }
        named.contains(address)
    }

    /// A peer that is connected no more: what it saw may be true no more.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.named.remove(peer);
        self.seen.retain(|(known, _), _| known != peer);
    }

    /// Addresses that lead here no more.
    pub(crate) fn forget_addresses(&mut self, gone: impl Fn(&Multiaddr) -> bool) {
        self.seen.retain(|_, seen| !gone(&seen.at));
        self.named.clear();
    }

    /// Every address at which somebody sees this node.
    pub(crate) fn addresses(&self) -> Vec<Multiaddr> {
        let mut all: Vec<Multiaddr> = self.seen.values().map(|seen| seen.at.clone()).collect();
        all.sort();
        all.dedup();
        all
    }

    /// IPv4 addresses that are not of this machine and that peers see on connections which this node dialled: a stranger
    /// that comes in cannot make a server believe that there is a NAT before it.
    fn outside<'a>(&'a self, own: &'a [IpAddr]) -> impl Iterator<Item = (&'a PeerId, &'a Seen)> {
        let translated = |seen: &Seen| ip_of(&seen.at).is_some_and(|ip| ip.is_ipv4() && !own.contains(&ip));
        self.seen.iter().filter(move |(_, seen)| seen.dialed && translated(seen)).map(|((peer, _), seen)| (peer, seen))
    }

    /// Somebody sees another address than this machine has.
    pub(crate) fn translated(&self, own: &[IpAddr]) -> bool {
        self.outside(own).next().is_some()
    }

    /// The kind of NAT, as far as those who were dialled can tell.
    pub(crate) fn nat(&self, listening: &[Multiaddr]) -> Nat {
        let own: Vec<IpAddr> = listening.iter().filter_map(ip_of).collect();
        if !self.translated(&own) {
            let seen_as_it_is = self.seen.values().any(|seen| ip_of(&seen.at).is_some_and(|ip| own.contains(&ip)));
            return if seen_as_it_is { Nat::None } else { Nat::Unknown };
        }
        let kept = |seen: &Seen| port_of(&seen.at).is_some_and(|port| ports(listening, &seen.at).contains(&port));
        // QUIC has one socket for all: two peers that see two ports are proof of a port for each.
        let mut quic: Vec<&Seen> = self.outside(&own).map(|(_, seen)| seen).filter(|seen| is_quic(&seen.at)).collect();
        let peers = quic.len();
        let any_kept = self.outside(&own).any(|(_, seen)| kept(seen));
        quic.sort_by(|a, b| a.at.cmp(&b.at));
        quic.dedup_by(|a, b| a.at == b.at);
        match (peers, quic.len()) {
            (2.., 1) => Nat::Cone,
            (2.., _) => Nat::Symmetric,
            // A port that was not translated was not chosen for one peer.
            _ if any_kept => Nat::Cone,
            _ => Nat::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    fn listening() -> Vec<Multiaddr> {
        ["/ip4/10.0.0.5/udp/4001/quic-v1", "/ip4/10.0.0.5/tcp/4002", "/ip6/fd00::5/tcp/4003"].map(addr).to_vec()
    }

    fn seen(words: &[(&str, bool)]) -> Observations {
        let mut observations = Observations::default();
        for (at, dialed) in words {
            observations.note(PeerId::random(), &addr(at), *dialed);
        }
        observations
    }

    #[test]
    fn the_kind_of_nat_follows_from_what_several_peers_see() {
        let out = |port: u16| format!("/ip4/198.51.100.1/udp/{port}/quic-v1");
        for (words, nat) in [
            (vec![], Nat::Unknown),
            (vec![("/ip4/10.0.0.5/udp/4001/quic-v1".to_owned(), true)], Nat::None),
            (vec![(out(4001), true)], Nat::Cone),
            (vec![(out(50_000), true)], Nat::Unknown),
            (vec![(out(50_000), true), (out(50_000), true)], Nat::Cone),
            (vec![(out(50_000), true), (out(50_001), true)], Nat::Symmetric),
            (vec![("/ip4/198.51.100.1/tcp/4002".to_owned(), true)], Nat::Cone),
            (vec![("/ip4/198.51.100.1/tcp/60000".to_owned(), true)], Nat::Unknown),
            // A neighbour on the LAN sees the machine as it is; that says nothing of the way out.
            (vec![("/ip4/10.0.0.5/udp/4001/quic-v1".to_owned(), true), (out(4001), true)], Nat::Cone),
            // A stranger that came in is not asked.
            (vec![("/ip4/10.0.0.5/udp/4001/quic-v1".to_owned(), true), (out(9), false)], Nat::None),
        ] {
            let words: Vec<(&str, bool)> = words.iter().map(|(at, dialed)| (at.as_str(), *dialed)).collect();
            assert_eq!(seen(&words).nat(&listening()), nat, "{words:?}");
        }
    }

    #[test]
    fn candidates_are_mappings_where_they_are_known_and_guesses_with_the_ports_of_listeners_elsewhere() {
        let of = |at: &str, dialed| candidates(&addr(at), dialed, &listening());
        assert_eq!(of("/ip4/198.51.100.1/udp/50000/quic-v1", true), [addr("/ip4/198.51.100.1/udp/50000/quic-v1")]);
        assert_eq!(of("/ip4/198.51.100.1/tcp/60000", true), [addr("/ip4/198.51.100.1/tcp/4002")]);
        assert_eq!(of("/ip4/198.51.100.1/tcp/4002", true), [addr("/ip4/198.51.100.1/tcp/4002")]);
        assert_eq!(of("/ip4/198.51.100.1/tcp/60000", false), [addr("/ip4/198.51.100.1/tcp/60000")]);
        assert_eq!(of("/ip6/2001:db8::1/tcp/60000", true), [addr("/ip6/2001:db8::1/tcp/4003")]);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_changes_are_noticed() {
        let (mut observations, peer) = (Observations::default(), PeerId::random());
        assert!(observations.note(peer, &addr("/ip4/198.51.100.1/tcp/1"), true));
        assert!(!observations.note(peer, &addr("/ip4/198.51.100.1/tcp/1"), true));
        assert!(observations.note(peer, &addr("/ip4/198.51.100.2/tcp/1"), true));
        assert!(!observations.note(peer, &addr(&format!("/p2p/{peer}")), true));
        for _ in 0..1000 {
            observations.note(PeerId::random(), &addr("/ip4/198.51.100.1/tcp/1"), true);
        }
        assert_eq!(observations.seen.len(), MAX_PEERS);
        observations.forget(&peer);
        assert_eq!(observations.seen.len(), MAX_PEERS - 1);
        observations.forget_addresses(|at| *at == addr("/ip4/198.51.100.1/tcp/1"));
        assert!(observations.addresses().is_empty());
    }

    #[test]
    fn a_peer_that_was_dialled_is_heard_in_any_crowd_and_has_two_addresses_tried() {
        let (mut observations, dialled) = (Observations::default(), PeerId::random());
        for _ in 0..MAX_PEERS {
            assert!(observations.note(PeerId::random(), &addr("/ip4/198.51.100.1/tcp/1"), false));
        }
        assert!(!observations.note(PeerId::random(), &addr("/ip4/198.51.100.1/tcp/1"), false));
        assert!(observations.note(dialled, &addr("/ip4/198.51.100.9/tcp/1"), true));
        assert_eq!(observations.seen.len(), MAX_PEERS);
        let mut may = |port: u16| observations.may_name(dialled, &addr(&format!("/ip4/198.51.100.9/tcp/{port}")));
        assert_eq!([may(1), may(2), may(3), may(1)], [true, true, false, true]);
        observations.forget(&dialled);
        assert!(observations.may_name(dialled, &addr("/ip4/198.51.100.9/tcp/3")));
    }
}
