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
use super::membership::{framed, loggable};
use super::session::{Generation, Outgoing, Up};
use super::task::{Due, Task};
use crate::domain::cluster::ClusterId;
use crate::wire::control::{ByeReason, Control};

/// How long the first one has to answer.
const ANSWER: Duration = Duration::from_millis(1500);
/// Contests at once; who comes then is dropped and may try again.
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
    /// Where another machine uses this node's identity, by the members that say so.
    ours: Vec<Sighting>,
    /// When a member last turned this node away because of it.
    turned_away: Option<Instant>,
}

/// A member's word that another machine uses this node's identity.
#[derive(Debug)]
struct Sighting {
    address: String,
    teller: PeerId,
    at: Instant,
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
    fn addresses(&self, now: Instant) -> Vec<String> {
        let fresh = self.ours.iter().filter(|seen| now.duration_since(seen.at) < EVIDENCE);
        let mut addresses: Vec<String> = fresh.map(|seen| seen.address.clone()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// More than one member's word: it takes two, or that this node was turned away.
    fn is_certain(&self, now: Instant) -> bool {
        let fresh = |at: Instant| now.duration_since(at) < EVIDENCE;
        // One sighting of each teller is kept.
        self.turned_away.is_some_and(fresh) || self.ours.iter().filter(|seen| fresh(seen.at)).count() >= 2
    }

    /// The text of the address, when it is one and news: the last word of each member counts.
    fn sighted(&mut self, teller: PeerId, address: Vec<u8>, now: Instant) -> Option<String> {
        let address = Multiaddr::try_from(address).ok().filter(|address| address::ip_of(address).is_some())?;
        let address = loggable(&address.to_string());
        let is_news = self.addresses(now).is_empty();
        self.ours.retain(|seen| seen.teller != teller && now.duration_since(seen.at) < EVIDENCE);
        self.ours.insert(0, Sighting { address: address.clone(), teller, at: now });
        self.ours.truncate(MAX_EVIDENCE);
        is_news.then_some(address)
    }

    fn forget(&mut self, now: Instant) -> bool {
        let before = self.ours.len();
        self.ours.retain(|seen| now.duration_since(seen.at) < EVIDENCE);
        self.ours.len() < before
    }

    /// There is one contest for each peer.
    fn is_contested(&self, peer: &PeerId) -> bool {
        self.contests.iter().any(|contest| contest.up.peer == *peer)
    }

    /// What comes of a second run that is no restart.
    fn opened(&self, peer: &PeerId) -> Verdict {
        let may_be = self.contests.len() < MAX_CONTESTS && !self.is_contested(peer);
        if may_be { Verdict::Contest } else { Verdict::Later }
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
    /// Not to be told now: too many contests, or one of this peer is not over. It proves nothing, so nobody is told
    /// anything and nobody is remembered; who comes greets again.
    Later,
}

impl Task<'_> {
    /// Judges a stream that came up beside another one of the same peer and cluster.
    pub(super) fn judge(&mut self, up: &Up, current: Generation, now: Instant) -> Verdict {
        let Some(session) = self.sessions.get(&current) else { return Verdict::Same };
        let (Some(old), Some(new)) = (session.run, up.run) else { return Verdict::Same };
        if old == new {
            return Verdict::Same;
        }
        if self.rivals.refused.get(&up.peer).is_some_and(|&(run, _, until)| run == new && now < until) {
            return Verdict::Refused;
        }
        if self.rivals.is_contested(&up.peer) {
            return Verdict::Later;
        }
        let (there, here) = (self.remote_of(&up.peer, session.connection), self.remote_of(&up.peer, up.connection));
        let host = |remote: &Option<Multiaddr>| remote.as_ref().and_then(address::ip_of);
        if host(&there) == host(&here) && !self.rivals.was_there_before(&up.peer, new) {
            self.rivals.replaced(up.peer, old);
            return Verdict::Restart;
        }
        self.rivals.opened(&up.peer)
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
        if let Some(seen) = self.rivals.sighted(*teller, bytes, now) {
            let noted = self.ledger.get(teller).and_then(|note| note.name.as_deref());
            let name = self.members.name(cluster, teller).or(noted).map(loggable);
            let teller = name.unwrap_or_else(|| teller.to_string());
            tracing::warn!(
                "{teller} says that another machine uses this node's identity, at {seen}; \"ogctl doctor\" says what to do"
            );
        }
        self.dirty = true;
    }

    /// A member turned this node away: the other machine was there first.
    pub(super) fn turned_away(&mut self, now: Instant) {
        self.rivals.turned_away = Some(now);
        self.dirty = true;
    }

    /// Whether there is more than the word of one member of another machine with this node's identity.
    pub(super) fn is_rival_certain(&self, now: Instant) -> bool {
        self.rivals.is_certain(now) || self.twins_heard(now).next().is_some()
    }

    /// Where another machine uses this node's identity: by members, and by what this node hears on its own networks.
    pub(super) fn same_identity(&self, now: Instant) -> Vec<String> {
        let mut seen: Vec<String> = self.rivals.addresses(now);
        seen.extend(self.twins_heard(now));
        seen
    }

    /// Evidence that nobody repeats is forgotten.
    pub(super) fn forget_rivals(&mut self, now: Instant) {
        self.dirty |= self.rivals.forget(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Vec<u8> {
        text.parse::<Multiaddr>().unwrap().to_vec()
    }

    fn contest(peer: PeerId, now: Instant) -> Contest {
        let up = Up {
            generation: 2,
            cluster: ClusterId::new("home").unwrap(),
            peer,
            connection: ConnectionId::new_unchecked(1),
            opened_here: false,
            protocol: 3,
            run: Some(7),
            outbox: tokio::sync::mpsc::channel(1).0,
        };
        Contest { up, entered: oneshot::channel().0, incumbent: 1, until: now + ANSWER }
    }

    #[test]
    fn each_peer_has_one_contest_and_all_together_have_few() {
        let (mut rivals, now, first) = (Rivals::default(), Instant::now(), PeerId::random());
        rivals.contests.push(contest(first, now));
        assert!(rivals.is_contested(&first));
        assert_eq!(rivals.opened(&first), Verdict::Later);
        for _ in 2..MAX_CONTESTS {
            rivals.contests.push(contest(PeerId::random(), now));
        }
        assert_eq!(rivals.opened(&PeerId::random()), Verdict::Contest, "the last one");
        rivals.contests.push(contest(PeerId::random(), now));
        assert_eq!(rivals.opened(&PeerId::random()), Verdict::Later, "one more");
        assert!(rivals.refused.is_empty());
    }

    #[test]
    fn one_member_alone_makes_nothing_certain_whatever_it_says() {
        let (mut rivals, now, liar) = (Rivals::default(), Instant::now(), PeerId::random());
        for nonsense in [Vec::new(), vec![255; 9], address("/dns4/example.org/tcp/1"), address("/memory/7")] {
            assert_eq!(rivals.sighted(liar, nonsense, now), None);
        }
        assert!(rivals.addresses(now).is_empty());
        for host in 1..9 {
            rivals.sighted(liar, address(&format!("/ip4/192.0.2.{host}/tcp/1")), now);
        }
        assert_eq!(rivals.addresses(now), ["/ip4/192.0.2.8/tcp/1"]);
        assert!(!rivals.is_certain(now));
        // A second one says the same.
        assert_eq!(rivals.sighted(PeerId::random(), address("/ip4/192.0.2.8/tcp/1"), now), None, "no news");
        assert!(rivals.is_certain(now) && rivals.addresses(now).len() == 1);
        assert!(!rivals.is_certain(now + EVIDENCE));
        assert!(rivals.forget(now + EVIDENCE));
        rivals.turned_away = Some(now);
        assert!(rivals.is_certain(now) && !rivals.is_certain(now + EVIDENCE));
    }

    #[test]
    fn an_address_is_told_on_one_line_and_few_are_kept() {
        let (mut rivals, now) = (Rivals::default(), Instant::now());
        let hostile = address("/ip4/192.0.2.1").into_iter().chain([53, 3, b'a', b'\n', 27]).collect();
        let told = rivals.sighted(PeerId::random(), hostile, now).unwrap();
        assert!(!told.contains(char::is_control), "{told:?}");
        for _ in 0..=MAX_EVIDENCE {
            rivals.sighted(PeerId::random(), address("/ip4/192.0.2.1/tcp/1"), now);
        }
        assert_eq!(rivals.ours.len(), MAX_EVIDENCE);
    }
}
