//! What is announced: in time, in order, and not too often.

use std::time::Instant;

use futures::StreamExt as _;
use opengateway::api::proxy::ManagerProxy;
use opengateway::domain::node::GoneReason;
use opengateway::domain::resources::Lent;
use zbus::{MatchRule, MessageStream};

use super::*;

const CLUSTER_PATH: &str = "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc";

async fn all_signals(connection: &Connection) -> MessageStream {
    let rule = MatchRule::builder().msg_type(zbus::message::Type::Signal).sender(NAME).build().unwrap();
    MessageStream::for_match_rule(rule, connection, std::num::NonZeroUsize::new(4096)).await.unwrap()
}

/// Properties that a `PropertiesChanged` tells.
fn changed(message: &Message) -> HashMap<String, OwnedVariant> {
    if member_of(message) != "PropertiesChanged" {
        return HashMap::new();
    }
    message.body().deserialize::<(String, HashMap<String, OwnedVariant>, Vec<String>)>().unwrap().1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_peers_in_a_second_are_told_by_ten_signals_a_second_and_the_count() {
    let Some(played) = Played::start().await else { return };
    let listener = played.bus.connect().await;
    let mut signals = all_signals(&listener).await;
    let begun = Instant::now();
    let mut members = Vec::new();
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    for round in 0..50 {
        pace.tick().await;
        for number in 0..10 {
            let one = member(round * 10 + number, "peer");
            members.push(Arc::clone(&one));
            played.net.events.send(net::Event::MemberUp { cluster: id("gatewayai-poc"), member: one }).unwrap();
            played.net.state.send_replace(snapshot(&[("gatewayai-poc", &members)]));
        }
    }
    let (mut peers, mut totals, mut counts) = (0, Vec::new(), Vec::new());
    within(async {
        while totals.last() != Some(&500) || counts.last() != Some(&500) {
            let message = signals.next().await.unwrap().unwrap();
            match member_of(&message).as_str() {
                "PeerConnected" => peers += 1,
                "PeersChanged" => totals.push(message.body().deserialize::<u32>().unwrap()),
                _ => counts.extend(changed(&message).get("PeerCount").map(|count| u32::try_from(count).unwrap())),
            }
        }
    })
    .await;
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap() + 1;
    assert!((1..=10 * seconds).contains(&(peers + totals.len())), "{peers} + {totals:?} in {seconds} s");
    assert!(peers >= 10, "the first ones are told one by one: {peers}");
    assert!(counts.len() <= seconds + 1, "{counts:?} in {seconds} s");
    // A few that come one by one are told one by one, and nothing else.
    let listed = property(&listener, CLUSTER_PATH, "org.opengateway.Gateway1.Cluster", "PeerCount").await.unwrap();
    assert_eq!(u32::try_from(listed).unwrap(), 500);
}

#[tokio::test]
async fn two_peers_are_told_by_two_signals_and_the_count_at_last() {
    let Some(played) = Played::start().await else { return };
    let listener = played.bus.connect().await;
    let mut signals = all_signals(&listener).await;
    let mut members = Vec::new();
    for number in 0..2 {
        members.push(member(number, "peer"));
        played
            .net
            .events
            .send(net::Event::MemberUp { cluster: id("gatewayai-poc"), member: Arc::clone(&members[number]) })
            .unwrap();
        played.net.state.send_replace(snapshot(&[("gatewayai-poc", &members)]));
        // Each is told before the next one comes.
        while member_of(&within(signals.next()).await.unwrap().unwrap()) != "PeerConnected" {}
    }
    let mut told = Vec::new();
    let last = async {
        loop {
            let message = signals.next().await.unwrap().unwrap();
            told.push(member_of(&message));
            if changed(&message).get("PeerCount").is_some_and(|count| **count == Variant::from(2_u32)) {
                return;
            }
        }
    };
    within(last).await;
    assert!(!told.iter().any(|member| member == "PeersChanged"), "both were told one by one: {told:?}");
}

#[tokio::test]
async fn a_late_word_about_a_cluster_that_was_left_brings_no_object_back() {
    let Some(played) = Played::start().await else { return };
    let listener = played.bus.connect().await;
    let one = member(1, "peer");
    played.net.state.send_replace(snapshot(&[("gatewayai-poc", &[]), ("left", &[Arc::clone(&one)])]));
    let path = "/org/opengateway/Gateway1/cluster/left";
    let is_there = async || property(&listener, path, "org.opengateway.Gateway1.Cluster", "Id").await.is_ok();
    within(async { while !is_there().await {} }).await;
    played.net.state.send_replace(snapshot(&[("gatewayai-poc", &[])]));
    within(async { while is_there().await {} }).await;
    let mut signals = all_signals(&listener).await;
    let gone =
        net::Event::MemberDown { cluster: id("left"), id: one.id.clone(), name: one.name.clone(), reason: GoneReason::Left };
    played.net.events.send(gone).unwrap();
    // The next thing that is announced shows that the word was heard.
    let here = member(2, "here");
    played.net.events.send(net::Event::MemberUp { cluster: id("gatewayai-poc"), member: here }).unwrap();
    within(async {
        loop {
            let message = signals.next().await.unwrap().unwrap();
            assert_ne!(message.header().path().map(|found| found.as_str()), Some(path), "{message}");
            assert_ne!(member_of(&message), "InterfacesAdded", "{message}");
            if member_of(&message) == "PeerConnected" {
                return;
            }
        }
    })
    .await;
    assert!(!is_there().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_announced_before_its_reply_so_that_a_cache_is_fresh() {
    let Some(played) = Played::start().await else { return };
    let Played { bus, mut requests, control, service: _service, net: _net, .. } = played;
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            match request {
                Request::SetSharing(enabled, _, _, reply) => {
                    control.send_modify(|state| state.sharing = enabled);
                    let _ = reply.send(Ok(()));
                }
                other => panic!("{other:?}"),
            }
        }
    });
    let caller = bus.connect().await;
    let manager = ManagerProxy::new(&caller).await.unwrap();
    assert!(manager.sharing().await.unwrap());
    let mut messages = MessageStream::from(&caller);
    let mut sharing = true;
    for round in 0..1000 {
        sharing = !sharing;
        manager.set_sharing(sharing, &Options::new()).await.unwrap();
        // On the wire: the announcement, then the reply.
        let mut announced = false;
        within(async {
            loop {
                let message = messages.next().await.unwrap().unwrap();
                announced |= changed(&message).contains_key("Sharing");
                if message.message_type() == zbus::message::Type::MethodReturn {
                    return;
                }
            }
        })
        .await;
        assert!(announced, "round {round}");
        // A cache is filled by a task of the client's own, which may still be about to run.
        within(async {
            while manager.sharing().await.unwrap() != sharing {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn resources_that_move_again_too_soon_are_told_later_and_not_lost() {
    let Some(played) = Played::start().await else { return };
    let listener = played.bus.connect().await;
    let mut signals = all_signals(&listener).await;
    let frozen = Frozen::now();
    let mut told = async || loop {
        let message = signals.next().await.unwrap().unwrap();
        if member_of(&message) == "ResourcesChanged" {
            return message.body().deserialize::<Vec<String>>().unwrap();
        }
    };
    let mut now = resources();
    now.memory.available = Some(1);
    now.cpu.load1 = Some(3.0);
    played.measured.send_replace(Arc::new(now.clone()));
    assert_eq!(told().await, ["Memory"], "the load is no total and no availability");
    now.storage.available = Some(1);
    played.measured.send_replace(Arc::new(now));
    played.control.send_modify(|state| state.lent = Lent { cores: Some(1.0), ..Lent::default() });
    // Whatever was to be told at once is told before this reply.
    let caller = played.bus.connect().await;
    for _ in 0..3 {
        caller.call_method(Some(NAME), ROOT, Some(MANAGER), "GetStatus", &()).await.unwrap();
    }
    frozen.pass(Duration::from_secs(6)).await;
    assert_eq!(told().await, ["Storage", "Lent"]);
}
