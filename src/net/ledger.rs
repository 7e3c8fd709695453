//! What came of dials and greetings: the memory of the doctor. Pure and bounded; nothing decides by it.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use libp2p::core::transport::TransportError;
use libp2p::swarm::DialError;
use libp2p::{Multiaddr, PeerId};

use super::{address, bootstrap};

use crate::domain::cluster::ClusterId;
use crate::domain::network::{DialOutcome, GreetOutcome};
use crate::domain::node::{FoundBy, NodeId};

/// Peers that are remembered; the one that was heard of longest ago makes room.
const MAX_PEERS: usize = 1024;
/// Addresses of one peer whose last dial is remembered.
const MAX_ATTEMPTS: usize = 8;

/// What is remembered of one peer.
#[derive(Debug, Default)]
pub(crate) struct Note {
    /// The last dial to each address, the newest first.
    pub attempts: VecDeque<(Multiaddr, Instant, DialOutcome)>,
    /// The last greeting in each cluster.
    pub greetings: HashMap<ClusterId, (Instant, GreetOutcome)>,
    /// Where it was heard of.
    pub sources: Vec<FoundBy>,
    /// The name that it told last.
    pub name: Option<String>,
    /// When it was heard of last.
    pub heard: Option<Instant>,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    notes: HashMap<PeerId, Note>,
}

impl Ledger {
    fn note(&mut self, peer: PeerId, now: Instant) -> &mut Note {
        if self.notes.len() >= MAX_PEERS && !self.notes.contains_key(&peer) {
            let oldest = self.notes.iter().min_by_key(|(_, note)| note.heard).map(|(&peer, _)| peer);
            if let Some(oldest) = oldest {
                self.notes.remove(&oldest);
            }
        }
        let note = self.notes.entry(peer).or_default();
        note.heard = Some(now);
        note
    }

    /// Somebody or something named the peer.
    pub(crate) fn heard(&mut self, peer: PeerId, source: FoundBy, now: Instant) {
        let sources = &mut self.note(peer, now).sources;
        if !sources.contains(&source) {
            sources.push(source);
        }
    }

    /// A dial to one address of the peer ended.
    pub(crate) fn dialled(&mut self, peer: PeerId, address: Multiaddr, outcome: DialOutcome, now: Instant) {
        let attempts = &mut self.note(peer, now).attempts;
        attempts.retain(|(known, ..)| *known != address);
        attempts.push_front((address, now, outcome));
        attempts.truncate(MAX_ATTEMPTS);
    }

    /// A greeting ended, or made a member.
    pub(crate) fn greeted(&mut self, peer: PeerId, cluster: &ClusterId, outcome: GreetOutcome, now: Instant) {
        self.note(peer, now).greetings.insert(cluster.clone(), (now, outcome));
    }

    /// The peer told its name.
    pub(crate) fn named(&mut self, peer: PeerId, name: &str, now: Instant) {
        self.note(peer, now).name = Some(name.to_owned());
    }

    #[allow(dead_code)] // read by `facts`
    pub(crate) fn get(&self, peer: &PeerId) -> Option<&Note> {
        self.notes.get(peer)
    }

    #[allow(dead_code)] // read by `facts`
    pub(crate) fn peers(&self) -> impl Iterator<Item = (&PeerId, &Note)> {
        self.notes.iter()
    }
}

/// What each address said of a dial that failed.
pub(crate) fn outcomes(error: &DialError) -> Vec<(Multiaddr, DialOutcome)> {
    match error {
        DialError::WrongPeerId { obtained, address } => {
            let other = NodeId::new(obtained.to_string());
            vec![(address::without_peer(address), DialOutcome::WrongPeer(other))]
        }
        DialError::LocalPeerId { address } => vec![(address::without_peer(address), DialOutcome::Ourselves)],
        DialError::Transport(errors) => {
            errors.iter().map(|(address, error)| (address::without_peer(address), outcome(error))).collect()
        }
        _ => Vec::new(),
    }
}

fn outcome(error: &TransportError<std::io::Error>) -> DialOutcome {
    use std::io::ErrorKind;
    let TransportError::Other(io) = error else { return DialOutcome::Other(bootstrap::why(error)) };
    match io.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => DialOutcome::Refused,
        ErrorKind::TimedOut => DialOutcome::TimedOut,
        ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable | ErrorKind::AddrNotAvailable | ErrorKind::NetworkDown => {
            DialOutcome::Unreachable
        }
        _ => DialOutcome::Other(bootstrap::why(error)),
    }
}
