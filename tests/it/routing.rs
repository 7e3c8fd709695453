//! Whole nodes in one process, with backends that the test plays: who answers, who is passed over, who waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use opengateway::dispatch::{self, Job, JobEvent, Options, Router, ServedBy};
use opengateway::domain::cluster::ClusterId;
use opengateway::domain::node::{Liveness, Member, ModelOffer, ModelSource, ModelState, NodeId};
use opengateway::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Role, Text, Turn, Usage};
use opengateway::net::identity::Identity;
use opengateway::net::{self, Config, ConnectionCaps, JoinOptions, Timings};
use opengateway::serve;
use opengateway::serve::backend::{Answering, Availability, Backend, Limits};
use opengateway::wire::version::Versions;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

const DEADLINE: Duration = Duration::from_secs(60);
const TOKENS: u32 = 20;

/// Answers with `TOKENS` tokens at its own speed.
#[derive(Debug)]
struct Paced {
    limits: Limits,
    per_token: Duration,
    availability: watch::Receiver<Availability>,
    answered: AtomicU32,
    context: u32,
}

impl Backend for Paced {
    fn name(&self) -> &str {
        "paced"
    }
    fn availability(&self) -> watch::Receiver<Availability> {
        self.availability.clone()
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn answer(&self, _: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        Box::pin(async move {
            let needed = u32::try_from(ask.prompt.as_str().len()).unwrap();
            if self.context > 0 && needed > self.context {
                return Err(Failure::new(
                    FailureKind::ContextOverflow,
                    format!("{needed} tokens, the window is {}", self.context),
                ));
            }
            for turn in &ask.history {
                let _ = out.send(Text::new(format!("[{}]", turn.text.as_str()))).await;
            }
            for _ in 0..TOKENS {
                sleep(self.per_token).await;
                out.send(Text::new("t ")).await.map_err(|_| Failure::new(FailureKind::Cancelled, "gone"))?;
            }
            self.answered.fetch_add(1, Ordering::Relaxed);
            Ok(Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 1, completion_tokens: TOKENS } })
        })
    }
}

/// How a node is made.
struct Plan {
    name: &'static str,
    model: Option<ModelOffer>,
    per_token: Duration,
    slots: usize,
    versions: Versions,
}

fn plan(name: &'static str) -> Plan {
    let model =
        ModelOffer { state: ModelState::Ready, source: ModelSource::Engine, size: Some(1 << 30), ..ModelOffer::named("m") };
    Plan { name, model: Some(model), per_token: Duration::from_millis(2), slots: 1, versions: Versions::OURS }
}

struct Node {
    net: net::Handle,
    dispatch: dispatch::Handle,
    backend: Arc<Paced>,
    _tiers: watch::Sender<Vec<String>>,
}

fn home() -> ClusterId {
    ClusterId::new("home").unwrap()
}

impl Plan {
    /// Joins "home", serving when it has a model.
    async fn start(self, bootstrap: &[String]) -> Node {
        let limits = Limits { slots: self.slots, queued: 64, running_per_peer: self.slots, queued_per_peer: 64 };
        let serves = self.model.is_some();
        let context = self.model.as_ref().map_or(0, |model| model.context_tokens);
        let (_, availability) = watch::channel(Availability { models: self.model.into_iter().collect(), problem: None });
        let backend = Arc::new(Paced { limits, per_token: self.per_token, availability, answered: AtomicU32::new(0), context });
        let (tiers_of, tiers) = watch::channel(Vec::new());
        let (serve, _) = serve::spawn(serve::Config { backends: vec![Arc::clone(&backend) as Arc<dyn Backend>], tiers });
        let config = Config {
            node_name: self.name.to_owned(),
            version: "test".to_owned(),
            listen: vec!["/ip4/127.0.0.1/udp/0/quic-v1".to_owned()],
            any_port: false,
            bootstrap: bootstrap.to_vec(),
            mdns: false,
            timings: Timings { views: Duration::from_millis(300), patience: Duration::from_millis(100), ..Timings::default() },
            caps: ConnectionCaps { memory_bytes: usize::MAX, ..ConnectionCaps::default() },
            versions: self.versions,
            ..Config::default()
        };
        let (net, _) = net::start(config, &Identity::generate(), Arc::new(serve.clone())).await.unwrap();
        net.join(home(), JoinOptions { bootstrap: Vec::new(), serve: serves }).await.unwrap();
        let dispatch = dispatch::Handle::new(Router::new(net.clone(), serve, self.name.to_owned()));
        Node { net, dispatch, backend, _tiers: tiers_of }
    }
}

impl Node {
    async fn address(&self) -> String {
        let mut state = self.net.watch();
        let snapshot = timeout(DEADLINE, state.wait_for(|now| !now.listen_addresses.is_empty())).await.unwrap().unwrap();
        format!("{}/p2p/{}", snapshot.listen_addresses[0], snapshot.peer_id.as_ref().unwrap())
    }

    fn id(&self) -> NodeId {
        self.net.snapshot().peer_id.clone().unwrap()
    }

    /// Waits until it sees so many members, all of which satisfy `wanted`.
    async fn sees(&self, count: usize, wanted: impl Fn(&Member) -> bool) {
        let all = |now: &Arc<net::Snapshot>| {
            now.clusters.get(&home()).is_some_and(|view| {
                view.members.len() == count && view.members.iter().all(|one| one.liveness != Liveness::Known && wanted(one))
            })
        };
        timeout(DEADLINE, self.net.watch().wait_for(all)).await.expect("the members in time").unwrap();
    }

    fn ask(&self, ask: Ask) -> Job {
        self.dispatch.start(1000, home(), ask, Options { timeout: DEADLINE, ..Options::default() }).unwrap()
    }

    /// Asks and reads to the end: who answered, the text, and the places in the queue before.
    async fn whole(&self, ask: Ask) -> Result<(ServedBy, String, Vec<u32>), Failure> {
        let mut job = self.ask(ask);
        let (mut by, mut text, mut places) = (None, String::new(), Vec::new());
        loop {
            match job.next().await.expect("an end") {
                JobEvent::Queued { position } => places.push(position),
                JobEvent::Started { by: told, .. } => by = Some(told),
                JobEvent::Text(more) => text.push_str(&more),
                JobEvent::End(outcome) => return outcome.map(|_| (by.expect("somebody"), text, places)),
            }
        }
    }
}

fn named() -> Ask {
    Ask { model: Some("m".to_owned()), prompt: Text::new("x"), ..Ask::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_in_the_queue_is_told_across_the_network() {
    let server = Plan { per_token: Duration::from_millis(40), ..plan("server") }.start(&[]).await;
    let asker = Plan { model: None, ..plan("asker") }.start(&[server.address().await]).await;
    asker.sees(1, |member| member.serving && !member.models.is_empty()).await;
    let (first, second, third) = tokio::join!(asker.whole(named()), asker.whole(named()), asker.whole(named()));
    let mut waits: Vec<Vec<u32>> = [first, second, third].into_iter().map(|one| one.unwrap().2).collect();
    waits.sort();
    assert_eq!(waits[0], [0_u32; 0], "the first one did not wait: {waits:?}");
    assert_eq!((waits[1].as_slice(), waits[2].as_slice()), (&[0][..], &[1, 0][..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_failed_at_one_node_is_asked_for_at_the_other() {
    let failed = ModelOffer { state: ModelState::Failed, ..plan("").model.unwrap() };
    let broken = Plan { model: Some(failed), ..plan("broken") }.start(&[]).await;
    let bootstrap = [broken.address().await];
    let asker = Plan { model: None, ..plan("asker") }.start(&bootstrap).await;
    asker.sees(1, |member| member.models.first().is_some_and(|model| model.state == ModelState::Failed)).await;
    let failure = asker.whole(named()).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ModelUnavailable);
    assert!(failure.detail.contains("broken has model \"m\", but could not load it"), "{failure}");
    let _works = plan("works").start(&bootstrap).await;
    asker.sees(2, |member| member.serving && !member.models.is_empty()).await;
    for _ in 0..10 {
        assert_eq!(asker.whole(named()).await.unwrap().0.name, "works");
    }
    assert_eq!(broken.backend.answered.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_goes_to_nodes_that_understand_it_and_a_single_question_to_all() {
    let old = Plan { versions: Versions::only(1), ..plan("old") }.start(&[]).await;
    let bootstrap = [old.address().await];
    let asker = Plan { model: None, ..plan("asker") }.start(&bootstrap).await;
    asker.sees(1, |member| member.serving && !member.models.is_empty()).await;
    let turn = Turn { role: Role::User, text: Text::new("before") };
    let conversation = || Ask { history: vec![turn.clone()], ..named() };
    let failure = asker.whole(conversation()).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::NoEligiblePeer);
    assert!(failure.detail.contains("old") && failure.detail.contains("upgrade"), "{failure}");
    assert_eq!(asker.whole(named()).await.unwrap().0.name, "old");
    let _new = plan("new").start(&bootstrap).await;
    asker.sees(2, |member| member.serving && !member.models.is_empty()).await;
    for _ in 0..5 {
        let (by, text, _) = asker.whole(conversation()).await.unwrap();
        assert_eq!(by.name, "new");
        assert!(text.starts_with("[before]"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_is_too_long_for_one_node_goes_to_the_same_model_with_a_larger_window() {
    let sized =
        |name, context_tokens| Plan { model: Some(ModelOffer { context_tokens, ..plan("").model.unwrap() }), ..plan(name) };
    let small = sized("small", 10).start(&[]).await;
    let bootstrap = [small.address().await];
    let asker = Plan { model: None, ..plan("asker") }.start(&bootstrap).await;
    asker.sees(1, |member| member.serving && !member.models.is_empty()).await;
    let long = || Ask { prompt: Text::new("x".repeat(50)), ..named() };
    assert_eq!(asker.whole(long()).await.unwrap_err().kind, FailureKind::ContextOverflow);
    let _large = sized("large", 100).start(&bootstrap).await;
    asker.sees(2, |member| member.serving && !member.models.is_empty()).await;
    for _ in 0..5 {
        assert_eq!(asker.whole(long()).await.unwrap().0.name, "large");
    }
    let endless = Ask { prompt: Text::new("x".repeat(500)), ..named() };
    assert_eq!(asker.whole(endless).await.unwrap_err().kind, FailureKind::ContextOverflow);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_uneven_nodes_are_used_as_they_can_and_their_speeds_are_known() {
    // 400, 200, 100 and 50 tokens a second.
    let paces = [("n400", 2.5), ("n200", 5.0), ("n100", 10.0), ("n50", 20.0)];
    let mut nodes: Vec<Node> = Vec::new();
    for (name, millis) in paces {
        let bootstrap = match nodes.first() {
            Some(first) => vec![first.address().await],
            None => Vec::new(),
        };
        nodes.push(Plan { per_token: Duration::from_secs_f64(millis / 1e3), ..plan(name) }.start(&bootstrap).await);
    }
    let asker = Plan { model: None, ..plan("asker") }.start(&[nodes[0].address().await]).await;
    asker.sees(4, |member| member.serving && member.models.first().is_some_and(|model| model.slots == 1)).await;
    // Every node is seen once; then the measurement.
    for round in [8_u32, 96] {
        let began = Instant::now();
        let left = Arc::new(AtomicU32::new(round));
        let askers = (0..8).map(|_| async {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                asker.whole(named()).await.unwrap();
            }
        });
        futures::future::join_all(askers).await;
        let rate = f64::from(round * TOKENS) / began.elapsed().as_secs_f64();
        println!("{round} prompts: {rate:.0} tokens/s of 750");
        // Half: two busy cores and timers of a millisecond lie between this and the simulation's nine tenths.
        assert!(round == 8 || rate > 375.0, "{rate} tokens/s");
    }
    let answered: Vec<u32> = nodes.iter().map(|node| node.backend.answered.load(Ordering::Relaxed)).collect();
    assert!(answered.is_sorted_by(|a, b| a >= b) && answered[0] > 2 * answered[2], "{answered:?}");
    let speeds: Vec<f64> = nodes.iter().filter_map(|node| asker.dispatch.speed(&node.id(), "m")).collect();
    assert!(speeds.len() == 4 && speeds.is_sorted_by(|a, b| a > b), "{speeds:?}");
    assert_eq!(asker.dispatch.speed(&asker.id(), "m"), None);
}
