//! The part of the network task that looks for members on the local network: it runs mDNS and hears what it tells.

use std::time::Duration;

use libp2p::PeerId;
use tokio::time::Instant;

use super::book::Source;
use super::mdns::{Event, Mdns};
use super::task::{Due, Task};
use crate::domain::network::MdnsFacts;

/// When mDNS is started again after it has failed.
const AGAIN: Duration = Duration::from_secs(30);
/// Another machine with this node's identity counts as gone when it was not heard for so long.
const TWIN: Duration = Duration::from_secs(300);
/// The problem that mDNS has, among those of the node.
pub(super) const PROBLEM: &str = "mdns";

impl Task<'_> {
    pub(super) fn start_mdns(&mut self) {
        self.mdns = Some(Mdns::start(self.local, self.own_listeners().cloned().collect(), self.mdns_events.clone()));
        self.problems.remove(PROBLEM);
        self.dirty = true;
    }

    /// The addresses that are listened on have changed.
    pub(super) fn tell_mdns_addresses(&self) {
        if let Some(mdns) = &self.mdns {
            mdns.set_listening(self.own_listeners().cloned().collect());
        }
    }

    /// The network has changed: asks who is here as at the start, and tells the others.
    pub(super) fn ask_local_network(&self) {
        if let Some(mdns) = &self.mdns {
            mdns.ask_now();
        }
    }

    pub(super) fn on_mdns(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Found(peer, addresses) => self.learn(peer, Source::Mdns, addresses, now),
            Event::Gone(peer) => self.on_goodbye(peer),
            Event::SameIdentity(at) => self.on_twin(at, now),
            Event::Flooded => {
                let (members, swarm) = (&self.members, &self.swarm);
                self.book.forget_heard(|peer| members.is_member(peer) || swarm.is_connected(peer));
            }
            Event::Problem(problem) => self.set_mdns_problem(problem),
            Event::Failed(why) => {
                self.mdns = None;
                self.agenda.set(Due::Mdns, now + AGAIN);
                self.set_mdns_problem(Some(format!("mDNS has failed and is started again soon: {why}")));
            }
        }
    }

    fn set_mdns_problem(&mut self, problem: Option<String>) {
        match problem {
            Some(problem) => {
                tracing::warn!("{problem}");
                self.problems.insert(PROBLEM, problem);
            }
            None => drop(self.problems.remove(PROBLEM)),
        }
        self.dirty = true;
    }

    /// Nobody has to authenticate to say goodbye for another: it ends a hint, never a member or a connection.
    fn on_goodbye(&mut self, peer: PeerId) {
        tracing::debug!(%peer, "said goodbye on the local network");
        let only_heard = self.book.found_by(&peer) == Some(Source::Mdns.found_by());
        if only_heard && !self.members.is_member(&peer) && !self.swarm.is_connected(&peer) {
            self.book.forget(&peer);
        }
    }

    fn on_twin(&mut self, at: std::net::IpAddr, now: Instant) {
        self.twins.retain(|_, heard| now.duration_since(*heard) < TWIN);
        if self.twins.insert(at, now).is_none() {
            self.dirty = true;
            tracing::warn!("another machine, at {at}, uses the identity of this node: one of the two needs a new one");
        }
    }

    /// Addresses of other machines that lately said on the local network that they are this node.
    pub(super) fn twins_heard(&self, now: Instant) -> impl Iterator<Item = String> {
        self.twins.iter().filter(move |(_, heard)| now.duration_since(**heard) < TWIN).map(|(at, _)| at.to_string())
    }

    /// mDNS at each interface.
    pub(super) fn mdns_facts(&self) -> Vec<MdnsFacts> {
        self.mdns.as_ref().map(Mdns::facts).unwrap_or_default()
    }
}
