//! What strangers read and write: identify and the DHT.

use libp2p::kad::{self, GetProvidersOk, QueryResult, RecordKey};
use libp2p::{Multiaddr, PeerId};

use super::rogue::{Heard, Rogue};
use super::*;
use crate::wire::keys::{self, Root};
use crate::wire::version::KAD_PROTOCOL;

const ANYWHERE: &str = "/ip4/127.0.0.1/udp/4999/quic-v1";

async fn known(rogue: &mut Rogue, node: &Node) -> libp2p::identify::Info {
    rogue.connect(&node.address().await).await;
    let (peer, address): (PeerId, Multiaddr) = (node.id().as_str().parse().unwrap(), node.bare_address().await.parse().unwrap());
    rogue.kad(move |kad| {
        kad.add_address(&peer, address);
    });
    rogue
        .hears("identify", |heard| match heard {
            Heard::Identified(info) if info.protocols.iter().any(|protocol| protocol.as_ref() == KAD_PROTOCOL) => Some(*info),
            _ => None,
        })
        .await
}

#[tokio::test]
async fn identify_tells_a_stranger_no_name_and_no_cluster() {
    let node = plan("a-name-to-keep").start().await;
    node.join("secretcluster", true, &[]).await;
    let mut rogue = Rogue::start().await;
    let info = known(&mut rogue, &node).await;
    let everything = format!("{info:?}").to_lowercase();
    for word in ["secretcluster", "a-name-to-keep"] {
        assert!(!everything.contains(word), "{everything}");
    }
    assert_eq!((info.protocol_version.as_str(), info.agent_version.as_str()), ("opengateway/1", "opengateway/1"));
    let protocols: Vec<&str> = info.protocols.iter().map(AsRef::as_ref).filter(|name| name.starts_with("/opengateway")).collect();
    assert!(protocols.iter().all(|name| crate::domain::version::PEER_PROTOCOLS.contains(name)), "{protocols:?}");
    // What it announces is what it may be dialled at, not all that it listens on.
    let announced: Vec<String> = info.listen_addrs.iter().map(ToString::to_string).collect();
    assert_eq!(announced, [node.bare_address().await]);
}

#[tokio::test]
async fn a_provider_record_is_stored_and_read_back_over_both_transports() {
    for listen in [QUIC, TCP] {
        let node = Plan { listen: listen.to_owned(), ..plan("a") }.start().await;
        for round in 0..5_u8 {
            let mut provider = Rogue::start().await;
            known(&mut provider, &node).await;
            provider.announce(ANYWHERE);
            let key = RecordKey::new(&[round]);
            let wanted = key.clone();
            provider.kad(move |kad| drop(kad.start_providing(wanted)));
            provider
                .hears("that it is announced", |heard| {
                    matches!(heard, Heard::Query(QueryResult::StartProviding(Ok(_)))).then_some(())
                })
                .await;
            let mut seeker = Rogue::start().await;
            known(&mut seeker, &node).await;
            // A query that succeeds proves nothing; the record does. It is on its way for a moment.
            let found = async {
                loop {
                    let wanted = key.clone();
                    seeker.kad(move |kad| {
                        kad.get_providers(wanted);
                    });
                    let providers = seeker
                        .hears("providers", |heard| match heard {
                            Heard::Query(QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { providers, .. }))) => {
                                Some(providers)
                            }
                            Heard::Query(QueryResult::GetProviders(_)) => Some(Default::default()),
                            _ => None,
                        })
                        .await;
                    if providers.contains(&provider.peer) {
                        return;
                    }
                }
            };
            timeout(DEADLINE, found).await.unwrap_or_else(|_| panic!("{listen}, round {round}: never found"));
        }
    }
}

#[tokio::test]
async fn value_records_are_not_kept() {
    let node = plan("a").start().await;
    let mut rogue = Rogue::start().await;
    known(&mut rogue, &node).await;
    let record = kad::Record::new(RecordKey::new(b"k"), b"anything".to_vec());
    rogue.kad(move |kad| drop(kad.put_record(record, kad::Quorum::One)));
    rogue.hears("the outcome", |heard| matches!(heard, Heard::Query(QueryResult::PutRecord(_))).then_some(())).await;
    let mut other = Rogue::start().await;
    known(&mut other, &node).await;
    other.kad(|kad| {
        kad.get_record(RecordKey::new(b"k"));
    });
    let found = other
        .hears("an answer", |heard| match heard {
            Heard::Query(QueryResult::GetRecord(found)) => Some(found),
            _ => None,
        })
        .await;
    assert!(matches!(found, Err(_) | Ok(kad::GetRecordOk::FinishedWithNoAdditionalRecord { .. })), "{found:?}");
}

#[tokio::test]
async fn members_that_know_only_a_bootstrap_node_find_each_other_in_the_dht() {
    let bootstrap = plan("bootstrap").start().await;
    let boot = vec![bootstrap.address().await];
    let timings = Timings { lookup_lonely: Duration::from_millis(500), ..plan("x").timings };
    let a = Plan { bootstrap: boot.clone(), timings, ..plan("a") }.start().await;
    let b = Plan { bootstrap: boot, timings, ..plan("b") }.start().await;
    a.join("home", true, &[]).await;
    b.join("home", true, &[]).await;
    a.sees("home", &["b"]).await;
    b.sees("home", &["a"]).await;
    // Each is announced where there is something to announce to.
    a.until("announced", |snapshot| snapshot.clusters[&id("home")].announced).await;
}

#[tokio::test]
async fn providers_are_a_hint_and_the_addresses_of_strangers_are_filtered() {
    let bootstrap = plan("bootstrap").start().await;
    // A node with a network of its own: loopback addresses of strangers are not for it.
    let node = plan("a").start().await;
    let key = RecordKey::new(&keys::dht_key(&Root::public(&id("home")), 0, 0));
    let mut provider = Rogue::start().await;
    known(&mut provider, &bootstrap).await;
    for bad in ["/ip4/10.1.2.3/tcp/22", "/ip4/169.254.169.254/tcp/80", "/ip4/192.168.1.1/tcp/80"] {
        provider.announce(bad);
    }
    let good = provider.address.to_string();
    provider.announce(&good);
    let wanted = key.clone();
    provider.kad(move |kad| drop(kad.start_providing(wanted)));
    provider
        .hears("that it is announced", |heard| matches!(heard, Heard::Query(QueryResult::StartProviding(Ok(_)))).then_some(()))
        .await;
    // Found, dialled at the one address that is left, greeted, and no member: it is in no cluster.
    let timings = Timings { lookup_lonely: Duration::from_millis(300), ..plan("x").timings };
    drop(node);
    let node = Plan { bootstrap: vec![bootstrap.address().await], timings, ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    let greeted = provider.accepted(crate::wire::version::MEMBER_PROTOCOL).await;
    drop(greeted);
    assert!(listed(&node.handle.snapshot(), "home").is_empty());
}
