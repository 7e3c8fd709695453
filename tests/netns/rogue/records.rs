//! Lies in the DHT.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use futures::{AsyncWriteExt as _, StreamExt as _};
use libp2p::core::Transport as _;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::identity::Keypair;
use libp2p::kad::{self, RecordKey, store::MemoryStore, store::MemoryStoreConfig};
use libp2p::swarm::{self, NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm, identify, quic};
use opengateway::domain::cluster::ClusterId;
use opengateway::wire::keys::{self, Root};
use opengateway::wire::version::KAD_PROTOCOL;
use tokio::time::{sleep, timeout};

use super::wire::{Dialer, Over, PORT};
use super::{addresses, go, number, over, setting, victim};

#[derive(NetworkBehaviour)]
struct Manners {
    identify: identify::Behaviour,
    kad: kad::Behaviour<MemoryStore>,
}

/// A peer of the DHT that takes part in it, at an address of its own.
fn peer(keypair: &Keypair, at: Ipv4Addr) -> Swarm<Manners> {
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

/// ADD_PROVIDER as Kademlia has it on the wire, in protobuf: a message with a key (2) and a provider (9), which is its peer id
/// (1) and an address (2); all fields are shorter than 128 bytes.
fn add_provider(key: &[u8], provider: &PeerId, at: &Multiaddr) -> Vec<u8> {
    let field = |number: u8, bytes: &[u8]| [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()][..], bytes].concat();
    let provider = [field(1, &provider.to_bytes()), field(2, &at.to_vec())].concat();
    let message = [vec![1 << 3, 2], field(2, key), field(9, &provider)].concat();
    assert!(message.len() < 1 << 14);
    let [low, high] = [message.len() & 0x7f | 0x80, message.len() >> 7].map(|part| u8::try_from(part).unwrap());
    [&[low, high][..], &message].concat()
}

/// RECORDS provider records, PEERS peers at a time from HOSTS addresses, each with a new name after every 32: all of them on
/// the cluster's key, or (SPREAD=1) on a key each.
pub async fn provide() {
    let (records, peers, spread): (u32, u32, u32) = (number("RECORDS", 10_000), number("PEERS", 20), number("SPREAD", 0));
    let seconds: u64 = number("SECONDS", 30);
    let from = addresses(number("HOSTS", 20));
    go().await;
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let mut running = tokio::task::JoinSet::new();
    for number in 0..peers {
        let from = from[number as usize % from.len()];
        running.spawn(async move {
            let (mut told, mut names) = (0_u32, 0_u32);
            while told < records / peers && Instant::now() < end {
                let mut dialer = Dialer::new(from);
                let Ok(wire) = dialer.dial(Over::Tcp, victim().into()).await else {
                    sleep(Duration::from_millis(200)).await;
                    continue;
                };
                names += 1;
                let at: Multiaddr = format!("/ip4/{from}/tcp/{PORT}").parse().unwrap();
                for record in 0..PER_NAME {
                    let key = match spread {
                        0 => key_of(crate::CLUSTER),
                        _ => RecordKey::new(&[number, names, record].map(u32::to_be_bytes).concat()),
                    };
                    let telling = async {
                        let mut stream = wire.speak(KAD_PROTOCOL).await?;
                        stream.write_all(&add_provider(key.as_ref(), &wire.local, &at)).await?;
                        stream.close().await
                    };
                    told += u32::from(matches!(timeout(Duration::from_secs(2), telling).await, Ok(Ok(()))));
                }
            }
            [told, names]
        });
    }
    let sums = running.join_all().await.into_iter().fold([0, 0], |sums, counts| [sums[0] + counts[0], sums[1] + counts[1]]);
    over(format!("{} of {records} records told under {} names in {:.1} s", sums[0], sums[1], begun.elapsed().as_secs_f64()))
        .await;
}

/// SYBILS peers with names as near to the cluster's key as can be had out of GROUND, at HOSTS addresses: all of them in the
/// DHT of the victim, and none of them a member of anything.
pub async fn sybils() {
    let (sybils, ground): (usize, u32) = (number("SYBILS", 200), number("GROUND", 5000));
    let (seconds, hosts): (u64, u32) = (number("SECONDS", 10), number("HOSTS", 1));
    let key = kad::KBucketKey::new(key_of(crate::CLUSTER));
    let near = |keypair: &Keypair| kad::KBucketKey::from(keypair.public().to_peer_id()).distance(&key);
    let mut names: Vec<Keypair> = (0..ground).map(|_| Keypair::generate_ed25519()).collect();
    names.sort_by_cached_key(near);
    names.truncate(sybils);
    let (from, (id, at)) = (addresses(hosts), at_victim());
    go().await;
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let mut running = tokio::task::JoinSet::new();
    for (number, keypair) in names.into_iter().enumerate() {
        let (from, at) = (from[number % from.len()], at.clone());
        running.spawn(async move {
            // As fast as the victim lets them in.
            sleep(Duration::from_millis(60) * u32::try_from(number).unwrap() / hosts).await;
            let mut swarm = peer(&keypair, from);
            swarm.behaviour_mut().kad.add_address(&id, at.clone());
            let _ = swarm.dial(at);
            let mut connected = false;
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => match event {
                        SwarmEvent::NewListenAddr { address, .. } => swarm.add_external_address(address),
                        SwarmEvent::ConnectionEstablished { .. } => connected = true,
                        _ => {}
                    },
                    () = tokio::time::sleep_until(end) => return (connected, swarm),
                }
            }
        });
    }
    // They are held until this process ends: who asks them gets an answer, and nobody's name.
    let held = running.join_all().await;
    let connected = held.iter().filter(|(connected, _)| *connected).count();
    for (_, mut swarm) in held {
        tokio::spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
    }
    over(format!("{connected} of {sybils} were let in")).await;
}
