//! A prompt's whole life, with the members played by the test. The clock is the test's too.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Handle, Job, JobEvent, Options, Router};
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterState, ClusterView, FoundBy, Liveness, Member, ModelOffer, NodeId};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, Text, Usage};
use crate::net::{self, AnswerEvent, Command, Scripted, Snapshot};
use crate::serve;

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
        let (net, scripted) = net::Handle::scripted();
        let (_, tiers) = watch::channel(Vec::new());
        let (serve, _) = serve::spawn(serve::Config { backends: Vec::new(), tiers });
        let view = ClusterView {
            id: cluster(),
            state: ClusterState::Connected,
            serving: false,
            joined_at: SystemTime::UNIX_EPOCH,
            announced: true,
            discovery: Vec::new(),
            members: names.iter().map(|name| member(name)).collect(),
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

    /// The next member that is asked, and the way to answer it.
    async fn asked(&mut self) -> (String, mpsc::Sender<AnswerEvent>) {
        match self.scripted.commands.recv().await.unwrap() {
            Command::Ask { member, events, .. } => (member.as_str().to_owned(), events),
            other => panic!("{other:?}"),
        }
    }
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
