//! The part of the network task that notices that the network has changed, and is back before the user notices.
//!
//! Addresses come and go (`net::listen`), links and routes change and clocks jump (`net::links`), or this task itself was not
//! run for a while. After each of these the old connections may lead nowhere: QUIC would notice after ten seconds, TCP after
//! minutes. So everybody who matters is asked for a sign of life on every connection; who does not answer is given up and
//! dialled again at once, like everybody whose pause was not over yet.

use std::collections::HashMap;
use std::time::Duration;

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::address;
use super::links::{Ground, Sleeper, clocks};
use super::session::Generation;
use super::task::{Due, Task};
use crate::domain::node::GoneReason;

/// A change seldom comes alone: link, address, route. After the first one the others have this long.
const SETTLE: Duration = Duration::from_millis(250);
/// Between two rounds that follow each other, first and at most: a link that comes and goes all the time costs no more than
/// heartbeats do.
const GAP: Duration = Duration::from_secs(1);
const LONGEST_GAP: Duration = Duration::from_secs(4);
/// After so much peace the next round is the first one again.
const PEACE: Duration = Duration::from_secs(30);
/// Addresses that are told so soon after the start are those that it begins with.
const BEGINNING: Duration = Duration::from_secs(1);
/// A sign of life takes no longer, or there is none: many round trips, in which a lost packet is sent again several times.
const SIGN: Duration = Duration::from_secs(1);
/// The same through a relay; after a change that took no address away, when connections are more likely to live than not, and
/// TCP waits longer than a second where two packets of three get lost; and on one of two connections that are both young: the
/// two ends dialled each other, and may have little time for each while they dial many.
const LONG_SIGN: Duration = Duration::from_secs(3);
/// A connection is young for so long.
const YOUNG: Duration = Duration::from_secs(2);
/// A connection that is older than this when the peer connects again may be one that the peer has lost. Two that dial each other
/// at the same moment connect within less, and a process that was killed is not back within it.
const OLD: Duration = Duration::from_millis(200);
/// A dial that is older than this when the network changes went into the old one.
const STALE_DIAL: Duration = Duration::from_secs(1);
/// A timer that is so late was not kept waiting by other work: the process was stopped, or its machine.
const OVERSLEPT: Duration = Duration::from_secs(3);

/// Whether the other end of a connection gave a sign of life.
pub(crate) type Probed = (PeerId, ConnectionId, bool);

/// When to begin a round. Pure.
#[derive(Debug, Default)]
struct Rounds {
    last: Option<Instant>,
    gap: Duration,
}

impl Rounds {
    /// When the round that a change at `now` asks for begins.
    fn due(&self, now: Instant) -> Instant {
        let settled = now + SETTLE;
        self.last.map_or(settled, |last| settled.max(last + self.gap))
    }

    fn begin(&mut self, now: Instant) {
        let peaceful = self.last.is_none_or(|last| now.duration_since(last) > PEACE);
        self.gap = if peaceful { GAP } else { (self.gap * 2).min(LONGEST_GAP) };
        self.last = Some(now);
    }
}

/// What is known of changes.
#[derive(Debug)]
pub(crate) struct Recovery {
    begun: Instant,
    rounds: Rounds,
    sleeper: Sleeper,
    ground: Ground,
    /// Connections whose other end was asked for a sign of life, and until when it has time for one.
    probing: HashMap<ConnectionId, Instant>,
    /// An address of this machine is gone since the last round, and with it whatever used it.
    address_lost: bool,
    /// The DHT is to be asked again when all of them have answered or not.
    look_up: bool,
    probed: mpsc::Sender<Probed>,
}

impl Recovery {
    pub(super) fn new(probed: mpsc::Sender<Probed>, now: Instant) -> Self {
        Self {
            begun: now,
            rounds: Rounds::default(),
            sleeper: Sleeper::new(clocks()),
            ground: Ground::default(),
            probing: HashMap::new(),
            address_lost: false,
            look_up: false,
            probed,
        }
    }
}

impl Task<'_> {
    /// A listener got an address, or lost one.
    pub(super) fn addresses_moved(&mut self, address: &Multiaddr, now: Instant) {
        if !address::leads_elsewhere(address) {
            return;
        }
        // What failed before may work now.
        self.policy.network_changed();
        self.agenda.no_later(Due::Dial, now);
        if now.duration_since(self.recovery.begun) > BEGINNING {
            self.changed("addresses", now);
        }
    }

    /// This machine has an address less.
    pub(super) fn address_lost(&mut self) {
        self.recovery.address_lost = true;
    }

    /// Links, routes or clocks changed.
    pub(super) fn on_ground(&mut self, ground: Ground, now: Instant) {
        let before = std::mem::replace(&mut self.recovery.ground, ground);
        if ground.changes != before.changes {
            self.changed("links or routes", now);
        }
        if ground.jumps != before.jumps {
            match self.recovery.sleeper.slept(clocks()) {
                Some(slept) => {
                    tracing::info!("awake again after {} s of suspend", slept.as_secs());
                    self.changed("a suspend", now);
                }
                // Nothing here goes by the wall clock.
                None => tracing::info!("the wall clock was set"),
            }
        }
    }

    /// Something is due that was due at `due`.
    pub(super) fn notice_oversleeping(&mut self, due: Instant, now: Instant) {
        let slept = self.recovery.sleeper.slept(clocks());
        if slept.is_some() || now.duration_since(due) > OVERSLEPT {
            tracing::info!("this process stood still for {} s", slept.unwrap_or(now.duration_since(due)).as_secs());
            self.changed("a stop", now);
        }
    }

    pub(super) fn changed(&mut self, what: &str, now: Instant) {
        tracing::debug!("the network may have changed: {what}");
        self.agenda.no_later(Due::Recover, self.recovery.rounds.due(now));
    }

    /// Tries what there is and what there was.
    pub(super) fn recover(&mut self, now: Instant) {
        self.recovery.rounds.begin(now);
        if self.recovery.ground.offline {
            // There is nobody to be reached, and nobody is given up for that: a link that is back soon may find all of them.
            return;
        }
        tracing::info!("the network changed: connections are tried, lost members dialled");
        self.policy.network_changed();
        self.recall(now);
        let address_lost = std::mem::take(&mut self.recovery.address_lost);
        // A dial from an address that is gone hears no answer, however young it is.
        let stale = if address_lost { now } else { now - STALE_DIAL };
        for peer in self.policy.dialing_since(stale.into_std()) {
            if !self.swarm.is_connected(&peer) {
                // Ends the dial: there is no connection to be closed.
                let _ = self.swarm.disconnect_peer_id(peer);
            }
        }
        self.bootstrap_again(now);
        self.ask_local_network();
        let patience = if address_lost { SIGN } else { LONG_SIGN };
        for (peer, connection) in self.connections_that_matter() {
            self.ask_for_sign(peer, connection, patience);
        }
        self.agenda.no_later(Due::Dial, now);
        self.recovery.look_up = true;
        self.look_up_when_settled(now);
    }

    /// Connections to members, to bootstrap nodes, and to whomever we wanted.
    fn connections_that_matter(&self) -> Vec<(PeerId, ConnectionId)> {
        let matters = |peer: &PeerId| self.members.is_member(peer) || self.is_bootstrap(peer);
        self.swarm
            .behaviour()
            .streams
            .all()
            .filter(|(peer, connection)| connection.dialed || matters(peer))
            .map(|(peer, connection)| (*peer, connection.id))
            .collect()
    }

    /// A peer connected once more: it may have been started anew, or have another address, and know nothing of the connections
    /// that it had.
    pub(super) fn probe_older(&mut self, peer: PeerId) {
        let connections = self.swarm.behaviour().streams.connections(&peer);
        let newest = connections.iter().map(|known| known.since).max();
        let (old, young): (Vec<_>, Vec<_>) =
            connections.iter().filter(|known| Some(known.since) < newest).partition(|known| known.since.elapsed() > OLD);
        let patience = |age: Duration| if age < YOUNG { LONG_SIGN } else { SIGN };
        let old: Vec<(ConnectionId, Duration)> =
            old.into_iter().map(|known| (known.id, patience(known.since.elapsed()))).collect();
        if !young.is_empty() {
            // Too young to tell by that: a node may also lose its address in its first moments.
            self.agenda.no_later(Due::Older(peer), Instant::now() + OLD);
        }
        for (connection, patience) in old {
            self.ask_for_sign(peer, connection, patience);
            // Prompts take the new one meanwhile.
            self.lasting.pool.connection_closed(peer, connection);
        }
    }

    /// Asks for a sign of life on one connection; no answer within `patience` is its end.
    fn ask_for_sign(&mut self, peer: PeerId, connection: ConnectionId, patience: Duration) {
        let relayed =
            self.swarm.behaviour().streams.connections(&peer).iter().any(|known| known.id == connection && known.relayed);
        let patience = if relayed { LONG_SIGN } else { patience };
        let until = Instant::now() + patience;
        // Whoever is asked already may have less time now: the network has changed since.
        if self.recovery.probing.get(&connection).is_some_and(|&before| before <= until) {
            return;
        }
        self.recovery.probing.insert(connection, until);
        self.swarm.behaviour_mut().streams.doubt(&peer, connection, true);
        let sign = self.is_alive(peer, connection, patience);
        let probed = self.recovery.probed.clone();
        self.spawn(async move {
            let alive = sign.await;
            let _ = probed.send((peer, connection, alive)).await;
        });
    }

    pub(super) fn on_probed(&mut self, (peer, connection, alive): Probed, now: Instant) {
        if self.recovery.probing.remove(&connection).is_none() {
            return; // asked twice, and answered or given up already
        }
        if alive {
            self.swarm.behaviour_mut().streams.doubt(&peer, connection, false);
        } else {
            self.give_up(peer, connection);
        }
        self.look_up_when_settled(now);
    }

    /// Nobody is at the other end of a connection any more: whoever was is gone, and is dialled again when the close is told.
    fn give_up(&mut self, peer: PeerId, connection: ConnectionId) {
        tracing::debug!(%peer, "no sign of life: the connection is given up");
        let on_it = |session: &super::task::Session| session.peer == peer && session.connection == connection;
        let generations: Vec<Generation> =
            self.sessions.iter().filter(|(_, session)| on_it(session)).map(|(&generation, _)| generation).collect();
        for generation in generations {
            self.bury(generation, GoneReason::Timeout);
        }
        let may_live = |known: &super::streams::Connection| {
            known.id != connection && (!known.doubted || self.recovery.probing.contains_key(&known.id))
        };
        if self.swarm.behaviour().streams.connections(&peer).iter().any(may_live) {
            self.swarm.close_connection(connection);
        } else {
            // A dial that crossed the peer's own, and went from where this connection did, would keep the next one waiting.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
    }

    /// The way to the DHT is known to be open, or not: it is asked who is there, and told where this node is now.
    fn look_up_when_settled(&mut self, now: Instant) {
        if self.recovery.probing.is_empty() && std::mem::take(&mut self.recovery.look_up) {
            self.dht_reached(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn changes_that_come_together_are_one_round() {
        let (start, mut rounds) = (Instant::now(), Rounds::default());
        let due = rounds.due(start);
        assert_eq!(due, start + SETTLE);
        // Whatever comes before it begins waits for no other: the agenda keeps the earlier moment.
        assert!(rounds.due(start + 100 * MILLI) > due);
        rounds.begin(due);
        // A change right after it began has to be looked at too, a little later.
        assert_eq!(rounds.due(due + MILLI), due + GAP);
        assert_eq!(rounds.due(due + 5 * GAP), due + 5 * GAP + SETTLE);
    }

    #[test]
    fn a_link_that_comes_and_goes_all_the_time_costs_a_round_every_four_seconds() {
        let (start, mut rounds) = (Instant::now(), Rounds::default());
        let (mut now, mut begun) = (start, 0_u32);
        let mut due = None;
        while now < start + Duration::from_secs(60) {
            // A change every ten milliseconds.
            let next: Instant = *due.get_or_insert_with(|| rounds.due(now));
            if next <= now {
                rounds.begin(now);
                begun += 1;
                due = None;
            }
            now += 10 * MILLI;
        }
        assert!((15..=18).contains(&begun), "{begun}");
        // After peace it is as quick as ever.
        let later = now + PEACE + LONGEST_GAP;
        rounds.begin(rounds.due(later));
        assert_eq!(rounds.gap, GAP);
    }
}
