//! The part of the network task that makes this node reachable: what others see of it, what AutoNAT found, and the way
//! from a relayed connection to a direct one. Places at relays are in `places`.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use libp2p::autonat::v2::client;
use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId, dcutr, kad, relay};
use tokio::time::Instant;

use super::address::{self, ip_of};
use super::meter::Limit;
use super::places::Places;
use super::reach::{Observations, candidates};
use super::relaying::Load;
use super::task::{Due, Task};
use super::{jitter, streams};
use crate::domain::cluster::ClusterId;
use crate::domain::network::{Nat, ReachFacts};

/// Between two tries to reach a peer directly that is connected through a relay: the first, and the longest.
const DIRECT_FIRST: Duration = Duration::from_secs(1);
const DIRECT_LONGEST: Duration = Duration::from_secs(300);
/// By which a peer says that it tests addresses of others: the library does not name it.
pub(super) const TEST_PROTOCOL: &str = "/libp2p/autonat/2/dial-request";
/// Peers that are dialled once more when AutoNAT begins anew.
const MAX_TESTERS: usize = 2;
/// Relays whose limits are remembered.
const MAX_LIMITS: usize = 128;
/// Addresses whose test failed that are remembered.
const MAX_UNREACHABLE: usize = 8;

/// What the task knows of its own reachability.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    pub observations: Observations,
    pub places: Places,
    /// What each relay allows a circuit.
    limits: HashMap<PeerId, Limit>,
    /// Others reach this node without a relay, as far as is known.
    pub is_direct: bool,
    /// Addresses from the configuration: not found out, and not lost.
    configured: HashSet<Multiaddr>,
    /// IPv6 addresses at which somebody outside did reach this node. A global one alone says nothing: most homes have a
    /// firewall before it.
    reached6: HashSet<IpAddr>,
    unreachable: Vec<(Multiaddr, String)>,
    /// Pauses between dials to peers that are relayed.
    direct_pauses: HashMap<PeerId, Duration>,
    /// Clusters whose record is published with addresses that are no longer all.
    pub stale: HashSet<ClusterId>,
    /// Where connected peers say that they are reached.
    pub told: HashMap<PeerId, Vec<Multiaddr>>,
    /// Connected peers that test addresses of others (AutoNAT v2).
    pub testers: HashSet<PeerId>,
    pub load: Load,
}

/// What a relay says that it allows each circuit.
fn limit_of(event: &relay::client::Event) -> Option<(PeerId, Limit)> {
    use relay::client::Event;
    match event {
        Event::ReservationReqAccepted { relay_peer_id, limit, .. }
        | Event::OutboundCircuitEstablished { relay_peer_id, limit } => {
            let limit = limit.as_ref()?;
            Some((*relay_peer_id, Limit { bytes: limit.data_in_bytes(), duration: limit.duration() }))
        }
        // It comes through a place of ours, and what that allows is known.
        Event::InboundCircuitEstablished { .. } => None,
    }
}

impl Reach {
    /// Notes what a relay allows. With too many of them one is forgotten: circuits through it are metered no worse than by
    /// the relay itself.
    fn note_limit(&mut self, relay: PeerId, limit: Limit) {
        if self.limits.len() >= MAX_LIMITS
            && !self.limits.contains_key(&relay)
            && let Some(any) = self.limits.keys().next().copied()
        {
            self.limits.remove(&any);
        }
        self.limits.insert(relay, limit);
    }

    /// The last connection to a peer is gone.
    pub(super) fn forget_peer(&mut self, peer: &PeerId) {
        self.observations.forget(peer);
        self.told.remove(peer);
        self.testers.remove(peer);
        self.limits.remove(peer);
        self.direct_pauses.remove(peer);
    }
}

impl Task<'_> {
    /// Addresses that this machine itself listens on: places at relays count as listeners too.
    pub(super) fn own_listeners(&self) -> impl Iterator<Item = &Multiaddr> + Clone {
        let listening: Vec<&Multiaddr> = self.swarm.listeners().filter(|address| !address::is_circuit(address)).collect();
        listening.into_iter()
    }

    fn own_ips(&self) -> Vec<IpAddr> {
        self.own_listeners().filter_map(ip_of).collect()
    }

    /// Announces the configured addresses: ports that are forwarded to this node.
    pub(super) fn announce_configured(&mut self) {
        for text in self.lasting.config.announce.clone() {
            let parsed = text.parse::<Multiaddr>().ok().map(|address| address::without_peer(&address));
            let Some(address) = parsed.filter(|address| address::announceable(address, &self.networks)) else {
                let problem = format!(
                    "network.announce: {text:?} is not announced: it must be /ip4|ip6/…/udp/PORT/quic-v1 or …/tcp/PORT at which others reach this node"
                );
                tracing::warn!("{problem}");
                self.problems.insert("announce", problem);
                continue;
            };
            self.reach.configured.insert(address.clone());
            self.reachable(address);
        }
    }

    /// Whether an address is from the configuration.
    pub(super) fn is_configured(&self, address: &Multiaddr) -> bool {
        self.reach.configured.contains(address)
    }

    /// Whether others reach this node without a relay: an address of its own that is confirmed, and not one that is good in
    /// its own network alone while others see it behind a NAT.
    fn is_reached(&self) -> bool {
        let translated = self.reach.observations.translated(&self.own_ips());
        self.swarm.external_addresses().filter(|address| !address::is_circuit(address)).any(|address| {
            let global = address::is_global(address);
            match ip_of(address) {
                _ if self.reach.configured.contains(address) => true,
                Some(ip) if global && ip.is_ipv6() => self.bootstrap.is_empty() || self.reach.reached6.contains(&ip),
                Some(_) => global || !translated,
                None => false,
            }
        })
    }

    /// What is known of this node's addresses changed: what hangs on it is set anew.
    fn rejudge(&mut self) {
        let direct = self.is_reached();
        if direct != self.reach.is_direct {
            tracing::debug!(direct, "reachable without a relay: {direct}");
            self.dirty = true;
        }
        self.reach.is_direct = direct;
        let mode = if direct { kad::Mode::Server } else { kad::Mode::Client };
        let behaviour = self.swarm.behaviour_mut();
        behaviour.kad.set_mode(Some(mode));
        behaviour.dial_back.enabled = direct;
        if !direct {
            self.agenda.no_later(Due::Places, Instant::now());
        }
        if self.lasting.config.relaying.enabled {
            if direct {
                self.problems.remove("relay");
            } else {
                let problem = "this node is to be a relay, and no address is known at which others reach it: let its port through, or name the address in [network] announce";
                self.problems.insert("relay", problem.to_owned());
            }
        }
    }

    /// The addresses of this node changed: publishes the records of all clusters anew, and tells connected peers.
    pub(super) fn addresses_changed(&mut self) {
        self.rejudge();
        self.dirty = true;
        let ids: Vec<ClusterId> = self.clusters.keys().cloned().collect();
        for id in ids {
            self.publish_record(&id);
        }
        let connected: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        self.swarm.behaviour_mut().identify.push(connected);
    }

    /// A peer said where it sees us on `connection`.
    pub(super) fn note_observed(&mut self, peer: PeerId, connection: ConnectionId, observed: &Multiaddr) {
        let known = self.swarm.behaviour().streams.connections(&peer).iter().find(|known| known.id == connection);
        let Some(dialed) = known.filter(|known| !known.relayed).map(|known| known.dialed) else { return };
        // Who came in by itself could name whatever it likes: nothing is tried because of its word.
        if !self.reach.observations.note(peer, observed, dialed) || !dialed {
            return;
        }
        let listening: Vec<Multiaddr> = self.own_listeners().cloned().collect();
        for candidate in candidates(observed, dialed, &listening) {
            if !address::dialable(&candidate, &self.networks) || !self.reach.observations.may_name(peer, &candidate) {
                continue;
            }
            self.swarm.behaviour_mut().punch.candidate(&candidate);
            // What this machine listens on itself needs no test, unless a firewall may be before it.
            let own = listening.contains(&candidate);
            if address::is_global(&candidate) && (!own || ip_of(&candidate).is_some_and(|ip| ip.is_ipv6())) {
                self.swarm.behaviour_mut().tester.candidate(&candidate);
            }
        }
        self.rejudge();
    }

    /// A connection came in at an IPv6 address of ours from another network: no firewall is before it.
    pub(super) fn note_reached(&mut self, local: &Multiaddr, remote: &Multiaddr) {
        let (Some(IpAddr::V6(at)), Some(IpAddr::V6(from))) = (ip_of(local), ip_of(remote)) else { return };
        let net = |ip: std::net::Ipv6Addr| u128::from(ip) >> 64;
        if net(at) != net(from) && self.reach.reached6.insert(at.into()) {
            self.rejudge();
        }
    }

    /// A behaviour confirmed an address: AutoNAT one of our own, the relay client one through a relay.
    pub(super) fn on_confirmed(&mut self, confirmed: &Multiaddr) {
        if address::is_circuit(confirmed) {
            self.on_circuit_address(None, confirmed);
            return;
        }
        tracing::info!(address = %confirmed, "reachable from outside at {confirmed}");
        self.reach.unreachable.retain(|(known, _)| known != confirmed);
        if let Some(ip) = ip_of(confirmed).filter(IpAddr::is_ipv6) {
            self.reach.reached6.insert(ip);
        }
        self.addresses_changed();
    }

    pub(super) fn on_tested(&mut self, event: client::Event) {
        let Err(error) = event.result else { return };
        tracing::debug!(address = %event.tested_addr, server = %event.server, %error, "not reachable from outside");
        self.reach.unreachable.retain(|(known, _)| *known != event.tested_addr);
        self.reach.unreachable.insert(0, (event.tested_addr, error.to_string()));
        self.reach.unreachable.truncate(MAX_UNREACHABLE);
    }

    pub(super) fn on_relay_client(&mut self, event: relay::client::Event) {
        if let relay::client::Event::ReservationReqAccepted { relay_peer_id, renewal, .. } = &event {
            self.on_place(*relay_peer_id, *renewal);
        }
        if let Some((relay, limit)) = limit_of(&event) {
            self.reach.note_limit(relay, limit);
        }
    }

    pub(super) fn on_relaying(&mut self, event: &relay::Event) {
        tracing::debug!(?event, "relay");
        let swarm = &self.swarm;
        self.reach.load.on_event(event, |peer| swarm.is_connected(peer));
    }

    pub(super) fn on_punched(&mut self, event: &dcutr::Event) {
        match &event.result {
            Ok(_) => tracing::debug!(peer = %event.remote_peer_id, "a hole is punched"),
            Err(error) => tracing::debug!(peer = %event.remote_peer_id, %error, "no hole could be punched"),
        }
    }

    /// A connection came up: what is to be done about relayed ones.
    pub(super) fn on_path(&mut self, peer: PeerId, now: Instant) {
        let connections = self.swarm.behaviour().streams.connections(&peer);
        for known in connections.iter().filter(|known| known.relayed) {
            if let (Some(meter), Some(limit)) = (&known.meter, known.relay.and_then(|relay| self.reach.limits.get(&relay))) {
                meter.allow(*limit);
            }
        }
        let any_direct = connections.first().is_some_and(|best| !best.relayed);
        let relayed: Vec<ConnectionId> = connections.iter().filter(|known| known.relayed).map(|known| known.id).collect();
        if relayed.is_empty() {
            return;
        }
        if !any_direct {
            self.agenda.no_later(Due::Direct(peer), now + jitter(DIRECT_FIRST));
            return;
        }
        // The next prompt goes directly; one that runs ends where it is. Only the lower one moves the membership streams.
        self.reach.direct_pauses.remove(&peer);
        self.lasting.pool.retire(peer, relayed.iter().copied().collect());
        if self.members.is_member(&peer) {
            self.lasting.pool.warm(peer);
        }
        if self.local.to_bytes() < peer.to_bytes() {
            for connection in relayed {
                self.move_sessions(peer, connection);
            }
        }
    }

    /// A connection went: a relayed one may be all that is left, and is good enough again.
    pub(super) fn on_path_lost(&mut self, peer: PeerId, now: Instant) {
        let connections = self.swarm.behaviour().streams.connections(&peer);
        if connections.first().is_some_and(|best| best.relayed) {
            self.lasting.pool.retire(peer, HashSet::new());
            self.agenda.no_later(Due::Direct(peer), now + jitter(DIRECT_FIRST));
        }
    }

    /// Dials a peer directly that is connected through a relay alone: two in one LAN may have met at a relay, and a port
    /// may have been opened since.
    pub(super) fn seek_direct(&mut self, peer: PeerId, now: Instant) {
        let connections = self.swarm.behaviour().streams.connections(&peer);
        if connections.first().is_none_or(|best| !best.relayed) {
            self.reach.direct_pauses.remove(&peer);
            return;
        }
        let pause = self.reach.direct_pauses.entry(peer).or_insert(DIRECT_FIRST);
        *pause = (*pause * 2).min(DIRECT_LONGEST);
        let again = now + jitter(*pause);
        self.agenda.set(Due::Direct(peer), again);
        let direct: Vec<Multiaddr> =
            self.book.addresses(&peer).iter().filter(|known| !address::is_circuit(known)).cloned().collect();
        if !direct.is_empty() {
            let options = DialOpts::peer_id(peer).condition(PeerCondition::NotDialing).addresses(direct).build();
            if let Err(error) = self.swarm.dial(options) {
                tracing::debug!(%peer, %error, "not dialled directly");
            }
        }
    }

    /// Whether connections of this peer carry what does not show on them: circuits of others, or ours to others.
    pub(super) fn carries(&self, peer: &PeerId) -> bool {
        let through = |connection: &streams::Connection| connection.relay == Some(*peer);
        self.reach.load.serves(peer)
            || self.reach.places.is_at(peer)
            || self.swarm.behaviour().streams.all().any(|(_, connection)| through(connection))
    }

    /// This machine has the address `lost` no more: what was found out with it counts no more. Behind a NAT nobody knows
    /// which of its addresses was seen outside; IPv6 addresses are seen as they are, and the others go on.
    pub(super) fn forget_reach(&mut self, lost: IpAddr) {
        let gone = |known: &Multiaddr| ip_of(known).is_some_and(|ip| ip == lost || (ip.is_ipv4() && lost.is_ipv4()));
        self.reach.observations.forget_addresses(gone);
        self.reach.reached6.remove(&lost);
        self.reach.unreachable.retain(|(known, _)| !gone(known));
        self.swarm.behaviour_mut().tester.reset();
        let own: HashSet<Multiaddr> = self.own_listeners().cloned().collect();
        let found: Vec<Multiaddr> = self.swarm.external_addresses().filter(|known| gone(known)).cloned().collect();
        for address in found {
            // The relay client keeps its own in step.
            if !address::is_circuit(&address) && !own.contains(&address) && !self.reach.configured.contains(&address) {
                self.swarm.remove_external_address(&address);
            }
        }
        self.addresses_changed();
        self.find_testers();
    }

    /// AutoNAT hears once on each connection that its other end tests addresses, and what it heard went with its outcomes:
    /// some of those peers are dialled once more, beside the connection that there is. They also tell anew where they see
    /// this node. The second connection goes by itself a little later.
    fn find_testers(&mut self) {
        let lone = |peer: &PeerId| match self.swarm.behaviour().streams.connections(peer) {
            [only] if only.dialed && !only.relayed => Some((*peer, address::without_peer(&only.remote))),
            _ => None,
        };
        let mut found: Vec<(PeerId, Multiaddr)> = self.reach.testers.iter().filter_map(lone).collect();
        found.sort_by_key(|(peer, _)| (!self.is_bootstrap(peer), !self.members.is_member(peer), *peer));
        for (peer, address) in found.into_iter().take(MAX_TESTERS) {
            let options = DialOpts::peer_id(peer).condition(PeerCondition::NotDialing).addresses(vec![address]).build();
            if let Err(error) = self.swarm.dial(options) {
                tracing::debug!(%peer, %error, "not dialled once more");
            }
        }
    }

    /// Where this node can be reached, for people to paste: configured, its own, through relays.
    pub(super) fn dialable_addresses(&self) -> Vec<String> {
        let mut all: Vec<Multiaddr> = self.reach.configured.iter().cloned().collect();
        all.sort();
        all.extend(address::for_others(self.own_listeners()).into_iter().cloned());
        all.extend(self.swarm.external_addresses().filter(|known| address::is_circuit(known)).map(address::without_peer));
        let mut told: Vec<String> = Vec::new();
        for address in all.iter().map(ToString::to_string) {
            if !told.contains(&address) {
                told.push(address);
            }
        }
        told
    }

    /// How others reach this node, for the doctor.
    pub(super) fn reach_facts(&self) -> ReachFacts {
        let listening: Vec<Multiaddr> = self.own_listeners().cloned().collect();
        let confirmed = self.swarm.external_addresses().any(|known| address::is_global(known) && !listening.contains(known));
        let mut announced: Vec<String> =
            self.swarm.external_addresses().map(|known| address::without_peer(known).to_string()).collect();
        announced.sort();
        announced.dedup();
        ReachFacts {
            nat: if confirmed { Nat::None } else { self.reach.observations.nat(&listening) },
            observed: self.reach.observations.addresses().iter().map(ToString::to_string).collect(),
            announced,
            unreachable: self.reach.unreachable.iter().map(|(known, why)| (known.to_string(), why.clone())).collect(),
            reservations: self.place_facts(),
            relaying: self.lasting.config.relaying.enabled.then(|| self.reach.load.facts()),
        }
    }

    /// Whether this node answers questions in the DHT: it does when others reach it without a relay.
    pub(super) fn serves_dht(&self) -> bool {
        self.reach.is_direct
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_relays_are_bounded_and_what_is_known_of_a_peer_goes_with_it() {
        let (mut reach, last) = (Reach::default(), PeerId::random());
        for _ in 0..MAX_LIMITS {
            reach.note_limit(PeerId::random(), Limit { bytes: None, duration: None });
        }
        assert_eq!(reach.limits.len(), MAX_LIMITS);
        reach.note_limit(last, Limit { bytes: None, duration: None });
        reach.note_limit(last, Limit { bytes: None, duration: None });
        assert_eq!(reach.limits.len(), MAX_LIMITS);
        assert!(reach.limits.contains_key(&last));
        reach.direct_pauses.insert(last, DIRECT_LONGEST);
        reach.forget_peer(&last);
        assert!(reach.direct_pauses.is_empty() && !reach.limits.contains_key(&last));
    }
}
