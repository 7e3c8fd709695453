//! The part of the network task that looks for members: mDNS, provider records, views; and dials.
//!
//! What it finds are candidates, hints to dial, no more: a candidate becomes a member by the hello alone.

use std::collections::HashSet;
use std::time::Duration;

use libp2p::kad::RecordKey;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::address;
use super::book::Source;
use super::dht::Need;
use super::duplicates::{self, Link};
use super::jitter;
use super::task::{Due, Task};
use crate::domain::cluster::ClusterId;
use crate::wire::keys;

/// When a node announces itself again after joining; then every ten minutes.
const ANNOUNCE_AGAIN: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(120)];
/// However late it is: never twice within this.
const ANNOUNCE_LEAST: Duration = Duration::from_secs(1);
const ANNOUNCE_EVERY: Duration = Duration::from_secs(600);
/// With this many members the DHT is asked rarely: views tell the rest.
const COMPANY: usize = 3;
/// First pause between two looks into the DHT, then twice as long each time: who starts together looks before the others
/// have announced themselves.
const LOOK_FIRST: Duration = Duration::from_secs(1);

impl Task<'_> {
    pub(super) fn ways_of_discovery(&self) -> Vec<&'static str> {
        let mut ways = Vec::new();
        if self.mdns.is_some() {
            ways.push("mdns");
        }
        if !self.bootstrap.is_empty() {
            ways.push("bootstrap");
            ways.push("kademlia");
        }
        ways
    }

    /// Hints from mDNS, the DHT or a view.
    pub(super) fn learn(&mut self, peer: PeerId, source: Source, addresses: Vec<Multiaddr>, now: Instant) {
        if peer == self.local || self.bans.is_banned(&peer, now.into_std()) {
            return;
        }
        let teller = if let Source::View(teller) = source { Some(teller) } else { None };
        let addresses = self.dialable_of(teller, addresses);
        if addresses.is_empty() {
            return;
        }
        self.ledger.heard(peer, source.found_by(), now.into_std());
        if addresses.iter().any(|address| !self.book.addresses(&peer).contains(address)) {
            self.policy.has_other_addresses(&peer);
        }
        self.book.learn(peer, source, addresses, now.into_std());
        // A hint that names a peer which refused a cluster gives it another chance on its next connection only.
        if !self.clusters.is_empty() && !self.swarm.is_connected(&peer) {
            self.agenda.no_later(Due::Dial, now);
        }
    }

    /// Those of `addresses` that this node may dial.
    pub(super) fn dialable_of(&self, teller: Option<PeerId>, addresses: Vec<Multiaddr>) -> Vec<Multiaddr> {
        // Who tells us over loopback is on this machine, and so may be whom it tells of.
        let mut networks = self.networks.clone();
        if teller.is_some_and(|teller| self.is_on_this_machine(&teller)) {
            networks.push(address::Network::Loopback);
        }
        let bare = addresses.iter().map(address::without_peer);
        bare.filter(|found| address::dialable(found, &networks) && address::relay_of(found) != Some(self.local)).collect()
    }

    /// Whether `peer` is connected over loopback.
    pub(super) fn is_on_this_machine(&self, peer: &PeerId) -> bool {
        self.swarm.behaviour().streams.connections(peer).iter().any(|connection| address::is_loopback(&connection.remote))
    }

    /// Dials the candidates whose turn it is.
    pub(super) fn dial(&mut self, now: Instant) {
        if self.clusters.is_empty() {
            return;
        }
        let idle: HashSet<PeerId> = self
            .book
            .iter()
            .map(|(peer, _)| *peer)
            .filter(|peer| self.swarm.is_connected(peer) || self.is_not_wanted(peer))
            .collect();
        let orders = self.policy.next(now.into_std(), &self.book, |peer| idle.contains(peer));
        for order in orders {
            self.dial_now(order.peer, order.addresses);
        }
        if let Some(wake) = self.policy.wake_at() {
            self.agenda.set(Due::Dial, Instant::from_std(wake));
        }
    }

    pub(super) fn dial_now(&mut self, peer: PeerId, mut addresses: Vec<Multiaddr>) {
        addresses.retain(|address| address::relay_of(address) != Some(self.local));
        let now = Instant::now().into_std();
        if !self.policy.has_room(&peer, now) {
            return;
        }
        // Beside a dial that hangs, but never beside one that the DHT has just made.
        let dialing = self.policy.is_dialing(&peer);
        let condition = if dialing { PeerCondition::Disconnected } else { PeerCondition::DisconnectedAndNotDialing };
        let options = DialOpts::peer_id(peer).condition(condition).addresses(addresses).build();
        match self.swarm.dial(options) {
            Ok(()) => self.policy.dialing(peer, now),
            Err(libp2p::swarm::DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => {
                tracing::debug!(%peer, %error, "dial refused");
                self.policy.failed(&peer, now);
            }
        }
    }

    /// Whether the last dials leave room for one more stranger.
    pub(super) fn may_dial(&mut self, peer: &PeerId, now: Instant) -> bool {
        self.policy.may_dial(peer, now.into_std())
    }

    /// Makes room at the door: of the strangers that came in and proved nothing the oldest goes, long before there are so
    /// many that a new member would be refused.
    pub(super) fn show_out_a_stranger(&mut self) {
        let caps = self.lasting.config.caps;
        let most = caps.established_incoming - (caps.established_incoming / 8).clamp(1, caps.established_incoming.max(1));
        let strangers: Vec<(std::time::Instant, libp2p::swarm::ConnectionId)> = self
            .swarm
            .behaviour()
            .streams
            .all()
            .filter(|(peer, connection)| !connection.dialed && !self.members.is_member(peer) && !self.is_bootstrap(peer))
            .filter(|(peer, _)| !self.reach.load.serves(peer))
            .map(|(_, connection)| (connection.since, connection.id))
            .collect();
        // A member came in as a stranger, and the library counts that connection for as long as it lasts.
        let members: std::collections::HashSet<PeerId> = self.members.peers().collect();
        if strangers.len() + members.len() > most as usize
            && let Some(&(_, oldest)) = strangers.iter().min_by_key(|(since, _)| *since)
        {
            tracing::debug!("the oldest stranger is shown out: {} are at the door", strangers.len());
            self.swarm.close_connection(oldest);
        }
    }

    fn record_key(cluster: &super::task::Cluster) -> RecordKey {
        RecordKey::new(&keys::dht_key(&cluster.root, 0, 0))
    }

    /// Publishes the provider record of this node, and plans the next time.
    pub(super) fn announce(&mut self, id: &ClusterId, now: Instant) {
        let Some(cluster) = self.clusters.get_mut(id) else { return };
        let planned =
            ANNOUNCE_AGAIN.get(cluster.announcements as usize).map_or(now + ANNOUNCE_EVERY, |&after| cluster.joined + after);
        cluster.announcements += 1;
        self.agenda.set(Due::Announce(id.clone()), planned.max(now + ANNOUNCE_LEAST));
        self.publish_record(id);
    }

    /// Publishes the provider record now, outside the plan: an address of this node changed, a bootstrap came up.
    pub(super) fn publish_record(&mut self, id: &ClusterId) {
        let Some(cluster) = self.clusters.get(id) else { return };
        let key = Self::record_key(cluster);
        if self.swarm.external_addresses().next().is_none() {
            // A record without an address helps nobody (it carries those known at this moment).
            return;
        }
        if self.announces.values().any(|running| running == id) {
            // What is under way names the addresses of the moment when it began.
            self.reach.stale.insert(id.clone());
            return;
        }
        if let Ok(query) = self.swarm.behaviour_mut().kad.start_providing(key) {
            self.announces.insert(query, id.clone());
        }
    }

    pub(super) fn stop_providing(&mut self, id: &ClusterId) {
        if let Some(cluster) = self.clusters.get(id) {
            let key = Self::record_key(cluster);
            self.swarm.behaviour_mut().kad.stop_providing(&key);
        }
    }

    /// Asks the DHT for members, and plans the next time.
    pub(super) fn look_up(&mut self, id: &ClusterId, now: Instant) {
        let members = self.members.count(id);
        let Some(cluster) = self.clusters.get_mut(id) else { return };
        let timings = &self.lasting.config.timings;
        // A cluster may well consist of two or three nodes: who has somebody to ask looks for more less and less often.
        let longest = if members == 0 { timings.lookup_lonely } else { timings.lookup };
        let pause = if members < COMPANY { (LOOK_FIRST * (1 << cluster.looks.min(10))).min(longest) } else { timings.lookup };
        cluster.looks += 1;
        let key = keys::dht_key(&cluster.root, 0, 0);
        self.agenda.set(Due::Lookup(id.clone()), now + jitter(pause));
        if self.lookups.values().any(|running| running == id) {
            return;
        }
        let kad = &mut self.swarm.behaviour_mut().kad;
        if kad.kbuckets().any(|bucket| bucket.num_entries() > 0) {
            let query = kad.get_providers(RecordKey::new(&key));
            self.lookups.insert(query, id.clone());
        }
    }

    /// Tells the DHT how much depends on it.
    pub(super) fn weigh_dht(&mut self, now: Instant) {
        let lonely = self.clusters.is_empty() || self.clusters.keys().any(|cluster| self.members.count(cluster) < COMPANY);
        let need = match lonely {
            true => Need::Lonely,
            false if self.is_in_crowds() => Need::Crowd,
            false => Need::Company,
        };
        self.swarm.behaviour_mut().kad.needs(need, now.into_std());
    }

    /// All clusters: look up and announce at once, because the way to the DHT has just opened.
    pub(super) fn dht_reached(&mut self, now: Instant) {
        let ids: Vec<ClusterId> = self.clusters.keys().cloned().collect();
        for id in ids {
            self.publish_record(&id);
            if let Some(cluster) = self.clusters.get_mut(&id) {
                cluster.looks = 0;
            }
            self.look_up(&id, now);
        }
    }

    /// Where `peer` can be dialled, best first: where we dialled it, what it announced, where it came from over QUIC.
    pub(super) fn addresses_of(&self, peer: &PeerId) -> Vec<Multiaddr> {
        let mut addresses: Vec<Multiaddr> = Vec::new();
        let mut add = |address: Multiaddr| {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        };
        let connections = self.swarm.behaviour().streams.connections(peer);
        let told = self.reach.told.get(peer).map_or(&[][..], Vec::as_slice);
        connections.iter().filter(|known| known.dialed).for_each(|known| add(address::without_peer(&known.remote)));
        told.iter().cloned().for_each(&mut add);
        // The source port of an incoming TCP connection is not one that listens, and an incoming circuit has no address. Who
        // says where it is reached is not reached where its NAT lets it out.
        if told.is_empty() {
            let from = connections.iter().filter(|known| !known.dialed && known.quic && !known.relayed);
            from.for_each(|known| add(address::without_peer(&known.remote)));
        }
        for address in self.book.addresses(peer) {
            add(address.clone());
        }
        addresses
    }

    /// Closes connections that are one too many, if it is ours to do so.
    pub(super) fn close_duplicates(&mut self, peer: PeerId, now: Instant) {
        let links: Vec<Link> = self
            .swarm
            .behaviour()
            .streams
            .connections(&peer)
            .iter()
            .map(|connection| Link { id: connection.id, since: connection.since })
            .collect();
        let grace = self.lasting.config.timings.duplicates;
        let verdict = duplicates::decide(&self.local, &peer, &links, now.into_std(), grace);
        if let Some(wake) = verdict.again_at {
            self.agenda.set(Due::Duplicates(peer), Instant::from_std(wake));
        }
        for connection in verdict.close {
            // A prompt that runs is never cut off for tidiness, whichever of the two asked it.
            let served = self.serving.get(&connection).map_or(0, |count| count.load(std::sync::atomic::Ordering::Relaxed));
            if served + self.lasting.pool.in_use(peer, connection) > 0 {
                self.agenda.set(Due::Duplicates(peer), now + self.lasting.config.timings.patience * 2);
                continue;
            }
            if self.carries(&peer) {
                self.agenda.set(Due::Duplicates(peer), now + self.lasting.config.timings.duplicates);
                continue;
            }
            let busy = self.sessions.values().any(|session| session.connection == connection && session.peer == peer);
            if busy {
                // Move the membership streams to the best connection first; look again when that is done.
                self.move_sessions(peer, connection);
                self.agenda.set(Due::Duplicates(peer), now + self.lasting.config.timings.patience * 2);
            } else {
                self.swarm.close_connection(connection);
            }
        }
    }

    pub(super) fn move_sessions(&mut self, peer: PeerId, from: libp2p::swarm::ConnectionId) {
        let Some(best) = self.swarm.behaviour().streams.connections(&peer).first().map(|connection| connection.id) else {
            return;
        };
        let moving: Vec<(ClusterId, keys::Root)> = self
            .sessions
            .values()
            .filter(|session| session.peer == peer && session.connection == from)
            .filter_map(|session| self.clusters.get(&session.cluster).map(|cluster| (cluster.id.clone(), cluster.root.clone())))
            .collect();
        for (cluster, root) in moving {
            self.open_session(peer, best, cluster, root);
        }
    }
}
