//! Two machines with one identity: a copied disk, a cloned virtual machine. Who was there first stays, the other is told,
//! and neither flaps.
//!
//! Every run of a node has a random number, which it names in its hellos (version 3). A second stream of the same peer id
//! with another number is a restart, or another machine: whoever is there still answers a probe.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::address;
use super::membership::framed;
use super::session::{Generation, Outgoing, Up};
use super::task::{Due, Task};
use crate::domain::cluster::ClusterId;
use crate::wire::control::{ByeReason, Control};

/// How long the first one has to answer.
const ANSWER: Duration = Duration::from_millis(1500);
/// Contests at once; one more is lost by who comes.
const MAX_CONTESTS: usize = 32;
/// Who was refused is refused without a contest, and does not come back by itself, for this long.
pub(super) const REFUSED: Duration = Duration::from_secs(60);
/// Between two notices to the same member.
const NOTICE_AGAIN: Duration = Duration::from_secs(60);
/// What is known of a twin of this node counts this long.
const EVIDENCE: Duration = Duration::from_secs(600);
/// Addresses of twins of this node that are remembered.
const MAX_EVIDENCE: usize = 8;
/// Peers whose earlier runs, refusals and notices are remembered.
const MAX_PEERS: usize = 512;
/// Earlier runs of one peer.
const MAX_RUNS: usize = 4;

/// A newcomer that waits for the verdict.
#[derive(Debug)]
struct Contest {
    up: Up,
    entered: oneshot::Sender<()>,
    incumbent: Generation,
    until: Instant,
}

/// What is remembered.
#[derive(Debug, Default)]
pub(crate) struct Rivals {
    contests: Vec<Contest>,
    /// Runs that a newer one replaced: one that comes back is no restart.
    past: HashMap<PeerId, VecDeque<u64>>,
    refused: HashMap<PeerId, (u64, ConnectionId, Instant)>,
    noticed: HashMap<PeerId, Instant>,
    /// Where another machine uses this node's identity, and when that was last heard.
    ours: Vec<(String, Instant)>,
}

/// Makes room in a map of peers.
fn bounded<T>(map: &mut HashMap<PeerId, T>, age: impl Fn(&T) -> Instant) {
    if map.len() >= MAX_PEERS
        && let Some(oldest) = map.iter().min_by_key(|(_, value)| age(value)).map(|(peer, _)| *peer)
    {
        map.remove(&oldest);
    }
}

impl Rivals {
    /// Addresses of other machines that use this node's identity.
    pub(crate) fn addresses(&self, now: Instant) -> Vec<String> {
        let fresh = |seen: &&(String, Instant)| now.duration_since(seen.1) < EVIDENCE;
        self.ours.iter().filter(fresh).map(|(address, _)| address.clone()).collect()
    }

    fn replaced(&mut self, peer: PeerId, run: u64) {
        if self.past.len() >= MAX_PEERS && !self.past.contains_key(&peer) {
            self.past.clear(); // a restart more is taken for one
        }
        let runs = self.past.entry(peer).or_default();
        runs.push_front(run);
        runs.truncate(MAX_RUNS);
    }

    fn was_there_before(&self, peer: &PeerId, run: u64) -> bool {
        self.past.get(peer).is_some_and(|runs| runs.contains(&run))
    }
}

/// What a second stream of a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The same run of the same node, or nobody can tell.
    Same,
    /// The node was started anew: what there is of the old run is void.
    Restart,
    /// Maybe another machine.
    Contest,
    /// Another machine that was told so within the last minute.
    Refused,
}

impl Task<'_> {
    /// Judges a stream that came up beside another one of the same peer and cluster.
    pub(super) fn judge(&mut self, up: &Up, current: Generation, now: Instant) -> Verdict {
        let Some(session) = self.sessions.get(&current) else { return Verdict::Same };
        let (Some(old), Some(new)) = (session.run, up.run) else { return Verdict::Same };
        if old == new {
            return Verdict::Same;
        }
        if self.rivals.refused.get(&up.peer).is_some_and(|&(run, _, until)| run == new && now < until)
            || self.rivals.contests.len() >= MAX_CONTESTS
            || self.rivals.contests.iter().any(|contest| contest.incumbent == current)
        {
            return Verdict::Refused;
        }
        let (there, here) = (self.remote_of(&up.peer, session.connection), self.remote_of(&up.peer, up.connection));
        let host = |remote: &Option<Multiaddr>| remote.as_ref().and_then(address::ip_of);
        if host(&there) == host(&here) && !self.rivals.was_there_before(&up.peer, new) {
            self.rivals.replaced(up.peer, old);
            return Verdict::Restart;
        }
        Verdict::Contest
    }

    fn remote_of(&self, peer: &PeerId, connection: ConnectionId) -> Option<Multiaddr> {
        let connections = self.swarm.behaviour().streams.connections(peer);
        connections.iter().find(|known| known.id == connection).map(|known| known.remote.clone())
    }

    /// Asks the one that is there for a sign of life; the one that comes waits.
    pub(super) fn contest(&mut self, up: Up, entered: oneshot::Sender<()>, incumbent: Generation, now: Instant) {
        tracing::debug!(peer = %up.peer, "two runs of one identity: the first one is asked for a sign of life");
        self.probe(incumbent, now);
        self.rivals.contests.push(Contest { up, entered, incumbent, until: now + ANSWER });
        self.agenda.no_later(Due::Contest, now + ANSWER);
    }

    /// The first one lives: who came is another machine.
    pub(super) fn lives(&mut self, generation: Generation, now: Instant) {
        if let Some(at) = self.rivals.contests.iter().position(|contest| contest.incumbent == generation) {
            let Contest { up, entered, .. } = self.rivals.contests.swap_remove(at);
            self.refuse_rival(&up, entered, generation, now);
        }
    }

    /// Who came has gone again before the verdict.
    pub(super) fn withdraw(&mut self, generation: Generation) {
        self.rivals.contests.retain(|contest| contest.up.generation != generation);
    }

    /// The first ones that did not answer are replaced.
    pub(super) fn decide_contests(&mut self, now: Instant) {
        while let Some(at) = self.rivals.contests.iter().position(|contest| contest.until <= now) {
            let Contest { up, entered, incumbent, .. } = self.rivals.contests.swap_remove(at);
            if let Some(run) = self.sessions.get(&incumbent).and_then(|session| session.run) {
                self.rivals.replaced(up.peer, run);
            }
            if self.clusters.get(&up.cluster).is_some_and(|cluster| cluster.leaving.is_none()) {
                self.enter_member(up, entered, true, now);
            }
        }
        if let Some(next) = self.rivals.contests.iter().map(|contest| contest.until).min() {
            self.agenda.set(Due::Contest, next);
        }
    }

    /// Tells who came that its identity is taken, and who is there that somebody came.
    pub(super) fn refuse_rival(&mut self, up: &Up, entered: oneshot::Sender<()>, incumbent: Generation, now: Instant) {
        let there = self.sessions.get(&incumbent).and_then(|session| self.remote_of(&up.peer, session.connection));
        let here = self.remote_of(&up.peer, up.connection);
        let told = |at: &Option<Multiaddr>| at.as_ref().map_or_else(Vec::new, |at| address::without_peer(at).to_vec());
        let _ = up.outbox.try_send(framed(&Control::SameIdentity(told(&there))));
        let _ = up.outbox.try_send(Outgoing::Bye(ByeReason::Identity));
        let _ = entered.send(());
        bounded(&mut self.rivals.refused, |(.., until)| *until);
        if let Some(run) = up.run {
            self.rivals.refused.insert(up.peer, (run, up.connection, now + REFUSED));
        }
        if self.rivals.noticed.get(&up.peer).is_none_or(|&last| now.duration_since(last) >= NOTICE_AGAIN) {
            tracing::warn!(peer = %up.peer, "two machines use the identity {}: the first one stays a member", up.peer);
            bounded(&mut self.rivals.noticed, |at| *at);
            self.rivals.noticed.insert(up.peer, now);
            self.send(incumbent, &Control::SameIdentity(told(&here)));
        }
    }

    /// The goodbye to a refused one is out: its connection goes too.
    pub(super) fn refused_rival_ended(&mut self, peer: &PeerId, connection: ConnectionId) {
        if self.rivals.refused.get(peer).is_some_and(|(_, refused, _)| *refused == connection) {
            self.swarm.close_connection(connection);
        }
    }

    /// A member says that another machine uses this node's identity.
    pub(super) fn rival_reported(&mut self, teller: &PeerId, cluster: &ClusterId, bytes: Vec<u8>, now: Instant) {
        let noted = self.ledger.get(teller).and_then(|note| note.name.as_deref());
        let name = self.members.name(cluster, teller).or(noted).map(super::membership::loggable);
        let teller = name.unwrap_or_else(|| teller.to_string());
        let seen = Multiaddr::try_from(bytes).map_or_else(|_| "an unknown address".to_owned(), |at| at.to_string());
        if self.rivals.ours.is_empty() {
            tracing::warn!(
                "another machine uses this node's identity: {teller} sees it at {seen}; \"ogctl doctor\" says what to do"
            );
        }
        self.rivals.ours.retain(|(known, at)| *known != seen && now.duration_since(*at) < EVIDENCE);
        self.rivals.ours.insert(0, (seen, now));
        self.rivals.ours.truncate(MAX_EVIDENCE);
        self.dirty = true;
    }

    /// Where another machine uses this node's identity: by members, and by what this node hears on its own networks.
    pub(super) fn same_identity(&self, now: Instant) -> Vec<String> {
        let mut seen: Vec<String> = self.rivals.addresses(now);
        seen.extend(self.twins_heard(now));
        seen
    }

    /// Evidence that nobody repeats is forgotten.
    pub(super) fn forget_rivals(&mut self, now: Instant) {
        let before = self.rivals.ours.len();
        self.rivals.ours.retain(|(_, at)| now.duration_since(*at) < EVIDENCE);
        self.dirty |= self.rivals.ours.len() < before;
    }
}
