//! The member table: who is in which cluster, when it was heard last, what it said of itself.
//!
//! Pure: the time is given from outside. An entry is held by one session, named by its generation; an older session that
//! ends late cannot remove what a newer one made.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::session::Generation;
use crate::domain::cluster::ClusterId;
use crate::domain::network::Relay;
use crate::domain::node::{FoundBy, Liveness, Member, ModelOffer, ModelState, NodeId};
use crate::wire::control::{Heartbeat, State};
use crate::wire::limits::MAX_ROSTER_MODELS;
use crate::wire::models::Models;

/// Weight of a new round trip in the running mean: an eighth, as TCP does (RFC 6298).
const SMOOTHING: u64 = 8;

/// An echo that waited longer at the other side than the time between two heartbeats says little of the way.
const MAX_ECHO_DELAY: Duration = Duration::from_secs(6);

/// Microseconds on the way, of the `whole` time, when the other side says that it waited for `delay`; it may err or lie.
fn trip(whole: Duration, delay: Duration) -> Option<u64> {
    let trip = whole.checked_sub(delay).filter(|_| delay <= MAX_ECHO_DELAY)?;
    u64::try_from(trip.as_micros()).ok()
}

/// How a member is connected.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub addresses: Vec<Multiaddr>,
    pub direct: bool,
    /// Who carries it, when it is not direct and that is known.
    pub relay: Option<PeerId>,
    pub transport: &'static str,
}

#[derive(Debug)]
struct Entry {
    generation: Generation,
    protocol: u16,
    found_by: FoundBy,
    id: NodeId,
    link: Link,
    connected_at: SystemTime,
    last_frame: Instant,
    last_seen: SystemTime,
    suspect: bool,
    heartbeat: Heartbeat,
    /// When the last heartbeat of the other side arrived, to echo it.
    heard: Option<(u64, Instant)>,
    /// When our last heartbeat left, to time its echo.
    sent: Option<(u64, Instant)>,
    latency_us: Option<u64>,
    state: Option<State>,
    /// Details of that state's models, from version 2 on.
    models: Option<Models>,
    /// The peers of the last view that was sent, and when it was.
    told: Vec<Vec<u8>>,
    told_at: Option<Instant>,
    /// Rises when what others are told of it changes; 0 until it told its name.
    news: u64,
    /// As lists show it: lists are made far more often than one member changes.
    shown: OnceLock<Arc<Member>>,
}

/// A member as others are told of it.
#[derive(Debug)]
pub(crate) struct Shown<'a> {
    pub name: &'a str,
    pub serving: bool,
    pub draining: bool,
    pub models: Vec<&'a str>,
    /// When it was heard last.
    pub heard: Instant,
}

/// What [`Members::expire`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Transition {
    /// Silent for 10 s: no new prompts.
    Suspect,
    /// Silent for 15 s: to be removed.
    Dead { cluster: ClusterId, peer: PeerId, generation: Generation },
}

/// A member that was removed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gone {
    /// Its name, if it ever told it (only then it was listed).
    pub name: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Members {
    entries: BTreeMap<(ClusterId, PeerId), Entry>,
    suspect: Duration,
    dead: Duration,
    /// The last number that was given to a change that others are told of.
    news: u64,
}

impl Members {
    pub(crate) fn new(suspect: Duration, dead: Duration) -> Self {
        Self { entries: BTreeMap::new(), suspect, dead, news: 0 }
    }

    fn key(cluster: &ClusterId, peer: &PeerId) -> (ClusterId, PeerId) {
        (cluster.clone(), *peer)
    }

    fn held(&mut self, cluster: &ClusterId, peer: &PeerId, generation: Generation) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&Self::key(cluster, peer)).filter(|entry| entry.generation == generation)?;
        entry.shown.take();
        Some(entry)
    }

    /// Enters a member, or moves it to a newer session; gives the session that held it.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn insert(
        &mut self,
        cluster: &ClusterId,
        peer: PeerId,
        generation: Generation,
        protocol: u16,
        found_by: FoundBy,
        link: Link,
        now: Instant,
    ) -> Option<Generation> {
        let old = self.entries.remove(&(cluster.clone(), peer));
        let replaced = old.as_ref().map(|old| old.generation);
        let entry = Entry {
            generation,
            protocol,
            found_by: old.as_ref().map_or(found_by, |old| old.found_by),
            id: old.as_ref().map_or_else(|| NodeId::new(peer.to_string()), |old| old.id.clone()),
            link,
            connected_at: old.as_ref().map_or_else(SystemTime::now, |old| old.connected_at),
            last_frame: now,
            last_seen: SystemTime::now(),
            suspect: false,
            heartbeat: old.as_ref().map(|old| old.heartbeat).unwrap_or_default(),
            heard: None,
            sent: None,
            latency_us: old.as_ref().and_then(|old| old.latency_us),
            models: old.as_ref().and_then(|old| old.models.clone()),
            news: old.as_ref().map_or(0, |old| old.news),
            state: old.and_then(|old| old.state),
            told: Vec::new(),
            told_at: None,
            shown: OnceLock::new(),
        };
        self.entries.insert((cluster.clone(), peer), entry);
        replaced
    }

    /// Removes a member, if this session holds it.
    pub(crate) fn remove(&mut self, cluster: &ClusterId, peer: &PeerId, generation: Generation) -> Option<Gone> {
        self.held(cluster, peer, generation)?;
        let entry = self.entries.remove(&Self::key(cluster, peer))?;
        Some(Gone { name: entry.state.map(|state| state.node_name) })
    }

    /// Any frame proves that the member lives.
    pub(crate) fn heard(&mut self, cluster: &ClusterId, peer: &PeerId, generation: Generation, now: Instant) -> bool {
        let Some(entry) = self.held(cluster, peer, generation) else { return false };
        entry.last_frame = now;
        entry.last_seen = SystemTime::now();
        std::mem::take(&mut entry.suspect)
    }

    /// Takes a heartbeat in; true when what others see of the member changed.
    pub(crate) fn on_heartbeat(
        &mut self,
        cluster: &ClusterId,
        peer: &PeerId,
        generation: Generation,
        heartbeat: &Heartbeat,
        now: Instant,
    ) -> bool {
        let recovered = self.heard(cluster, peer, generation, now);
        let Some(entry) = self.held(cluster, peer, generation) else { return false };
        if let Some((seq, sent)) = entry.sent
            && seq == heartbeat.echo_seq
        {
            if let Some(trip) = trip(now.duration_since(sent), Duration::from_micros(u64::from(heartbeat.echo_delay_us))) {
                entry.latency_us = Some(entry.latency_us.map_or(trip, |mean| (mean * (SMOOTHING - 1) + trip) / SMOOTHING));
            }
            entry.sent = None;
        }
        entry.heard = Some((heartbeat.seq, now));
        let seen = |beat: &Heartbeat| (beat.serving, beat.draining, beat.free_slots, beat.queued);
        let told = |beat: &Heartbeat| (beat.serving, beat.draining);
        let changed = seen(&entry.heartbeat) != seen(heartbeat);
        let is_news = entry.state.is_some() && told(&entry.heartbeat) != told(heartbeat);
        entry.heartbeat = *heartbeat;
        if is_news {
            self.make_news(cluster, peer);
        }
        changed || recovered
    }

    /// Takes a state in; true when it is the first one, with which the member becomes visible.
    pub(crate) fn on_state(
        &mut self,
        cluster: &ClusterId,
        peer: &PeerId,
        generation: Generation,
        state: State,
        now: Instant,
    ) -> bool {
        self.heard(cluster, peer, generation, now);
        let Some(entry) = self.held(cluster, peer, generation) else { return false };
        let told = |state: &State| {
            let names = state.models.iter().take(MAX_ROSTER_MODELS).map(|model| model.name.clone());
            (state.node_name.clone(), names.collect::<Vec<_>>())
        };
        let is_news = entry.state.as_ref().is_none_or(|old| told(old) != told(&state));
        let first = entry.state.replace(state).is_none();
        if is_news {
            self.make_news(cluster, peer);
        }
        first
    }

    fn make_news(&mut self, cluster: &ClusterId, peer: &PeerId) {
        self.news += 1;
        if let Some(entry) = self.entries.get_mut(&Self::key(cluster, peer)) {
            entry.news = self.news;
        }
    }

    /// A member can be reached where it could not before: others are to be told.
    pub(crate) fn moved(&mut self, peer: &PeerId) {
        for ((_, member), entry) in &mut self.entries {
            if member == peer && entry.state.is_some() {
                self.news += 1;
                entry.news = self.news;
            }
        }
    }

    /// The number of the last change that others are to be told of.
    pub(crate) fn news(&self) -> u64 {
        self.news
    }

    /// Takes details of models in; true when they are those of the state that is known.
    pub(crate) fn on_models(
        &mut self,
        cluster: &ClusterId,
        peer: &PeerId,
        generation: Generation,
        models: Models,
        now: Instant,
    ) -> bool {
        self.heard(cluster, peer, generation, now);
        let Some(entry) = self.held(cluster, peer, generation) else { return false };
        let fits = entry.state.as_ref().is_some_and(|state| state.version == models.state_version);
        entry.models = Some(models);
        fits
    }

    /// Remembers when a heartbeat left, to time its echo.
    pub(crate) fn sent(&mut self, cluster: &ClusterId, peer: &PeerId, seq: u64, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&Self::key(cluster, peer)) {
            entry.sent = Some((seq, now));
        }
    }

    /// The heartbeat to echo to this member, and how long ago it came.
    pub(crate) fn echo(&self, cluster: &ClusterId, peer: &PeerId, now: Instant) -> Option<(u64, Duration)> {
        let (seq, at) = self.entries.get(&Self::key(cluster, peer))?.heard?;
        Some((seq, now.duration_since(at)))
    }

    /// Members that have been silent too long at `now`.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Transition> {
        let mut found = Vec::new();
        for ((cluster, peer), entry) in &mut self.entries {
            let silent = now.duration_since(entry.last_frame);
            if silent >= self.dead {
                found.push(Transition::Dead { cluster: cluster.clone(), peer: *peer, generation: entry.generation });
            } else if silent >= self.suspect && !entry.suspect {
                entry.suspect = true;
                entry.shown.take();
                found.push(Transition::Suspect);
            }
        }
        found
    }

    /// When [`Members::expire`] is to be called next.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.entries.values().map(|entry| entry.last_frame + if entry.suspect { self.dead } else { self.suspect }).min()
    }

    /// The session that holds a member.
    pub(crate) fn generation(&self, cluster: &ClusterId, peer: &PeerId) -> Option<Generation> {
        self.entries.get(&Self::key(cluster, peer)).map(|entry| entry.generation)
    }

    /// Whether the peer is a member of any cluster.
    pub(crate) fn is_member(&self, peer: &PeerId) -> bool {
        self.entries.keys().any(|(_, member)| member == peer)
    }

    pub(crate) fn peers(&self) -> impl Iterator<Item = PeerId> {
        self.entries.keys().map(|(_, peer)| *peer)
    }

    /// Members of a cluster that told their name.
    pub(crate) fn count(&self, cluster: &ClusterId) -> usize {
        self.of(cluster).filter(|(_, entry)| entry.state.is_some()).count()
    }

    /// Of those: that take prompts.
    pub(crate) fn serving(&self, cluster: &ClusterId) -> usize {
        self.of(cluster).filter(|(_, entry)| entry.state.is_some() && entry.heartbeat.serving).count()
    }

    fn of<'a>(&'a self, cluster: &'a ClusterId) -> impl Iterator<Item = (&'a PeerId, &'a Entry)> {
        self.entries.iter().filter(move |((in_cluster, _), _)| in_cluster == cluster).map(|((_, peer), entry)| (peer, entry))
    }

    pub(crate) fn name(&self, cluster: &ClusterId, peer: &PeerId) -> Option<&str> {
        self.entries.get(&Self::key(cluster, peer))?.state.as_ref().map(|state| state.node_name.as_str())
    }

    /// Who told which name in a cluster.
    pub(crate) fn names<'a>(&'a self, cluster: &'a ClusterId) -> impl Iterator<Item = (PeerId, &'a str)> + 'a {
        self.of(cluster).filter_map(|(peer, entry)| Some((*peer, entry.state.as_ref()?.node_name.as_str())))
    }

    /// Peers of a cluster, each with when it was heard last; the caller picks at random.
    pub(crate) fn heard_of<'a>(&'a self, cluster: &'a ClusterId) -> impl Iterator<Item = (PeerId, Instant)> + 'a {
        self.of(cluster).map(|(peer, entry)| (*peer, entry.last_frame))
    }

    /// The members of a cluster that told their names, each with the number of its last news, if that is above `after`.
    pub(crate) fn news_after<'a>(&'a self, cluster: &'a ClusterId, after: u64) -> impl Iterator<Item = (u64, PeerId)> + 'a {
        self.of(cluster).filter(move |(_, entry)| entry.news > after).map(|(peer, entry)| (entry.news, *peer))
    }

    /// A member as others are told of it.
    pub(crate) fn shown(&self, cluster: &ClusterId, peer: &PeerId) -> Option<Shown<'_>> {
        let entry = self.entries.get(&Self::key(cluster, peer))?;
        let state = entry.state.as_ref()?;
        let details = entry.models(state);
        let usable = |at: usize| details.get(at).is_none_or(|model| model.state != ModelState::Failed);
        let models = state.models.iter().enumerate().filter(|(at, _)| usable(*at)).map(|(_, model)| model.name.as_str());
        Some(Shown {
            name: &state.node_name,
            serving: entry.heartbeat.serving,
            draining: entry.heartbeat.draining,
            models: models.take(MAX_ROSTER_MODELS).collect(),
            heard: entry.last_frame,
        })
    }

    /// Whether this member was told of the same peers last, within `fresh`; remembers them.
    pub(crate) fn view_told(
        &mut self,
        cluster: &ClusterId,
        peer: &PeerId,
        mut peers: Vec<Vec<u8>>,
        now: Instant,
        fresh: Duration,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(&Self::key(cluster, peer)) else { return true };
        peers.sort();
        let same = entry.told == peers && entry.told_at.is_some_and(|at| now.duration_since(at) < fresh);
        if !same {
            entry.told_at = Some(now);
        }
        entry.told = peers;
        same
    }

    /// A relay, with its name if it is a member of anything.
    pub(crate) fn relay(&self, id: &PeerId) -> Relay {
        let mut told = self.entries.iter().filter(|((_, peer), _)| peer == id).filter_map(|(_, entry)| entry.state.as_ref());
        Relay { id: NodeId::new(id.to_string()), name: told.next().map(|state| state.node_name.clone()) }
    }

    fn show(&self, entry: &Entry) -> Option<Arc<Member>> {
        if let Some(shown) = entry.shown.get() {
            return Some(Arc::clone(shown));
        }
        let shown = entry.show(entry.link.relay.map(|relay| self.relay(&relay)))?;
        // The name of a relay changes without this member.
        if entry.link.relay.is_none() {
            return Some(Arc::clone(entry.shown.get_or_init(|| shown)));
        }
        Some(shown)
    }

    /// The id of a member, as others read it.
    pub(crate) fn id(&self, cluster: &ClusterId, peer: &PeerId) -> Option<&NodeId> {
        self.entries.get(&Self::key(cluster, peer)).map(|entry| &entry.id)
    }

    /// When a member was heard last, and its measured round trip.
    pub(crate) fn nearness(&self, cluster: &ClusterId, peer: &PeerId) -> Option<(Instant, Option<u64>)> {
        self.entries.get(&Self::key(cluster, peer)).map(|entry| (entry.last_frame, entry.latency_us))
    }

    pub(crate) fn get(&self, cluster: &ClusterId, peer: &PeerId) -> Option<Arc<Member>> {
        self.entries.get(&Self::key(cluster, peer)).and_then(|entry| self.show(entry))
    }

    /// The members of a cluster, sorted by peer id.
    pub(crate) fn list(&self, cluster: &ClusterId) -> Vec<Arc<Member>> {
        self.of(cluster).filter_map(|(_, entry)| self.show(entry)).collect()
    }
}

impl Entry {
    /// The models of a state with what is known of them besides.
    fn models(&self, state: &State) -> Vec<ModelOffer> {
        let mut models = state.models.clone();
        if let Some(told) = self.models.as_ref().filter(|told| told.state_version == state.version) {
            models.iter_mut().zip(&told.details).for_each(|(model, details)| details.enter(model));
        }
        models
    }

    fn show(&self, relay: Option<Relay>) -> Option<Arc<Member>> {
        let state = self.state.as_ref()?;
        Some(Arc::new(Member {
            id: self.id.clone(),
            name: state.node_name.clone(),
            version: state.software.clone(),
            protocol: self.protocol,
            addresses: self.link.addresses.iter().map(ToString::to_string).collect(),
            found_by: self.found_by,
            direct: self.link.direct,
            relay,
            transport: self.link.transport,
            connected_at: self.connected_at,
            last_seen: self.last_seen,
            latency_us: self.latency_us,
            serving: self.heartbeat.serving,
            draining: self.heartbeat.draining,
            free_slots: self.heartbeat.free_slots,
            queued: self.heartbeat.queued,
            models: self.models(state),
            tiers: state.tiers.clone(),
            liveness: if self.suspect { Liveness::Suspect } else { Liveness::Alive },
        }))
    }
}

#[cfg(test)]
mod tests;
