//! The member table: who is in which cluster, when it was heard last, what it said of itself.
//!
//! Pure: the time is given from outside. An entry is held by one session, named by its generation; an older session that
//! ends late cannot remove what a newer one made.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::session::Generation;
use crate::domain::cluster::ClusterId;
use crate::domain::node::{FoundBy, Liveness, Member, ModelOffer, NodeId};
use crate::wire::control::{Heartbeat, State, View};
use crate::wire::models::Models;

/// Weight of a new round trip in the running mean: an eighth, as TCP does (RFC 6298).
const SMOOTHING: u64 = 8;

/// How a member is connected.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub addresses: Vec<Multiaddr>,
    pub direct: bool,
    pub transport: &'static str,
}

#[derive(Debug)]
struct Entry {
    generation: Generation,
    protocol: u16,
    found_by: FoundBy,
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
    /// The peers of the last view that was sent.
    told: Vec<Vec<u8>>,
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
}

impl Members {
    pub(crate) fn new(suspect: Duration, dead: Duration) -> Self {
        Self { entries: BTreeMap::new(), suspect, dead }
    }

    fn key(cluster: &ClusterId, peer: &PeerId) -> (ClusterId, PeerId) {
        (cluster.clone(), *peer)
    }

    fn held(&mut self, cluster: &ClusterId, peer: &PeerId, generation: Generation) -> Option<&mut Entry> {
        self.entries.get_mut(&Self::key(cluster, peer)).filter(|entry| entry.generation == generation)
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
            state: old.and_then(|old| old.state),
            told: Vec::new(),
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
            let whole = now.duration_since(sent);
            let trip = whole.saturating_sub(Duration::from_micros(u64::from(heartbeat.echo_delay_us)));
            let trip = u64::try_from(trip.as_micros()).unwrap_or(u64::MAX);
            entry.latency_us = Some(entry.latency_us.map_or(trip, |mean| (mean * (SMOOTHING - 1) + trip) / SMOOTHING));
            entry.sent = None;
        }
        entry.heard = Some((heartbeat.seq, now));
        let seen = |beat: &Heartbeat| (beat.serving, beat.draining, beat.free_slots, beat.queued);
        let changed = seen(&entry.heartbeat) != seen(heartbeat);
        entry.heartbeat = *heartbeat;
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
        entry.state.replace(state).is_none()
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

    /// Whether the same view was the last one that this member was told; remembers it.
    pub(crate) fn view_told(&mut self, cluster: &ClusterId, peer: &PeerId, view: &View) -> bool {
        let Some(entry) = self.entries.get_mut(&Self::key(cluster, peer)) else { return true };
        let mut peers: Vec<Vec<u8>> = view.entries.iter().map(|entry| entry.peer.clone()).collect();
        peers.sort();
        let same = entry.told == peers;
        entry.told = peers;
        same
    }

    pub(crate) fn get(&self, cluster: &ClusterId, peer: &PeerId) -> Option<Arc<Member>> {
        self.entries.get(&Self::key(cluster, peer)).and_then(|entry| entry.show(peer))
    }

    /// The members of a cluster, sorted by peer id.
    pub(crate) fn list(&self, cluster: &ClusterId) -> Vec<Arc<Member>> {
        self.of(cluster).filter_map(|(peer, entry)| entry.show(peer)).collect()
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

    fn show(&self, peer: &PeerId) -> Option<Arc<Member>> {
        let state = self.state.as_ref()?;
        Some(Arc::new(Member {
            id: NodeId::new(peer.to_string()),
            name: state.node_name.clone(),
            version: state.software.clone(),
            protocol: self.protocol,
            addresses: self.link.addresses.iter().map(ToString::to_string).collect(),
            found_by: self.found_by,
            direct: self.link.direct,
            relay: None,
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
mod tests {
    use super::*;
    use crate::domain::node::ModelState;
    use crate::wire::models::Details;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn table() -> (Members, ClusterId, PeerId, Instant) {
        (Members::new(10 * SECOND, 15 * SECOND), ClusterId::new("home").unwrap(), PeerId::random(), Instant::now())
    }

    fn enter(
        members: &mut Members,
        cluster: &ClusterId,
        peer: PeerId,
        generation: Generation,
        now: Instant,
    ) -> Option<Generation> {
        let link = Link { addresses: Vec::new(), direct: true, transport: "quic" };
        members.insert(cluster, peer, generation, 1, FoundBy::Mdns, link, now)
    }

    #[test]
    fn an_old_stream_that_ends_late_does_not_remove_what_a_newer_one_made() {
        let (mut members, cluster, peer, now) = table();
        assert_eq!(enter(&mut members, &cluster, peer, 1, now), None);
        assert_eq!(enter(&mut members, &cluster, peer, 2, now), Some(1));
        assert_eq!(members.remove(&cluster, &peer, 1), None);
        assert!(members.is_member(&peer));
        assert!(members.remove(&cluster, &peer, 2).is_some());
        assert!(!members.is_member(&peer));
    }

    #[test]
    fn silence_makes_a_suspect_after_ten_seconds_and_a_dead_one_after_fifteen() {
        let (mut members, cluster, peer, now) = table();
        enter(&mut members, &cluster, peer, 1, now);
        assert_eq!(members.expire(now + 9 * SECOND), []);
        assert_eq!(members.next_deadline(), Some(now + 10 * SECOND));
        assert_eq!(members.expire(now + 10 * SECOND), [Transition::Suspect]);
        assert_eq!(members.expire(now + 11 * SECOND), []);
        assert_eq!(members.next_deadline(), Some(now + 15 * SECOND));
        assert_eq!(members.expire(now + 15 * SECOND), [Transition::Dead { cluster, peer, generation: 1 }]);
    }

    #[test]
    fn a_frame_of_an_older_session_proves_nothing() {
        let (mut members, cluster, peer, now) = table();
        enter(&mut members, &cluster, peer, 2, now);
        members.heard(&cluster, &peer, 1, now + 9 * SECOND);
        assert_eq!(members.expire(now + 10 * SECOND), [Transition::Suspect]);
        assert!(members.heard(&cluster, &peer, 2, now + 11 * SECOND), "the suspect is back");
    }

    #[test]
    fn a_member_is_visible_once_it_has_told_its_state() {
        let (mut members, cluster, peer, now) = table();
        enter(&mut members, &cluster, peer, 1, now);
        assert!(members.list(&cluster).is_empty());
        let state = State { node_name: "NodeA".to_owned(), ..State::default() };
        assert!(members.on_state(&cluster, &peer, 1, state.clone(), now));
        assert!(!members.on_state(&cluster, &peer, 1, state, now));
        assert_eq!(members.list(&cluster)[0].name, "NodeA");
        assert!(members.list(&ClusterId::new("other").unwrap()).is_empty());
    }

    #[test]
    fn details_of_models_count_with_the_state_that_they_belong_to() {
        let (mut members, cluster, peer, now) = table();
        enter(&mut members, &cluster, peer, 1, now);
        let models = vec![ModelOffer::named("m"), ModelOffer::named("n")];
        let state = State { version: 4, models, ..State::default() };
        let details = |state_version| Models {
            state_version,
            details: vec![Details { state: ModelState::Ready, slots: 2, size: Some(9), ..Details::default() }],
        };
        assert!(!members.on_models(&cluster, &peer, 1, details(4), now), "no state yet");
        members.on_state(&cluster, &peer, 1, state.clone(), now);
        let known = |members: &Members| members.list(&cluster)[0].models.clone();
        let ready = ModelOffer { state: ModelState::Ready, slots: 2, size: Some(9), ..ModelOffer::named("m") };
        assert_eq!(known(&members), [ready.clone(), ModelOffer::named("n")]);
        assert!(!members.on_models(&cluster, &peer, 1, details(3), now));
        assert_eq!(known(&members), state.models);
        assert!(members.on_models(&cluster, &peer, 1, details(4), now));
        assert_eq!(known(&members)[0], ready);
        members.on_state(&cluster, &peer, 1, State { version: 5, ..state.clone() }, now);
        assert_eq!(known(&members), state.models);
    }

    #[test]
    fn the_echo_of_a_heartbeat_gives_the_round_trip_without_the_wait_at_the_other_side() {
        let (mut members, cluster, peer, now) = table();
        enter(&mut members, &cluster, peer, 1, now);
        members.on_state(&cluster, &peer, 1, State::default(), now);
        members.sent(&cluster, &peer, 5, now);
        let beat = Heartbeat { seq: 1, echo_seq: 5, echo_delay_us: 4_000_000, ..Heartbeat::default() };
        members.on_heartbeat(&cluster, &peer, 1, &beat, now + 4 * SECOND + Duration::from_micros(700));
        assert_eq!(members.list(&cluster)[0].latency_us, Some(700));
        // A liar's delay longer than the whole trip gives 0, not a wrap.
        members.sent(&cluster, &peer, 6, now);
        let beat = Heartbeat { seq: 2, echo_seq: 6, echo_delay_us: u32::MAX, ..Heartbeat::default() };
        members.on_heartbeat(&cluster, &peer, 1, &beat, now + SECOND);
        assert_eq!(members.list(&cluster)[0].latency_us, Some(612));
    }

    proptest! {
        #[test]
        fn only_the_session_that_holds_a_member_keeps_it_or_ends_it(
            steps in proptest::collection::vec((0_u8..6, 0_usize..2, 0_u64..4, 0_u64..8), 0..80),
        ) {
            let (mut members, cluster, first, mut now) = table();
            let peers = [first, PeerId::random()];
            // The plain model: who holds each member, and when that session was heard last.
            let mut model: [Option<(Generation, Instant)>; 2] = [None; 2];
            for (action, who, generation, seconds) in steps {
                now += Duration::from_secs(seconds);
                let (peer, held) = (peers[who], model[who].is_some_and(|(holder, _)| holder == generation));
                match action {
                    0 => {
                        let replaced = enter(&mut members, &cluster, peer, generation, now);
                        prop_assert_eq!(replaced, model[who].map(|(holder, _)| holder));
                        model[who] = Some((generation, now));
                    }
                    1 => {
                        prop_assert_eq!(members.remove(&cluster, &peer, generation).is_some(), held);
                        if held { model[who] = None }
                    }
                    2 => drop(members.heard(&cluster, &peer, generation, now)),
                    3 => {
                        let beat = Heartbeat { seq: seconds, echo_seq: seconds, echo_delay_us: u32::MAX, ..Heartbeat::default() };
                        members.sent(&cluster, &peer, seconds, now);
                        members.on_heartbeat(&cluster, &peer, generation, &beat, now);
                    }
                    4 => drop(members.on_state(&cluster, &peer, generation, State::default(), now)),
                    _ => for transition in members.expire(now) {
                        if let Transition::Dead { peer, generation, .. } = transition {
                            let who = usize::from(peer == peers[1]);
                            let (holder, heard) = model[who].unwrap();
                            prop_assert!(holder == generation && now - heard >= 15 * SECOND);
                            prop_assert!(members.remove(&cluster, &peer, generation).is_some());
                            model[who] = None;
                        }
                    },
                }
                if (2..5).contains(&action) && held {
                    model[who] = Some((generation, now));
                }
                for (peer, model) in peers.iter().zip(&model) {
                    prop_assert_eq!(members.generation(&cluster, peer), model.map(|(holder, _)| holder));
                }
                prop_assert!(members.list(&cluster).len() <= model.iter().flatten().count());
                prop_assert_eq!(members.next_deadline().is_some(), model.iter().any(Option::is_some));
            }
        }
    }
}
