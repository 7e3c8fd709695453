//! The part of the network task that tells what it knows: facts for the doctor. No I/O; what it takes is one walk over
//! tables that are bounded.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use libp2p::{PeerId, kad};
use tokio::time::Instant;

use super::bootstrap::Bootstrap;
use super::ledger::{Note, Tried};
use super::mdns::Mdns;
use super::streams::Connection;
use super::task::Task;
use crate::domain::cluster::ClusterId;
use crate::domain::network::{
    Attempt, BootstrapFacts, ClusterFacts, DhtFacts, DialOutcome, Facts, GreetOutcome, Greeting, Link, PeerFacts, Relay,
};
use crate::domain::node::{FoundBy, Liveness, NodeId};

/// Peers that are told of at once; more would be read by nobody.
const MAX_PEERS: usize = 256;

pub(super) fn node(peer: &PeerId) -> NodeId {
    NodeId::new(peer.to_string())
}

fn attempts(tried: &[Tried], now: std::time::Instant) -> Vec<Attempt> {
    tried
        .iter()
        .map(|tried| Attempt {
            address: tried.address.to_string(),
            ago: now.saturating_duration_since(tried.at),
            outcome: tried.outcome.clone(),
        })
        .collect()
}

/// The more there is to say about a peer, the greater.
fn trouble(peer: &PeerFacts) -> u8 {
    let failed = peer.attempts.first().is_some_and(|last| last.outcome != DialOutcome::Connected);
    let unwelcome = peer.greetings.iter().any(|greeting| greeting.outcome != GreetOutcome::Member);
    match peer {
        _ if peer.banned || peer.suspect => 5,
        _ if peer.bootstrap && peer.links.is_empty() => 4,
        _ if !peer.member_of.is_empty() => 1,
        _ if failed || unwelcome => 3,
        _ => 2,
    }
}

impl Task<'_> {
    /// Everything that is known of the network at this moment, `about` a peer in any case.
    pub(super) fn facts(&mut self, about: Option<&str>) -> Facts {
        let now = Instant::now();
        let dht = self.dht_facts(now);
        Facts { peers: self.peer_facts(about, now), dht, ..self.facts_of_node() }
    }

    /// The same without peers and the DHT: cheap enough for every snapshot.
    pub(super) fn facts_of_node(&self) -> Facts {
        let now = Instant::now();
        Facts {
            at: SystemTime::now(),
            id: node(&self.local),
            listening: self.own_listeners().map(ToString::to_string).collect(),
            not_listening: self.not_listening.clone(),
            interfaces: Vec::new(),
            mdns_enabled: self.lasting.config.mdns,
            mdns_flooded: self.mdns.as_ref().is_some_and(Mdns::is_flooded),
            mdns: self.mdns_facts(),
            bootstrap: self.bootstrap.iter().map(|bootstrap| self.bootstrap_facts(bootstrap, now)).collect(),
            reach: self.reach_facts(),
            dht: DhtFacts { server: self.serves_dht(), ..DhtFacts::default() },
            clusters: self.clusters.keys().filter_map(|id| self.cluster_facts(id, now)).collect(),
            peers: Vec::new(),
            same_identity: self.same_identity(now),
            same_identity_certain: self.is_rival_certain(now),
            connections: (self.swarm.behaviour().streams.all().count(), self.lasting.config.caps.established as usize),
            refused: self.ledger.refused(now.into_std()),
            versions: (self.lasting.config.versions.min, self.lasting.config.versions.max),
        }
    }

    fn dht_facts(&mut self, now: Instant) -> DhtFacts {
        let kad = &mut self.swarm.behaviour_mut().kad;
        DhtFacts {
            server: kad.mode() == kad::Mode::Server,
            peers: kad.kbuckets().map(|bucket| bucket.num_entries()).sum(),
            answered_ago: self.ledger.dht_answered(now.into_std()),
        }
    }

    fn cluster_facts(&self, id: &ClusterId, now: Instant) -> Option<ClusterFacts> {
        let cluster = self.clusters.get(id)?;
        Some(ClusterFacts {
            id: id.clone(),
            joined_ago: now.saturating_duration_since(cluster.joined),
            members: self.listed(id),
            known: self.known.count(id),
            serving: self.members.serving(id) + self.known.serving(id),
            serves: cluster.serve,
            announced: cluster.announced,
        })
    }

    fn bootstrap_facts(&self, bootstrap: &Bootstrap, now: Instant) -> BootstrapFacts {
        let tried: Vec<Tried> =
            bootstrap.dialled.iter().filter_map(|address| self.ledger.tried(bootstrap.peer.as_ref(), address)).cloned().collect();
        BootstrapFacts {
            address: bootstrap.address.text(),
            peer: bootstrap.peer.as_ref().map(node),
            connected: bootstrap.connected,
            attempts: attempts(&tried, now.into_std()),
            problem: bootstrap.problem.clone(),
        }
    }

    /// Peers that were heard of, met or tried: `about` first, then those with trouble.
    fn peer_facts(&self, about: Option<&str>, now: Instant) -> Vec<PeerFacts> {
        let streams = &self.swarm.behaviour().streams;
        let known: HashSet<PeerId> = self
            .ledger
            .peers()
            .copied()
            .chain(self.book.iter().map(|(peer, _)| *peer))
            .chain(streams.all().map(|(peer, _)| *peer))
            .chain(self.bootstrap.iter().filter_map(|bootstrap| bootstrap.peer))
            .chain(self.clusters.keys().flat_map(|id| self.known.list(id)).map(|(peer, _)| peer))
            .filter(|peer| *peer != self.local)
            .collect();
        let mut peers: Vec<PeerFacts> = known.iter().map(|peer| self.one_peer(peer, now)).collect();
        let meant =
            |peer: &PeerFacts| about.is_some_and(|about| peer.id.as_str() == about || peer.name.as_deref() == Some(about));
        peers.sort_by(|a, b| {
            let rank = |peer: &PeerFacts| (!meant(peer), u8::MAX - trouble(peer), peer.heard_ago.unwrap_or(Duration::MAX));
            rank(a).cmp(&rank(b)).then_with(|| a.id.cmp(&b.id))
        });
        peers.truncate(MAX_PEERS);
        peers
    }

    fn one_peer(&self, peer: &PeerId, now: Instant) -> PeerFacts {
        let nothing = Note::default();
        let note = self.ledger.get(peer).unwrap_or(&nothing);
        let candidate = self.book.get(peer);
        let at = now.into_std();
        let member_of: Vec<ClusterId> =
            self.clusters.keys().filter(|id| self.members.generation(id, peer).is_some()).cloned().collect();
        let told = || self.clusters.keys().filter_map(|id| self.known.get(id, peer).map(|told| (id, told)));
        let members = || member_of.iter().filter_map(|id| self.members.get(id, peer));
        let connections = self.swarm.behaviour().streams.connections(peer);
        let mut addresses = self.addresses_of(peer);
        for address in told().flat_map(|(_, told)| told.addresses) {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        // Where there is more to say, as of a dial that failed, that is what the doctor has to tell.
        let only_known = member_of.is_empty() && connections.is_empty() && is_untroubled(note);
        let by_view = told().next().map(|_| FoundBy::View);
        let mut sources = note.sources.clone();
        let inbound = connections.iter().any(|connection| !connection.dialed).then_some(FoundBy::Inbound);
        for source in candidate.map(|candidate| candidate.source.found_by()).into_iter().chain(inbound).chain(by_view) {
            if !sources.contains(&source) {
                sources.push(source);
            }
        }
        let heard = note.heard.max(candidate.map(|candidate| candidate.heard));
        let heard = heard.max(told().map(|(_, told)| told.heard.into_std()).max());
        let dialling = connections.is_empty() && !self.clusters.is_empty();
        PeerFacts {
            id: node(peer),
            name: self.name_of(peer),
            sources,
            heard_ago: heard.map(|heard| at.saturating_duration_since(heard)),
            mdns_ago: note.mdns.map(|heard| at.saturating_duration_since(heard)),
            addresses: addresses.iter().map(ToString::to_string).collect(),
            attempts: attempts(&note.attempts.iter().cloned().collect::<Vec<_>>(), at),
            next_dial: candidate
                .filter(|candidate| dialling && !candidate.addresses.is_empty())
                .map(|candidate| self.policy.pause_left(peer, candidate.was_member, at)),
            links: connections.iter().map(|connection| self.link_facts(connection, at)).collect(),
            greetings: greetings(note, &member_of, at),
            suspect: members().any(|member| member.liveness == Liveness::Suspect),
            member_of: member_of.iter().chain(told().map(|(id, _)| id).filter(|_| only_known)).cloned().collect(),
            banned: self.bans.is_banned(peer, at),
            bootstrap: self.is_bootstrap(peer),
        }
    }

    pub(super) fn link_facts(&self, connection: &Connection, now: std::time::Instant) -> Link {
        Link {
            address: connection.remote.to_string(),
            dialed: connection.dialed,
            transport: if connection.quic { "quic" } else { "tcp" },
            relay: connection.relay.map(|relay| Relay { id: node(&relay), name: self.name_of(&relay) }),
            age: now.saturating_duration_since(connection.since),
        }
    }

    /// The name that a peer told last, if it ever did.
    pub(super) fn name_of(&self, peer: &PeerId) -> Option<String> {
        let listed = self.clusters.keys().find_map(|id| self.members.name(id, peer));
        let told = || self.clusters.keys().find_map(|id| Some(self.known.get(id, peer)?.name));
        listed.or_else(|| self.ledger.get(peer)?.name.as_deref()).or_else(told).map(str::to_owned)
    }
}

/// Nothing that was tried with this peer failed.
fn is_untroubled(note: &Note) -> bool {
    let reached = note.attempts.iter().next().is_none_or(|last| last.outcome == DialOutcome::Connected);
    reached && note.greetings.values().all(|greeted| matches!(greeted.outcome, GreetOutcome::Member | GreetOutcome::Left))
}

/// What came of greetings; a cluster in which it is a member now is no trouble, whatever came of another try.
fn greetings(note: &Note, member_of: &[ClusterId], now: std::time::Instant) -> Vec<Greeting> {
    let mut greetings: Vec<Greeting> = note
        .greetings
        .iter()
        .map(|(cluster, greeted)| Greeting {
            cluster: cluster.clone(),
            ago: now.saturating_duration_since(greeted.at),
            outcome: if member_of.contains(cluster) { GreetOutcome::Member } else { greeted.outcome },
            versions: greeted.versions,
        })
        .collect();
    greetings.sort_by(|a, b| a.cluster.cmp(&b.cluster));
    greetings
}
