//! The part of the network task that looks for members: bootstrap list, mDNS, provider records, views; and dials.
//!
//! What it finds are candidates, hints to dial, no more: a candidate becomes a member by the hello alone.

use std::net::SocketAddr;
use std::time::Duration;

use libp2p::kad::{self, RecordKey};
use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::address::{self, BootstrapAddress};
use super::book::Source;
use super::duplicates::{self, Link};
use super::handle::JoinError;
use super::task::{Due, StartError, Task};
use super::{jitter, port};
use crate::domain::cluster::ClusterId;
use crate::wire::control::{View, ViewEntry};
use crate::wire::keys;
use crate::wire::limits::{MAX_VIEW_ADDRESSES, MAX_VIEW_ENTRIES};

/// When a node announces itself again after joining; then every ten minutes.
const ANNOUNCE_AGAIN: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(120)];
const ANNOUNCE_EVERY: Duration = Duration::from_secs(600);
/// With this many members the DHT is asked rarely: views tell the rest.
const COMPANY: usize = 3;
/// First pause between two looks into the DHT, then twice as long each time: who starts together looks before the others
/// have announced themselves.
const LOOK_FIRST: Duration = Duration::from_secs(1);
/// First and longest pause between two dials of a bootstrap address.
const BOOTSTRAP_FIRST: Duration = Duration::from_secs(1);
const BOOTSTRAP_LONGEST: Duration = Duration::from_secs(300);

/// A configured node to dial at the start.
#[derive(Debug)]
pub(super) struct Bootstrap {
    pub address: BootstrapAddress,
    /// Who is there: configured, or who answered when nobody was.
    pub peer: Option<PeerId>,
    /// Where it was dialled last: what its name stood for.
    pub dialled: Vec<Multiaddr>,
    pub pause: Duration,
    pub connected: bool,
    /// Why the last try did not reach it.
    pub problem: Option<String>,
}

/// Why a dial failed, for people: who answered instead, or what each address said.
pub(super) fn why_not(error: &DialError) -> String {
    match error {
        DialError::WrongPeerId { obtained, .. } => format!("another node answers there, {obtained}"),
        DialError::LocalPeerId { .. } => "it is this node itself".to_owned(),
        DialError::Transport(errors) => {
            let mut said: Vec<String> = errors.iter().map(|(_, error)| why(error)).collect();
            said.dedup();
            said.join("; ")
        }
        other => other.to_string(),
    }
}

/// What is wrong, down to the cause: a transport's error says little itself, or nothing.
fn why(error: &dyn std::error::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !text.is_empty() && said.last() != Some(&text) {
            said.push(text);
        }
        next = error.source();
    }
    said.join(": ")
}

impl Task<'_> {
    /// Opens the listeners. A port that is taken is replaced by a free one when the configuration allows it.
    pub(super) fn listen(&mut self) -> Result<(), StartError> {
        let mut problems = Vec::new();
        let mut listening = 0;
        for text in self.lasting.config.listen.clone() {
            let refused = |reason: String| StartError::Listen { address: text.clone(), reason };
            let address: Multiaddr =
                text.parse().map_err(|error| StartError::Address { address: text.clone(), reason: format!("{error}") })?;
            let mut open = |address: Multiaddr| {
                port::check(&address).map_err(|error| error.to_string())?;
                self.swarm.listen_on(address).map_err(|error| why(&error))
            };
            let any_port = self.lasting.config.any_port;
            match open(address.clone()).or_else(|error| if any_port { open(address::any_port(&address)) } else { Err(error) }) {
                Ok(_) => listening += 1,
                Err(error) => problems.push(refused(error)),
            }
        }
        // A machine without IPv6 has half of the listeners, which is well; none at all is not.
        match problems.into_iter().next() {
            Some(problem) if listening == 0 || !self.lasting.config.any_port => Err(problem),
            Some(problem) => {
                tracing::info!("{problem}");
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(super) fn start_mdns(&mut self) {
        let local = self.local;
        let problems = self.swarm.behaviour_mut().start_mdns(local);
        self.mdns_meter.restarted(std::time::Instant::now());
        match problems.first() {
            Some(problem) => {
                tracing::warn!("{problem}");
                self.problems.insert("mdns", problem.clone());
            }
            None => drop(self.problems.remove("mdns")),
        }
        self.dirty = true;
    }

    /// More records than an honest network sends: off for a while.
    pub(super) fn stop_mdns(&mut self, now: Instant) {
        tracing::warn!("mDNS flood: discovery on the local network is off for ten minutes");
        self.problems.insert("mdns", "discovery on the local network is off: it was flooded with mDNS records".to_owned());
        self.swarm.behaviour_mut().stop_mdns();
        self.agenda.set(Due::Mdns, now + super::mdns_meter::PAUSE);
        self.dirty = true;
    }

    pub(super) fn ways_of_discovery(&self) -> Vec<&'static str> {
        let mut ways = Vec::new();
        let behaviour = self.swarm.behaviour();
        if behaviour.mdns4.is_enabled() || behaviour.mdns6.is_enabled() {
            ways.push("mdns");
        }
        if !self.bootstrap.is_empty() {
            ways.push("bootstrap");
            ways.push("kademlia");
        }
        ways
    }

    pub(super) fn start_bootstrap(&mut self) {
        for text in self.lasting.config.bootstrap.clone() {
            if let Err(error) = self.add_bootstrap(std::slice::from_ref(&text)) {
                tracing::warn!("bootstrap address ignored: {error}");
                self.problems.insert("bootstrap", format!("a bootstrap address is ignored: {error}"));
            }
        }
    }

    /// Adds addresses to dial at once and again until connected.
    pub(super) fn add_bootstrap(&mut self, texts: &[String]) -> Result<(), JoinError> {
        let parsed: Vec<BootstrapAddress> = texts
            .iter()
            .map(|text| {
                BootstrapAddress::parse(text)
                    .map_err(|error| JoinError::BadAddress { address: text.clone(), reason: error.to_string() })
            })
            .collect::<Result<_, _>>()?;
        let now = Instant::now();
        for address in parsed {
            if self.bootstrap.iter().any(|known| known.address == address) || address.peer == Some(self.local) {
                continue;
            }
            let index = self.bootstrap.len();
            if let Some(peer) = address.peer {
                self.swarm.behaviour_mut().limits.bypass_peer_id(&peer);
                self.swarm.behaviour_mut().gate.trust(peer);
            }
            let peer = address.peer;
            self.bootstrap.push(Bootstrap {
                address,
                peer,
                dialled: Vec::new(),
                pause: BOOTSTRAP_FIRST,
                connected: false,
                problem: None,
            });
            self.dial_bootstrap(index, now);
        }
        Ok(())
    }

    /// Dials one bootstrap address, resolving its name first, and plans the next try.
    pub(super) fn dial_bootstrap(&mut self, index: usize, now: Instant) {
        let Some(bootstrap) = self.bootstrap.get_mut(index) else { return };
        if bootstrap.peer.is_some_and(|peer| self.swarm.is_connected(&peer)) {
            bootstrap.pause = BOOTSTRAP_FIRST;
            bootstrap.connected = true;
            return;
        }
        bootstrap.connected = false;
        let pause = jitter(bootstrap.pause);
        bootstrap.pause = (bootstrap.pause * 2).min(BOOTSTRAP_LONGEST);
        self.agenda.set(Due::Bootstrap(index), now + pause);
        let address = bootstrap.address.clone();
        match address.name {
            None => self.on_resolved(index, vec![address.address]),
            Some(ref name) => {
                let (name, resolved) = (name.clone(), self.resolved.clone());
                tokio::spawn(async move {
                    // The system's own resolver: it knows /etc/hosts, .local names and changes of the network.
                    match tokio::net::lookup_host((name.as_str(), 0)).await {
                        Ok(found) => {
                            let addresses = found.filter_map(|found: SocketAddr| address.with_ip(found.ip())).take(8).collect();
                            let _ = resolved.send((index, addresses)).await;
                        }
                        Err(error) => {
                            tracing::info!(name, %error, "bootstrap name not resolved");
                            let _ = resolved.send((index, Vec::new())).await;
                        }
                    }
                });
            }
        }
    }

    pub(super) fn on_resolved(&mut self, index: usize, addresses: Vec<Multiaddr>) {
        let Some(bootstrap) = self.bootstrap.get_mut(index) else { return };
        let now = Instant::now();
        bootstrap.dialled.clone_from(&addresses);
        if addresses.is_empty() {
            bootstrap.problem = Some("its name is not known here".to_owned());
            self.dirty = true;
            return;
        }
        match bootstrap.peer {
            Some(peer) => {
                for address in &addresses {
                    self.swarm.behaviour_mut().kad.configured.insert(address.clone());
                    self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
                }
                self.book.learn(peer, Source::Bootstrap, addresses.clone(), now.into_std());
                self.dial_now(peer, addresses);
            }
            None => {
                let connected = |address: &Multiaddr| self.swarm.behaviour().streams.is_connected_to(address);
                // It may be somebody whom we know by another way, and a second connection would tell us nothing.
                if let Some((peer, address)) = addresses.iter().find_map(|address| Some((connected(address)?, address.clone()))) {
                    self.match_bootstrap(peer, &address);
                    return;
                }
                for address in addresses {
                    let _ = self.swarm.dial(DialOpts::unknown_peer_id().address(address).build());
                }
            }
        }
    }

    /// A connection came up: was it a bootstrap address that named no peer?
    pub(super) fn match_bootstrap(&mut self, peer: PeerId, remote: &Multiaddr) {
        let remote = address::without_peer(remote);
        for bootstrap in &mut self.bootstrap {
            if bootstrap.peer == Some(peer) || (bootstrap.peer.is_none() && bootstrap.dialled.contains(&remote)) {
                bootstrap.peer = Some(peer);
                bootstrap.pause = BOOTSTRAP_FIRST;
                bootstrap.connected = true;
                bootstrap.problem = None;
                self.swarm.behaviour_mut().limits.bypass_peer_id(&peer);
                self.swarm.behaviour_mut().gate.trust(peer);
            }
        }
    }

    /// A bootstrap node was lost or could not be reached: try again later.
    pub(super) fn bootstrap_lost(&mut self, peer: Option<PeerId>, now: Instant) {
        for index in 0..self.bootstrap.len() {
            let bootstrap = &mut self.bootstrap[index];
            if bootstrap.peer.is_some() && bootstrap.peer == peer {
                bootstrap.connected = false;
                // Who answers at an address without /p2p may be somebody else the next time.
                bootstrap.peer = bootstrap.address.peer;
                let pause = jitter(bootstrap.pause);
                self.agenda.no_later(Due::Bootstrap(index), now + pause);
            }
        }
    }

    /// A dial failed: if a bootstrap node was meant, `ogctl status` says why it is not reached.
    pub(super) fn note_bootstrap_failure(&mut self, peer: Option<PeerId>, error: &DialError) {
        let failed: Vec<Multiaddr> = match error {
            DialError::Transport(errors) => errors.iter().map(|(address, _)| address::without_peer(address)).collect(),
            DialError::WrongPeerId { address, .. } | DialError::LocalPeerId { address } => vec![address::without_peer(address)],
            _ => Vec::new(),
        };
        for bootstrap in &mut self.bootstrap {
            let meant = match bootstrap.peer {
                Some(wanted) => peer == Some(wanted),
                None => failed.iter().any(|address| bootstrap.dialled.contains(address)),
            };
            if meant && !bootstrap.connected {
                bootstrap.problem = Some(why_not(error));
                self.dirty = true;
            }
        }
    }

    /// The bootstrap nodes that are not reached, a sentence each.
    pub(super) fn bootstrap_problems(&self) -> impl Iterator<Item = String> + '_ {
        self.bootstrap.iter().filter_map(|bootstrap| {
            let reason = bootstrap.problem.as_ref()?;
            Some(format!(
                "bootstrap node {} is not reached: {reason}; compare with what \"ogctl status\" shows there, and let its port through the firewall",
                bootstrap.address.text()
            ))
        })
    }

    pub(super) fn is_bootstrap(&self, peer: &PeerId) -> bool {
        self.bootstrap.iter().any(|bootstrap| bootstrap.peer.as_ref() == Some(peer))
    }

    /// Hints from mDNS, the DHT or a view.
    pub(super) fn learn(&mut self, peer: PeerId, source: Source, addresses: Vec<Multiaddr>, now: Instant) {
        if peer == self.local || self.bans.is_banned(&peer, now.into_std()) {
            return;
        }
        // Who tells us over loopback is on this machine, and so may be whom it tells of.
        let mut networks = self.networks.clone();
        if let Source::View(teller) = source
            && self
                .swarm
                .behaviour()
                .streams
                .connections(&teller)
                .iter()
                .any(|connection| address::is_loopback(&connection.remote))
        {
            networks.push(address::Network::Loopback);
        }
        let addresses: Vec<Multiaddr> = addresses
            .into_iter()
            .map(|address| address::without_peer(&address))
            .filter(|address| address::dialable(address, &networks))
            .collect();
        if addresses.is_empty() {
            return;
        }
        self.book.learn(peer, source, addresses, now.into_std());
        // A hint that names a peer which refused a cluster gives it another chance on its next connection only.
        if !self.clusters.is_empty() && !self.swarm.is_connected(&peer) {
            self.agenda.no_later(Due::Dial, now);
        }
    }

    pub(super) fn learn_view(&mut self, from: PeerId, cluster: &ClusterId, view: View, now: Instant) {
        for ViewEntry { peer, addresses, .. } in view.entries {
            let Ok(peer) = PeerId::from_bytes(&peer) else { continue };
            let addresses = addresses.into_iter().filter_map(|bytes| Multiaddr::try_from(bytes).ok()).collect();
            self.learn(peer, Source::View(from), addresses, now);
            self.hinted(peer, cluster, now);
        }
    }

    /// Dials the candidates whose turn it is.
    pub(super) fn dial(&mut self, now: Instant) {
        if self.clusters.is_empty() {
            return;
        }
        let connected = |peer: &PeerId| self.swarm.is_connected(peer);
        let orders = self.policy.next(now.into_std(), &self.book, connected);
        for order in orders {
            self.dial_now(order.peer, order.addresses);
        }
        if let Some(wake) = self.policy.wake_at() {
            self.agenda.set(Due::Dial, Instant::from_std(wake));
        }
    }

    pub(super) fn dial_now(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        let options = DialOpts::peer_id(peer).condition(PeerCondition::DisconnectedAndNotDialing).addresses(addresses).build();
        match self.swarm.dial(options) {
            Ok(()) => self.policy.dialing(peer),
            Err(libp2p::swarm::DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => {
                tracing::debug!(%peer, %error, "dial refused");
                self.policy.failed(&peer, Instant::now().into_std());
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
        self.agenda.set(Due::Announce(id.clone()), planned.max(now + BOOTSTRAP_FIRST));
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

    pub(super) fn exchange_views(&mut self, now: Instant) {
        self.agenda.set(Due::Views, now + jitter(self.lasting.config.timings.views));
        let members = &self.members;
        self.book.expire(now.into_std(), |peer| members.is_member(peer));
        let book = &self.book;
        self.policy.retain(|peer| book.contains(peer));
        let targets: Vec<_> =
            self.sessions.iter().map(|(&generation, session)| (generation, session.cluster.clone(), session.peer)).collect();
        for (generation, cluster, peer) in targets {
            // A view that names nobody new is not sent: between three idle nodes there is nothing to tell.
            let Some(view) = self.view_for(&cluster, &peer, now) else { continue };
            if self.members.view_told(&cluster, &peer, &view) {
                continue;
            }
            self.send(generation, &crate::wire::control::Control::View(view));
        }
    }

    /// Up to 32 random members of `cluster` for `to`, with addresses that it can use; `None` when there are none.
    pub(super) fn view_for(&self, cluster: &ClusterId, to: &PeerId, now: Instant) -> Option<View> {
        let to_loopback =
            self.swarm.behaviour().streams.connections(to).iter().any(|connection| address::is_loopback(&connection.remote));
        let mut known: Vec<(PeerId, Instant)> = self.members.heard_of(cluster).filter(|(peer, _)| peer != to).collect();
        // A random choice: any 32 of a shuffled list.
        for at in (1..known.len()).rev() {
            known.swap(at, super::random_below(at + 1));
        }
        let entries: Vec<ViewEntry> = known
            .into_iter()
            .filter_map(|(peer, heard)| {
                let addresses: Vec<Vec<u8>> = self
                    .addresses_of(&peer)
                    .into_iter()
                    .filter(|found| address::for_view(found, to_loopback))
                    .take(MAX_VIEW_ADDRESSES)
                    .map(|found| found.to_vec())
                    .collect();
                let age_seconds = u32::try_from(now.duration_since(heard).as_secs()).unwrap_or(u32::MAX);
                (!addresses.is_empty()).then(|| ViewEntry { peer: peer.to_bytes(), age_seconds, addresses })
            })
            .take(MAX_VIEW_ENTRIES)
            .collect();
        (!entries.is_empty()).then_some(View { entries })
    }

    /// Where `peer` can be dialled, best first: where we dialled it, what it announced, where it came from over QUIC.
    pub(super) fn addresses_of(&self, peer: &PeerId) -> Vec<Multiaddr> {
        let mut addresses: Vec<Multiaddr> = Vec::new();
        let mut add = |address: Multiaddr| {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        };
        for connection in self.swarm.behaviour().streams.connections(peer) {
            // The source port of an incoming TCP connection is not one that listens.
            if connection.dialed || connection.quic {
                add(address::without_peer(&connection.remote));
            }
        }
        for address in self.book.addresses(peer) {
            add(address.clone());
        }
        addresses
    }

    fn networks_changed(&mut self) {
        self.networks = address::networks_of(self.swarm.listeners());
        self.swarm.behaviour_mut().kad.networks.clone_from(&self.networks);
    }

    /// A listener got an address. Where no NAT can lie between, it is also what others may dial.
    pub(super) fn on_new_listen_address(&mut self, listening: Multiaddr) {
        self.networks_changed();
        // Loopback is told first. Once there is a network, it must not be announced: others would dial themselves.
        let stale: Vec<Multiaddr> =
            self.swarm.external_addresses().filter(|known| !address::announceable(known, &self.networks)).cloned().collect();
        for address in stale {
            self.unreachable(&address);
        }
        if address::announceable(&listening, &self.networks) && (self.bootstrap.is_empty() || address::is_global(&listening)) {
            self.reachable(listening);
        }
        // A cable is in again, or a network was joined: what failed before may work now.
        self.policy.network_changed();
        self.agenda.no_later(Due::Dial, Instant::now());
        self.dirty = true;
    }

    /// Somebody saw us at `observed`. If that is an IP address that we listen on, no NAT lies between, and whoever can
    /// reach that peer can reach us.
    pub(super) fn on_observed(&mut self, observed: &Multiaddr) {
        for address in address::same_host(observed, self.swarm.listeners()) {
            if address::announceable(&address, &self.networks) {
                self.reachable(address);
            }
        }
    }

    fn reachable(&mut self, address: Multiaddr) {
        if self.swarm.external_addresses().any(|known| *known == address) {
            return;
        }
        tracing::debug!(%address, "reachable address");
        self.swarm.add_external_address(address);
        self.swarm.behaviour_mut().kad.set_mode(Some(kad::Mode::Server));
        let ids: Vec<ClusterId> = self.clusters.keys().cloned().collect();
        for id in ids {
            self.publish_record(&id);
        }
    }

    fn unreachable(&mut self, address: &Multiaddr) {
        self.swarm.remove_external_address(address);
        if self.swarm.external_addresses().next().is_none() {
            self.swarm.behaviour_mut().kad.set_mode(Some(kad::Mode::Client));
        }
    }

    pub(super) fn on_lost_listen_address(&mut self, address: &Multiaddr) {
        self.networks_changed();
        self.unreachable(address);
        // A QUIC connection does not survive the change of an address: members are dialled again at once.
        self.policy.network_changed();
        self.agenda.no_later(Due::Dial, Instant::now());
        self.dirty = true;
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

    fn move_sessions(&mut self, peer: PeerId, from: libp2p::swarm::ConnectionId) {
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
