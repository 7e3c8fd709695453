//! Lies in the DHT.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use libp2p::core::Transport as _;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::identity::Keypair;
use libp2p::kad::{self, QueryResult, RecordKey, store::MemoryStore, store::MemoryStoreConfig};
use libp2p::swarm::{self, NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm, identify, quic};
use opengateway::domain::cluster::ClusterId;
use opengateway::wire::keys::{self, Root};
use opengateway::wire::version::KAD_PROTOCOL;

use super::wire::PORT;
use super::{addresses, go, number, over, setting, victim};

#[derive(NetworkBehaviour)]
pub struct Manners {
    identify: identify::Behaviour,
    pub kad: kad::Behaviour<MemoryStore>,
}

/// A peer of the DHT that takes part in it, at an address of its own.
pub fn peer(keypair: &Keypair, at: Ipv4Addr) -> Swarm<Manners> {
    let local = keypair.public().to_peer_id();
    let mut config = kad::Config::new(StreamProtocol::new(KAD_PROTOCOL));
    config.set_periodic_bootstrap_interval(None).set_query_timeout(Duration::from_secs(5));
    let limits = MemoryStoreConfig { max_provided_keys: 1 << 20, ..MemoryStoreConfig::default() };
    let behaviour = Manners {
        identify: identify::Behaviour::new(identify::Config::new("opengateway/1".to_owned(), keypair.public())),
        kad: kad::Behaviour::with_config(local, MemoryStore::with_config(local, limits), config),
    };
    let transport = quic::tokio::Transport::new(quic::Config::new(keypair))
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
        .boxed();
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(Duration::from_secs(60));
    let mut swarm = Swarm::new(transport, behaviour, local, config);
    swarm.behaviour_mut().kad.set_mode(Some(kad::Mode::Server));
    let address: Multiaddr = format!("/ip4/{at}/udp/0/quic-v1").parse().unwrap();
    swarm.listen_on(address).unwrap();
    swarm
}

/// Where `victim` is, for a peer of the DHT.
pub fn at_victim() -> (PeerId, Multiaddr) {
    let peer = setting("VICTIM_ID").unwrap().parse().unwrap();
    (peer, format!("/ip4/{}/udp/{PORT}/quic-v1", victim()).parse().unwrap())
}

/// The key under which the members of `cluster` are found.
pub fn key_of(cluster: &str) -> RecordKey {
    RecordKey::new(&keys::dht_key(&Root::public(&ClusterId::new(cluster).unwrap()), 0, 0))
}

/// Records that one name tells before it is changed for another.
const PER_NAME: u32 = 32;

/// RECORDS provider records, PEERS peers at a time from HOSTS addresses, each with a new name after every 32: all of them on
/// the cluster's key, or (SPREAD=1) on a key each.
pub async fn provide() {
    let (records, peers, spread): (u32, u32, u32) = (number("RECORDS", 10_000), number("PEERS", 20), number("SPREAD", 0));
    let seconds: u64 = number("SECONDS", 30);
    let (id, at) = at_victim();
    let from = addresses(number("HOSTS", 20));
    go().await;
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let begun = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    let each = records / peers;
    for number in 0..peers {
        let (at, from) = (at.clone(), from[number as usize % from.len()]);
        running.spawn(async move {
            let mut told = 0_u32;
            for name in 0..each.div_ceil(PER_NAME) {
                let mut swarm = peer(&Keypair::generate_ed25519(), from);
                swarm.behaviour_mut().kad.add_address(&id, at.clone());
                swarm.dial(at.clone()).unwrap();
                let mut wanted: Vec<RecordKey> = (0..PER_NAME)
                    .map(|key| match spread {
                        0 => key_of(crate::CLUSTER),
                        _ => RecordKey::new(&[number, name, key].map(u32::to_be_bytes).concat()),
                    })
                    .collect();
                let (mut asked, mut addressed) = (HashSet::new(), false);
                let mut connected = false;
                loop {
                    while connected && addressed && asked.len() < 32 {
                        let Some(key) = wanted.pop() else { break };
                        if let Ok(query) = swarm.behaviour_mut().kad.start_providing(key) {
                            asked.insert(query);
                        }
                    }
                    if connected && addressed && asked.is_empty() {
                        break;
                    }
                    let event = tokio::select! {
                        event = swarm.select_next_some() => event,
                        () = tokio::time::sleep_until(end) => return told,
                    };
                    match event {
                        SwarmEvent::NewListenAddr { address, .. } => {
                            swarm.add_external_address(address);
                            addressed = true;
                        }
                        SwarmEvent::ConnectionEstablished { .. } => connected = true,
                        SwarmEvent::OutgoingConnectionError { .. } if !connected => break,
                        SwarmEvent::Behaviour(MannersEvent::Kad(kad::Event::OutboundQueryProgressed {
                            id,
                            result: QueryResult::StartProviding(result),
                            ..
                        })) => {
                            asked.remove(&id);
                            told += u32::from(result.is_ok());
                        }
                        _ => {}
                    }
                }
            }
            told
        });
    }
    let told: u32 = running.join_all().await.into_iter().sum();
    over(format!("{told} of {records} records told in {:.1} s", begun.elapsed().as_secs_f64())).await;
}
