//! What the doctor is asked over the bus, signs of life, and how jobs and members are told of as they change.

use futures::StreamExt as _;
use opengateway::api::names::ErrorName;
use opengateway::api::proxy::{Details, NetworkProxy};
use opengateway::api::stream::{JobLine, JobNow, LineReader};
use opengateway::domain::network::{
    Attempt, DhtFacts, DialOutcome, Facts, GreetOutcome, Greeting, Link, PeerFacts, PingError, Pinged, ReachFacts, Relay,
};
use opengateway::net::Command;
use tokio::net::unix::pipe::Receiver;
use zbus::{MatchRule, MessageStream};

use super::jobs::{answer, done};
use super::*;

const NETWORK: &str = "org.opengateway.Gateway1.Network";

fn peer(id: &str, name: &str) -> PeerFacts {
    PeerFacts {
        id: NodeId::new(id),
        name: Some(name.to_owned()),
        sources: vec![FoundBy::Mdns],
        heard_ago: Some(Duration::from_secs(3)),
        mdns_ago: None,
        addresses: vec!["/ip4/192.0.2.2/udp/4001/quic-v1".to_owned()],
        attempts: vec![Attempt {
            address: "/ip4/192.0.2.2/udp/4001/quic-v1".to_owned(),
            ago: Duration::from_secs(2),
            outcome: DialOutcome::Other("strange\0".to_owned()),
        }],
        next_dial: None,
        links: Vec::new(),
        greetings: vec![Greeting {
            cluster: super::id("gatewayai-poc"),
            ago: Duration::from_secs(1),
            outcome: GreetOutcome::Refused,
            versions: None,
        }],
        member_of: Vec::new(),
        suspect: false,
        banned: false,
        bootstrap: false,
    }
}

fn facts() -> Facts {
    Facts {
        at: SystemTime::now(),
        id: NodeId::new("12D3KooWself"),
        listening: vec!["/ip4/192.0.2.1/udp/4001/quic-v1".to_owned()],
        not_listening: Vec::new(),
        interfaces: Vec::new(),
        mdns_enabled: true,
        mdns_flooded: false,
        mdns: Vec::new(),
        bootstrap: Vec::new(),
        reach: ReachFacts::default(),
        dht: DhtFacts::default(),
        clusters: Vec::new(),
        peers: vec![peer("12D3KooWa", "NodeA"), peer("12D3KooWb", "NodeB"), peer("12D3KooWc", "NodeB")],
        same_identity: Vec::new(),
        same_identity_certain: false,
        connections: (3, 512),
        refused: None,
        versions: (1, 3),
    }
}

/// Plays the network: facts at once, and pings as their name wishes. Gives how often it was asked for facts.
fn play(commands: mpsc::Receiver<Command>) -> watch::Receiver<u32> {
    play_with(commands, facts())
}

/// The same with facts of one's own.
fn play_with(mut commands: mpsc::Receiver<Command>, facts: Facts) -> watch::Receiver<u32> {
    let (count, counted) = watch::channel(0);
    tokio::spawn(async move {
        while let Some(command) = commands.recv().await {
            match command {
                Command::Facts { reply, .. } => {
                    count.send_modify(|count| *count += 1);
                    let _ = reply.send(facts.clone());
                }
                Command::Ping { peer, count, reply } => {
                    let link = Link {
                        address: "/ip4/192.0.2.9/udp/4001/quic-v1".to_owned(),
                        dialed: true,
                        transport: "quic",
                        relay: Some(Relay { id: NodeId::new("12D3KooWw"), name: Some("Node\0W".to_owned()) }),
                        age: Duration::from_secs(5),
                    };
                    let round_trips = vec![Duration::from_micros(800); count as usize];
                    let pinged = Pinged { id: NodeId::new("12D3KooWa"), name: Some(peer.clone()), link, round_trips };
                    let answer = match peer.as_str() {
                        "nobody" => Err(PingError::NoSuchPeer(peer)),
                        "gone" => Err(PingError::NotConnected(peer, "every address timed out".to_owned())),
                        "twin" => Err(PingError::Ambiguous(peer, "12D3KooWa, 12D3KooWb".to_owned())),
                        "self" => Err(PingError::Ourselves),
                        "old" => Err(PingError::Unsupported(peer)),
                        "silent" => Err(PingError::NoAnswer(peer)),
                        "slow" => {
                            // Never answered as long as the caller waits.
                            tokio::spawn(async move {
                                let mut reply = reply;
                                reply.closed().await;
                            });
                            continue;
                        }
                        _ => Ok(pinged),
                    };
                    let _ = reply.send(answer);
                }
                _ => {}
            }
        }
    });
    counted
}

async fn network<B>(connection: &Connection, method: &str, body: &B) -> Result<Message, (String, String)>
where
    B: serde::Serialize + zbus::wire::DynamicType + Sync,
{
    match within(connection.call_method(Some(NAME), ROOT, Some(NETWORK), method, body)).await {
        Ok(reply) => Ok(reply),
        Err(zbus::Error::MethodError(name, message, _)) => Err((name.to_string(), message.unwrap_or_default())),
        // The standard names come as a type of their own.
        Err(zbus::Error::FDO(error)) => {
            use zbus::DBusError as _;
            Err((error.name().to_string(), error.description().unwrap_or_default().to_owned()))
        }
        Err(error) => panic!("{method}: {error}"),
    }
}

fn text(details: &Details, key: &str) -> String {
    String::try_from(details[key].try_clone().unwrap()).unwrap()
}

fn list(details: &Details, key: &str) -> Vec<Details> {
    Vec::<Details>::try_from(details[key].try_clone().unwrap()).unwrap()
}

#[tokio::test]
async fn facts_are_told_whole_and_only_of_whom_they_were_asked() {
    let Some(played) = Played::start().await else { return };
    let _looks = play(played.net.commands);
    let caller = played.bus.connect().await;
    let diagnose = async |options: Options<'_>| -> (Vec<Details>, Details) {
        network(&caller, "Diagnose", &(options,)).await.unwrap().body().deserialize().unwrap()
    };
    let (findings, all) = diagnose(Options::new()).await;
    for finding in &findings {
        assert!(!text(finding, "Code").is_empty() && !text(finding, "Sentence").is_empty());
        assert!(["error", "warning", "info"].contains(&text(finding, "Severity").as_str()));
    }
    assert_eq!(text(&all, "PeerId"), "12D3KooWself");
    assert_eq!((list(&all, "Peers").len(), &*all["MaxConnections"]), (3, &Variant::from(512_u32)));
    let one = &list(&all, "Peers")[0];
    let tried = &list(one, "Attempts")[0];
    assert_eq!((text(tried, "Outcome"), text(tried, "Detail")), ("other".into(), "strange\u{fffd}".into()));
    assert_eq!(*tried["AgoUSec"], Variant::from(2_000_000_u64));
    assert_eq!(text(&list(one, "Greetings")[0], "Outcome"), "refused");
    assert!(!one.contains_key("NextDialUSec") && !all.contains_key("Refused"), "what is not known is absent");

    let about = async |peer: &str| list(&diagnose(Options::from([("Peer", Variant::from(peer))])).await.1, "Peers").len();
    assert_eq!((about("NodeA").await, about("12D3KooWb").await, about("NodeB").await, about("nobody").await), (1, 1, 2, 0));
    let (_, cluster) = diagnose(Options::from([("Cluster", Variant::from("GatewayAI-poc"))])).await;
    assert_eq!(list(&cluster, "Peers").len(), 3);
}

#[tokio::test]
async fn wrong_questions_have_names_and_a_loop_of_them_costs_one_look_a_second() {
    let Some(played) = Played::start().await else { return };
    let looks = play(played.net.commands);
    let caller = played.bus.connect().await;
    let invalid = ErrorName::InvalidArgs.as_str();
    let error = async |options: Options<'_>| network(&caller, "Diagnose", &(options,)).await.unwrap_err().0;
    assert_eq!(error(Options::from([("Nonsense", Variant::from(true))])).await, invalid);
    assert_eq!(error(Options::from([("Peer", Variant::from(1_u32))])).await, invalid);
    assert_eq!(error(Options::from([("Peer", Variant::from(""))])).await, invalid);
    assert_eq!(error(Options::from([("Peer", Variant::from("x".repeat(129)))])).await, invalid);
    let both = Options::from([("Peer", Variant::from("a")), ("Cluster", Variant::from("b"))]);
    assert_eq!(error(both).await, invalid);
    let cluster = |name: &'static str| Options::from([("Cluster", Variant::from(name))]);
    assert_eq!(error(cluster("../x")).await, ErrorName::InvalidClusterId.as_str());
    assert_eq!(error(cluster("nowhere")).await, ErrorName::NoSuchCluster.as_str());
    network(&caller, "Diagnose", &(Options::from([("Peer", Variant::from("x".repeat(128)))]),)).await.unwrap();

    let begun = std::time::Instant::now();
    let before = *looks.borrow();
    for _ in 0..200 {
        network(&caller, "Diagnose", &(Options::new(),)).await.unwrap();
    }
    let seconds = u32::try_from(begun.elapsed().as_secs()).unwrap();
    assert!(*looks.borrow() - before <= seconds + 2, "{} looks in {seconds} s", *looks.borrow() - before);
}

#[tokio::test]
async fn pings_tell_the_way_and_the_times_and_fail_by_name() {
    let Some(played) = Played::start().await else { return };
    let _looks = play(played.net.commands);
    let caller = played.bus.connect().await;
    let count = |count: u32| Options::from([("Count", Variant::from(count))]);
    let said: Details = network(&caller, "Ping", &("NodeA", count(100))).await.unwrap().body().deserialize().unwrap();
    assert_eq!((text(&said, "PeerId"), text(&said, "Transport")), ("12D3KooWa".into(), "quic".into()));
    assert_eq!((text(&said, "Relay"), text(&said, "RelayName")), ("12D3KooWw".into(), "Node\u{fffd}W".into()));
    assert_eq!(*said["Direct"], Variant::from(false));
    assert_eq!(Vec::<u64>::try_from(said["RoundTrips"].try_clone().unwrap()).unwrap(), [800; 100]);
    let error = async |peer: &str, options: Options<'_>| network(&caller, "Ping", &(peer, options)).await.unwrap_err();
    for (peer, name) in [
        ("nobody", ErrorName::NoSuchPeer),
        ("gone", ErrorName::PeerUnreachable),
        ("silent", ErrorName::NoAnswer),
        ("old", ErrorName::NoAnswer),
        ("twin", ErrorName::InvalidArgs),
        ("self", ErrorName::InvalidArgs),
        ("", ErrorName::InvalidArgs),
    ] {
        assert_eq!(error(peer, Options::new()).await.0, name.as_str(), "{peer}");
    }
    let (_, message) = error("twin", Options::new()).await;
    assert!(message.contains("12D3KooWa, 12D3KooWb"), "{message}");
    for bad in [0, 101] {
        assert_eq!(error("NodeA", count(bad)).await.0, ErrorName::InvalidArgs.as_str(), "{bad}");
    }
    assert_eq!(error("NodeA", Options::from([("Peer", Variant::from("x"))])).await.0, ErrorName::InvalidArgs.as_str());
    // Two at once, and not three.
    let body = ("slow", Options::new());
    let slow = || caller.call_method(Some(NAME), ROOT, Some(NETWORK), "Ping", &body);
    let mut running = Vec::new();
    for _ in 0..2 {
        let mut call = Box::pin(slow());
        assert!(tokio::time::timeout(Duration::from_millis(200), &mut call).await.is_err(), "it has no answer yet");
        running.push(call);
    }
    assert_eq!(error("NodeA", Options::new()).await.0, ErrorName::Busy.as_str());
}

#[tokio::test]
async fn the_worst_finding_is_a_property_that_tells_when_it_changes() {
    let Some(played) = Played::start().await else { return };
    let twin = vec!["/ip4/192.0.2.66/udp/4001/quic-v1".to_owned()];
    let _looks = play_with(played.net.commands, Facts { same_identity: twin, same_identity_certain: true, ..facts() });
    let caller = played.bus.connect().await;
    let proxy = NetworkProxy::new(&caller).await.unwrap();
    assert_eq!(proxy.worst_finding().await.unwrap(), Default::default());
    let (findings, _) = proxy.diagnose(&Options::new()).await.unwrap();
    let worst = findings.first().unwrap();
    assert_eq!((text(worst, "Code"), text(worst, "Severity")), ("duplicate-identity".to_owned(), "error".to_owned()));
    // The property follows by itself, at the latest with the second look.
    let told = async {
        loop {
            let (code, severity, _) = proxy.worst_finding().await.unwrap();
            if (code, severity) == (text(worst, "Code"), text(worst, "Severity")) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), told).await.expect("it is told");
}

#[tokio::test]
async fn members_that_change_are_told_by_name_of_what_changed() {
    let Some(played) = Played::start().await else { return };
    let listener = played.bus.connect().await;
    let rule = MatchRule::builder().msg_type(zbus::message::Type::Signal).sender(NAME).member("PeerChanged").build();
    let mut signals = MessageStream::for_match_rule(rule.unwrap(), &listener, None).await.unwrap();
    let mut told = async || {
        let message = within(signals.next()).await.unwrap().unwrap();
        message.body().deserialize::<(String, Vec<String>, Details)>().unwrap()
    };
    let (steady, first) = (member(1, "steady"), member(2, "NodeB"));
    let show = |second: Member| {
        let members = [Arc::clone(&steady), Arc::new(second)];
        played.net.state.send_replace(snapshot(&[("gatewayai-poc", &members)]));
    };
    // The service has seen a snapshot when it has told its count.
    show((*first).clone());
    within(async {
        let path = "/org/opengateway/Gateway1/cluster/gatewayai_2dpoc";
        let count = async || property(&listener, path, "org.opengateway.Gateway1.Cluster", "PeerCount").await.unwrap();
        while *count().await != Variant::from(2_u32) {}
        call(&listener, "GetStatus", &()).await.unwrap();
    })
    .await;
    let relay = Relay { id: NodeId::new("12D3KooWw"), name: Some("NodeW".to_owned()) };
    let steps = [
        (Member { liveness: Liveness::Suspect, ..(*first).clone() }, vec!["Liveness"]),
        (Member { latency_us: Some(5), ..(*first).clone() }, vec!["Liveness"]),
        (Member { direct: false, relay: Some(relay), ..(*first).clone() }, vec!["Direct", "Relay"]),
        ((*first).clone(), vec!["Direct", "Relay"]),
        (Member { liveness: Liveness::Known, ..(*first).clone() }, vec!["Liveness"]),
    ];
    // Until the first is told the service may not have looked yet.
    for (number, (member, wanted)) in steps.into_iter().enumerate() {
        show(member);
        let (peer, changed, details) = told().await;
        assert_eq!((peer.as_str(), changed), ("12D3KooW00002", wanted.iter().map(|&key| key.to_owned()).collect()), "{number}");
        assert_eq!(text(&details, "Name"), "NodeB");
        match number {
            2 => assert_eq!((text(&details, "Relay"), text(&details, "RelayName")), ("12D3KooWw".into(), "NodeW".into())),
            4 => assert!(["Direct", "Transport", "FreeSlots", "ConnectedAt"].iter().all(|key| !details.contains_key(*key))),
            _ => assert!(!details.contains_key("Relay")),
        }
    }
    // One that is only known is a member, and is not connected.
    let reply = call(&listener, "GetStatus", &()).await.unwrap();
    let cluster = &list(&reply.body().deserialize::<Details>().unwrap(), "Clusters")[0];
    assert_eq!((&*cluster["PeerCount"], &*cluster["MemberCount"]), (&Variant::from(1_u32), &Variant::from(2_u32)));
}

/// The lines that a watcher of jobs is told.
struct Told(LineReader<Receiver>);

impl Told {
    async fn watch(connection: &Connection) -> Self {
        let reply = call(connection, "WatchJobs", &(Options::new(),)).await.unwrap();
        let stream: zbus::OwnedFd = reply.body().deserialize().unwrap();
        Self(LineReader::new(Receiver::from_owned_fd(stream.into()).unwrap()))
    }

    async fn next(&mut self) -> JobLine {
        within(self.0.next_job()).await.unwrap().expect("the service lives")
    }

    async fn job(&mut self) -> JobNow {
        match self.next().await {
            JobLine::Job(now) => now,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn jobs_are_told_from_their_beginning_to_their_end_and_never_what_they_are_about() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let mut told = Told::watch(&caller).await;
    let (_, stream) = start_prompt(&caller, "canary").await;
    let start = played.started().await;
    let begun = told.job().await;
    assert_eq!((begun.state.as_str(), begun.position, begun.cluster.as_str()), ("queued", None, "gatewayai-poc"));
    assert_eq!(begun.uid, rustix::process::geteuid().as_raw());
    for position in [3, 3, 1] {
        start.events.send(JobEvent::Queued { position }).await.unwrap();
    }
    assert_eq!((told.job().await.position, told.job().await.position), (Some(3), Some(1)), "each place once");
    // A second watcher begins with how things are.
    let mut second = Told::watch(&caller).await;
    assert_eq!((second.job().await.position, begun.id), (Some(1), begun.id));
    for event in [taken(), JobEvent::Text("canary".to_owned()), done()] {
        start.events.send(event).await.unwrap();
    }
    for told in [&mut told, &mut second] {
        let running = told.job().await;
        assert_eq!((running.state.as_str(), running.model.as_deref()), ("running", Some("echo")));
        assert_eq!(running.served_by.unwrap().name, "NodeA");
        let done = told.job().await;
        assert_eq!((done.state.as_str(), done.prompt_tokens, done.completion_tokens), ("done", Some(1), 1));
        assert!(done.duration_us > 0 && done.error.is_none() && done.id == begun.id);
    }
    within(lines(stream)).await;
    // One that fails says with which error; one that is answered in the reply is told too.
    let failing = async {
        let start = played.started().await;
        let failure = opengateway::domain::prompt::Failure::new(opengateway::domain::prompt::FailureKind::Stalled, "canary");
        start.events.send(JobEvent::End(Err(failure))).await.unwrap();
    };
    let body = ("", "canary", Options::new());
    let (reply, ()) = tokio::join!(call(&caller, "Prompt", &body), failing);
    assert!(reply.is_err());
    assert_eq!(told.job().await.state, "queued");
    let failed = told.next().await.to_bytes();
    let shown = String::from_utf8(failed).unwrap();
    assert!(shown.contains(r#""state":"failed""#) && shown.contains("Error.Stalled") && !shown.contains("canary"), "{shown}");
}

#[tokio::test]
async fn a_watcher_that_does_not_read_is_told_how_much_it_missed_and_hinders_nobody() {
    let Some(mut played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let mut told = Told::watch(&caller).await;
    for _ in 0..300 {
        let answering = async { answer(&played.started().await, "4").await };
        let body = ("", "x", Options::new());
        let (reply, ()) = tokio::join!(call(&caller, "Prompt", &body), answering);
        reply.unwrap();
    }
    let (mut jobs, mut skipped) = (0, 0);
    // Three lines each; what was not told is counted.
    while jobs + skipped < 900 {
        match told.next().await {
            JobLine::Job(_) => jobs += 1,
            JobLine::Skipped { count } => skipped += count,
            JobLine::Unknown => {}
        }
    }
    assert_eq!(jobs + skipped, 900, "{jobs} told, {skipped} skipped");
}

#[tokio::test]
async fn eight_watchers_of_one_user_and_not_nine_and_a_closed_pipe_makes_room() {
    let Some(played) = Played::start().await else { return };
    let caller = played.bus.connect().await;
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(Told::watch(&caller).await);
    }
    let refused = call(&caller, "WatchJobs", &(Options::new(),)).await.unwrap_err();
    assert_eq!(refused.0, ErrorName::Busy.as_str());
    open.pop();
    within(async { while call(&caller, "WatchJobs", &(Options::new(),)).await.is_err() {} }).await;
    let wrong = Options::from([("All", Variant::from(true))]);
    assert_eq!(call(&caller, "WatchJobs", &(wrong,)).await.unwrap_err().0, ErrorName::InvalidArgs.as_str());
}
