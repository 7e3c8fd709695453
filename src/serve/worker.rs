//! The task that owns the queues: admits, starts, ends; publishes what this node offers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{BoxStream, FuturesUnordered, SelectAll};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::backend::Backend;
use super::handle::{BackendId, Command, Handle, Requester, Served, Shared, Source, stopping};
use super::queue::{Admission, Cost, Queue, Ticket};
use crate::domain::node::{ModelOffer, ModelState, Offer};
use crate::domain::prompt::{Ask, Failure, FailureKind, MAX_ANSWER_BYTES, MAX_TIMEOUT};
use crate::net::AnswerEvent;
use crate::wire::infer;
use crate::wire::limits::{MAX_MODELS, SLOW_CONSUMER};

/// Prompts between two turns of the worker; more is `Busy`.
const COMMANDS: usize = 1024;
/// Free slots and queue lengths are told at most this often; whether there is a slot at all is told at once.
const TELL: Duration = Duration::from_millis(250);
/// Pieces that a backend may be ahead of its reader.
const PIECES: usize = 64;

/// Tokens that an answer is reckoned to take when it has no bound of its own; the queue corrects it at the end.
const USUAL_TOKENS: u32 = 256;
/// Tokens that an answer is reckoned to take at most: clients send bounds that they do not mean.
const MOST_TOKENS: u32 = 4096;

/// What the worker is told at its start.
#[derive(Debug)]
pub struct Config {
    /// Sources of answers at the start, best first; more come and go by [`Handle::add`] and [`Handle::remove`].
    pub backends: Vec<Arc<dyn Backend>>,
    /// Names of the tiers that this machine qualifies for, as they change.
    pub tiers: watch::Receiver<Vec<String>>,
}

struct Entry {
    backend: BackendId,
    requester: Requester,
    cost: Cost,
    /// Where its place in the queue is told; gone once it began, so that the end of its task is the end of the answer.
    events: Option<mpsc::Sender<AnswerEvent>>,
    position: Option<usize>,
    /// Lets the prompt's task begin; gone once it did.
    start: Option<oneshot::Sender<()>>,
    begun: Instant,
}

impl Entry {
    /// Tells how many are before it, when that changed. A reader that is behind hears the next place.
    fn tell(&mut self, position: usize) {
        if self.position == Some(position) {
            return;
        }
        let told = AnswerEvent::Queued { position: u32::try_from(position).unwrap_or(u32::MAX) };
        if self.events.as_ref().is_some_and(|events| events.try_send(told).is_ok()) {
            self.position = Some(position);
        }
    }

    fn begin(&mut self) {
        self.events = None;
        if let Some(start) = self.start.take() {
            self.begun = Instant::now();
            // Its task may have ended a moment ago; then its end is on the way here and frees the slot.
            let _ = start.send(());
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    queues: BTreeMap<BackendId, Queue>,
    /// Of backends that were taken away: prompts that still run.
    leaving: BTreeMap<BackendId, Queue>,
    entries: HashMap<Ticket, Entry>,
    next_ticket: Ticket,
    ended: mpsc::UnboundedSender<(Ticket, Option<Cost>)>,
    /// Wakes when a backend can do more or less than before.
    changes: SelectAll<BoxStream<'static, ()>>,
    tiers: watch::Receiver<Vec<String>>,
    offer: watch::Sender<Offer>,
    told: Instant,
    tell_at: Option<Instant>,
    drained: Option<oneshot::Sender<()>>,
    /// Running mean of the seconds that a prompt takes, for `Busy`.
    mean_seconds: f64,
}

/// Starts the worker.
pub fn spawn(config: Config) -> (Handle, JoinHandle<()>) {
    let Config { backends, tiers } = config;
    // One ticket for every prompt that was admitted, so the queues bound it: sending never waits.
    let (ended, ends) = mpsc::unbounded_channel();
    let (commands, receiver) = mpsc::channel(COMMANDS);
    let shared = Arc::new(Shared::default());
    let (publish, offer) = watch::channel(Offer::default());
    let mut worker = Worker {
        shared: Arc::clone(&shared),
        queues: BTreeMap::new(),
        leaving: BTreeMap::new(),
        changes: SelectAll::new(),
        entries: HashMap::new(),
        next_ticket: 0,
        ended,
        tiers,
        offer: publish,
        told: Instant::now(),
        tell_at: None,
        drained: None,
        mean_seconds: 1.0,
    };
    for backend in backends {
        let id = shared.enter(Arc::clone(&backend));
        worker.on_added(id, &*backend);
    }
    worker.tell();
    let running = tokio::spawn(worker.run(receiver, ends));
    (Handle { commands, offer, shared }, running)
}

impl Worker {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>, mut ends: mpsc::UnboundedReceiver<(Ticket, Option<Cost>)>) {
        let mut tiers = self.tiers.clone();
        loop {
            let tell_at = self.tell_at;
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Serve(prompt)) => self.on_prompt(prompt),
                    Some(Command::Added(id, backend)) => self.on_added(id, &*backend),
                    Some(Command::Removed(id)) => self.on_removed(id),
                    Some(Command::Drain(reply)) => self.on_drain(reply),
                    Some(Command::Probe(reply)) => drop(reply.send(())),
                    None => return,
                },
                Some((ticket, used)) = ends.recv() => self.on_end(ticket, used),
                Some(()) = self.changes.next() => self.on_change(),
                Ok(()) = tiers.changed() => self.tell(),
                () = async { tokio::time::sleep_until(tell_at.unwrap_or_else(Instant::now)).await }, if tell_at.is_some() => self.tell(),
            }
        }
    }

    fn on_added(&mut self, id: BackendId, backend: &dyn Backend) {
        // A prompt may have been here before this command, and have made the queue.
        let queue = self.queues.entry(id).or_insert_with(|| Queue::new(backend.limits()));
        queue.set_limits(backend.limits());
        begin_waiting(queue, &mut self.entries);
        let changes = futures::stream::unfold(backend.availability(), |mut availability| async move {
            availability.changed().await.ok().map(|()| ((), availability))
        });
        self.changes.push(changes.boxed());
        self.tell();
    }

    /// A backend can do more or less than before, or takes more or less at once.
    fn on_change(&mut self) {
        for source in self.shared.sources().iter() {
            let Some(queue) = self.queues.get_mut(&source.id) else { continue };
            queue.set_limits(source.backend.limits());
            begin_waiting(queue, &mut self.entries);
        }
        self.load_changed();
        self.tell();
    }

    /// What waits for it is refused, what runs may end.
    fn on_removed(&mut self, id: BackendId) {
        if let Some(mut queue) = self.queues.remove(&id) {
            for ticket in queue.drain() {
                self.entries.remove(&ticket);
            }
            if queue.running() > 0 {
                self.leaving.insert(id, queue);
            }
        }
        self.load_changed();
        self.tell();
        self.settle_drain();
    }

    fn on_prompt(&mut self, prompt: Served) {
        if let Err((events, failure)) = self.admit(prompt) {
            // The channel was made for this prompt: it has room for its only event.
            let _ = events.try_send(AnswerEvent::End(Err(failure)));
        }
        self.load_changed();
    }

    fn admit(&mut self, prompt: Served) -> Result<(), (mpsc::Sender<AnswerEvent>, Failure)> {
        let Served { requester, ask, timeout, events } = prompt;
        if self.shared.draining.load(Ordering::Relaxed) {
            return Err((events, stopping()));
        }
        if let Err(error) = infer::check(&ask) {
            return Err((events, Failure::new(FailureKind::InvalidRequest, error.to_string())));
        }
        let (source, model) = match self.shared.pick(ask.model.as_deref()) {
            Ok(picked) => picked,
            Err(failure) => return Err((events, failure)),
        };
        // One that was entered a moment ago: its command is on the way.
        let (id, backend) = (source.id, Arc::clone(&source.backend));
        let queue = self.queues.entry(id).or_insert_with(|| Queue::new(backend.limits()));
        let (ticket, cost) = (self.next_ticket, cost(&ask));
        let admission = queue.admit(&requester, ticket, cost);
        let whose = match admission {
            Admission::Run | Admission::Wait(_) => None,
            Admission::Full => Some("all places in the queue are taken"),
            Admission::OverShare => Some("this asker's places in the queue are taken"),
        };
        if let Some(whose) = whose {
            let slots = backend.limits().slots.max(1);
            let rounds = queue.waiting().div_ceil(slots).max(1);
            let wait = Duration::from_secs_f64((self.mean_seconds * rounds as f64).clamp(0.1, 60.0));
            return Err((events, Failure::busy(format!("{whose}; come back in {:.1} s", wait.as_secs_f64()), wait)));
        }
        self.next_ticket += 1;
        let (start, started) = oneshot::channel();
        let mut entry = Entry {
            backend: id,
            requester,
            cost,
            events: Some(events.clone()),
            position: None,
            start: Some(start),
            begun: Instant::now(),
        };
        if admission == Admission::Run {
            entry.begin();
        } else {
            let order = queue.order();
            entry.tell(order.iter().position(|waiting| *waiting == ticket).unwrap_or(0));
        }
        self.entries.insert(ticket, entry);
        let ended = Ended { ticket, used: None, ended: self.ended.clone() };
        let deadline = Instant::now() + timeout.min(MAX_TIMEOUT);
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            let mut ended = ended;
            let outcome = tokio::select! {
                biased;
                () = events.closed() => None,
                outcome = tokio::time::timeout_at(deadline, begun(started, live(deadline, &*backend, model, ask, &events))) => Some(outcome),
            };
            let outcome = match outcome {
                None => return,
                Some(Ok(Some(outcome))) => outcome,
                Some(Ok(None)) => Err(never_begun(&shared)),
                Some(Err(_)) => Err(Failure::new(
                    FailureKind::DeadlineExceeded,
                    "the deadline passed at the serving node before the answer was whole",
                )),
            };
            if let Ok(done) = &outcome {
                let used = Cost::from(done.usage.prompt_tokens) + Cost::from(done.usage.completion_tokens);
                // Some servers do not count.
                ended.used = (used > 0).then_some(used);
            }
            // The slot is free before the asker knows: who asks again at once finds it.
            drop(ended);
            let _ = tokio::time::timeout(SLOW_CONSUMER, events.send(AnswerEvent::End(outcome))).await;
        });
        Ok(())
    }

    fn on_end(&mut self, ticket: Ticket, used: Option<Cost>) {
        let Some(entry) = self.entries.remove(&ticket) else { return };
        let queue = self.queues.get_mut(&entry.backend).or_else(|| self.leaving.get_mut(&entry.backend));
        let Some(queue) = queue else { return };
        if entry.start.is_some() {
            queue.withdraw(&entry.requester, ticket);
        } else {
            queue.finished(&entry.requester, entry.cost, used);
            self.mean_seconds = self.mean_seconds.mul_add(0.9, entry.begun.elapsed().as_secs_f64() * 0.1);
            self.shared.answered.fetch_add(1, Ordering::Relaxed);
        }
        begin_waiting(queue, &mut self.entries);
        self.leaving.retain(|_, queue| queue.running() > 0);
        self.load_changed();
        self.settle_drain();
    }

    fn on_drain(&mut self, reply: oneshot::Sender<()>) {
        self.shared.draining.store(true, Ordering::Relaxed);
        for queue in self.queues.values_mut() {
            // Dropping the start refuses the prompt: its asker can go elsewhere at once.
            for ticket in queue.drain() {
                self.entries.remove(&ticket);
            }
        }
        self.drained = Some(reply);
        self.tell();
        self.settle_drain();
    }

    fn settle_drain(&mut self) {
        if self.running() == 0
            && let Some(reply) = self.drained.take()
        {
            let _ = reply.send(());
        }
    }

    /// Those of backends that are gone end, too.
    fn running(&self) -> usize {
        self.queues.values().chain(self.leaving.values()).map(Queue::running).sum()
    }

    fn load_changed(&mut self) {
        let waiting = self.queues.values().map(Queue::waiting).sum();
        self.shared.waiting.store(waiting, Ordering::Relaxed);
        self.shared.running.store(self.running(), Ordering::Relaxed);
        for source in self.shared.sources().iter() {
            source.free.store(self.free_slots_of(source) > 0, Ordering::Relaxed);
        }
        let had_slot = self.offer.borrow().free_slots > 0;
        if had_slot != (self.free_slots() > 0) {
            self.tell();
        } else if self.tell_at.is_none() {
            self.tell_at = Some((self.told + TELL).max(Instant::now()));
        }
    }

    fn free_slots_of(&self, source: &Source) -> usize {
        self.queues.get(&source.id).map_or_else(|| source.backend.limits().slots, Queue::free_slots)
    }

    fn free_slots(&self) -> usize {
        let sources = self.shared.sources();
        let works = |source: &&Arc<Source>| source.now().models.iter().any(|model| model.state != ModelState::Failed);
        let real = sources.iter().filter(works).any(|source| !source.backend.is_last_resort());
        // The slots of the echo say nothing about those of a model.
        let counted = sources.iter().filter(works).filter(|source| !(real && source.backend.is_last_resort()));
        counted.map(|source| self.free_slots_of(source)).sum()
    }

    fn current(&self) -> Offer {
        let clip = |count: usize| u16::try_from(count).unwrap_or(u16::MAX);
        Offer {
            models: offered(&self.shared.sources()),
            tiers: self.tiers.borrow().clone(),
            free_slots: clip(self.free_slots()),
            queued: clip(self.queues.values().map(Queue::waiting).sum()),
            draining: self.shared.draining.load(Ordering::Relaxed),
        }
    }

    /// Tells those that wait how many are before them: whenever the offer is told, so no more often than that.
    fn tell_positions(&mut self) {
        for queue in self.queues.values().filter(|queue| queue.waiting() > 0) {
            for (position, ticket) in queue.order().into_iter().enumerate() {
                if let Some(entry) = self.entries.get_mut(&ticket) {
                    entry.tell(position);
                }
            }
        }
    }

    fn tell(&mut self) {
        self.tell_at = None;
        self.told = Instant::now();
        let current = self.current();
        self.offer.send_if_modified(|offer| {
            let changed = *offer != current;
            *offer = current;
            changed
        });
        self.tell_positions();
    }
}

/// Begins what has a slot now.
fn begin_waiting(queue: &mut Queue, entries: &mut HashMap<Ticket, Entry>) {
    while let Some((_, next)) = queue.next() {
        if let Some(entry) = entries.get_mut(&next) {
            entry.begin();
        }
    }
}

/// What all backends offer, best first; a model that two of them have is offered once, in the better state, with the slots of
/// both.
fn offered(sources: &[Arc<Source>]) -> Vec<ModelOffer> {
    let mut models: Vec<ModelOffer> = Vec::new();
    for source in sources {
        let slots = u16::try_from(source.backend.limits().slots).unwrap_or(u16::MAX);
        for model in &source.now().models {
            let mut model = model.clone();
            if model.slots == 0 {
                model.slots = slots;
            }
            let Some(known) = models.iter_mut().find(|known| known.name == model.name) else {
                models.push(model);
                continue;
            };
            let slots = match (known.state, model.state) {
                (ModelState::Failed, _) => model.slots,
                (_, ModelState::Failed) => known.slots,
                _ => known.slots.saturating_add(model.slots),
            };
            if readiness(&model) > readiness(known) {
                *known = model;
            }
            known.slots = slots;
        }
    }
    models.sort_by_key(|model| (model.state == ModelState::Failed, Reverse(model.rank())));
    models.truncate(MAX_MODELS);
    models
}

fn readiness(model: &ModelOffer) -> u8 {
    match model.state {
        ModelState::Failed => 0,
        ModelState::Loading => 1,
        ModelState::Available => 2,
        ModelState::Ready => 3,
    }
}

/// Tells the worker that a prompt's task is over, however it ended.
struct Ended {
    ticket: Ticket,
    /// Tokens that a whole answer took.
    used: Option<Cost>,
    ended: mpsc::UnboundedSender<(Ticket, Option<Cost>)>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.ended.send((self.ticket, self.used));
    }
}

/// What a prompt is reckoned to take, in tokens: four bytes each, and of an answer without a bound what is usual.
fn cost(ask: &Ask) -> Cost {
    let texts = ask.history.iter().map(|turn| &turn.text).chain(&ask.system).chain([&ask.prompt]);
    let bytes: usize = texts.map(|text| text.as_str().len()).sum();
    Cost::try_from(bytes / 4).unwrap_or(Cost::MAX).saturating_add(ask.max_tokens.unwrap_or(USUAL_TOKENS).min(MOST_TOKENS).into())
}

/// Why a prompt that waited is refused: all of them are, or only those of its backend.
fn never_begun(shared: &Shared) -> Failure {
    if shared.draining.load(Ordering::Relaxed) {
        return stopping();
    }
    Failure::new(FailureKind::ModelUnavailable, "the model was taken away")
}

/// `None` when it never began.
async fn begun<T>(started: oneshot::Receiver<()>, living: impl Future<Output = T>) -> Option<T> {
    started.await.ok()?;
    Some(living.await)
}

/// A prompt from its start to the last piece of text.
async fn live(
    deadline: Instant,
    backend: &dyn Backend,
    model: String,
    ask: Ask,
    events: &mpsc::Sender<AnswerEvent>,
) -> Result<crate::domain::prompt::Done, Failure> {
    let (out, mut pieces) = mpsc::channel(PIECES);
    let answering = backend.answer_by(deadline, model.clone(), ask, out);
    let mut answering = FuturesUnordered::from_iter([answering]);
    let mut outcome = None;
    let mut model = Some(model);
    let mut bytes = 0;
    loop {
        // A piece that cannot be handed on stops the polling of the backend: that is the back-pressure.
        let piece = tokio::select! {
            biased;
            piece = pieces.recv() => piece,
            Some(ended) = answering.next() => {
                outcome = Some(ended);
                continue;
            }
        };
        let Some(text) = piece else { break };
        bytes += text.as_str().len();
        if bytes > MAX_ANSWER_BYTES {
            let detail = format!("the answer passed the limit of {} MiB", MAX_ANSWER_BYTES >> 20);
            return Err(Failure::new(FailureKind::AnswerTooLarge, detail));
        }
        if let Some(model) = model.take() {
            hand_on(events, AnswerEvent::Started { model }).await?;
        }
        hand_on(events, AnswerEvent::Text(text.into_string())).await?;
    }
    if outcome.is_none() {
        // The backend dropped its sender before it ended: wait for its word.
        outcome = answering.next().await;
    }
    let outcome = outcome.unwrap_or_else(|| Err(Failure::new(FailureKind::BackendFailed, "the backend gave no outcome")));
    if let (Ok(_), Some(model)) = (&outcome, model) {
        hand_on(events, AnswerEvent::Started { model }).await?;
    }
    outcome
}

async fn hand_on(events: &mpsc::Sender<AnswerEvent>, event: AnswerEvent) -> Result<(), Failure> {
    match timeout(SLOW_CONSUMER, events.send(event)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Failure::new(FailureKind::Cancelled, "the asker is gone")),
        Err(_) => Err(Failure::new(FailureKind::SlowConsumer, "the asker did not read for 30 s")),
    }
}
