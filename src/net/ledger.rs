//! What came of dials and greetings: the memory of the doctor. Pure and bounded; nothing decides by it.

use std::collections::{HashMap, VecDeque};
use std::error::Error as _;
use std::io;
use std::time::{Duration, Instant};

use libp2p::core::transport::TransportError;
use libp2p::memory_connection_limits::MemoryUsageLimitExceeded;
use libp2p::swarm::{ConnectionDenied, DialError};
use libp2p::{Multiaddr, PeerId};

use super::gate::Banned;
use super::session::End;
use super::{address, bootstrap};

use crate::domain::cluster::ClusterId;
use crate::domain::network::{DialOutcome, GreetOutcome, RefusedFacts};
use crate::domain::node::{FoundBy, NodeId};
use crate::wire::control::ByeReason;

/// Peers that are remembered; the one that something came of longest ago makes room.
const MAX_PEERS: usize = 1024;
/// Addresses of one peer whose last dial is remembered.
const MAX_ATTEMPTS: usize = 8;
/// Addresses that were dialled without a peer id.
const MAX_ADDRESSES: usize = 256;
/// Clusters of one peer whose last greeting is remembered.
const MAX_GREETINGS: usize = 16;

/// Who closes a connection sooner than this has not looked whom it has before it.
const AT_ONCE: Duration = Duration::from_secs(2);
const HUNG_UP: &str = "it let go of the connection at once; it may be at its limit of connections, or have banned this node";
const HUNG_UP_EARLY: &str = "it let go of the connection before the handshake was done; it may be at its limit of connections";

/// The last dial to an address.
#[derive(Debug, Clone)]
pub(crate) struct Tried {
    /// Without the peer id.
    pub address: Multiaddr,
    pub at: Instant,
    pub outcome: DialOutcome,
}

/// The last greeting in a cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Greeted {
    pub at: Instant,
    pub outcome: GreetOutcome,
    /// What the other side speaks, if it said so.
    pub versions: Option<(u16, u16)>,
}

/// What is remembered of one peer.
#[derive(Debug, Default)]
pub(crate) struct Note {
    /// The last dial to each address, the newest first.
    pub attempts: VecDeque<Tried>,
    pub greetings: HashMap<ClusterId, Greeted>,
    /// Where it was heard of.
    pub sources: Vec<FoundBy>,
    /// The name that it told last.
    pub name: Option<String>,
    /// When it was heard of last.
    pub heard: Option<Instant>,
    /// When it was heard by mDNS last.
    pub mdns: Option<Instant>,
    /// When anything was written here last.
    touched: Option<Instant>,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    notes: HashMap<PeerId, Note>,
    /// Dials of addresses that named no peer.
    nameless: VecDeque<Tried>,
    /// When the DHT answered last.
    answered: Option<Instant>,
    /// Connections that a limit of ours kept out: how many, and the last.
    refused: Option<(u64, Instant, String)>,
}

impl Ledger {
    fn note(&mut self, peer: PeerId, now: Instant) -> &mut Note {
        if self.notes.len() >= MAX_PEERS && !self.notes.contains_key(&peer) {
            let oldest = self.notes.iter().min_by_key(|(_, note)| note.touched).map(|(&peer, _)| peer);
            if let Some(oldest) = oldest {
                self.notes.remove(&oldest);
            }
        }
        let note = self.notes.entry(peer).or_default();
        note.touched = Some(now);
        note
    }

    /// Somebody or something named the peer.
    pub(crate) fn heard(&mut self, peer: PeerId, source: FoundBy, now: Instant) {
        let note = self.note(peer, now);
        note.heard = Some(now);
        if source == FoundBy::Mdns {
            note.mdns = Some(now);
        }
        if !note.sources.contains(&source) {
            note.sources.push(source);
        }
    }

    /// A dial to one address ended; `peer` is whom it was to lead to, if it named somebody.
    pub(crate) fn dialled(&mut self, peer: Option<PeerId>, address: Multiaddr, outcome: DialOutcome, now: Instant) {
        let (list, most) = match peer {
            Some(peer) => (&mut self.note(peer, now).attempts, MAX_ATTEMPTS),
            None => (&mut self.nameless, MAX_ADDRESSES),
        };
        list.retain(|known| known.address != address);
        list.push_front(Tried { address, at: now, outcome });
        list.truncate(most);
    }

    /// The other end closed a connection that we had dialled. When that was at once, and nothing came of it, it did not want
    /// us: a node at its limit of connections lets the handshake end before it says so.
    pub(crate) fn hung_up(&mut self, peer: PeerId, address: &Multiaddr, now: Instant) {
        let Some(note) = self.notes.get_mut(&peer) else { return };
        let member = note.greetings.values().any(|greeted| greeted.outcome == GreetOutcome::Member);
        let attempt = note.attempts.iter_mut().find(|tried| tried.address == *address);
        if let Some(tried) = attempt.filter(|tried| tried.outcome == DialOutcome::Connected && !member)
            && now.saturating_duration_since(tried.at) < AT_ONCE
        {
            tried.outcome = DialOutcome::Denied(HUNG_UP.to_owned());
        }
    }

    /// A greeting ended, or made a member.
    pub(crate) fn greeted(&mut self, peer: PeerId, cluster: &ClusterId, outcome: GreetOutcome, now: Instant) {
        let greetings = &mut self.note(peer, now).greetings;
        if greetings.len() >= MAX_GREETINGS
            && !greetings.contains_key(cluster)
            && let Some(oldest) = greetings.iter().min_by_key(|(_, greeted)| greeted.at).map(|(cluster, _)| cluster.clone())
        {
            greetings.remove(&oldest);
        }
        let known = greetings.get(cluster).filter(|known| known.outcome == outcome).and_then(|known| known.versions);
        greetings.insert(cluster.clone(), Greeted { at: now, outcome, versions: known });
    }

    /// A membership stream ended, or never began.
    pub(crate) fn ended(&mut self, peer: PeerId, cluster: &ClusterId, end: &End, now: Instant) {
        let outcome = match end {
            End::Refused => GreetOutcome::Refused,
            End::VersionMismatch(_) => GreetOutcome::VersionMismatch,
            End::Violation(_) => GreetOutcome::Violation,
            End::Bye(ByeReason::Duplicate | ByeReason::Surplus) => return, // it keeps another stream, or stays a member
            End::Bye(ByeReason::Identity) | End::SameIdentity(_) => GreetOutcome::SameIdentity,
            End::Bye(_) | End::Closed => GreetOutcome::Left,
            End::Io(_) | End::TimedOut => GreetOutcome::Failed,
        };
        self.greeted(peer, cluster, outcome, now);
        if let (End::VersionMismatch(Some(versions)), Some(greeted)) = (end, self.note(peer, now).greetings.get_mut(cluster)) {
            greeted.versions = Some(*versions);
        }
    }

    /// The peer told its name.
    pub(crate) fn named(&mut self, peer: PeerId, name: &str, now: Instant) {
        self.note(peer, now).name = Some(name.to_owned());
    }

    /// A limit of ours kept somebody out.
    pub(crate) fn refuse(&mut self, reason: String, now: Instant) {
        let before = self.refused.as_ref().map_or(0, |(count, ..)| *count);
        self.refused = Some((before.saturating_add(1), now, reason));
    }

    pub(crate) fn refused(&self, now: Instant) -> Option<RefusedFacts> {
        self.refused.as_ref().map(|(count, at, reason)| RefusedFacts {
            count: *count,
            ago: now.saturating_duration_since(*at),
            reason: reason.clone(),
        })
    }

    /// A query for a cluster was answered by somebody in the DHT.
    pub(crate) fn dht_answers(&mut self, now: Instant) {
        self.answered = Some(now);
    }

    pub(crate) fn dht_answered(&self, now: Instant) -> Option<Duration> {
        self.answered.map(|at| now.saturating_duration_since(at))
    }

    pub(crate) fn get(&self, peer: &PeerId) -> Option<&Note> {
        self.notes.get(peer)
    }

    /// The last dial of `address`, to `peer` or to whoever is there.
    pub(crate) fn tried(&self, peer: Option<&PeerId>, address: &Multiaddr) -> Option<&Tried> {
        let named = peer.and_then(|peer| self.notes.get(peer)).map(|note| &note.attempts);
        let of = |list: &'_ VecDeque<Tried>| list.iter().position(|tried| tried.address == *address);
        let named = named.and_then(|list| of(list).map(|at| &list[at]));
        let nameless = of(&self.nameless).map(|at| &self.nameless[at]);
        [named, nameless].into_iter().flatten().max_by_key(|tried| tried.at)
    }

    pub(crate) fn peers(&self) -> impl Iterator<Item = &PeerId> {
        self.notes.keys()
    }
}

/// What each address said of a dial that failed; `dialled` are those that were meant, where the error names none.
pub(crate) fn outcomes(error: &DialError, dialled: &[Multiaddr]) -> Vec<(Multiaddr, DialOutcome)> {
    match error {
        DialError::WrongPeerId { obtained, address } => {
            let other = NodeId::new(obtained.to_string());
            vec![(address::without_peer(address), DialOutcome::WrongPeer(other))]
        }
        DialError::LocalPeerId { address } => vec![(address::without_peer(address), DialOutcome::Ourselves)],
        DialError::Transport(errors) => {
            errors.iter().map(|(address, error)| (address::without_peer(address), outcome(error))).collect()
        }
        DialError::Denied { cause } => {
            let outcome = DialOutcome::Denied(denied(cause));
            dialled.iter().map(|address| (address::without_peer(address), outcome.clone())).collect()
        }
        DialError::NoAddresses | DialError::DialPeerConditionFalse(_) | DialError::Aborted => Vec::new(),
    }
}

/// Which rule of this node a connection fell under, a phrase.
pub(crate) fn denied(cause: &ConnectionDenied) -> String {
    if cause.downcast_ref::<MemoryUsageLimitExceeded>().is_some() {
        return "this node uses as much memory as it may".to_owned();
    }
    cause.source().map_or_else(|| cause.to_string(), ToString::to_string)
}

/// It was for want of room, and not a matter of who knocked.
pub(crate) fn is_limit(cause: &ConnectionDenied) -> bool {
    cause.downcast_ref::<Banned>().is_none()
}

/// What one address said. The transports are boxed, and an error in the box shows its text and not its kind: the system's
/// errors carry their number there, as the standard library writes them.
pub(crate) fn outcome(error: &TransportError<io::Error>) -> DialOutcome {
    let TransportError::Other(io) = error else { return DialOutcome::Other("this address cannot be dialled".to_owned()) };
    let text = bootstrap::why(io);
    let kind = number(&text).map_or_else(|| io.kind(), |number| io::Error::from_raw_os_error(number).kind());
    by_kind(kind).unwrap_or_else(|| by_text(text))
}

/// The number in "… (os error 111)".
fn number(text: &str) -> Option<i32> {
    let (_, rest) = text.rsplit_once("(os error ")?;
    rest.split_once(')')?.0.parse().ok()
}

fn by_kind(kind: io::ErrorKind) -> Option<DialOutcome> {
    use io::ErrorKind;
    match kind {
        ErrorKind::ConnectionRefused => Some(DialOutcome::Refused),
        // "No route to host" comes from a neighbour that is not there, or from a firewall that says so: the way is known, and
        // nobody at its end answers.
        ErrorKind::TimedOut | ErrorKind::HostUnreachable => Some(DialOutcome::TimedOut),
        ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable | ErrorKind::NetworkDown => Some(DialOutcome::Unreachable),
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => {
            Some(DialOutcome::Denied(HUNG_UP_EARLY.to_owned()))
        }
        _ => None,
    }
}

fn by_text(text: String) -> DialOutcome {
    let lower = text.to_lowercase();
    if lower.contains("timed out") || lower.contains("timeout") {
        DialOutcome::TimedOut
    } else if lower.contains("eof") || lower.contains("reset") || lower.contains("closed") || lower.contains("aborted") {
        DialOutcome::Denied(HUNG_UP_EARLY.to_owned())
    } else {
        DialOutcome::Other(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> DialOutcome {
        outcome(&TransportError::Other(io::Error::other(text.to_owned())))
    }

    #[test]
    fn what_an_address_says_is_read_from_the_number_that_the_system_gave() {
        assert_eq!(said("Connection refused (os error 111)"), DialOutcome::Refused);
        assert_eq!(said("Verbindung verweigert (os error 111)"), DialOutcome::Refused);
        assert_eq!(said("Network is unreachable (os error 101)"), DialOutcome::Unreachable);
        assert_eq!(said("No route to host (os error 113)"), DialOutcome::TimedOut);
        assert_eq!(said("Handshake with the remote timed out."), DialOutcome::TimedOut);
        assert_eq!(said("Timeout has been reached"), DialOutcome::TimedOut);
        assert!(matches!(said("Connection reset by peer (os error 104)"), DialOutcome::Denied(_)));
        assert_eq!(said("odd (os error x)"), DialOutcome::Other("odd (os error x)".to_owned()));
        assert_eq!(outcome(&TransportError::Other(io::ErrorKind::TimedOut.into())), DialOutcome::TimedOut);
    }

    #[test]
    fn peers_addresses_and_greetings_are_bounded() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        let address = |port: usize| -> Multiaddr { format!("/ip4/192.0.2.1/tcp/{}", port % 60_000 + 1).parse().unwrap() };
        let (first, last) = (PeerId::random(), PeerId::random());
        ledger.heard(first, FoundBy::Mdns, now);
        for number in 0..MAX_PEERS {
            ledger.heard(PeerId::random(), FoundBy::View, now + Duration::from_millis(1 + number as u64));
        }
        assert_eq!((ledger.notes.len(), ledger.get(&first).is_none()), (MAX_PEERS, true));
        for number in 0..1000 {
            ledger.dialled(Some(last), address(number), DialOutcome::Refused, now);
            ledger.dialled(None, address(number), DialOutcome::Refused, now);
            let cluster = ClusterId::new(&format!("c{number}")).unwrap();
            ledger.greeted(last, &cluster, GreetOutcome::Refused, now + Duration::from_millis(number as u64));
        }
        let note = ledger.get(&last).unwrap();
        assert_eq!(
            (note.attempts.len(), note.greetings.len(), ledger.nameless.len()),
            (MAX_ATTEMPTS, MAX_GREETINGS, MAX_ADDRESSES)
        );
        assert_eq!(note.attempts[0].address, address(999));
        assert!(note.greetings.contains_key(&ClusterId::new("c999").unwrap()));
    }

    #[test]
    fn who_hangs_up_at_once_did_not_want_us_and_who_was_a_member_only_left() {
        let (mut ledger, now, peer) = (Ledger::default(), Instant::now(), PeerId::random());
        let address: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let outcome = |ledger: &Ledger| ledger.get(&peer).unwrap().attempts[0].outcome.clone();
        ledger.dialled(Some(peer), address.clone(), DialOutcome::Connected, now);
        ledger.hung_up(peer, &address, now + AT_ONCE);
        assert_eq!(outcome(&ledger), DialOutcome::Connected, "that was not at once");
        ledger.hung_up(peer, &address, now);
        assert!(matches!(outcome(&ledger), DialOutcome::Denied(_)));
        ledger.dialled(Some(peer), address.clone(), DialOutcome::Connected, now);
        ledger.greeted(peer, &ClusterId::new("home").unwrap(), GreetOutcome::Member, now);
        ledger.hung_up(peer, &address, now);
        assert_eq!(outcome(&ledger), DialOutcome::Connected);
    }
}
