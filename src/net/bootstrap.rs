//! The part of the network task that reaches the configured bootstrap nodes, again and again, and says why it does not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::address::{self, BootstrapAddress};
use super::book::Source;
use super::handle::JoinError;
use super::jitter;
use super::task::{Due, Task};

/// First pause between two dials of a bootstrap address; then twice as long each time, up to one of the others.
pub(super) const BOOTSTRAP_FIRST: Duration = Duration::from_secs(1);
/// While this node is alone in some cluster.
const BOOTSTRAP_LONELY: Duration = Duration::from_secs(5);
/// While it has company everywhere.
const BOOTSTRAP_LONGEST: Duration = Duration::from_secs(60);
/// A connection that did not last as long, and on which nobody became a member, is no success: a bootstrap node that lets go
/// at once (it is full, or has banned this node) is dialled less and less often, also by a node that is alone.
const LASTING: Duration = Duration::from_secs(10);
/// Questions for one name under way at once: each may hang while there is no name server.
const MAX_RESOLVING: usize = 4;

/// A configured node to dial at the start.
#[derive(Debug)]
pub(super) struct Bootstrap {
    pub address: BootstrapAddress,
    /// Who is there: configured, or who answered when nobody was.
    pub peer: Option<PeerId>,
    /// Where it is: what its name stood for last, if it has one.
    pub dialled: Vec<Multiaddr>,
    pub pause: Duration,
    pub connected: bool,
    visits: Visits,
    /// Why the last try did not reach it.
    pub problem: Option<String>,
    /// One clone for each question for its name.
    resolving: Arc<()>,
}

/// How connections to a bootstrap node went. Pure.
#[derive(Debug, Default)]
struct Visits {
    /// When the one that there is came up.
    since: Option<Instant>,
    /// Somebody of a cluster was there.
    proved: bool,
    /// Those in a row that were of no use.
    useless: u32,
}

impl Visits {
    fn begin(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// It is of use, however long it lasts.
    fn proved(&mut self) {
        self.proved = true;
    }

    /// The connection is gone. `None`: there was none, or it was of use; else how long to stay away.
    fn end(&mut self, now: Instant) -> Option<Duration> {
        let proved = std::mem::take(&mut self.proved);
        let since = self.since.take()?;
        if proved || now.duration_since(since) >= LASTING {
            self.useless = 0;
            return None;
        }
        let pause = (BOOTSTRAP_FIRST * (1 << self.useless.min(10))).min(BOOTSTRAP_LONGEST);
        self.useless = self.useless.saturating_add(1);
        Some(pause)
    }
}

fn parse(text: &str) -> Result<BootstrapAddress, JoinError> {
    BootstrapAddress::parse(text).map_err(|error| JoinError::BadAddress { address: text.to_owned(), reason: error.to_string() })
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
pub(super) fn why(error: &dyn std::error::Error) -> String {
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
    pub(super) fn start_bootstrap(&mut self) {
        let mut good = Vec::new();
        for text in self.lasting.config.bootstrap.clone() {
            match parse(&text) {
                Ok(address) => good.push(address),
                Err(error) => {
                    tracing::warn!("bootstrap address ignored: {error}");
                    self.problems.insert("bootstrap", format!("a bootstrap address is ignored: {error}"));
                }
            }
        }
        self.dial_new_bootstrap(good);
    }

    /// Adds addresses to dial at once and again until connected.
    pub(super) fn add_bootstrap(&mut self, texts: &[String]) -> Result<(), JoinError> {
        let parsed = texts.iter().map(|text| parse(text)).collect::<Result<_, _>>()?;
        self.dial_new_bootstrap(parsed);
        Ok(())
    }

    fn dial_new_bootstrap(&mut self, addresses: Vec<BootstrapAddress>) {
        let (first_new, now) = (self.bootstrap.len(), Instant::now());
        for address in addresses {
            if self.bootstrap.iter().any(|known| known.address == address) || address.peer == Some(self.local) {
                continue;
            }
            if let Some(peer) = address.peer {
                self.swarm.behaviour_mut().limits.bypass_peer_id(&peer);
                self.swarm.behaviour_mut().gate.trust(peer);
                self.policy.has_other_addresses(&peer);
            }
            let dialled = if address.name.is_none() { vec![address.address.clone()] } else { Vec::new() };
            self.bootstrap.push(Bootstrap {
                peer: address.peer,
                address,
                dialled,
                pause: BOOTSTRAP_FIRST,
                connected: false,
                visits: Visits::default(),
                problem: None,
                resolving: Arc::default(),
            });
        }
        for index in first_new..self.bootstrap.len() {
            self.dial_bootstrap(index, now);
        }
    }

    /// Every address that is configured for a bootstrap node, each of its entries' own.
    fn bootstrap_addresses(&self, peer: PeerId) -> Vec<Multiaddr> {
        let entries = self.bootstrap.iter().filter(|bootstrap| bootstrap.peer == Some(peer));
        entries.flat_map(|bootstrap| bootstrap.dialled.iter().cloned()).collect()
    }

    /// Longest pause between two dials now.
    fn longest_pause(&self) -> Duration {
        let lonely = self.clusters.values().any(|cluster| cluster.leaving.is_none() && self.members.count(&cluster.id) == 0);
        if lonely { BOOTSTRAP_LONELY } else { BOOTSTRAP_LONGEST }
    }

    /// Somebody is gone. Who is alone now does not wait for as long as one who has company.
    pub(super) fn bootstrap_if_lonely(&mut self, now: Instant) {
        let longest = self.longest_pause();
        for (index, bootstrap) in self.bootstrap.iter_mut().enumerate() {
            if !bootstrap.connected && bootstrap.pause > longest {
                bootstrap.pause = longest;
                self.agenda.no_later(Due::Bootstrap(index), now + jitter(longest));
            }
        }
    }

    /// The network changed: all that are not connected are dialled now, and their names asked for anew.
    pub(super) fn bootstrap_again(&mut self, now: Instant) {
        for index in 0..self.bootstrap.len() {
            self.bootstrap[index].pause = BOOTSTRAP_FIRST;
            self.bootstrap[index].visits.useless = 0;
            self.dial_bootstrap(index, now);
        }
    }

    /// A dial of a bootstrap node was ended for another one.
    pub(super) fn dial_bootstrap_again(&mut self, peer: &PeerId, now: Instant) {
        for (index, bootstrap) in self.bootstrap.iter().enumerate() {
            if bootstrap.peer.as_ref() == Some(peer) {
                self.agenda.no_later(Due::Bootstrap(index), now);
            }
        }
    }

    /// Dials one bootstrap address, resolving its name first, and plans the next try.
    pub(super) fn dial_bootstrap(&mut self, index: usize, now: Instant) {
        let longest = self.longest_pause();
        let Some(bootstrap) = self.bootstrap.get_mut(index) else { return };
        if bootstrap.peer.is_some_and(|peer| self.swarm.is_connected(&peer)) {
            bootstrap.connected = true;
            bootstrap.visits.begin(now);
            return;
        }
        bootstrap.connected = false;
        let held = bootstrap.peer.map_or(Duration::ZERO, |peer| self.policy.held_for(&peer, now.into_std()));
        if held > Duration::ZERO {
            return self.agenda.set(Due::Bootstrap(index), now + held);
        }
        if self.has_company() {
            // In a large cluster a bootstrap node lets go of those that have others.
            return self.agenda.set(Due::Bootstrap(index), now + jitter(BOOTSTRAP_LONGEST));
        }
        let Some(bootstrap) = self.bootstrap.get_mut(index) else { return };
        let pause = jitter(bootstrap.pause);
        bootstrap.pause = (bootstrap.pause * 2).min(longest);
        self.agenda.set(Due::Bootstrap(index), now + pause);
        let address = bootstrap.address.clone();
        match address.name {
            None => self.on_resolved(index, vec![address.address]),
            Some(_) if Arc::strong_count(&bootstrap.resolving) > MAX_RESOLVING => {}
            Some(ref name) => {
                let (name, resolved, asking) = (name.clone(), self.resolved.clone(), Arc::clone(&bootstrap.resolving));
                self.spawn(async move {
                    let _asking = asking;
                    // The system's own resolver: it knows /etc/hosts, .local names and changes of the network.
                    match tokio::net::lookup_host((name.as_str(), 0)).await {
                        Ok(found) => {
                            let addresses = found.filter_map(|found: SocketAddr| address.with_ip(found.ip())).take(8).collect();
                            let _ = resolved.send((index, addresses)).await;
                        }
                        Err(error) => {
                            tracing::info!(name, %error, "bootstrap name {name} not resolved: {error}");
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
        if bootstrap.connected {
            return; // an answer that came late
        }
        let before = bootstrap.peer.map(|peer| self.bootstrap_addresses(peer)).unwrap_or_default();
        let Some(bootstrap) = self.bootstrap.get_mut(index) else { return };
        bootstrap.dialled.clone_from(&addresses);
        if addresses.is_empty() {
            bootstrap.problem = Some("its name is not known here".to_owned());
            self.dirty = true;
            return;
        }
        match bootstrap.peer {
            Some(peer) => {
                // One node by UDP and by TCP, say: all its addresses are tried together, or each would wait for the other's
                // handshake to time out.
                if addresses.iter().any(|address| !before.contains(address)) {
                    self.policy.has_other_addresses(&peer);
                }
                for address in &addresses {
                    self.swarm.behaviour_mut().kad.configured.insert(address.clone());
                    self.swarm.behaviour_mut().kad.add_address(&peer, address.clone());
                }
                self.book.learn(peer, Source::Bootstrap, addresses.clone(), now.into_std());
                let all = self.bootstrap_addresses(peer);
                self.dial_now(peer, all);
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
        let (remote, now) = (address::without_peer(remote), Instant::now());
        for bootstrap in &mut self.bootstrap {
            if bootstrap.peer == Some(peer) || (bootstrap.peer.is_none() && bootstrap.dialled.contains(&remote)) {
                bootstrap.peer = Some(peer);
                bootstrap.connected = true;
                bootstrap.visits.begin(now);
                bootstrap.problem = None;
                self.swarm.behaviour_mut().limits.bypass_peer_id(&peer);
                self.swarm.behaviour_mut().gate.trust(peer);
            }
        }
    }

    /// A peer became a member: if it is a bootstrap node, it is worth the next dial too.
    pub(super) fn bootstrap_proved(&mut self, peer: &PeerId) {
        for bootstrap in self.bootstrap.iter_mut().filter(|bootstrap| bootstrap.peer.as_ref() == Some(peer)) {
            bootstrap.visits.proved();
        }
    }

    /// A bootstrap node was lost or could not be reached: try again later.
    pub(super) fn bootstrap_lost(&mut self, lost: PeerId, now: Instant) {
        let held = self.policy.held_for(&lost, now.into_std());
        for (index, bootstrap) in self.bootstrap.iter_mut().enumerate() {
            if bootstrap.peer != Some(lost) {
                continue;
            }
            let was_connected = std::mem::take(&mut bootstrap.connected);
            // Who answers at an address without /p2p may be somebody else the next time.
            bootstrap.peer = bootstrap.address.peer;
            match bootstrap.visits.end(now) {
                Some(pause) => self.agenda.set(Due::Bootstrap(index), now + jitter(pause).max(held)),
                None if held > Duration::ZERO => self.agenda.set(Due::Bootstrap(index), now + held),
                None => {
                    if was_connected {
                        bootstrap.pause = BOOTSTRAP_FIRST;
                    }
                    self.agenda.no_later(Due::Bootstrap(index), now + jitter(bootstrap.pause));
                }
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

    pub(super) fn is_bootstrap(&self, peer: &PeerId) -> bool {
        self.bootstrap.iter().any(|bootstrap| bootstrap.peer.as_ref() == Some(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bootstrap_node_that_lets_go_at_once_is_dialled_less_and_less_often() {
        let (start, mut visits) = (Instant::now(), Visits::default());
        let visit = |visits: &mut Visits, lasted: Duration| {
            visits.begin(start);
            visits.end(start + lasted)
        };
        let short = LASTING - Duration::from_millis(1);
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(visit(&mut visits, short), Some(Duration::from_secs(seconds)));
        }
        assert_eq!(visits.end(start), None, "a dial that failed is no visit");
        assert_eq!(visit(&mut visits, LASTING), None);
        assert_eq!(visit(&mut visits, short), Some(BOOTSTRAP_FIRST));
        visits.begin(start);
        visits.proved();
        assert_eq!(visits.end(start), None, "a member is dialled again at once");
    }
}
