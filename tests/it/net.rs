//! Real swarms in one process, on loopback, without a bus and without root.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::{Liveness, Member, ModelOffer, NodeId, Offer};
use opengateway::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Text, Usage};
use opengateway::net::identity::Identity;
use opengateway::net::{
    AnswerEvent, AnswerNow, Config, ConnectionCaps, Event, Handle, InboundPrompt, JoinOptions, Service, Timings, start,
};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(20);

/// Plays `serve`: echoes at once, or hands the prompt to the test.
#[derive(Debug)]
struct Stub {
    offer: watch::Receiver<Offer>,
    _publish: watch::Sender<Offer>,
    prompts: Option<mpsc::Sender<InboundPrompt>>,
    answered: AtomicU32,
}

impl Service for Stub {
    fn answer_now(&self, _: &NodeId, ask: &Ask) -> Option<Result<AnswerNow, Failure>> {
        if self.prompts.is_some() {
            return None;
        }
        self.answered.fetch_add(1, Ordering::Relaxed);
        let done = Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 1, completion_tokens: 1 } };
        Some(Ok(AnswerNow { model: "echo".to_owned(), pieces: vec![ask.prompt.clone()], done }))
    }

    fn submit(&self, prompt: InboundPrompt) -> Result<(), Failure> {
        let prompts = self.prompts.as_ref().ok_or_else(|| Failure::new(FailureKind::BackendFailed, "none"))?;
        prompts.try_send(prompt).map_err(|_| Failure::busy("full", Duration::from_secs(1)))
    }

    fn offer(&self) -> watch::Receiver<Offer> {
        self.offer.clone()
    }
}

struct Node {
    handle: Handle,
    stub: Arc<Stub>,
    prompts: mpsc::Receiver<InboundPrompt>,
}

impl Node {
    async fn start(name: &str, bootstrap: &[String], interactive: bool) -> Self {
        Self::start_at(name, bootstrap, interactive, "/ip4/127.0.0.1/udp/0/quic-v1").await
    }

    async fn start_at(name: &str, bootstrap: &[String], interactive: bool, listen: &str) -> Self {
        let offer = Offer {
            models: vec![ModelOffer::named("echo")],
            tiers: vec!["SmolLM-360M".to_owned()],
            free_slots: 4,
            queued: 0,
            draining: false,
        };
        let (publish, offer) = watch::channel(offer);
        let (sender, prompts) = mpsc::channel(16);
        let prompts_to = interactive.then_some(sender);
        let stub = Arc::new(Stub { offer, _publish: publish, prompts: prompts_to, answered: AtomicU32::new(0) });
        let config = Config {
            node_name: name.to_owned(),
            version: "test".to_owned(),
            listen: vec![listen.to_owned()],
            any_port: false,
            bootstrap: bootstrap.to_vec(),
            mdns: false,
            timings: Timings { views: Duration::from_millis(500), patience: Duration::from_millis(100), ..Timings::default() },
            caps: ConnectionCaps { memory_bytes: usize::MAX, ..ConnectionCaps::default() },
            versions: opengateway::wire::version::Versions::OURS,
            ..Config::default()
        };
        let service: Arc<dyn Service> = Arc::clone(&stub) as Arc<dyn Service>;
        let (handle, _) = start(config, &Identity::generate(), service).await.unwrap();
        Self { handle, stub, prompts }
    }

    /// An address that others can dial, once the listener has one.
    async fn address(&self) -> String {
        let mut state = self.handle.watch();
        let snapshot =
            timeout(DEADLINE, state.wait_for(|snapshot| !snapshot.listen_addresses.is_empty())).await.unwrap().unwrap();
        format!("{}/p2p/{}", snapshot.listen_addresses[0], snapshot.peer_id.as_ref().unwrap())
    }

    async fn join(&self, cluster: &str, serve: bool) {
        self.handle.join(id(cluster), JoinOptions { bootstrap: Vec::new(), serve }).await.unwrap();
    }

    /// Waits until exactly these are members of `cluster`, connected and not only known.
    async fn sees(&self, cluster: &str, names: &[&str]) -> Vec<Arc<Member>> {
        let mut state = self.handle.watch();
        let seen = |snapshot: &Arc<opengateway::net::Snapshot>| {
            let Some(view) = snapshot.clusters.get(&id(cluster)) else { return false };
            let connected = view.members.iter().filter(|member| member.liveness != Liveness::Known);
            let mut seen: Vec<&str> = connected.map(|member| member.name.as_str()).collect();
            seen.sort_unstable();
            seen == names && seen.len() == view.members.len()
        };
        let snapshot =
            timeout(DEADLINE, state.wait_for(seen)).await.unwrap_or_else(|_| panic!("{names:?} not seen in {cluster}")).unwrap();
        snapshot.clusters[&id(cluster)].members.clone()
    }

    fn ask(&self, cluster: &str, member: &NodeId, prompt: &str) -> Result<opengateway::net::AnswerStream, Failure> {
        let ask = Ask { prompt: Text::new(prompt), ..Ask::default() };
        self.handle.ask(id(cluster), member.clone(), ask, Duration::from_secs(10))
    }
}

fn id(name: &str) -> ClusterId {
    ClusterId::new(name).unwrap()
}

async fn whole(stream: &mut opengateway::net::AnswerStream) -> Result<String, Failure> {
    let mut text = String::new();
    loop {
        match timeout(DEADLINE, stream.next()).await.expect("an outcome within the deadline") {
            Some(AnswerEvent::Queued { .. } | AnswerEvent::Started { .. }) => {}
            Some(AnswerEvent::Text(more)) => text.push_str(&more),
            Some(AnswerEvent::End(outcome)) => return outcome.map(|_| text),
            None => panic!("no outcome"),
        }
    }
}

#[tokio::test]
async fn three_nodes_see_each_other_and_a_prompt_is_answered() {
    let a = Node::start("a", &[], false).await;
    a.join("home", true).await;
    let boot = [a.address().await];
    let b = Node::start("b", &boot, false).await;
    b.join("home", true).await;
    let c = Node::start("c", &boot, false).await;
    c.join("home", false).await;
    a.sees("home", &["b", "c"]).await;
    b.sees("home", &["a", "c"]).await;
    let members = c.sees("home", &["a", "b"]).await;
    for member in members {
        assert!(member.serving);
        let mut stream = c.ask("home", &member.id, "What is 2+2?").unwrap();
        assert_eq!(whole(&mut stream).await.unwrap(), "What is 2+2?");
    }
    assert_eq!(a.stub.answered.load(Ordering::Relaxed) + b.stub.answered.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn members_meet_over_tcp_too() {
    let a = Node::start_at("a", &[], false, "/ip4/127.0.0.1/tcp/0").await;
    a.join("home", true).await;
    let b = Node::start_at("b", &[a.address().await], false, "/ip4/127.0.0.1/tcp/0").await;
    b.join("HOME", false).await;
    let members = b.sees("home", &["a"]).await;
    assert_eq!(members[0].transport, "tcp");
    let mut stream = b.ask("home", &members[0].id, "x").unwrap();
    assert_eq!(whole(&mut stream).await.unwrap(), "x");
}

#[tokio::test]
async fn who_leaves_is_gone_at_once_and_says_so() {
    let a = Node::start("a", &[], false).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", true).await;
    a.sees("home", &["b"]).await;
    b.sees("home", &["a"]).await;
    let mut events = a.handle.events();
    b.handle.leave(id("home"), Duration::ZERO).await.unwrap();
    a.sees("home", &[]).await;
    let event = timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, Event::MemberDown { reason: opengateway::domain::node::GoneReason::Left, .. }), "{event:?}");
    assert!(b.handle.snapshot().clusters.is_empty());
    // And back again, on the same connection.
    b.join("home", true).await;
    a.sees("home", &["b"]).await;
}

#[tokio::test]
async fn a_node_that_shuts_down_says_goodbye() {
    let a = Node::start("a", &[], false).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", true).await;
    a.sees("home", &["b"]).await;
    timeout(Duration::from_secs(2), b.handle.shutdown()).await.expect("shut down in time");
    a.sees("home", &[]).await;
}

#[tokio::test]
async fn clusters_never_mix_and_a_node_can_be_in_both() {
    let a = Node::start("a", &[], false).await;
    a.join("home", true).await;
    let boot = [a.address().await];
    let b = Node::start("b", &boot, false).await;
    b.join("lab", true).await;
    let both = Node::start("both", &boot, false).await;
    both.join("home", true).await;
    both.join("lab", true).await;
    // Views of one cluster are for that cluster: b is found through the bootstrap node's DHT.
    both.sees("home", &["a"]).await;
    both.sees("lab", &["b"]).await;
    a.sees("home", &["both"]).await;
    b.sees("lab", &["both"]).await;
    // A member of one cluster cannot ask in the other, by any name.
    let a_id = a.handle.snapshot().peer_id.clone().unwrap();
    let failure = b.ask("lab", &a_id, "x").map(drop).unwrap_err();
    assert_eq!(failure.kind, FailureKind::PeerLost);
}

#[tokio::test]
async fn dropping_the_answer_cancels_the_work_at_the_serving_node() {
    let mut a = Node::start("a", &[], true).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let mut stream = b.ask("home", &member, "x").unwrap();
    let waiting = tokio::spawn(async move {
        stream.next().await;
    });
    let prompt = timeout(DEADLINE, a.prompts.recv()).await.unwrap().unwrap();
    assert_eq!(prompt.ask.prompt.as_str(), "x");
    assert_eq!(prompt.from_name, "b");
    waiting.abort();
    timeout(DEADLINE, prompt.reply.closed()).await.expect("the serving node learns of it");
}

#[tokio::test]
async fn an_answer_streams_and_the_lane_serves_the_next_one() {
    let mut a = Node::start("a", &[], true).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    for round in 0..5 {
        let mut stream = b.ask("home", &member, "x").unwrap();
        let answer = tokio::spawn(async move { whole(&mut stream).await });
        let prompt = timeout(DEADLINE, a.prompts.recv()).await.unwrap().unwrap();
        prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
        for word in ["one ", "two ", "three"] {
            prompt.reply.send(AnswerEvent::Text(word.to_owned())).await.unwrap();
        }
        let done = Done { finish: FinishReason::Stop, usage: Usage::default() };
        prompt.reply.send(AnswerEvent::End(Ok(done))).await.unwrap();
        assert_eq!(answer.await.unwrap().unwrap(), "one two three", "round {round}");
    }
}

#[tokio::test]
async fn a_serving_node_that_vanishes_interrupts_after_the_first_token_and_is_lost_before() {
    let mut a = Node::start("a", &[], true).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let mut begun = b.ask("home", &member, "begun").unwrap();
    let mut waiting = b.ask("home", &member, "waiting").unwrap();
    let begun = tokio::spawn(async move { whole(&mut begun).await });
    let waiting = tokio::spawn(async move { whole(&mut waiting).await });
    let mut held = Vec::new();
    for _ in 0..2 {
        let prompt = timeout(DEADLINE, a.prompts.recv()).await.unwrap().unwrap();
        if prompt.ask.prompt.as_str() == "begun" {
            prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
            prompt.reply.send(AnswerEvent::Text("one".to_owned())).await.unwrap();
        }
        held.push(prompt);
    }
    // The text is on its way before the node goes.
    tokio::time::sleep(Duration::from_millis(100)).await;
    a.handle.shutdown().await;
    assert_eq!(begun.await.unwrap().unwrap_err().kind, FailureKind::Interrupted);
    assert_eq!(waiting.await.unwrap().unwrap_err().kind, FailureKind::PeerLost);
}

#[tokio::test]
async fn a_slot_that_ends_without_an_outcome_is_a_named_failure() {
    let mut a = Node::start("a", &[], true).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let mut stream = b.ask("home", &member, "x").unwrap();
    let answer = tokio::spawn(async move { whole(&mut stream).await });
    drop(timeout(DEADLINE, a.prompts.recv()).await.unwrap().unwrap());
    assert_eq!(answer.await.unwrap().unwrap_err().kind, FailureKind::BackendFailed);
}

#[tokio::test]
async fn a_node_that_only_consumes_refuses_to_serve() {
    let a = Node::start("a", &[], false).await;
    a.join("home", false).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].clone();
    assert!(!member.serving && member.models.is_empty());
    let mut stream = b.ask("home", &member.id, "x").unwrap();
    assert_eq!(whole(&mut stream).await.unwrap_err().kind, FailureKind::NotAuthorized);
}

#[tokio::test]
async fn many_prompts_at_once_share_the_lanes() {
    let a = Node::start("a", &[], false).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let mut all = tokio::task::JoinSet::new();
    for number in 0..256 {
        let mut stream = b.ask("home", &member, &format!("prompt {number}")).unwrap();
        all.spawn(async move { (number, whole(&mut stream).await) });
    }
    while let Some(answer) = timeout(DEADLINE, all.join_next()).await.unwrap() {
        let (number, text) = answer.unwrap();
        assert_eq!(text.unwrap(), format!("prompt {number}"));
    }
}

#[tokio::test]
async fn large_prompts_and_answers_pass() {
    let a = Node::start("a", &[], false).await;
    a.join("home", true).await;
    let b = Node::start("b", &[a.address().await], false).await;
    b.join("home", false).await;
    let member = b.sees("home", &["a"]).await[0].id.clone();
    let text = "é".repeat(400_000);
    let mut stream = b.ask("home", &member, &text[..64 * 1024]).unwrap();
    assert_eq!(whole(&mut stream).await.unwrap(), text[..64 * 1024]);
    let mut stream = b.ask("home", &member, &text).unwrap();
    assert_eq!(whole(&mut stream).await.unwrap(), text);
}

#[tokio::test]
async fn sixteen_clusters_and_not_one_more() {
    let a = Node::start("a", &[], false).await;
    for number in 0..16 {
        a.join(&format!("c{number}"), false).await;
    }
    let error = a.handle.join(id("c16"), JoinOptions::default()).await.unwrap_err();
    assert!(matches!(error, opengateway::net::JoinError::TooMany(16)));
    a.join("c3", true).await;
}

#[tokio::test]
async fn a_bootstrap_address_that_cannot_be_dialled_is_named() {
    let a = Node::start("a", &[], false).await;
    let options = JoinOptions { bootstrap: vec!["192.0.2.1:4001".to_owned()], serve: false };
    let error = a.handle.join(id("home"), options).await.unwrap_err();
    assert!(error.to_string().contains("192.0.2.1:4001"), "{error}");
    assert!(a.handle.snapshot().clusters.is_empty());
}
