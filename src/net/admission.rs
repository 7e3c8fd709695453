//! The part of the network task that enters members: a session is up, and it is decided which of two stays.

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::jitter;
use super::rivals::Verdict;
use super::session::{Outgoing, Up};
use super::task::{Due, Session, Task};
use crate::domain::node::FoundBy;
use crate::wire::control::ByeReason;

impl Task<'_> {
    pub(super) fn on_up(&mut self, up: Up, entered: oneshot::Sender<()>) {
        let now = Instant::now();
        self.hellos.remove(&up.generation);
        if self.clusters.get(&up.cluster).is_none_or(|joined| joined.leaving.is_some())
            || self.bans.is_banned(&up.peer, now.into_std())
        {
            return; // dropping `entered` ends the session
        }
        let Some(current) = self.members.generation(&up.cluster, &up.peer) else {
            return self.enter_member(up, entered, false, now);
        };
        match self.judge(&up, current, now) {
            Verdict::Same => self.enter_member(up, entered, false, now),
            Verdict::Restart => self.enter_member(up, entered, true, now),
            Verdict::Contest => self.contest(up, entered, current, now),
            Verdict::Refused => self.refuse_rival(&up, entered, current, now),
            Verdict::Later => {} // dropping `entered` ends the session
        }
    }

    /// Enters a member, unless another stream of it stays. `anew`: whatever other stream there is belongs to the past.
    pub(super) fn enter_member(&mut self, up: Up, entered: oneshot::Sender<()>, anew: bool, now: Instant) {
        let Up { generation, cluster, peer, connection, opened_here, protocol, run, outbox } = up;
        // Of two streams for one cluster the one that the lower peer id opened stays; a newer one of the same opener
        // replaces the older (it moves to a better connection).
        let opened_by_lower = opened_here == self.is_lower(&peer);
        let current = self.members.generation(&cluster, &peer).and_then(|generation| self.sessions.get(&generation));
        if let Some(current) = current.filter(|current| !anew && current.opened_by_lower && !opened_by_lower) {
            let newer = |known: &super::streams::Connection| known.id == connection && known.since > current.since;
            let may_be_a_ghost = !opened_here && self.swarm.behaviour().streams.connections(&peer).iter().any(newer);
            let _ = outbox.try_send(Outgoing::Bye(ByeReason::Duplicate));
            let _ = entered.send(());
            // A peer that greets on a connection younger than the stream that we keep may have been started anew and
            // know nothing of that stream: it gets one that it does know.
            if may_be_a_ghost && let Some(root) = self.clusters.get(&cluster).map(|joined| joined.root.clone()) {
                self.open_session(peer, connection, cluster, root);
            }
            return;
        }
        let Some(link) = self.link(&peer, connection) else { return };
        let found_by = self.book.found_by(&peer).unwrap_or(FoundBy::Inbound);
        // Prompts that run go on when the membership moves to another stream, and end with it.
        let gone = self.members.generation(&cluster, &peer).and_then(|old| self.sessions.get(&old)).map(|old| old.gone.clone());
        let gone = gone.unwrap_or_default();
        let replaced = self.members.insert(&cluster, peer, generation, protocol, found_by, link, now);
        self.sessions.insert(
            generation,
            Session {
                cluster: cluster.clone(),
                peer,
                connection,
                protocol,
                opened_by_lower,
                run,
                told: 0,
                listed: 0,
                outbox,
                since: std::time::Instant::now(),
                gone,
                beaten: now,
                beat_at: now + jitter(self.lasting.config.timings.heartbeat),
            },
        );
        self.plan_heartbeat();
        if let Some(old) = replaced
            && let Some(session) = self.sessions.remove(&old)
        {
            let _ = session.outbox.try_send(Outgoing::Bye(ByeReason::Duplicate));
        }
        self.swarm.behaviour_mut().limits.bypass_peer_id(&peer);
        self.swarm.behaviour_mut().gate.trust(peer);
        self.agenda.no_later(Due::Expire, now + self.lasting.config.timings.suspect);
        self.publish_permits();
        let _ = entered.send(());
        self.introduce(generation, &cluster, now);
        tracing::debug!(%cluster, %peer, generation, "member entered");
    }
}
