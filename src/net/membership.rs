//! The part of the network task that greets, admits, hears and buries members.
//!
//! Nothing but a session that is up makes a member (`Report::Up`), and nothing but its end or its silence unmakes it.

use std::time::Duration;

use libp2p::swarm::ConnectionId;
use libp2p::{PeerId, StreamProtocol};
use tokio::time::Instant;

use super::book::Source;
use super::handle::Event;
use super::jitter;
use super::members::{Link, Transition};
use super::session::{self, Context, End, Generation, Outgoing, Report};
use super::streams::Inbound;
use super::task::{Due, Session, Task};
use crate::domain::cluster::ClusterId;
use crate::domain::network::GreetOutcome;
use crate::domain::node::{GoneReason, NodeId};
use crate::wire::control::{ByeReason, Control, Heartbeat};
use crate::wire::frame;
use crate::wire::limits::{MAX_HELLOS_FROM_PEER, MAX_HELLOS_PER_PEER};
use crate::wire::version::{MEMBER_PROTOCOL, MEMBER_VERSION_THREE};

/// A cluster that a peer is not in is tried again on the same connection after a pause, twice as long each time, up to
/// this. At once when somebody says that it is in it. The first pauses are short: a member that is short of time, or has
/// not joined yet, lets go of a hello without a byte, as a stranger does.
const REFUSED: Duration = Duration::from_secs(600);
/// Such a word counts this long after the last refusal.
const HINT_AGAIN: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(30) };
/// A hello that failed without a word is tried again after this.
const HELLO_AGAIN: Duration = Duration::from_secs(5);
/// A greeting that has to wait for the hellos before it looks again after this.
const TURN: Duration = Duration::from_millis(50);
/// Heartbeats that are asked for are sent no more often than this.
const PROBE_LEAST: Duration = Duration::from_millis(200);
/// Between two looks for silent members, at least.
const EXPIRE_AGAIN: Duration = Duration::from_millis(10);

/// A peer is not in a cluster, or let go of our hello.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refusal {
    at: Instant,
    pause: Duration,
}

impl Refusal {
    fn until(&self) -> Instant {
        self.at + self.pause
    }
}

/// A name of another node as it may stand in a log line: no control characters, not endless.
pub(super) fn loggable(name: &str) -> String {
    name.escape_debug().take(128).collect()
}

pub(super) fn framed(control: &Control) -> Outgoing {
    let mut bytes = Vec::new();
    frame::encode(&control.encode(), &mut bytes);
    Outgoing::Frame(bytes)
}

impl Task<'_> {
    pub(super) fn is_lower(&self, peer: &PeerId) -> bool {
        self.local.to_bytes() < peer.to_bytes()
    }

    /// A new connection: greet the peer in every cluster, at once when it is ours to begin.
    pub(super) fn greet_peer(&mut self, peer: PeerId, now: Instant) {
        let clusters: Vec<ClusterId> = self.clusters.keys().cloned().collect();
        for cluster in clusters {
            self.plan_greeting(peer, &cluster, now);
        }
    }

    /// A newly joined cluster: greet everybody who is connected, without patience. Whoever is in it greeted us when the
    /// connection was made, was refused, and would try again after seconds.
    pub(super) fn greet_connected(&mut self, cluster: &ClusterId) {
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            if !self.is_company_enough(&peer, cluster) {
                self.greet(peer, cluster);
            }
        }
    }

    fn plan_greeting(&mut self, peer: PeerId, cluster: &ClusterId, now: Instant) {
        if self.is_company_enough(&peer, cluster) {
            return;
        }
        if self.is_lower(&peer) || self.is_chosen(&peer) {
            self.greet(peer, cluster);
        } else {
            let patience = jitter(self.lasting.config.timings.patience);
            self.agenda.no_later(Due::Hello(peer, cluster.clone()), now + patience);
        }
    }

    /// Opens a membership stream to `peer`, unless there is one, or one is being opened, or it was refused.
    pub(super) fn greet(&mut self, peer: PeerId, id: &ClusterId) {
        let Some(cluster) = self.clusters.get(id).filter(|cluster| cluster.leaving.is_none()) else { return };
        let Some(connection) = self.swarm.behaviour().streams.connections(&peer).first().map(|connection| connection.id) else {
            return;
        };
        let now = Instant::now();
        let opening = self.hellos.values().any(|(greeted, in_cluster)| *greeted == peer && in_cluster.as_ref() == Some(id));
        if opening || self.members.generation(id, &peer).is_some() {
            return;
        }
        if let Some(until) = self.refused.get(&(connection, id.clone())).map(Refusal::until).filter(|&until| now < until) {
            self.agenda.no_later(Due::Hello(peer, id.clone()), until);
            return;
        }
        if self.hellos_with(&peer, true) >= MAX_HELLOS_PER_PEER {
            self.agenda.no_later(Due::Hello(peer, id.clone()), now + jitter(TURN));
            return;
        }
        let root = cluster.root.clone();
        self.open_session(peer, connection, id.clone(), root);
    }

    pub(super) fn open_session(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        cluster: ClusterId,
        root: crate::wire::keys::Root,
    ) {
        let context = self.context(peer, connection);
        self.hellos.insert(context.generation, (peer, Some(cluster.clone())));
        let stream = self.swarm.behaviour_mut().streams.open(peer, Some(connection), StreamProtocol::new(MEMBER_PROTOCOL));
        self.spawn(async move {
            match stream.await {
                Ok(Ok(stream)) => session::open(context, cluster, root, stream).await,
                failed => {
                    let end = match failed {
                        Ok(Err(super::streams::OpenError::Unsupported(_))) => End::Refused,
                        Ok(Err(error)) => End::Io(error.to_string()),
                        _ => End::Io("the connection closed".to_owned()),
                    };
                    session::down(context, Some(cluster), end).await;
                }
            }
        });
    }

    fn context(&mut self, peer: PeerId, connection: ConnectionId) -> Context {
        self.lasting.next_generation += 1;
        Context {
            generation: self.lasting.next_generation,
            local: self.local,
            peer,
            connection,
            reports: self.reports.clone(),
            versions: self.lasting.config.versions,
            run: self.lasting.run,
        }
    }

    /// Hellos under way with a peer: those that we began, or those that it began.
    fn hellos_with(&self, peer: &PeerId, ours: bool) -> usize {
        self.hellos.values().filter(|(greeted, cluster)| greeted == peer && cluster.is_some() == ours).count()
    }

    /// Somebody names a peer as a member of a cluster in which it refused us: it may have joined since.
    pub(super) fn hinted(&mut self, peer: PeerId, cluster: &ClusterId, now: Instant) {
        let before = self.refused.len();
        let connections: Vec<ConnectionId> =
            self.swarm.behaviour().streams.connections(&peer).iter().map(|connection| connection.id).collect();
        for connection in connections {
            let key = (connection, cluster.clone());
            // Not at every word: whoever repeats a false hint would have us knock all day.
            if self.refused.get(&key).is_some_and(|refusal| now.duration_since(refusal.at) >= HINT_AGAIN) {
                self.refused.remove(&key);
            }
        }
        if self.refused.len() < before {
            self.plan_greeting(peer, cluster, now);
        }
    }

    /// Another node greets us.
    pub(super) fn accept_hello(&mut self, inbound: Inbound) {
        if self.hellos_with(&inbound.peer, false) >= MAX_HELLOS_FROM_PEER {
            tracing::debug!(peer = %inbound.peer, "hello refused: too many in flight");
            return;
        }
        let roots: Vec<_> = self
            .clusters
            .values()
            .filter(|cluster| cluster.leaving.is_none())
            .map(|cluster| (cluster.id.clone(), cluster.root.clone()))
            .collect();
        if roots.is_empty() {
            return;
        }
        let context = self.context(inbound.peer, inbound.connection);
        self.hellos.insert(context.generation, (inbound.peer, None));
        self.spawn(session::accept(context, roots, inbound.stream));
    }

    pub(super) fn on_report(&mut self, report: Report) {
        match report {
            Report::Up(up, entered) => self.on_up(up, entered),
            Report::Frame(generation, control) => self.on_control(generation, control),
            Report::Down { generation, peer, connection, cluster, end } => {
                self.on_down(generation, peer, connection, cluster, end);
            }
        }
    }

    /// How `peer` is reached over `connection`.
    pub(super) fn link(&self, peer: &PeerId, connection: ConnectionId) -> Option<Link> {
        let streams = &self.swarm.behaviour().streams;
        let used = streams.connections(peer).iter().find(|known| known.id == connection)?;
        Some(Link {
            addresses: self.addresses_of(peer),
            direct: !used.relayed,
            relay: used.relay,
            transport: if used.quic { "quic" } else { "tcp" },
        })
    }

    /// The first frames of a session: heartbeat, state and view, written together.
    pub(super) fn introduce(&mut self, generation: Generation, cluster: &ClusterId, now: Instant) {
        let heartbeat = self.heartbeat_for(generation, now);
        let Some((peer, protocol)) = self.sessions.get(&generation).map(|session| (session.peer, session.protocol)) else {
            return;
        };
        self.send(generation, &Control::Heartbeat(heartbeat));
        self.send_state(generation, cluster, protocol);
        if protocol >= MEMBER_VERSION_THREE {
            self.introduce_others(generation, cluster, &peer, now);
        } else if let Some(view) = self.view_for(cluster, &peer, now) {
            self.send(generation, &Control::View(view));
        }
    }

    pub(super) fn send(&mut self, generation: Generation, control: &Control) {
        let Some(session) = self.sessions.get(&generation) else { return };
        if let Err(tokio::sync::mpsc::error::TrySendError::Full(_)) = session.outbox.try_send(framed(control)) {
            // It does not read just now. The next heartbeat says the same and more; a state that it missed it would never
            // hear of. (A session that has ended reports that itself.)
            match control {
                Control::State(_) => drop(self.bury(generation, GoneReason::Timeout)),
                Control::Models(_) => self.agenda.no_later(Due::Models, Instant::now() + super::offers::MODELS_AGAIN),
                _ => {}
            }
        }
    }

    fn heartbeat_for(&mut self, generation: Generation, now: Instant) -> Heartbeat {
        self.heartbeat_seq += 1;
        let offer = self.offer.borrow().clone();
        let serving = self
            .sessions
            .get(&generation)
            .and_then(|session| self.clusters.get(&session.cluster))
            .is_some_and(|cluster| cluster.serve && cluster.leaving.is_none());
        let echo = self.sessions.get(&generation).and_then(|session| self.members.echo(&session.cluster, &session.peer, now));
        Heartbeat {
            seq: self.heartbeat_seq,
            serving,
            draining: offer.draining,
            probe: false,
            free_slots: if serving { offer.free_slots } else { 0 },
            queued: offer.queued,
            state_version: self.state_version,
            echo_seq: echo.map_or(0, |(seq, _)| seq),
            echo_delay_us: echo.map_or(0, |(_, delay)| u32::try_from(delay.as_micros()).unwrap_or(u32::MAX)),
        }
    }

    /// Heartbeats to the members whose turn it is, or nearly so: one wake-up for several of them.
    pub(super) fn heartbeat(&mut self, now: Instant) {
        let nearly = now + self.lasting.config.timings.heartbeat / 5;
        self.beat(now, |_, session| session.beat_at <= nearly);
        self.plan_heartbeat();
        // Moves the next look to after the next heartbeat, as long as everybody is heard: no wake-up of its own.
        self.expire(now);
        self.dirty |= self.pace.is_old(now);
    }

    pub(super) fn plan_heartbeat(&mut self) {
        if let Some(next) = self.sessions.values().map(|session| session.beat_at).min() {
            self.agenda.set(Due::Heartbeat, next);
        }
    }

    pub(super) fn beat(&mut self, now: Instant, whose: impl Fn(Generation, &Session) -> bool) {
        self.last_beat = now;
        let generations: Vec<Generation> = self
            .sessions
            .iter()
            .filter(|&(&generation, session)| whose(generation, session))
            .map(|(&generation, _)| generation)
            .collect();
        for generation in generations {
            let heartbeat = self.heartbeat_for(generation, now);
            if let Some(session) = self.sessions.get_mut(&generation) {
                session.beaten = now;
                session.beat_at = now + jitter(self.lasting.config.timings.heartbeat);
                self.members.sent(&session.cluster, &session.peer, heartbeat.seq, now);
            }
            self.send(generation, &Control::Heartbeat(heartbeat));
        }
    }

    /// A heartbeat is answered by our own, unless ours went out a short while ago: the two of a pair fall into one exchange,
    /// where the answer carries QUIC's acknowledgement too. Two nodes that beat by clocks of their own wake each other
    /// twice as often.
    fn answer_heartbeat(&mut self, generation: Generation, probe: bool, now: Instant) {
        let least = if probe { PROBE_LEAST } else { self.lasting.config.timings.heartbeat / 2 };
        let Some(session) = self.sessions.get_mut(&generation) else { return };
        if now.duration_since(session.beaten) >= least {
            self.beat(now, |candidate, _| candidate == generation);
        } else if probe {
            // Who asks counts on an answer: it comes as soon as it may.
            session.beat_at = session.beat_at.min(session.beaten + least);
        }
        self.plan_heartbeat();
    }

    /// Asks for a heartbeat at once.
    pub(super) fn probe(&mut self, generation: Generation, now: Instant) {
        let heartbeat = Heartbeat { probe: true, ..self.heartbeat_for(generation, now) };
        self.send(generation, &Control::Heartbeat(heartbeat));
    }

    fn on_control(&mut self, generation: Generation, control: Control) {
        let Some(session) = self.sessions.get(&generation) else { return };
        let (cluster, peer) = (session.cluster.clone(), session.peer);
        let now = Instant::now();
        let news = self.members.news();
        self.lives(generation, now);
        match control {
            Control::Heartbeat(heartbeat) => {
                self.dirty |= self.members.on_heartbeat(&cluster, &peer, generation, &heartbeat, now);
                self.answer_heartbeat(generation, heartbeat.probe, now);
            }
            Control::State(state) => {
                let first = self.members.on_state(&cluster, &peer, generation, state, now);
                self.dirty = true;
                if first {
                    self.on_member_known(&cluster, peer, now);
                }
            }
            Control::Models(models) => {
                self.dirty |= self.members.on_models(&cluster, &peer, generation, models, now);
            }
            Control::View(view) => {
                self.dirty |= self.members.heard(&cluster, &peer, generation, now);
                self.learn_view(peer, &cluster, view, now);
            }
            Control::Roster(roster) => {
                self.dirty |= self.members.heard(&cluster, &peer, generation, now);
                self.learn_roster(generation, roster, now);
            }
            Control::SameIdentity(address) => self.rival_reported(&peer, &cluster, address, now),
            Control::Bye(_) => {}
        }
        if self.members.news() > news {
            self.plan_news(now);
        }
    }

    /// The member has told its name and its models: it can be listed and asked.
    fn on_member_known(&mut self, cluster: &ClusterId, peer: PeerId, now: Instant) {
        (self.membership_changed, self.pace.at_once) = (true, true);
        self.publish_permits();
        self.known_arrived(cluster, &peer, now);
        self.policy.succeeded(&peer);
        self.bootstrap_proved(&peer);
        if self.book.get(&peer).is_some_and(|candidate| candidate.was_member) {
            self.policy.one_is_back(now.into_std());
            self.agenda.no_later(Due::Dial, now);
        }
        // It may have come to us, or have been found by its id alone: when it is lost, there is somewhere to look for it.
        let mut addresses = self.dialable_of(Some(peer), self.addresses_of(&peer));
        addresses.reverse(); // the book puts what it hears last in front
        self.book.learn(peer, Source::Inbound, addresses, now.into_std());
        self.book.succeeded(&peer, now.into_std());
        self.remember_member(peer, now);
        self.ledger.greeted(peer, cluster, GreetOutcome::Member, now.into_std());
        if let Some(member) = self.members.get(cluster, &peer) {
            self.ledger.named(peer, &member.name, now.into_std());
            self.lasting.pool.admit(peer);
            if member.serving || !member.models.is_empty() {
                self.lasting.pool.warm(peer);
            }
            let _ = self.lasting.events.send(Event::MemberUp { cluster: cluster.clone(), member });
        }
    }

    fn on_down(&mut self, generation: Generation, peer: PeerId, connection: ConnectionId, cluster: Option<ClusterId>, end: End) {
        let accepted = self.hellos.remove(&generation).is_some_and(|(_, greeted)| greeted.is_none());
        self.withdraw(generation);
        tracing::debug!(%peer, generation, ?end, "membership stream ended");
        let now = Instant::now();
        if let Some(cluster) = &cluster {
            self.ledger.ended(peer, cluster, &end, now.into_std());
        }
        match &end {
            // What became of the other side's hello says nothing about ours.
            End::Refused | End::VersionMismatch(_) if accepted => {}
            End::Refused | End::VersionMismatch(_) => {
                // A report of a connection that is gone would never be forgotten.
                if let (Some(cluster), true) = (&cluster, self.is_open(&peer, connection)) {
                    let key = (connection, cluster.clone());
                    let pause = match (&end, self.refused.get(&key)) {
                        (End::VersionMismatch(_), _) => REFUSED,
                        (_, Some(last)) => (last.pause * 2).min(REFUSED),
                        (_, None) => jitter(HELLO_AGAIN),
                    };
                    self.refused.insert(key, Refusal { at: now, pause });
                    self.agenda.no_later(Due::Hello(peer, cluster.clone()), now + pause);
                }
            }
            // The other side keeps another stream, whose first heartbeat may come after this word: the member stays
            // until then, or until it has been silent for too long.
            End::Bye(ByeReason::Duplicate) if self.sessions.contains_key(&generation) => return,
            End::Bye(ByeReason::Surplus) if self.sessions.contains_key(&generation) => {
                return self.parted_from(generation, connection, now);
            }
            End::Bye(ByeReason::Identity) | End::SameIdentity(_) => self.told_of_a_rival(peer, connection, cluster.as_ref(), now),
            End::Violation(_) => self.on_violation(peer),
            End::Closed => self.refused_rival_ended(&peer, connection),
            End::Bye(_) | End::Io(_) | End::TimedOut => {}
        }
        if let (End::SameIdentity(address), Some(cluster)) = (&end, &cluster) {
            self.rival_reported(&peer, cluster, address.clone(), now);
        }
        let reason = match &end {
            End::Bye(_) | End::Closed | End::SameIdentity(_) => GoneReason::Left,
            End::TimedOut => GoneReason::Timeout,
            End::Refused | End::VersionMismatch(_) | End::Io(_) | End::Violation(_) => GoneReason::Error,
        };
        let buried = self.bury(generation, reason);
        // The hello went down with its connection, and there is another one.
        if let Some(cluster) = &cluster
            && self.swarm.is_connected(&peer)
            && !self.swarm.behaviour().streams.connections(&peer).iter().any(|known| known.id == connection)
        {
            self.plan_greeting(peer, cluster, now);
        }
        // A stream that broke on a connection that lives is opened again, soon when it worked before.
        if let (Some(cluster), End::Io(_) | End::TimedOut) = (cluster, &end)
            && self.swarm.is_connected(&peer)
        {
            let delay = if buried { self.lasting.config.timings.patience } else { HELLO_AGAIN };
            self.agenda.no_later(Due::Hello(peer, cluster), now + jitter(delay));
        }
    }

    /// Another machine has our identity, and was there first: we come back in a minute, no sooner.
    fn told_of_a_rival(&mut self, peer: PeerId, connection: ConnectionId, cluster: Option<&ClusterId>, now: Instant) {
        if let (Some(cluster), true) = (cluster, self.is_open(&peer, connection)) {
            self.refused.insert((connection, cluster.clone()), Refusal { at: now, pause: super::rivals::REFUSED });
        }
        self.policy.hold(&peer, super::rivals::REFUSED, now.into_std());
        self.turned_away(now);
    }

    fn is_open(&self, peer: &PeerId, connection: ConnectionId) -> bool {
        self.swarm.behaviour().streams.connections(peer).iter().any(|known| known.id == connection)
    }

    /// Removes the session, and the member if it is this session that holds it.
    pub(super) fn bury(&mut self, generation: Generation, reason: GoneReason) -> bool {
        let Some(session) = self.sessions.remove(&generation) else { return false };
        let Some(gone) = self.members.remove(&session.cluster, &session.peer, generation) else {
            // A newer session holds the member: its prompts go on.
            return false;
        };
        session.gone.cancel();
        self.on_gone(&session.cluster, session.peer, gone.name, reason);
        true
    }

    fn on_gone(&mut self, cluster: &ClusterId, peer: PeerId, name: Option<String>, reason: GoneReason) {
        self.dirty = true;
        self.left_our_side(&peer);
        self.tell_of_loss(cluster, peer, Instant::now());
        self.bootstrap_if_lonely(Instant::now());
        if let Some(name) = name {
            (self.membership_changed, self.pace.at_once) = (true, true);
            let id = NodeId::new(peer.to_string());
            let _ = self.lasting.events.send(Event::MemberDown { cluster: cluster.clone(), id, name, reason });
        }
    }

    /// A peer is a member at our side in one cluster less.
    pub(super) fn left_our_side(&mut self, peer: &PeerId) {
        self.publish_permits();
        if !self.members.is_member(peer) {
            self.lasting.pool.forget(*peer);
            if !self.is_bootstrap(peer) {
                self.swarm.behaviour_mut().limits.remove_peer_id(peer);
                self.swarm.behaviour_mut().gate.distrust(peer);
            }
        }
    }

    /// Ends a session from our side; the member goes at once.
    pub(super) fn end_session(&mut self, generation: Generation, bye: Option<ByeReason>) {
        if let Some(session) = self.sessions.get(&generation)
            && let Some(reason) = bye
        {
            let _ = session.outbox.try_send(Outgoing::Bye(reason));
        }
        self.bury(generation, GoneReason::Left);
    }

    /// Members that are silent: suspects get no prompts, the dead are removed with their prompts.
    pub(super) fn expire(&mut self, now: Instant) {
        let transitions = self.members.expire(now);
        self.dirty |= !transitions.is_empty();
        for transition in transitions {
            if let Transition::Dead { cluster, peer, generation } = transition {
                let connection = self.sessions.get(&generation).map(|session| session.connection);
                tracing::debug!(%cluster, %peer, "member is silent: removed");
                self.bury(generation, GoneReason::Timeout);
                // Do not wait for a graceful close: the other end may hang.
                if let Some(connection) = connection
                    && !self.sessions.values().any(|session| session.connection == connection)
                {
                    self.swarm.close_connection(connection);
                }
                // It may be there on another connection.
                if self.swarm.is_connected(&peer) {
                    self.agenda.no_later(Due::Hello(peer, cluster), now + jitter(self.lasting.config.timings.patience));
                }
            }
        }
        if let Some(next) = self.members.next_deadline() {
            self.agenda.set(Due::Expire, next.max(now + EXPIRE_AGAIN));
        }
    }

    /// Removes a peer from every cluster.
    pub(super) fn drop_peer(&mut self, peer: PeerId, reason: GoneReason) {
        let generations: Vec<Generation> =
            self.sessions.iter().filter(|(_, session)| session.peer == peer).map(|(&generation, _)| generation).collect();
        for generation in generations {
            self.bury(generation, reason);
        }
    }

    /// A connection closed: its sessions end by themselves; what was refused on it is forgotten.
    pub(super) fn forget_connection(&mut self, peer: PeerId, connection: ConnectionId) {
        self.refused.retain(|(refused, _), _| *refused != connection);
        self.serving.remove(&connection);
        self.pings.connection_closed(connection);
        self.lasting.pool.connection_closed(peer, connection);
        self.on_path_lost(peer, Instant::now());
    }
}
