//! The worker with a backend that the test plays, on the test's clock.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::backend::{Answering, Availability, Backend, Limits};
use super::echo::Echo;
use super::{Config, Handle, Requester, Served, spawn};
use crate::domain::node::{ModelOffer, ModelSource, ModelState, NodeId};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, MAX_ANSWER_BYTES, Text, Usage};
use crate::net::AnswerEvent;

/// What the backend does with a prompt, by its text.
#[derive(Debug)]
struct Played {
    limits: Limits,
    availability: watch::Receiver<Availability>,
    /// Prompts in the order in which they began.
    begun: Mutex<Vec<String>>,
}

fn done() -> Done {
    Done { finish: FinishReason::Stop, usage: Usage::default() }
}

impl Backend for Played {
    fn name(&self) -> &str {
        "played"
    }
    fn availability(&self) -> watch::Receiver<Availability> {
        self.availability.clone()
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn answer(&self, _: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        let prompt = ask.prompt.as_str().to_owned();
        self.begun.lock().unwrap().push(prompt.clone());
        Box::pin(async move {
            let gone = || Failure::new(FailureKind::Cancelled, "gone");
            match prompt.split_once(' ') {
                Some(("bytes", count)) => {
                    let mut left: usize = count.parse().unwrap();
                    while left > 0 {
                        let piece = left.min(64 * 1024);
                        out.send(Text::new("b".repeat(piece))).await.map_err(|_| gone())?;
                        left -= piece;
                    }
                }
                Some(("endless", _)) => loop {
                    out.send(Text::new("e".repeat(1024))).await.map_err(|_| gone())?;
                },
                Some(("sleep", seconds)) => sleep(Duration::from_secs(seconds.parse().unwrap())).await,
                _ => std::future::pending().await,
            }
            Ok(done())
        })
    }
}

fn played(limits: Limits, models: Vec<ModelOffer>) -> Arc<Played> {
    let (_, availability) = watch::channel(Availability { models, problem: None });
    Arc::new(Played { limits, availability, begun: Mutex::default() })
}

fn worker_of(backends: Vec<Arc<dyn Backend>>) -> Handle {
    let (_, tiers) = watch::channel(Vec::new());
    spawn(Config { backends, tiers }).0
}

fn worker(limits: Limits) -> (Handle, Arc<Played>) {
    let backend = played(limits, vec![ModelOffer::named("m")]);
    (worker_of(vec![Arc::clone(&backend) as Arc<dyn Backend>]), backend)
}

const LIMITS: Limits = Limits { slots: 2, queued: 32, running_per_peer: 2, queued_per_peer: 8 };

fn submit(handle: &Handle, who: &str, prompt: &str, left: Duration) -> mpsc::Receiver<AnswerEvent> {
    submit_for(handle, Requester::Peer(NodeId::new(who)), None, prompt, left)
}

fn submit_for(
    handle: &Handle,
    requester: Requester,
    model: Option<&str>,
    prompt: &str,
    left: Duration,
) -> mpsc::Receiver<AnswerEvent> {
    let (events, receiver) = mpsc::channel(64);
    let ask = Ask { model: model.map(str::to_owned), prompt: Text::new(prompt), ..Ask::default() };
    handle.submit(Served { requester, ask, timeout: left, events }).unwrap();
    receiver
}

const LONG: Duration = Duration::from_secs(3600);

async fn outcome(events: &mut mpsc::Receiver<AnswerEvent>) -> Result<usize, FailureKind> {
    let mut bytes = 0;
    while let Some(event) = events.recv().await {
        match event {
            AnswerEvent::Queued { .. } | AnswerEvent::Started { .. } => {}
            AnswerEvent::Text(text) => bytes += text.len(),
            AnswerEvent::End(end) => {
                assert!(events.recv().await.is_none(), "something came after the end");
                return end.map(|_| bytes).map_err(|failure| failure.kind);
            }
        }
    }
    panic!("no outcome");
}

async fn idle(handle: &Handle, within: Duration) {
    let freed = async {
        while handle.running() > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(within, freed).await.expect("the slots are free");
}

#[tokio::test(start_paused = true)]
async fn an_answer_passes_up_to_its_limit_and_not_one_byte_past_it() {
    let (handle, _) = worker(LIMITS);
    let most = submit(&handle, "p", &format!("bytes {MAX_ANSWER_BYTES}"), LONG);
    assert_eq!(outcome(&mut { most }).await, Ok(MAX_ANSWER_BYTES));
    let more = submit(&handle, "p", &format!("bytes {}", MAX_ANSWER_BYTES + 1), LONG);
    assert_eq!(outcome(&mut { more }).await, Err(FailureKind::AnswerTooLarge));
    idle(&handle, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn who_does_not_read_for_thirty_seconds_loses_the_slot() {
    let (handle, _) = worker(LIMITS);
    let began = Instant::now();
    let _unread = submit(&handle, "p", "endless x", LONG);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(handle.running(), 1);
    idle(&handle, Duration::from_secs(31)).await;
    assert!((30..=32).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn who_reads_slowly_is_told_nothing_but_the_truth() {
    let (handle, _) = worker(LIMITS);
    let mut slow = submit(&handle, "p", "bytes 655360", LONG);
    // One piece every 29 s.
    let mut bytes = 0;
    loop {
        sleep(Duration::from_secs(29)).await;
        match slow.recv().await.unwrap() {
            AnswerEvent::Text(text) => bytes += text.len(),
            AnswerEvent::Queued { .. } | AnswerEvent::Started { .. } => {}
            AnswerEvent::End(end) => {
                assert_eq!((bytes, end), (655_360, Ok(done())));
                return;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn cancelling_frees_the_slot_and_the_place_in_the_queue() {
    let (handle, backend) = worker(LIMITS);
    let running: Vec<_> = (0..2).map(|at| submit(&handle, "a", &format!("hang{at}"), LONG)).collect();
    let waiting = submit(&handle, "b", "cancelled", LONG);
    let last = submit(&handle, "b", "last", LONG);
    sleep(Duration::from_millis(10)).await;
    drop(waiting);
    drop(running);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(handle.running(), 1);
    assert_eq!(*backend.begun.lock().unwrap(), ["hang0", "hang1", "last"]);
    drop(last);
    idle(&handle, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_a_prompt_that_runs_and_one_that_waits() {
    let (handle, _) = worker(Limits { slots: 1, ..LIMITS });
    let began = Instant::now();
    let mut running = submit(&handle, "a", "hang", Duration::from_secs(9));
    let mut waiting = submit(&handle, "b", "hang", Duration::from_secs(3));
    assert_eq!(outcome(&mut waiting).await, Err(FailureKind::DeadlineExceeded));
    assert_eq!(began.elapsed().as_secs(), 3);
    assert_eq!(outcome(&mut running).await, Err(FailureKind::DeadlineExceeded));
    assert_eq!(began.elapsed().as_secs(), 9);
    idle(&handle, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_greedy_peer_is_told_busy_at_once_and_a_polite_one_gets_its_share() {
    let (handle, backend) = worker(LIMITS);
    let began = Instant::now();
    let mut greedy: Vec<_> = (0..100).map(|_| submit(&handle, "greedy", "sleep 10", LONG)).collect();
    sleep(Duration::from_millis(1)).await;
    // Two run and eight wait; ninety know it already.
    let mut refused = 0;
    for events in &mut greedy {
        if let Ok(AnswerEvent::End(Err(failure))) = events.try_recv() {
            assert_eq!(failure.kind, FailureKind::Busy);
            assert!(failure.retry_after.is_some());
            refused += 1;
        }
    }
    assert_eq!(refused, 90);
    assert!(began.elapsed() < Duration::from_millis(100));
    // The polite one asks once at a time; it never waits for more than one round of the slots.
    for _ in 0..5 {
        let asked = Instant::now();
        let mut polite = submit(&handle, "polite", "sleep 1", LONG);
        assert_eq!(outcome(&mut polite).await, Ok(0));
        assert!(asked.elapsed() <= Duration::from_secs(12), "{:?}", asked.elapsed());
        greedy.push(submit(&handle, "greedy", "sleep 10", LONG));
    }
    let begun = backend.begun.lock().unwrap().iter().filter(|prompt| *prompt == "sleep 1").count();
    assert_eq!(begun, 5);
    drop(greedy);
    idle(&handle, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn draining_lets_the_running_end_and_refuses_the_waiting() {
    let (handle, _) = worker(Limits { slots: 1, ..LIMITS });
    let mut running = submit(&handle, "a", "sleep 5", LONG);
    let mut waiting = submit(&handle, "b", "sleep 5", LONG);
    sleep(Duration::from_millis(10)).await;
    let began = Instant::now();
    handle.drain(Duration::from_secs(30)).await;
    assert!((4..=5).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert_eq!(outcome(&mut running).await, Ok(0));
    assert_eq!(outcome(&mut waiting).await, Err(FailureKind::ShuttingDown));
}

/// Seconds that each prompt of a polite asker waited beside one that keeps as many waiting as it may.
async fn beside_a_greedy_one(greedy: &[Requester], polite: &Requester, rounds: usize) -> (Duration, usize) {
    let (handle, backend) = worker(Limits { slots: 1, ..LIMITS });
    // A hundred at once from each: those that find no place come again whenever one of theirs is over.
    let flood: Vec<_> = greedy
        .iter()
        .flat_map(|requester| std::iter::repeat_n(requester.clone(), 100))
        .map(|requester| {
            let handle = handle.clone();
            tokio::spawn(async move {
                loop {
                    let mut events = submit_for(&handle, requester.clone(), None, "sleep 10", LONG);
                    if outcome(&mut events).await.is_err() {
                        sleep(Duration::from_secs(1)).await;
                    }
                }
            })
        })
        .collect();
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    let before = backend.begun.lock().unwrap().len();
    for _ in 0..rounds {
        // It asks for the next one as soon as it has an answer.
        let mut events = submit_for(&handle, polite.clone(), None, "sleep 10", LONG);
        assert_eq!(outcome(&mut events).await, Ok(0));
    }
    let all = backend.begun.lock().unwrap().len() - before;
    flood.iter().for_each(tokio::task::JoinHandle::abort);
    (began.elapsed(), all)
}

#[tokio::test(start_paused = true)]
async fn one_that_asks_a_hundred_times_at_once_leaves_a_polite_one_its_share() {
    let peer = |name: &str| Requester::Peer(NodeId::new(name));
    for (greedy, polite) in [
        (vec![peer("greedy")], peer("polite")),
        (vec![Requester::Local(1)], Requester::Local(2)),
        (vec![peer("greedy"), peer("other")], peer("polite")),
    ] {
        let (took, all) = beside_a_greedy_one(&greedy, &polite, 50).await;
        let share = 50.0 * (greedy.len() + 1) as f64 / all as f64;
        assert!(share >= 0.9, "{greedy:?}: {share} of its fair share");
        // With nobody else each would take 10 s.
        assert!(took <= Duration::from_secs(500) * (u32::try_from(greedy.len()).unwrap() + 1) * 11 / 10, "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_hears_how_many_are_before_it_and_when_that_changes() {
    let (handle, _) = worker(Limits { slots: 1, ..LIMITS });
    let _running = submit(&handle, "a", "sleep 10", LONG);
    let first = submit(&handle, "a", "sleep 10", LONG);
    let second = submit(&handle, "b", "sleep 10", LONG);
    let places = |mut events: mpsc::Receiver<AnswerEvent>| async move {
        let mut places = Vec::new();
        while let Some(event) = events.recv().await {
            match event {
                AnswerEvent::Queued { position } => places.push(position),
                AnswerEvent::Started { .. } | AnswerEvent::Text(_) => places.push(99),
                AnswerEvent::End(end) => assert!(end.is_ok()),
            }
        }
        places
    };
    let (first, second) = tokio::join!(places(first), places(second));
    // "a" was given a prompt already, so the one of "b" goes before its second.
    assert_eq!((first, second), (vec![0, 1, 0, 99], vec![0, 99]));
}

fn offer(name: &str, state: ModelState, size: u64) -> ModelOffer {
    ModelOffer { state, size: Some(size), source: ModelSource::Engine, ..ModelOffer::named(name) }
}

const GIB: u64 = 1 << 30;

#[tokio::test(start_paused = true)]
async fn no_model_means_the_greatest_that_works_and_a_failed_one_is_never_asked() {
    let small = played(LIMITS, vec![offer("small", ModelState::Ready, GIB), offer("bad", ModelState::Failed, 9 * GIB)]);
    let great = played(LIMITS, vec![offer("great", ModelState::Available, 4 * GIB)]);
    let handle = worker_of(vec![Arc::clone(&small) as Arc<dyn Backend>, Arc::new(Echo::default()), Arc::clone(&great) as _]);
    let local = Requester::Local(1);
    let mut events = submit_for(&handle, local.clone(), None, "sleep 1", LONG);
    assert_eq!(outcome(&mut events).await, Ok(0));
    assert_eq!((small.begun.lock().unwrap().len(), great.begun.lock().unwrap().len()), (0, 1));
    let mut events = submit_for(&handle, local, Some("bad"), "sleep 1", LONG);
    match events.recv().await {
        Some(AnswerEvent::End(Err(failure))) => {
            assert_eq!(failure.kind, FailureKind::ModelUnavailable);
            assert!(failure.detail.contains("could not load"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
    let names: Vec<String> = handle.offer().borrow().models.iter().map(|model| model.name.clone()).collect();
    assert_eq!(names, ["great", "small", "echo", "bad"], "best first, and what failed last");
}

#[tokio::test(start_paused = true)]
async fn of_two_backends_with_a_model_the_one_where_it_is_loaded_answers_then_the_one_with_a_free_slot() {
    let one = Limits { slots: 1, ..LIMITS };
    let cold = played(one, vec![offer("m", ModelState::Available, GIB)]);
    let warm = played(one, vec![offer("m", ModelState::Ready, GIB)]);
    let twin = played(one, vec![offer("m", ModelState::Ready, GIB)]);
    let handle = worker_of(vec![Arc::clone(&cold) as Arc<dyn Backend>, Arc::clone(&warm) as _, Arc::clone(&twin) as _]);
    let held: Vec<_> = (0..2).map(|_| submit(&handle, "p", "hang", LONG)).collect();
    sleep(Duration::from_millis(10)).await;
    let begun = |backend: &Played| backend.begun.lock().unwrap().len();
    assert_eq!((begun(&cold), begun(&warm), begun(&twin)), (0, 1, 1));
    let models = handle.offer().borrow().models.clone();
    assert_eq!((models.len(), models[0].slots, models[0].state), (1, 3, ModelState::Ready));
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn at_most_sixty_four_models_are_offered() {
    let many = (0..80).map(|at| offer(&format!("m{at}"), ModelState::Ready, GIB * (at + 1))).collect();
    let handle = worker_of(vec![played(LIMITS, many) as Arc<dyn Backend>]);
    let models = handle.offer().borrow().models.clone();
    assert_eq!((models.len(), models[0].name.as_str(), models[0].slots), (64, "m79", 2));
}

#[tokio::test(start_paused = true)]
async fn a_prompt_that_came_before_the_news_of_its_backend_keeps_its_slot() {
    let handle = worker_of(Vec::new());
    let backend = played(Limits { slots: 1, ..LIMITS }, vec![ModelOffer::named("m")]);
    let id = handle.shared.enter(Arc::clone(&backend) as Arc<dyn Backend>);
    let mut first = submit(&handle, "a", "sleep 5", LONG);
    handle.commands.send(super::handle::Command::Added(id, Arc::clone(&backend) as Arc<dyn Backend>)).await.unwrap();
    let mut second = submit(&handle, "b", "sleep 5", LONG);
    sleep(Duration::from_secs(1)).await;
    assert_eq!((handle.running(), backend.begun.lock().unwrap().len()), (1, 1));
    assert_eq!((outcome(&mut first).await, outcome(&mut second).await), (Ok(0), Ok(0)));
    idle(&handle, Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn of_a_backend_that_is_taken_away_the_running_end_and_the_waiting_hear_why() {
    let handle = worker_of(Vec::new());
    let id = handle.add(played(Limits { slots: 1, ..LIMITS }, vec![ModelOffer::named("m")])).await;
    let mut running = submit(&handle, "a", "sleep 5", LONG);
    let mut waiting = submit(&handle, "b", "sleep 5", LONG);
    sleep(Duration::from_secs(1)).await;
    handle.remove(id).await;
    assert_eq!(outcome(&mut waiting).await, Err(FailureKind::ModelUnavailable));
    assert_eq!(handle.running(), 1, "it still runs");
    let begun = Instant::now();
    handle.drain(Duration::from_secs(60)).await;
    assert!(begun.elapsed() >= Duration::from_secs(3), "the end of what runs is waited for: {:?}", begun.elapsed());
    assert_eq!(outcome(&mut running).await, Ok(0));
    assert_eq!(handle.running(), 0);
}
