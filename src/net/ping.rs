//! Signs of life on demand: the ping protocol of libp2p on a stream of our choice, asked and answered.
//!
//! `Handle::ping` finds out who is meant, dials when need be, and times round trips on the best connection. The same protocol
//! tells whether a connection still leads anywhere (`Task::is_alive`), for whoever does not want to wait until it times out.
//! Not the behaviour of the library: it asks everybody all the time, on every connection, and cannot be asked to.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, Stream};
use libp2p::{PeerId, StreamProtocol};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::bootstrap::why_not;
use super::membership;
use super::streams::{Connection, Inbound, OpenError};
use super::task::{Due, Task};
use crate::domain::network::{PingError, Pinged};
use crate::domain::node::NodeId;
use crate::wire::limits::{MAX_PING_STREAMS, PING_BYTES, PING_IDLE, PING_PACE};
use crate::wire::version::PING_PROTOCOL;

/// Round trips of one question, at most.
pub const MAX_PINGS: u32 = 100;
/// Questions of this node at once; one more is told so.
const MAX_ASKED: usize = 32;
/// Between two round trips: far slower than anybody answers.
const PAUSE: Duration = Duration::from_millis(200);
/// A round trip that takes longer is none.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a connection may take to come up.
const CONNECT: Duration = Duration::from_secs(10);

/// Somebody who waits for an answer.
#[derive(Debug)]
struct Asking {
    /// As it was asked for.
    label: String,
    count: u32,
    reply: oneshot::Sender<Result<Pinged, PingError>>,
    /// Its place among those that ask.
    _place: Arc<()>,
}

/// Pings under way.
#[derive(Debug, Default)]
pub(crate) struct Pings {
    /// One clone for each stream that is answered, by the connection that carries it.
    answered: HashMap<ConnectionId, Arc<()>>,
    /// One clone for each question of this node.
    asked: Arc<()>,
    /// Questions that wait for a connection, and until when.
    waiting: HashMap<PeerId, (Instant, Vec<Asking>)>,
}

impl Pings {
    /// A place for one more stream of a connection, if there is one.
    fn admit(&mut self, connection: ConnectionId) -> Option<Arc<()>> {
        let places = self.answered.entry(connection).or_default();
        (Arc::strong_count(places) <= MAX_PING_STREAMS).then(|| Arc::clone(places))
    }

    pub(super) fn connection_closed(&mut self, connection: ConnectionId) {
        self.answered.remove(&connection);
    }
}

/// Whom a text means.
#[derive(Debug, PartialEq, Eq)]
enum Meant {
    Nobody,
    One(PeerId),
    Several(Vec<PeerId>),
}

/// Chooses among the `known` peers and their names: a peer id means itself, a name whoever told it.
fn meant<'a>(text: &str, known: impl Iterator<Item = (PeerId, &'a str)>) -> Meant {
    let mut found: Vec<PeerId> = known.filter(|(_, name)| *name == text).map(|(peer, _)| peer).collect();
    found.sort_unstable();
    found.dedup();
    match found.len() {
        0 => Meant::Nobody,
        1 => Meant::One(found[0]),
        _ => Meant::Several(found),
    }
}

impl Task<'_> {
    /// Asks `peer` (an id or a name) for signs of life; the answer goes to `reply`.
    pub(super) fn ping(&mut self, peer: String, count: u32, reply: oneshot::Sender<Result<Pinged, PingError>>) {
        if Arc::strong_count(&self.pings.asked) > MAX_ASKED {
            let _ = reply.send(Err(PingError::Busy));
            return;
        }
        let whom = match self.whom(&peer) {
            Ok(whom) => whom,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let place = Arc::clone(&self.pings.asked);
        let asking = Asking { label: peer, count: count.clamp(1, MAX_PINGS), reply, _place: place };
        match self.swarm.behaviour().streams.connections(&whom).first().cloned() {
            Some(connection) => self.ask_for_life(whom, &connection, asking),
            None => self.dial_to_ping(whom, asking),
        }
    }

    fn whom(&self, text: &str) -> Result<PeerId, PingError> {
        if let Ok(peer) = text.parse::<PeerId>() {
            let known = self.swarm.is_connected(&peer)
                || self.book.contains(&peer)
                || self.clusters.keys().any(|cluster| self.known.contains(cluster, &peer))
                || self.is_bootstrap(&peer)
                || self.ledger.get(&peer).is_some();
            return match peer {
                peer if peer == self.local => Err(PingError::Ourselves),
                peer if known => Ok(peer),
                _ => Err(PingError::NoSuchPeer(text.to_owned())),
            };
        }
        // Members first: somebody who is gone must not make the name of a member ambiguous.
        let members = self.clusters.keys().flat_map(|cluster| {
            let known = self.known.list(cluster).map(|(peer, member)| (peer, member.name.as_str()));
            self.members.names(cluster).chain(known)
        });
        let met = self.ledger.peers().filter_map(|peer| Some((*peer, self.ledger.get(peer)?.name.as_deref()?)));
        let found = match meant(text, members) {
            Meant::Nobody => meant(text, met),
            found => found,
        };
        match found {
            Meant::One(peer) => Ok(peer),
            Meant::Nobody if text == self.lasting.config.node_name => Err(PingError::Ourselves),
            Meant::Nobody => Err(PingError::NoSuchPeer(text.to_owned())),
            Meant::Several(peers) => {
                let ids: Vec<String> = peers.iter().map(ToString::to_string).collect();
                Err(PingError::Ambiguous(text.to_owned(), ids.join(", ")))
            }
        }
    }

    fn dial_to_ping(&mut self, peer: PeerId, asking: Asking) {
        let mut addresses = self.book.addresses(&peer).to_vec();
        for told in self.clusters.keys().flat_map(|cluster| self.known.addresses(cluster, &peer)) {
            if !addresses.contains(told) {
                addresses.push(told.clone());
            }
        }
        let options = DialOpts::peer_id(peer).condition(PeerCondition::DisconnectedAndNotDialing).addresses(addresses).build();
        match self.swarm.dial(options) {
            Ok(()) => self.policy.dialing(peer, std::time::Instant::now()),
            // One is under way already.
            Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => {
                let reason = match error {
                    DialError::NoAddresses => "no address of it is known".to_owned(),
                    other => why_not(&other),
                };
                let _ = asking.reply.send(Err(PingError::NotConnected(asking.label, reason)));
                return;
            }
        }
        let until = Instant::now() + CONNECT;
        self.pings.waiting.entry(peer).or_insert_with(|| (until, Vec::new())).1.push(asking);
        self.agenda.no_later(Due::Ping(peer), until);
    }

    /// A connection came up: whoever waited for it asks on it.
    pub(super) fn ping_connected(&mut self, peer: PeerId) {
        let Some((_, waiting)) = self.pings.waiting.remove(&peer) else { return };
        self.agenda.forget(|due| *due == Due::Ping(peer));
        let Some(connection) = self.swarm.behaviour().streams.connections(&peer).first().cloned() else { return };
        for asking in waiting {
            self.ask_for_life(peer, &connection, asking);
        }
    }

    /// No connection came up, for this reason.
    pub(super) fn ping_not_connected(&mut self, peer: PeerId, reason: &str) {
        self.agenda.forget(|due| *due == Due::Ping(peer));
        for asking in self.pings.waiting.remove(&peer).into_iter().flat_map(|(_, waiting)| waiting) {
            let _ = asking.reply.send(Err(PingError::NotConnected(asking.label, reason.to_owned())));
        }
    }

    /// A connection took too long.
    pub(super) fn ping_overdue(&mut self, peer: PeerId) {
        self.ping_not_connected(peer, &format!("no answer within {} s", CONNECT.as_secs()));
    }

    fn ask_for_life(&mut self, peer: PeerId, connection: &Connection, asking: Asking) {
        let link = self.link_facts(connection, std::time::Instant::now());
        let opening = self.open_ping(peer, connection.id);
        let name = self.name_of(&peer).map(|name| membership::loggable(&name));
        let id = NodeId::new(peer.to_string());
        self.spawn(async move {
            let Asking { label, count, reply, .. } = asking;
            let outcome = match timeout(ANSWER, opening).await {
                Ok(Ok(Ok(stream))) => match round_trips(stream, count).await {
                    trips if trips.is_empty() => Err(PingError::NoAnswer(label)),
                    round_trips => Ok(Pinged { id, name, link, round_trips }),
                },
                Ok(Ok(Err(OpenError::Unsupported(_)))) => Err(PingError::Unsupported(label)),
                _ => Err(PingError::NoAnswer(label)),
            };
            let _ = reply.send(outcome);
        });
    }

    fn open_ping(&mut self, peer: PeerId, connection: ConnectionId) -> oneshot::Receiver<Result<Stream, OpenError>> {
        self.swarm.behaviour_mut().streams.open(peer, Some(connection), StreamProtocol::new(PING_PROTOCOL))
    }

    /// Resolves to whether the other end of a connection answers within `deadline`.
    pub(super) fn is_alive(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        deadline: Duration,
    ) -> impl Future<Output = bool> + use<> {
        let opening = self.open_ping(peer, connection);
        async move {
            match timeout(deadline, opening).await {
                // A stream that was negotiated was answered; so was one of a protocol that an older node does not know.
                Ok(Ok(Ok(_) | Err(OpenError::Unsupported(_) | OpenError::Busy))) => true,
                Ok(Ok(Err(OpenError::NotConnected | OpenError::TimedOut | OpenError::Io(_)))) | Ok(Err(_)) | Err(_) => false,
            }
        }
    }

    /// Another node asks for a sign of life: anybody may, no more often than costs nothing.
    pub(super) fn accept_ping(&mut self, inbound: Inbound) {
        match self.pings.admit(inbound.connection) {
            Some(place) => self.spawn(answer(inbound, place)),
            None => tracing::debug!(peer = %inbound.peer, "ping refused: too many streams"),
        }
    }
}

/// Sends back what comes, until the other side has had enough or is silent for too long.
async fn answer(inbound: Inbound, place: Arc<()>) {
    let mut stream = inbound.into_stream();
    // Who proves nothing but that it lives is not worth a connection.
    stream.ignore_for_keep_alive();
    let mut payload = [0; PING_BYTES];
    while let Ok(Ok(())) = timeout(PING_IDLE, stream.read_exact(&mut payload)).await {
        let back = async {
            stream.write_all(&payload).await?;
            stream.flush().await
        };
        if !matches!(timeout(PING_IDLE, back).await, Ok(Ok(()))) {
            break;
        }
        sleep(PING_PACE).await;
    }
    drop(place);
}

/// Up to `count` round trips, until one is missing.
async fn round_trips(mut stream: Stream, count: u32) -> Vec<Duration> {
    let mut trips = Vec::new();
    while trips.len() < count as usize {
        if !trips.is_empty() {
            sleep(PAUSE).await;
        }
        match timeout(ANSWER, round_trip(&mut stream)).await {
            Ok(Ok(trip)) => trips.push(trip),
            Ok(Err(_)) | Err(_) => break,
        }
    }
    let _ = timeout(PAUSE, stream.close()).await;
    trips
}

async fn round_trip(stream: &mut Stream) -> std::io::Result<Duration> {
    let (mut sent, mut back) = ([0; PING_BYTES], [0; PING_BYTES]);
    getrandom::fill(&mut sent).map_err(std::io::Error::other)?;
    let begun = Instant::now();
    stream.write_all(&sent).await?;
    stream.flush().await?;
    stream.read_exact(&mut back).await?;
    match back == sent {
        true => Ok(begun.elapsed()),
        false => Err(std::io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_its_bearer_and_nobody_when_there_are_several() {
        let (a, b) = (PeerId::random(), PeerId::random());
        // In two clusters, and twice the same.
        let known = [(a, "one"), (a, "one"), (b, "two"), (a, "both"), (b, "both")];
        let mean = |text| meant(text, known.iter().copied());
        assert_eq!(mean("one"), Meant::One(a));
        assert_eq!(mean("One"), Meant::Nobody);
        assert!(matches!(mean("both"), Meant::Several(peers) if peers.len() == 2));
    }

    #[test]
    fn a_connection_has_two_places_for_those_who_ask() {
        let mut pings = Pings::default();
        let connection = ConnectionId::new_unchecked(1);
        let first = pings.admit(connection).unwrap();
        let _second = pings.admit(connection).unwrap();
        assert!(pings.admit(connection).is_none());
        assert!(pings.admit(ConnectionId::new_unchecked(2)).is_some());
        drop(first);
        assert!(pings.admit(connection).is_some());
    }
}
