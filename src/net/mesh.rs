//! The part of the network task that keeps a large cluster connected with few connections: whom to hold, whom only to know.
//!
//! Up to `full` members everybody is connected to everybody. Above, each node sees to it that it has `random + near` of
//! them at its side, whoever dialled; of more than `full` it lets some go, and stays their friend. Chosen at random, so
//! many edges keep the whole connected (`docs/scaling.md`).

use std::collections::HashMap;
use std::time::Duration;

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::known::Card;
use super::session::{Generation, Outgoing};
use super::task::{Due, Task};
use super::views::Waiting;
use super::{jitter, random_below};
use crate::domain::cluster::ClusterId;
use crate::domain::node::NodeId;
use crate::wire::control::ByeReason;
use crate::wire::limits::MAX_ROSTER_MODELS;
use crate::wire::version::MEMBER_VERSION_THREE;

/// So many are dialled at once; the others one after the other, so that a crowd that starts together can bear it.
const FIRST: usize = 8;
/// Of those others so many are under way at a time: where they take long, more of them would make all take longer.
const AT_ONCE: usize = 2;
/// Between two dials after those.
pub(super) const DIAL_AGAIN: Duration = Duration::from_millis(250);
/// When nobody is left to dial, or the dials are used up.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A dial is not counted on any longer.
const DIAL_TIME: Duration = Duration::from_secs(10);
/// Between two that are let go, and how long each has been there at least.
const PART_AGAIN: Duration = Duration::from_secs(2);
const PART_AFTER: Duration = Duration::from_secs(60);
/// With so many times the full number at its side a node parts sooner and faster.
const CROWDED: usize = 4;
const CROWDED_AGAIN: Duration = Duration::from_millis(100);
const CROWDED_AFTER: Duration = Duration::from_secs(5);
/// Between two looks at those whom a single member tells of.
const PROBE_AGAIN: Duration = Duration::from_secs(30);
/// Between two new neighbours of a node that has enough.
const ROTATE_AGAIN: Duration = Duration::from_secs(300);
/// Prompts that wait for a dial at once.
const MAX_REACHING: usize = 64;

/// A prompt that waits for a known member to be connected.
#[derive(Debug)]
struct Reaching {
    cluster: ClusterId,
    peer: PeerId,
    until: Instant,
    reply: oneshot::Sender<bool>,
}

/// What this part of the task remembers.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub waiting: Waiting,
    /// Known members that are being dialled to be at our side, and since when.
    dialing: HashMap<PeerId, Instant>,
    reaching: Vec<Reaching>,
    /// When the last new neighbour was chosen without need.
    rotated: HashMap<ClusterId, Instant>,
    /// When the last one was let go.
    parted: HashMap<ClusterId, Instant>,
}

impl Task<'_> {
    /// Members of a cluster that lists show, besides this node.
    pub(super) fn listed(&self, cluster: &ClusterId) -> usize {
        self.members.count(cluster) + self.known.count(cluster)
    }

    /// Whether a cluster has too many members to be connected to all of them: by our list, or by that of a member, which a
    /// new node hears long before it has all names.
    pub(super) fn is_partial(&self, cluster: &ClusterId) -> bool {
        let full = self.lasting.config.mesh.full;
        let told = self.sessions.values().filter(|session| session.cluster == *cluster).map(|session| session.listed).max();
        self.listed(cluster) + 1 > full || told.is_some_and(|told| told > full)
    }

    fn wanted_at_side(&self) -> usize {
        self.lasting.config.mesh.random + self.lasting.config.mesh.near
    }

    fn at_side(&self, cluster: &ClusterId) -> usize {
        self.members.heard_of(cluster).count()
    }

    /// Every cluster is a large one, and this node is well connected in each: nobody needs to be dialled.
    pub(super) fn has_company(&self) -> bool {
        !self.clusters.is_empty()
            && self.clusters.keys().all(|cluster| self.at_side(cluster) >= self.wanted_at_side() && self.is_partial(cluster))
    }

    /// Every cluster is a large one, and this node is no stranger in it.
    pub(super) fn is_in_crowds(&self) -> bool {
        !self.clusters.is_empty()
            && self.clusters.keys().all(|cluster| self.at_side(cluster) >= FIRST && self.is_partial(cluster))
    }

    /// A candidate that is not dialled just because it is there: in a large cluster this part of the task chooses.
    pub(super) fn is_not_wanted(&self, peer: &PeerId) -> bool {
        let mut knowing = self.clusters.keys().filter(|cluster| self.known.contains(cluster, peer)).peekable();
        (knowing.peek().is_some() && knowing.all(|cluster| self.is_partial(cluster))) || self.has_company()
    }

    pub(super) fn tend_mesh(&mut self, now: Instant) {
        self.mesh.dialing.retain(|_, since| now.duration_since(*since) < DIAL_TIME);
        let clusters: Vec<ClusterId> = self.clusters.keys().filter(|cluster| self.is_partial(cluster)).cloned().collect();
        if let Some(pause) = clusters.iter().map(|cluster| self.tend(cluster, now)).min() {
            self.agenda.no_later(Due::Mesh, now + jitter(pause));
        }
    }

    /// Gives the pause until the next look.
    fn tend(&mut self, cluster: &ClusterId, now: Instant) -> Duration {
        let (at_side, full) = (self.at_side(cluster), self.lasting.config.mesh.full);
        let coming = self.mesh.dialing.keys().filter(|peer| self.known.contains(cluster, peer)).count();
        if at_side + coming < self.wanted_at_side() {
            let burst = FIRST.saturating_sub(at_side + coming).max(1);
            if burst == 1 && coming >= AT_ONCE {
                // Whoever comes, or does not, is followed by the next.
                return LOOK_AGAIN;
            }
            let dialled = (0..burst).take_while(|_| self.dial_somebody(cluster, now)).count();
            // Whoever else was heard of may be dialled too.
            self.agenda.no_later(Due::Dial, now + LOOK_AGAIN);
            return if dialled == burst { DIAL_AGAIN } else { LOOK_AGAIN };
        }
        if at_side > full {
            let (pause, after) = if at_side > CROWDED * full { (CROWDED_AGAIN, CROWDED_AFTER) } else { (PART_AGAIN, PART_AFTER) };
            // Also who comes or parts by itself has this looked at.
            let due = self.mesh.parted.get(cluster).map_or(now, |&last| last + pause);
            if due > now {
                return due - now;
            }
            self.mesh.parted.insert(cluster.clone(), now);
            self.part_from_one(cluster, after, now);
            return pause;
        }
        if let Some(doubtful) = self.known.to_probe(cluster, now) {
            self.dial_known(cluster, doubtful, now);
            return PROBE_AGAIN;
        }
        let last = *self.mesh.rotated.entry(cluster.clone()).or_insert(now);
        if now.duration_since(last) >= ROTATE_AGAIN {
            self.mesh.rotated.insert(cluster.clone(), now);
            if self.dial_somebody(cluster, now) && at_side > self.wanted_at_side() {
                self.part_from_one(cluster, PART_AFTER, now);
            }
        }
        PROBE_AGAIN
    }

    /// Dials a known member that is chosen at random.
    fn dial_somebody(&mut self, cluster: &ClusterId, now: Instant) -> bool {
        let idle = |peer: &PeerId| !self.mesh.dialing.contains_key(peer);
        let known: Vec<PeerId> = self.known.dialable(cluster, now).filter(idle).collect();
        known.get(random_below(known.len())).copied().is_some_and(|chosen| self.dial_known(cluster, chosen, now))
    }

    fn dial_known(&mut self, cluster: &ClusterId, peer: PeerId, now: Instant) -> bool {
        if !self.may_dial(&peer, now) {
            return false;
        }
        self.mesh.dialing.insert(peer, now);
        if self.swarm.is_connected(&peer) {
            // By the DHT, which comes to everybody.
            self.greet(peer, cluster);
        } else {
            self.dial_now(peer, self.known.addresses(cluster, &peer).to_vec());
        }
        true
    }

    /// Whether a connection to a member that is only known is left at that: the DHT made it, or the other side, which greets
    /// when it wants a neighbour. A membership on each of them would be one too many, and soon be let go.
    pub(super) fn is_company_enough(&self, peer: &PeerId, cluster: &ClusterId) -> bool {
        self.known.contains(cluster, peer)
            && !self.is_chosen(peer)
            && self.is_partial(cluster)
            && self.at_side(cluster) >= self.wanted_at_side()
    }

    /// A dial to a peer failed that some cluster may list.
    pub(super) fn known_not_reached(&mut self, peer: &PeerId, now: Instant) {
        if self.mesh.dialing.remove(peer).is_some() {
            self.agenda.no_later(Due::Mesh, now);
        }
        if self.known.undialable(peer, now) {
            self.list_changed();
        }
        self.answer_reaching(|reaching| reaching.peer == *peer, false);
    }

    /// A known member is a member at our side now.
    pub(super) fn known_arrived(&mut self, cluster: &ClusterId, peer: &PeerId, now: Instant) {
        self.known.remove(cluster, peer);
        self.mesh.dialing.remove(peer);
        self.answer_reaching(|reaching| reaching.peer == *peer && reaching.cluster == *cluster, true);
        if self.is_partial(cluster) {
            self.agenda.no_later(Due::Mesh, now + DIAL_AGAIN);
        }
    }

    /// Lets go of one member at random that is neither near nor busy nor new.
    fn part_from_one(&mut self, cluster: &ClusterId, after: Duration, now: Instant) {
        let near = self.nearest(cluster);
        let may_go: Vec<Generation> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.cluster == *cluster && session.protocol >= MEMBER_VERSION_THREE)
            .filter(|(_, session)| now.into_std().duration_since(session.since) >= after)
            .filter(|(_, session)| !near.contains(&session.peer) && !self.is_bootstrap(&session.peer))
            .filter(|(_, session)| !self.is_busy(&session.peer, session.connection))
            // Who could not be told would take it for a loss.
            .filter(|(_, session)| session.outbox.capacity() > 0)
            .map(|(&generation, _)| generation)
            .collect();
        let Some(&chosen) = may_go.get(random_below(may_go.len())) else { return };
        if let Some(session) = self.sessions.get(&chosen) {
            tracing::debug!(%cluster, peer = %session.peer, "connections enough: this one goes, its member stays known");
            let _ = session.outbox.try_send(Outgoing::Bye(ByeReason::Surplus));
        }
        self.part(chosen, now);
    }

    /// Whether a prompt runs over a connection, in either direction.
    fn is_busy(&self, peer: &PeerId, connection: ConnectionId) -> bool {
        let served = self.serving.get(&connection).map_or(0, |count| count.load(std::sync::atomic::Ordering::Relaxed));
        served + self.lasting.pool.in_use(*peer, connection) > 0
    }

    /// The members with the shortest round trips.
    fn nearest(&self, cluster: &ClusterId) -> Vec<PeerId> {
        let trip = |peer: PeerId| self.members.nearness(cluster, &peer).and_then(|(_, trip)| Some((trip?, peer)));
        let mut by_trip: Vec<(u64, PeerId)> = self.members.heard_of(cluster).filter_map(|(peer, _)| trip(peer)).collect();
        by_trip.sort_unstable();
        by_trip.into_iter().take(self.lasting.config.mesh.near).map(|(_, peer)| peer).collect()
    }

    /// The membership of a session moves from our side into the list of those that are known: a goodbye among friends.
    pub(super) fn part(&mut self, generation: Generation, now: Instant) {
        let Some(session) = self.sessions.remove(&generation) else { return };
        let (cluster, peer) = (session.cluster, session.peer);
        let addresses = self.addresses_of(&peer);
        let parted = self.members.shown(&cluster, &peer).map(|shown| {
            let models = shown.models.iter().take(MAX_ROSTER_MODELS).map(|&name| name.to_owned()).collect();
            let name = shown.name.to_owned();
            (Card { name, serving: shown.serving, draining: shown.draining, models, addresses }, shown.heard)
        });
        if self.members.remove(&cluster, &peer, generation).is_none() {
            return; // a newer session holds it
        }
        session.gone.cancel();
        self.known.teller_parted(&cluster, &peer);
        self.left_our_side(&peer);
        if let Some((card, heard)) = parted {
            self.known.parted(&cluster, self.local, peer, card, heard, now);
        }
        self.dirty = true;
        self.agenda.no_later(Due::Mesh, now + DIAL_AGAIN);
    }

    /// The other side parted from us: it has said so, so the connection may go, unless something else is on it.
    pub(super) fn parted_from(&mut self, generation: Generation, connection: ConnectionId, now: Instant) {
        let Some(peer) = self.sessions.get(&generation).map(|session| session.peer) else { return };
        self.part(generation, now);
        if !self.sessions.values().any(|session| session.connection == connection) && !self.carries(&peer) {
            self.swarm.close_connection(connection);
        }
    }

    /// Connects to a member that is only known.
    pub(super) fn reach(&mut self, cluster: &ClusterId, member: &NodeId, until: Instant, reply: oneshot::Sender<bool>) {
        let peer = member.as_str().parse::<PeerId>().ok();
        let now = Instant::now().into_std();
        let may = |peer: &PeerId| self.known.contains(cluster, peer) && !self.bans.is_banned(peer, now);
        let Some(peer) = peer.filter(|peer| may(peer) && self.mesh.reaching.len() < MAX_REACHING) else {
            let is_here = peer.is_some_and(|peer| self.members.name(cluster, &peer).is_some());
            let _ = reply.send(is_here);
            return;
        };
        if self.swarm.is_connected(&peer) {
            self.greet(peer, cluster);
        } else {
            let told = self.known.addresses(cluster, &peer);
            let noted = self.book.addresses(&peer).iter().filter(|address| !told.contains(address));
            self.dial_now(peer, told.iter().chain(noted).cloned().collect());
        }
        self.mesh.reaching.push(Reaching { cluster: cluster.clone(), peer, until, reply });
        self.agenda.no_later(Due::Reach, until);
    }

    /// This node dials that peer to have it at its side: it is greeted without patience.
    pub(super) fn is_chosen(&self, peer: &PeerId) -> bool {
        self.mesh.reaching.iter().any(|reaching| reaching.peer == *peer) || self.mesh.dialing.contains_key(peer)
    }

    pub(super) fn give_up_reaching(&mut self, now: Instant) {
        self.answer_reaching(|reaching| reaching.until <= now || reaching.reply.is_closed(), false);
        if let Some(next) = self.mesh.reaching.iter().map(|reaching| reaching.until).min() {
            self.agenda.set(Due::Reach, next);
        }
    }

    fn answer_reaching(&mut self, which: impl Fn(&Reaching) -> bool, reached: bool) {
        for answered in self.mesh.reaching.extract_if(.., |reaching| which(reaching)) {
            let _ = answered.reply.send(reached);
        }
    }
}
