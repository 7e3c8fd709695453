//! The part of the network task that hears the swarm: connections, listeners, identify, Kademlia.

use libp2p::core::ConnectedPoint;
use libp2p::kad::{self, GetProvidersOk, InboundRequest, QueryId, QueryResult};
use libp2p::swarm::{DialError, ListenError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, identify};
use tokio::time::Instant;

use super::behaviour::BehaviourEvent;
use super::book::Source;
use super::task::{Due, Task};
use super::{address, ledger};
use crate::domain::cluster::ClusterId;
use crate::domain::network::DialOutcome;
use crate::wire::version::KAD_PROTOCOL;

/// Connections to one peer, members too. Two that dial each other over two transports and two addresses have fewer.
const MAX_CONNECTIONS_PER_PEER: u32 = 8;
/// Addresses of one peer in the routing table.
const MAX_ADDRESSES: usize = 8;

impl Task<'_> {
    pub(super) fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour_event(event, now),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                num_established,
                concurrent_dial_errors,
                ..
            } => {
                for (address, error) in concurrent_dial_errors.unwrap_or_default() {
                    let address = address::without_peer(&address);
                    self.ledger.dialled(Some(peer_id), address, ledger::outcome(&error), now.into_std());
                }
                if num_established.get() > MAX_CONNECTIONS_PER_PEER {
                    // Members are exempt from the limits of the library.
                    self.swarm.close_connection(connection_id);
                    return;
                }
                self.on_connected(peer_id, &endpoint, num_established.get(), now);
                self.on_path(peer_id, now);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, endpoint, num_established, cause } => {
                tracing::debug!(peer = %peer_id, ?cause, "connection closed");
                self.forget_connection(peer_id, connection_id);
                if cause.is_some() && endpoint.is_dialer() {
                    self.ledger.hung_up(peer_id, &address::without_peer(endpoint.get_remote_address()), now.into_std());
                }
                if num_established == 0 {
                    self.on_disconnected(peer_id, now);
                } else {
                    // Of several connections that came up together one goes again, maybe with the hello that was on it.
                    self.greet_peer(peer_id, now);
                }
                self.dirty = true;
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => self.on_dial_failed(peer_id, &error, now),
            SwarmEvent::NewListenAddr { listener_id, address } if address::is_circuit(&address) => {
                self.on_circuit_address(Some(listener_id), &address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } if address::is_circuit(&address) => {}
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "listening on {address}");
                self.on_new_listen_address(address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => self.on_lost_listen_address(&address),
            SwarmEvent::ExternalAddrConfirmed { address } => self.on_confirmed(&address),
            SwarmEvent::ExternalAddrExpired { .. } => self.addresses_changed(),
            SwarmEvent::ListenerClosed { listener_id, addresses, reason } => {
                let why = reason.as_ref().err().map(|error| super::bootstrap::why(error));
                if self.on_place_lost(listener_id, why, now) {
                    return;
                }
                tracing::warn!(?addresses, ?reason, "listener {addresses:?} closed: {reason:?}");
                self.dirty = true;
            }
            SwarmEvent::ListenerError { error, .. } => tracing::debug!(%error, "listener error"),
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                tracing::debug!(address = %send_back_addr, %error, "incoming connection failed");
                if let ListenError::Denied { cause } = &error
                    && ledger::is_limit(cause)
                {
                    self.ledger.refuse(ledger::denied(cause), now.into_std());
                }
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, peer: PeerId, endpoint: &ConnectedPoint, connections: u32, now: Instant) {
        let remote = endpoint.get_remote_address();
        tracing::debug!(%peer, address = %remote, dialed = endpoint.is_dialer(), "connected");
        self.policy.connected(&peer);
        self.ping_connected(peer);
        self.dirty = true;
        if endpoint.is_dialer() {
            self.ledger.dialled(Some(peer), address::without_peer(remote), DialOutcome::Connected, now.into_std());
            self.match_bootstrap(peer, remote);
        } else {
            if let ConnectedPoint::Listener { local_addr, send_back_addr } = endpoint {
                self.note_reached(local_addr, send_back_addr);
            }
            self.show_out_a_stranger();
        }
        if connections > 1 {
            self.agenda.no_later(Due::Duplicates(peer), now + self.lasting.config.timings.duplicates);
            self.probe_older(peer);
            return;
        }
        self.greet_peer(peer, now);
        if self.is_bootstrap(&peer) && endpoint.is_dialer() && !endpoint.is_relayed() {
            self.swarm.behaviour_mut().kad.add_address(&peer, address::without_peer(remote));
        }
        if self.is_bootstrap(&peer) {
            self.dht_reached(now);
        }
    }

    fn on_disconnected(&mut self, peer: PeerId, now: Instant) {
        // Its sessions end by themselves, each with its own last words; members are dialled again.
        if self.book.contains(&peer) {
            self.policy.lost(&peer, now.into_std());
        } else {
            self.policy.parted(&peer);
        }
        self.agenda.forget(|due| matches!(due, Due::Hello(gone, _) | Due::Duplicates(gone) | Due::Direct(gone) | Due::Older(gone) if *gone == peer));
        self.reach.forget_peer(&peer);
        self.forget_hop(&peer);
        self.bootstrap_lost(peer, now);
        if self.members.is_member(&peer) || self.book.contains(&peer) {
            self.agenda.no_later(Due::Dial, now);
        }
    }

    fn on_dial_failed(&mut self, peer: Option<PeerId>, error: &DialError, now: Instant) {
        if !matches!(error, DialError::Aborted) {
            self.note_bootstrap_failure(peer, error);
        }
        let meant = peer.map(|peer| self.book.addresses(&peer)).unwrap_or_default();
        // Who dials itself meant whoever is there.
        let named = peer.filter(|peer| *peer != self.local);
        for (address, outcome) in ledger::outcomes(error, meant) {
            self.ledger.dialled(named, address, outcome, now.into_std());
        }
        match peer {
            Some(peer) => {
                tracing::debug!(%peer, %error, "dial failed");
                self.reach.places.not_reached(&peer, super::bootstrap::why_not(error));
                if self.swarm.is_connected(&peer) {
                    return;
                }
                if matches!(error, DialError::Aborted) {
                    // By `recover`: the network is another one now.
                    self.policy.aborted(&peer);
                    self.dial_bootstrap_again(&peer, now);
                    self.agenda.no_later(Due::Dial, now);
                    return;
                }
                if matches!(error, DialError::WrongPeerId { .. }) {
                    // Somebody else has the address now: trying again costs both of us a handshake and finds nobody.
                    self.book.forget(&peer);
                }
                self.ping_not_connected(peer, &super::bootstrap::why_not(error));
                self.policy.failed(&peer, now.into_std());
                self.known_not_reached(&peer, now);
                if self.book.failed(&peer) >= 3 && !self.is_bootstrap(&peer) {
                    self.swarm.behaviour_mut().kad.remove_peer(&peer);
                }
                if self.book.told_by(&peer).is_some_and(|teller| !self.members.is_member(&teller)) {
                    // The word of somebody who is gone, and wrong at that.
                    self.book.forget(&peer);
                }
                self.bootstrap_lost(peer, now);
                self.agenda.no_later(Due::Dial, now);
            }
            None => tracing::info!("bootstrap address not reached: {}", super::bootstrap::why_not(error)),
        }
    }

    fn on_behaviour_event(&mut self, event: BehaviourEvent, now: Instant) {
        match event {
            BehaviourEvent::Identify(event) => self.on_identify(event, now),
            BehaviourEvent::Kad(event) => self.on_kad(event, now),
            BehaviourEvent::RelayClient(event) => self.on_relay_client(event),
            BehaviourEvent::Relay(event) => self.on_relaying(&event),
            BehaviourEvent::Punch(event) => self.on_punched(&event),
            BehaviourEvent::Tester(event) => self.on_tested(event),
            _ => {}
        }
    }

    fn on_identify(&mut self, event: identify::Event, now: Instant) {
        let identify::Event::Received { peer_id, info, connection_id } = event else { return };
        self.on_observed(&info.observed_addr);
        self.note_observed(peer_id, connection_id, &info.observed_addr);
        let told: Vec<_> = info
            .listen_addrs
            .into_iter()
            .map(|announced| address::without_peer(&announced))
            .filter(|announced| address::dialable(announced, &self.networks))
            .take(MAX_ADDRESSES)
            .collect();
        // Others reach it through this node, if it has its place here; this node does not.
        let ours = |announced: &&Multiaddr| address::relay_of(announced) == Some(self.local);
        let announced: Vec<_> = told.iter().filter(|announced| !ours(announced)).cloned().collect();
        let is_relay = info.protocols.contains(&libp2p::relay::HOP_PROTOCOL_NAME);
        self.note_hop(peer_id, is_relay, &announced, now);
        // A node behind NAT has got a place at a relay: until then others have nowhere to dial it.
        let before = self.reach.told.get(&peer_id).map_or(&[][..], Vec::as_slice);
        let has_place = told.iter().any(|address| address::is_circuit(address) && !before.contains(address));
        self.reach.told.insert(peer_id, told);
        if has_place {
            self.members.moved(&peer_id);
            self.plan_news(now);
        }
        if info.protocols.iter().any(|protocol| protocol.as_ref() == super::nat::TEST_PROTOCOL) {
            self.reach.testers.insert(peer_id);
        } else {
            self.reach.testers.remove(&peer_id);
        }
        let in_dht = info.protocols.iter().any(|protocol| protocol.as_ref() == KAD_PROTOCOL);
        if in_dht && !self.may_enter_dht(peer_id) {
            tracing::debug!(peer = %peer_id, "not taken into the DHT: too many from the same place are in it");
        } else if in_dht {
            let first = self.swarm.behaviour_mut().kad.kbuckets().all(|bucket| bucket.num_entries() == 0);
            self.swarm.behaviour_mut().kad.enter(peer_id, announced.clone(), now.into_std());
            if first && !announced.is_empty() {
                self.dht_reached(now);
            }
        } else if !self.is_bootstrap(&peer_id) {
            self.swarm.behaviour_mut().kad.leave(&peer_id);
        }
        if self.members.is_member(&peer_id) {
            self.book.learn(peer_id, Source::Inbound, announced, now.into_std());
        }
    }

    fn may_enter_dht(&mut self, peer: PeerId) -> bool {
        let connections = self.swarm.behaviour().streams.connections(&peer);
        let source = connections.iter().find(|connection| !connection.relayed).and_then(|direct| address::ip_of(&direct.remote));
        self.is_bootstrap(&peer) || self.swarm.behaviour_mut().kad.may_enter(peer, source)
    }

    fn on_kad(&mut self, event: kad::Event, now: Instant) {
        match event {
            kad::Event::OutboundQueryProgressed { id, result: QueryResult::Bootstrap(_), step, .. } if !step.last => {
                self.swarm.behaviour_mut().kad.content_with_neighbours(&id);
            }
            kad::Event::OutboundQueryProgressed { id, result, step, .. } => {
                let announced = matches!(result, QueryResult::StartProviding(Ok(_)));
                self.on_query(id, result, now);
                if step.last {
                    self.lookups.remove(&id);
                    let again = self.announces.get(&id).filter(|cluster| self.reach.stale.remove(*cluster)).cloned();
                    if let Some(cluster) = self.announces.remove(&id)
                        && announced
                        && let Some(cluster) = self.clusters.get_mut(&cluster)
                    {
                        cluster.announced = true;
                        self.dirty = true;
                    }
                    if let Some(cluster) = again {
                        self.publish_record(&cluster);
                    }
                }
            }
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(mut record) } } => {
                use libp2p::kad::store::RecordStore as _;
                // kad has checked that the provider is the sender. What nobody can dial is not handed on.
                record.addresses = record.addresses.iter().map(address::without_peer).collect();
                record.addresses.retain(|address| address::dialable(address, &self.networks));
                if let Err(error) = self.swarm.behaviour_mut().kad.store_mut().add_provider(record) {
                    tracing::debug!(%error, "provider record refused");
                }
            }
            _ => {}
        }
    }

    fn on_query(&mut self, id: QueryId, result: QueryResult, now: Instant) {
        if matches!(result, QueryResult::GetProviders(Ok(_))) {
            self.ledger.dht_answers(now.into_std());
        }
        if let QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { providers, .. })) = result
            && let Some(cluster) = self.lookups.get(&id).cloned()
        {
            for peer in providers {
                self.on_provider(peer, &cluster, now);
            }
        }
    }

    /// A provider record names `peer`. Its addresses live only as long as the query, inside kad: dial by peer id.
    fn on_provider(&mut self, peer: PeerId, cluster: &ClusterId, now: Instant) {
        if peer == self.local || self.bans.is_banned(&peer, now.into_std()) {
            return;
        }
        if self.swarm.is_connected(&peer) {
            self.hinted(peer, cluster, now);
            return;
        }
        // A stranger wrote this list: it must not make us dial whomever it likes as often as it likes.
        if !self.may_dial(&peer, now) {
            return;
        }
        self.book.learn(peer, Source::Kademlia, Vec::new(), now.into_std());
        self.dial_now(peer, Vec::new());
    }
}
