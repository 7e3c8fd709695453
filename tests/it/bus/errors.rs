//! Every failure over the wire: the name is the documented one, and no text makes the bus cut the daemon off.

use opengateway::dbus::control::ControlError;
use opengateway::domain::prompt::{Done, Failure, FailureKind, FinishReason, Usage};

use super::*;
use crate::daemon::ERROR;

const KINDS: &[(FailureKind, &str)] = &[
    (FailureKind::NoEligiblePeer, "NoEligiblePeer"),
    (FailureKind::ModelUnavailable, "ModelUnavailable"),
    (FailureKind::Busy, "Busy"),
    (FailureKind::QuotaExceeded, "QuotaExceeded"),
    (FailureKind::DeadlineExceeded, "DeadlineExceeded"),
    (FailureKind::Stalled, "Stalled"),
    (FailureKind::SlowConsumer, "SlowConsumer"),
    (FailureKind::AnswerTooLarge, "AnswerTooLarge"),
    (FailureKind::RelayLimit, "RelayLimit"),
    (FailureKind::EngineCrashed, "EngineCrashed"),
    (FailureKind::BackendFailed, "BackendFailed"),
    (FailureKind::PeerLost, "PeerLost"),
    (FailureKind::Interrupted, "Interrupted"),
    (FailureKind::Cancelled, "Cancelled"),
    (FailureKind::NotAuthorized, "NotAuthorized"),
    (FailureKind::ProtocolError, "ProtocolError"),
    (FailureKind::Duplicate, "Duplicate"),
    (FailureKind::ShuttingDown, "ShuttingDown"),
];

async fn prompt(caller: &Connection) -> Result<Message, (String, String)> {
    call(caller, "Prompt", &("", "x", Options::new())).await
}

#[tokio::test]
async fn every_failure_of_a_prompt_has_its_name_as_reply_in_the_stream_and_in_finished() {
    use futures::StreamExt as _;
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let own = KINDS.iter().map(|&(kind, name)| (kind, format!("{ERROR}{name}")));
    let invalid = (FailureKind::InvalidRequest, "org.freedesktop.DBus.Error.InvalidArgs".to_owned());
    for (kind, name) in own.chain([invalid]) {
        let fails = || JobEvent::End(Err(Failure::new(kind, "because")));
        let (reply, ()) = tokio::join!(prompt(&caller), async {
            played.started().await.events.send(fails()).await.unwrap();
        });
        assert_eq!(reply.unwrap_err(), (name.clone(), "because".to_owned()), "{kind:?}");

        let mut messages = zbus::MessageStream::from(&caller);
        let (_, stream) = start_prompt(&caller, "x").await;
        let start = played.started().await;
        start.events.send(taken()).await.unwrap();
        start.events.send(fails()).await.unwrap();
        let told = within(lines(stream)).await;
        assert_eq!(told.last(), Some(&Line::Error { name: name.clone(), message: "because".to_owned() }));
        let finished = within(async {
            while let Some(Ok(message)) = messages.next().await {
                if member_of(&message) == "Finished" {
                    return message.body().deserialize::<(String, HashMap<String, OwnedVariant>)>().unwrap();
                }
            }
            panic!("the bus is gone");
        })
        .await;
        assert_eq!(finished.0, if kind == FailureKind::Cancelled { "cancelled" } else { "failed" }, "{kind:?}");
        assert_eq!(*finished.1["Error"], Variant::from(name.as_str()));
        assert_eq!(*finished.1["Message"], Variant::from("because"));
    }
}

#[tokio::test]
async fn every_failure_of_the_daemon_has_its_name() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let text = || "because".to_owned();
    let invalid = "org.freedesktop.DBus.Error.InvalidArgs".to_owned();
    for (error, name) in [
        (ControlError::TooManyClusters(text()), format!("{ERROR}TooManyClusters")),
        (ControlError::NotEligible(text()), format!("{ERROR}NotEligible")),
        (ControlError::NoSuchCluster(id("x")), format!("{ERROR}NoSuchCluster")),
        (ControlError::NotConnected(id("x")), format!("{ERROR}NotConnected")),
        (ControlError::InvalidArgument(text()), invalid),
        (ControlError::Storage(text()), format!("{ERROR}StorageFull")),
        (ControlError::InvalidConfiguration(text()), format!("{ERROR}InvalidConfiguration")),
        (ControlError::Busy(text()), format!("{ERROR}Busy")),
        (ControlError::ShuttingDown, format!("{ERROR}ShuttingDown")),
    ] {
        let message = error.to_string();
        let answer = async {
            match within(played.requests.recv()).await.unwrap() {
                Request::Connect(_, _, reply) => reply.send(Err(error)).unwrap(),
                other => panic!("{other:?}"),
            }
        };
        let (reply, ()) = tokio::join!(async { call(&caller, "Connect", &("x", Options::new())).await }, answer);
        assert_eq!(reply.unwrap_err(), (name, message));
    }
    // The daemon does not listen any more.
    drop(played.requests);
    for method in ["Connect", "Disconnect"] {
        assert_eq!(call(&caller, method, &("x", Options::new())).await.unwrap_err().0, format!("{ERROR}ShuttingDown"));
    }
}

#[tokio::test]
async fn a_nul_in_the_words_of_another_node_does_not_cut_this_one_off_the_bus() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let mut evil = (*member(1, "a\0b")).clone();
    evil.version = "\0".to_owned();
    evil.models[0].name = "m\0".to_owned();
    evil.tiers = vec!["\0t".to_owned()];
    evil.addresses = vec!["/\0".to_owned()];
    let evil = Arc::new(evil);
    played.net.state.send_replace(snapshot(&[("gatewayai-poc", &[Arc::clone(&evil)])]));
    played.net.events.send(net::Event::MemberUp { cluster: id("gatewayai-poc"), member: evil }).unwrap();
    let reply = call(&caller, "ListPeers", &("", Options::new())).await.unwrap();
    let peers: Vec<(String, HashMap<String, OwnedVariant>)> = reply.body().deserialize().unwrap();
    assert_eq!(*peers[0].1["Name"], Variant::from("a\u{fffd}b"));
    let by = ServedBy { id: NodeId::new("12D3KooWa"), name: "\0".to_owned(), local: false };
    let started = || JobEvent::Started { model: "m\0".to_owned(), by: by.clone() };
    for end in [
        Ok(Done { finish: FinishReason::Stop, usage: Usage::default() }),
        Err(Failure::new(FailureKind::BackendFailed, "why\0not")),
    ] {
        let answer = async {
            let start = played.started().await;
            start.events.send(started()).await.unwrap();
            start.events.send(JobEvent::Text("4\0".to_owned())).await.unwrap();
            start.events.send(JobEvent::End(end.clone())).await.unwrap();
        };
        let (reply, ()) = tokio::join!(prompt(&caller), answer);
        match reply {
            Ok(reply) => {
                assert_eq!(reply.body().deserialize::<(String, HashMap<String, OwnedVariant>)>().unwrap().0, "4\u{fffd}");
            }
            Err((_, message)) => assert_eq!(message, "why\u{fffd}not"),
        }
        let (_, stream) = start_prompt(&caller, "x").await;
        let start = played.started().await;
        start.events.send(started()).await.unwrap();
        start.events.send(JobEvent::Text("4\0".to_owned())).await.unwrap();
        start.events.send(JobEvent::End(end)).await.unwrap();
        // JSON can say it, so the stream loses nothing.
        assert!(within(lines(stream)).await.contains(&Line::Text { text: "4\0".to_owned() }));
    }
    call(&caller, "GetStatus", &()).await.unwrap();
    call(&caller, "ListClusters", &()).await.unwrap();
    assert!(futures::FutureExt::now_or_never(played.service.closed()).is_none(), "the bus still knows us");
}

#[tokio::test]
async fn what_an_error_repeats_of_an_argument_is_short() {
    let Some(played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let long = "x".repeat(1 << 20);
    let unknown = Options::from([(long.as_str(), Variant::from(true))]);
    let tier = Options::from([("Tier", Variant::from(long.as_str()))]);
    for (method, reply) in [
        ("Connect", call(&caller, "Connect", &(long.as_str(), Options::new())).await),
        ("ListPeers", call(&caller, "ListPeers", &(long.as_str(), Options::new())).await),
        ("Prompt", call(&caller, "Prompt", &(long.as_str(), "x", Options::new())).await),
        ("Connect", call(&caller, "Connect", &("x", unknown.clone())).await),
        ("Prompt", call(&caller, "Prompt", &("", "x", unknown)).await),
        ("ListEligible", call(&caller, "ListEligible", &(tier,)).await),
    ] {
        let (name, message) = reply.unwrap_err();
        assert!(message.len() < 1000, "{method} {name}: {} bytes", message.len());
    }
}
