//! A prompt's whole life, with the members played by the test. The clock is the test's too.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Handle, Job, JobEvent, Options, Router};
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterState, ClusterView, FoundBy, Liveness, Member, ModelOffer, ModelSource, NodeId};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Text, Usage};
use crate::net::{self, AnswerEvent, Command, Scripted, Snapshot};
use crate::serve::backend::{Answering, Availability, Backend, Limits};
use crate::serve::{self, Echo};

mod reach;

struct Stage {
    handle: Handle,
    scripted: Scripted,
}

fn cluster() -> ClusterId {
    ClusterId::new("home").unwrap()
}

fn done() -> Done {
    Done { finish: FinishReason::Stop, usage: Usage::default() }
}

fn member(name: &str) -> Arc<Member> {
    Arc::new(Member {
        id: NodeId::new(format!("id-{name}")),
        name: name.to_owned(),
        version: String::new(),
        protocol: 1,
        addresses: Vec::new(),
        found_by: FoundBy::Mdns,
        direct: true,
        relay: None,
        transport: "quic",
        connected_at: SystemTime::UNIX_EPOCH,
        last_seen: SystemTime::UNIX_EPOCH,
        latency_us: None,
        serving: true,
        draining: false,
        free_slots: 4,
        queued: 0,
        models: vec![ModelOffer::named("m")],
        tiers: Vec::new(),
        liveness: Liveness::Alive,
    })
}

impl Stage {
    /// A node in "home" with these members.
    fn with(names: &[&str]) -> Self {
        Self::of(names.iter().map(|name| member(name)).collect())
    }

    fn of(members: Vec<Arc<Member>>) -> Self {
        Self::on(members, Vec::new())
    }

    /// The same where this machine has these backends.
    fn on(members: Vec<Arc<Member>>, backends: Vec<Arc<dyn Backend>>) -> Self {
        let (net, scripted) = net::Handle::scripted();
        let (_, tiers) = watch::channel(Vec::new());
        let (serve, _) = serve::spawn(serve::Config { backends, tiers });
        let view = ClusterView {
            id: cluster(),
            state: ClusterState::Connected,
            serving: false,
            joined_at: SystemTime::UNIX_EPOCH,
            announced: true,
            discovery: Vec::new(),
            members,
        };
        let clusters = [(cluster(), Arc::new(view))].into();
        let snapshot = Snapshot { peer_id: Some(NodeId::new("id-me")), clusters, ..Snapshot::default() };
        scripted.state.send_replace(Arc::new(snapshot));
        Self { handle: Handle::new(Router::new(net, serve, "me".to_owned())), scripted }
    }

    fn start(&self, timeout: Duration) -> Job {
        let ask = Ask { prompt: Text::new("x"), ..Ask::default() };
        self.handle.start(0, cluster(), ask, Options { timeout, ..Options::default() }).unwrap()
    }

    /// The next member that is asked, and with which model.
    async fn asked_for(&mut self) -> (String, Option<String>, mpsc::Sender<AnswerEvent>) {
        match self.scripted.commands.recv().await.unwrap() {
            Command::Ask { member, ask, events, .. } => (member.as_str().to_owned(), ask.model, events),
            other => panic!("{other:?}"),
        }
    }

    /// The next member that is asked, and the way to answer it.
    async fn asked(&mut self) -> (String, mpsc::Sender<AnswerEvent>) {
        match self.scripted.commands.recv().await.unwrap() {
            Command::Ask { member, events, .. } => (member.as_str().to_owned(), events),
            other => panic!("{other:?}"),
        }
    }
}

/// A member with two models, the greater one not loaded, and the echo.
fn rich(name: &str) -> Arc<Member> {
    let sized = |name: &str, size| ModelOffer { size: Some(size), ..ModelOffer::named(name) };
    let cold = ModelOffer { source: ModelSource::Engine, ..sized("big", 9_000_000_000) };
    let models = vec![cold, sized("small", 1_000_000_000), ModelOffer::named("echo")];
    Arc::new(Member { models, protocol: 2, ..Member::clone(&member(name)) })
}

const LIMITS: Limits = Limits { slots: 1, queued: 1, running_per_peer: 1, queued_per_peer: 1 };

/// A backend whose models all fail.
#[derive(Debug)]
struct Failing(FailureKind, watch::Receiver<Availability>);

impl Failing {
    fn backends(kind: FailureKind) -> Vec<Arc<dyn Backend>> {
        let models = rich("me").models[..2].to_vec();
        let (_, availability) = watch::channel(Availability { models, problem: None });
        vec![Arc::new(Self(kind, availability)), Arc::new(Echo::new(LIMITS))]
    }
}

impl Backend for Failing {
    fn name(&self) -> &str {
        "failing"
    }
    fn availability(&self) -> watch::Receiver<Availability> {
        self.1.clone()
    }
    fn limits(&self) -> Limits {
        LIMITS
    }
    fn answer(&self, model: String, _: Ask, _: mpsc::Sender<Text>) -> Answering<'_> {
        Box::pin(async move { Err(Failure::new(self.0, model)) })
    }
}

fn echoing(name: &str) -> Arc<Member> {
    Arc::new(Member { models: vec![ModelOffer::named("echo")], ..Member::clone(&member(name)) })
}

fn failed(kind: FailureKind) -> AnswerEvent {
    AnswerEvent::End(Err(Failure::new(kind, "told by the test")))
}

/// Drives a job to its end: its text and its one outcome.
async fn whole(mut job: Job) -> (String, Result<Done, Failure>) {
    let mut text = String::new();
    let mut outcome = None;
    while let Some(event) = job.next().await {
        assert!(outcome.is_none(), "something came after the end");
        match event {
            JobEvent::Queued { .. } | JobEvent::Started { .. } => {}
            JobEvent::Text(more) => text.push_str(&more),
            JobEvent::End(end) => outcome = Some(end),
        }
    }
    (text, outcome.expect("an outcome"))
}

#[tokio::test(start_paused = true)]
async fn three_members_are_asked_at_most_and_none_twice() {
    for kind in FailureKind::ALL.into_iter().filter(|kind| kind.retries_elsewhere() && *kind != FailureKind::EngineCrashed) {
        let mut stage = Stage::with(&["a", "b", "c", "d", "e"]);
        let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
        let mut asked = HashSet::new();
        for _ in 0..3 {
            let (member, events) = stage.asked().await;
            assert!(asked.insert(member.clone()), "{member} was asked twice");
            events.send(failed(kind)).await.unwrap();
        }
        assert_eq!(answer.await.unwrap().1.unwrap_err().kind, kind);
        assert!(stage.scripted.commands.try_recv().is_err(), "a fourth member was asked");
    }
}

#[tokio::test(start_paused = true)]
async fn an_engine_crash_is_tried_on_one_other_member() {
    let mut stage = Stage::with(&["a", "b", "c", "d"]);
    let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
    for _ in 0..2 {
        stage.asked().await.1.send(failed(FailureKind::EngineCrashed)).await.unwrap();
    }
    assert_eq!(answer.await.unwrap().1.unwrap_err().kind, FailureKind::EngineCrashed);
    assert!(stage.scripted.commands.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn what_another_member_cannot_mend_is_not_tried_there() {
    for kind in FailureKind::ALL.into_iter().filter(|kind| !kind.retries_elsewhere()) {
        let mut stage = Stage::with(&["a", "b"]);
        let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
        stage.asked().await.1.send(failed(kind)).await.unwrap();
        assert_eq!(answer.await.unwrap().1.unwrap_err().kind, kind);
        assert!(stage.scripted.commands.try_recv().is_err(), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn after_the_first_token_nobody_else_goes_on_and_the_loss_is_an_interruption() {
    for (kind, told) in [
        (Some(FailureKind::PeerLost), FailureKind::Interrupted),
        (Some(FailureKind::ShuttingDown), FailureKind::Interrupted),
        (Some(FailureKind::Stalled), FailureKind::Interrupted),
        (None, FailureKind::Interrupted),
    ] {
        let mut stage = Stage::with(&["a", "b"]);
        let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
        let (_, events) = stage.asked().await;
        events.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
        events.send(AnswerEvent::Text("one".to_owned())).await.unwrap();
        if let Some(kind) = kind {
            events.send(failed(kind)).await.unwrap();
        }
        drop(events);
        let (text, outcome) = answer.await.unwrap();
        assert_eq!((text.as_str(), outcome.unwrap_err().kind), ("one", told));
        assert!(stage.scripted.commands.try_recv().is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_that_answers_is_the_one_that_answers() {
    let mut stage = Stage::with(&["a", "b", "c"]);
    let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
    drop(stage.asked().await);
    stage.asked().await.1.send(failed(FailureKind::Busy)).await.unwrap();
    let (_, events) = stage.asked().await;
    events.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
    events.send(AnswerEvent::Text("whole".to_owned())).await.unwrap();
    events.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    assert_eq!(answer.await.unwrap(), ("whole".to_owned(), Ok(done())));
}

#[tokio::test(start_paused = true)]
async fn the_outcome_comes_at_the_deadline_whatever_the_members_do() {
    // Silent, and dripping.
    for pause in [3600, 1] {
        let mut stage = Stage::with(&["a"]);
        let began = Instant::now();
        let answer = tokio::spawn(whole(stage.start(Duration::from_secs(5))));
        let (_, events) = stage.asked().await;
        let feeding = tokio::spawn(async move {
            let _ = events.send(AnswerEvent::Started { model: "m".to_owned() }).await;
            loop {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                if events.send(AnswerEvent::Text("drip".to_owned())).await.is_err() {
                    return;
                }
            }
        });
        assert_eq!(answer.await.unwrap().1.unwrap_err().kind, FailureKind::DeadlineExceeded);
        assert!(began.elapsed() <= Duration::from_secs(6), "{:?}", began.elapsed());
        feeding.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn an_endless_answer_ends_at_the_deadline_also_when_there_is_always_more_to_read() {
    let mut stage = Stage::with(&["a"]);
    let began = Instant::now();
    let mut job = stage.start(Duration::from_secs(5));
    let reading = tokio::spawn(async move {
        loop {
            // A slow reader: whenever it asks, the next piece is there.
            tokio::time::sleep(Duration::from_millis(100)).await;
            if let JobEvent::End(outcome) = job.next().await.unwrap() {
                return outcome;
            }
        }
    });
    let (_, events) = stage.asked().await;
    let _ = events.send(AnswerEvent::Started { model: "m".to_owned() }).await;
    while began.elapsed() < Duration::from_secs(10) && events.send(AnswerEvent::Text(String::new())).await.is_ok() {}
    drop(events);
    assert_eq!(reading.await.unwrap().unwrap_err().kind, FailureKind::DeadlineExceeded);
    assert!(began.elapsed() <= Duration::from_secs(6), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn retries_share_one_deadline() {
    let mut stage = Stage::with(&["a", "b", "c"]);
    let began = Instant::now();
    let answer = tokio::spawn(whole(stage.start(Duration::from_secs(5))));
    for left in [5, 3] {
        match stage.scripted.commands.recv().await.unwrap() {
            Command::Ask { timeout, events, .. } => {
                assert!((timeout.as_secs_f64() - f64::from(left)).abs() < 0.5, "{timeout:?}");
                tokio::time::sleep(Duration::from_secs(2)).await;
                let _ = events.send(failed(FailureKind::PeerLost)).await;
            }
            other => panic!("{other:?}"),
        }
    }
    let _held = stage.asked().await;
    assert_eq!(answer.await.unwrap().1.unwrap_err().kind, FailureKind::DeadlineExceeded);
    assert!((5..=6).contains(&began.elapsed().as_secs()));
}

#[tokio::test(start_paused = true)]
async fn nobody_to_ask_is_told_without_waiting() {
    let stage = Stage::with(&[]);
    let began = Instant::now();
    assert_eq!(whole(stage.start(Duration::from_secs(60))).await.1.unwrap_err().kind, FailureKind::NoEligiblePeer);
    let elsewhere = stage.handle.start(0, ClusterId::new("lab").unwrap(), Ask::default(), Options::default()).unwrap();
    assert_eq!(whole(elsewhere).await.1.unwrap_err().kind, FailureKind::NoEligiblePeer);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn busy_everywhere_is_busy_with_the_time_to_come_back() {
    let mut stage = Stage::with(&["a", "b"]);
    let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
    let busy = Failure::busy("full", Duration::from_secs(7));
    stage.asked().await.1.send(AnswerEvent::End(Err(busy.clone()))).await.unwrap();
    stage.asked().await.1.send(failed(FailureKind::PeerLost)).await.unwrap();
    assert_eq!(answer.await.unwrap().1.unwrap_err(), busy);
}

#[tokio::test(start_paused = true)]
async fn dropping_a_job_closes_the_way_to_the_member_and_counts_it_out() {
    let mut stage = Stage::with(&["a"]);
    let mut job = stage.start(Duration::from_secs(60));
    assert_eq!(stage.handle.active(), 1);
    tokio::select! {
        event = job.next() => panic!("{event:?}"),
        (_, events) = stage.asked() => {
            assert!(!events.is_closed());
            drop(job);
            events.closed().await;
        }
    }
    assert_eq!(stage.handle.active(), 0);
}

#[tokio::test(start_paused = true)]
async fn when_the_best_model_fails_the_next_real_one_answers_and_never_the_echo() {
    let of_the_model = [FailureKind::Busy, FailureKind::ModelUnavailable, FailureKind::ModelLoading, FailureKind::BackendFailed];
    for kind in of_the_model {
        let mut stage = Stage::of(vec![rich("a"), echoing("e")]);
        let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
        for wanted in ["big", "small"] {
            let (member, model, events) = stage.asked_for().await;
            assert_eq!((member.as_str(), model.as_deref()), ("id-a", Some(wanted)), "{kind:?}");
            events.send(failed(kind)).await.unwrap();
        }
        assert_eq!(answer.await.unwrap().1.unwrap_err().kind, kind);
        assert!(stage.scripted.commands.try_recv().is_err(), "{kind:?}: somebody else was asked");
    }
}

#[tokio::test(start_paused = true)]
async fn when_the_node_fails_none_of_its_models_is_asked_for() {
    let mut stage = Stage::of(vec![rich("a"), echoing("e")]);
    let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
    stage.asked_for().await.2.send(failed(FailureKind::PeerLost)).await.unwrap();
    assert_eq!(answer.await.unwrap().1.unwrap_err().kind, FailureKind::PeerLost);
    assert!(stage.scripted.commands.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn the_echo_answers_where_there_is_nothing_else() {
    let mut stage = Stage::of(vec![echoing("e")]);
    let answer = tokio::spawn(whole(stage.start(Duration::from_secs(60))));
    let (member, model, events) = stage.asked_for().await;
    assert_eq!((member.as_str(), model), ("id-e", None));
    events.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    assert!(answer.await.unwrap().1.is_ok());
}

#[tokio::test(start_paused = true)]
async fn where_the_models_of_this_machine_fail_no_echo_answers_neither_its_own_nor_a_members() {
    for kind in [FailureKind::Busy, FailureKind::ModelUnavailable, FailureKind::BackendFailed, FailureKind::PeerLost] {
        let stage = || Stage::on(vec![echoing("e")], Failing::backends(kind));
        // In a cluster, this machine alone, and this machine first.
        let ask = || Ask { prompt: Text::new("x"), ..Ask::default() };
        let first = Options { local_first: true, ..Options::default() };
        for way in 0..3 {
            let mut stage = stage();
            let job = match way {
                0 => stage.start(Duration::from_secs(60)),
                1 => stage.handle.start_here(0, ask(), Options::default()).unwrap(),
                _ => stage.handle.start(0, cluster(), ask(), first.clone()).unwrap(),
            };
            let failure = whole(job).await.1.unwrap_err();
            // The last that was asked for: the smaller one, unless the whole node was at fault.
            let last = if kind == FailureKind::PeerLost { "big" } else { "small" };
            assert_eq!((failure.kind, failure.detail.as_str()), (kind, last), "{way}");
            assert!(stage.scripted.commands.try_recv().is_err(), "{kind:?}: the member's echo was asked");
        }
    }
}
