//! The owner of one child: starts and ends it, gives it prompts, and judges what it says.
//!
//! A child that breaks the protocol, that is silent, or that does not let go of a prompt is killed like one that died: its
//! prompts end with `EngineCrashed`, and a new one is started after a pause. Nothing in the loop waits.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use opengateway_engine_protocol::{Down, Ready, Up};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::child::Child;
use super::quarantine::{PromptDigest, Quarantine, Verdict};
use super::request::{Answer, Command, Request};
use super::{MayStart, Policy, Spec, Status};
use crate::domain::node::ModelState;
use crate::domain::prompt::{Failure, FailureKind};
use crate::serve::backend::Availability;

/// How often a child that works or loads is looked after.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// A cancelled prompt that the child does not end.
pub(super) const CANCEL: Duration = Duration::from_secs(5);
/// Between the frame that ends a child and the signal that does.
const GOODBYE: Duration = Duration::from_secs(2);
/// Pauses before a new start: the first, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Deaths while loading, one after the other, until it is left alone.
const LOAD_CRASHES: u32 = 3;
/// Bytes of a sentence of the child that are told on.
const SENTENCE: usize = 300;

/// Where the task shows what it is.
#[derive(Debug)]
pub(super) struct Publish {
    pub status: watch::Sender<Status>,
    pub availability: watch::Sender<Availability>,
    pub changed: Arc<Notify>,
}

#[derive(Debug)]
pub(super) enum State {
    /// No child, and nobody wants one.
    Down,
    /// The memory is being looked at.
    Asking(oneshot::Receiver<Result<(), String>>),
    /// A child died or had no memory: not before this time.
    Resting(Instant),
    /// There is a child.
    Up(Box<Running>),
    /// It is not tried any more.
    Failed(String),
}

#[derive(Debug)]
pub(super) struct Running {
    pub child: Child,
    pub since: Instant,
    pub greeted: bool,
    pub progress: f32,
    pub ready: Option<Ready>,
    /// When it last said anything.
    pub heard: Instant,
    pub pinged: Instant,
    /// The nonce of a ping that was not answered.
    pub ping: Option<u64>,
    /// It was told to end; killed at this time.
    pub ending: Option<Instant>,
}

/// A prompt that the child has.
#[derive(Debug)]
pub(super) struct Flight {
    pub digest: PromptDigest,
    /// Where its text goes; `None` once it ended for its reader, though not yet for the child.
    pub answer: Option<Answer>,
    alone: bool,
    pub started: bool,
    /// Nobody waits for it; the child is to let go of it by this time.
    pub cancelled: Option<Instant>,
}

pub(super) struct Task {
    pub spec: Spec,
    pub policy: watch::Receiver<Policy>,
    permits: mpsc::Sender<MayStart>,
    publish: Publish,
    pub state: State,
    /// Prompts that the child does not have yet, the oldest first.
    pub waiting: VecDeque<Request>,
    pub flights: BTreeMap<u64, Flight>,
    pub quarantine: Quarantine,
    /// The child is to be there although nobody asks.
    pub wanted: bool,
    /// The child ends as soon as it has nothing to do.
    unload: bool,
    unloading: Vec<oneshot::Sender<()>>,
    idle_replies: Vec<oneshot::Sender<bool>>,
    stopping: Option<oneshot::Sender<()>>,
    pub idle_since: Option<Instant>,
    /// Deaths in a row, for the pause; while loading, for giving up.
    pub deaths: u32,
    pub load_crashes: u32,
    pub next_ping: u64,
    /// When the child is looked after next, however much it says meanwhile.
    pub next_tick: Instant,
    /// What `Status` counts.
    pub counts: Status,
    pub problem: Option<String>,
    /// There was no memory for it when it was last looked at.
    no_memory: bool,
}

/// Starts the task; it ends when its engine is dropped or stopped.
pub(super) fn spawn(
    spec: Spec,
    policy: watch::Receiver<Policy>,
    permits: mpsc::Sender<MayStart>,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: Publish,
) {
    let task = Task {
        spec,
        policy,
        permits,
        publish,
        state: State::Down,
        waiting: VecDeque::new(),
        flights: BTreeMap::new(),
        quarantine: Quarantine::default(),
        wanted: false,
        unload: false,
        unloading: Vec::new(),
        idle_replies: Vec::new(),
        stopping: None,
        idle_since: None,
        deaths: 0,
        load_crashes: 0,
        next_ping: 0,
        next_tick: Instant::now(),
        counts: Status::default(),
        problem: None,
        no_memory: false,
    };
    tokio::spawn(task.run(commands));
}

/// What happened to the child or on the way to it.
enum Happened {
    Permit(Result<(), String>),
    Frame(Up),
    Lost(String),
}

impl State {
    /// Cancel-safe; pending while there is nothing to wait for.
    async fn next(&mut self) -> Happened {
        match self {
            Self::Asking(answer) => Happened::Permit(answer.await.unwrap_or_else(|_| Err("the daemon is stopping".to_owned()))),
            Self::Up(running) => match running.child.next().await {
                Ok(frame) => Happened::Frame(frame),
                Err(why) => Happened::Lost(why),
            },
            Self::Down | Self::Resting(_) | Self::Failed(_) => std::future::pending().await,
        }
    }
}

impl Task {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut policy = self.policy.clone();
        self.wanted = policy.borrow_and_update().keep;
        loop {
            self.proceed();
            self.show();
            self.settle_unload();
            if self.stopping.is_some() && matches!(self.state, State::Down) {
                break;
            }
            let alarm = self.alarm();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    // The handle is gone; the child goes with this task.
                    None => break,
                },
                happened = self.state.next() => self.on_happened(happened),
                Ok(()) = policy.changed() => {
                    let keep = policy.borrow_and_update().keep;
                    self.wanted |= keep && !self.stays_up() && !matches!(self.state, State::Failed(_));
                }
                () = async { tokio::time::sleep_until(alarm.unwrap_or_else(Instant::now)).await }, if alarm.is_some() => self.on_alarm(),
            }
        }
        if let Some(reply) = self.stopping.take() {
            let _ = reply.send(());
        }
    }

    /// When to look again without being called.
    fn alarm(&self) -> Option<Instant> {
        match &self.state {
            State::Up(running) if running.ready.is_some() && running.ending.is_none() && self.flights.is_empty() => {
                self.idle_end()
            }
            State::Up(_) | State::Asking(_) => Some(self.next_tick),
            State::Resting(until) if self.waiting.is_empty() => Some(*until),
            State::Resting(until) => Some(self.next_tick.min(*until)),
            State::Down | State::Failed(_) => None,
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Ask(request) => self.on_ask(*request),
            Command::Cancel(id) => self.on_cancel(id),
            Command::Load(reply) => {
                if matches!(self.state, State::Failed(_) | State::Resting(_)) {
                    self.state = State::Down;
                    (self.load_crashes, self.deaths) = (0, 0);
                }
                self.problem = None;
                self.no_memory = false;
                self.unload = false;
                self.wanted = !self.stays_up();
                // Whoever waits for the end of a child that now stays would wait for ever.
                if !self.wanted {
                    for reply in self.unloading.drain(..) {
                        let _ = reply.send(());
                    }
                    for reply in self.idle_replies.drain(..) {
                        let _ = reply.send(false);
                    }
                }
                let _ = reply.send(Ok(()));
            }
            Command::Unload(reply) => {
                self.unload = true;
                self.wanted = false;
                if matches!(self.state, State::Asking(_)) && self.waiting.is_empty() {
                    self.state = State::Down;
                }
                self.unloading.push(reply);
            }
            Command::UnloadIfIdle(reply) => {
                let is_idle = self.flights.is_empty() && self.waiting.is_empty();
                if is_idle && matches!(self.state, State::Up(_)) {
                    self.unload = true;
                    self.wanted = false;
                    self.idle_replies.push(reply);
                } else {
                    let _ = reply.send(false);
                }
            }
            Command::Memory => {
                if let State::Resting(until) = &mut self.state
                    && self.no_memory
                {
                    *until = Instant::now();
                }
            }
            Command::Digest(digest) => self.spec.offer.digest = Some(digest),
            Command::Stop(why, reply) => {
                self.fail_waiting(&why);
                self.fail_flights(&why);
                self.stopping = Some(reply);
                self.wanted = false;
                self.end_child();
            }
        }
    }

    fn on_ask(&mut self, request: Request) {
        let refused = match &self.state {
            _ if self.stopping.is_some() => Some(Failure::new(FailureKind::ModelUnavailable, "the model was taken away")),
            State::Failed(why) => Some(Failure::new(
                FailureKind::ModelUnavailable,
                format!("{} cannot be loaded: {why}; to try again: ogctl models load {}", self.model(), self.model()),
            )),
            _ if self.quarantine.verdict(request.digest, Instant::now()) == Verdict::Refused => Some(quarantined()),
            _ => None,
        };
        match refused {
            Some(failure) => request.answer.end(Err(failure)),
            None => {
                self.waiting.push_back(request);
                // There may be memory by now; a death takes its pause.
                if let State::Resting(until) = &mut self.state
                    && self.no_memory
                {
                    *until = Instant::now();
                }
            }
        }
    }

    /// There is a child, and nobody told it to end.
    fn stays_up(&self) -> bool {
        matches!(&self.state, State::Up(running) if running.ending.is_none() && !self.unload)
    }

    pub(super) fn on_cancel(&mut self, id: u64) {
        self.waiting.retain(|request| request.id != id);
        if let Some(flight) = self.flights.get_mut(&id)
            && flight.cancelled.is_none()
        {
            flight.cancelled = Some(Instant::now() + CANCEL);
            if let State::Up(running) = &self.state {
                let _ = running.child.send(&Down::Cancel { id });
            }
        }
    }

    pub(super) fn model(&self) -> &str {
        &self.spec.offer.name
    }

    /// Does what can be done now: asks for a child, hands it prompts, ends it.
    fn proceed(&mut self) {
        match &self.state {
            State::Down if self.stopping.is_none() && (self.wanted || !self.waiting.is_empty()) => self.ask_for_memory(),
            State::Resting(until) => {
                let is_asked = self.wanted || !self.waiting.is_empty();
                let is_over = *until <= Instant::now();
                if is_asked && is_over {
                    self.ask_for_memory();
                } else if !is_asked && (is_over || !self.no_memory) {
                    self.no_memory = false;
                    self.state = State::Down;
                }
            }
            State::Up(running) if running.ready.is_some() && running.ending.is_none() => self.dispatch(),
            State::Up(running) if running.ending.is_none() && self.unload => self.end_child(),
            State::Up(_) | State::Down | State::Asking(_) | State::Failed(_) => {}
        }
    }

    /// Tells those who wait for the end of the child, once everybody can see it.
    fn settle_unload(&mut self) {
        if matches!(self.state, State::Up(_)) {
            return;
        }
        self.unload = false;
        for reply in self.unloading.drain(..) {
            let _ = reply.send(());
        }
        for reply in self.idle_replies.drain(..) {
            let _ = reply.send(true);
        }
    }

    fn ask_for_memory(&mut self) {
        let (reply, answer) = oneshot::channel();
        let question = MayStart { model: self.model().to_owned(), needed: self.spec.needed, reply };
        // Nobody to ask, or too many who ask: the answer is no, for now.
        let _ = self.permits.try_send(question);
        self.state = State::Asking(answer);
    }

    fn on_happened(&mut self, happened: Happened) {
        match happened {
            Happened::Permit(Ok(())) => {
                self.no_memory = false;
                self.start();
            }
            Happened::Permit(Err(why)) => {
                tracing::warn!(model = self.model(), "{} is not loaded: {why}", self.model());
                self.fail_waiting(&Failure::new(FailureKind::ModelUnavailable, format!("{} is not loaded: {why}", self.model())));
                self.problem = Some(why);
                // One that is to be kept is tried again; the others wait for memory, and then for a prompt.
                self.wanted = self.policy.borrow().keep && self.stopping.is_none();
                self.no_memory = self.stopping.is_none();
                self.state = if self.no_memory { State::Resting(Instant::now() + LONGEST_PAUSE) } else { State::Down };
            }
            Happened::Frame(frame) => {
                if let Err(why) = self.on_frame(frame) {
                    self.on_lost(&why);
                }
            }
            Happened::Lost(why) => self.on_lost(&why),
        }
    }

    fn start(&mut self) {
        if self.stopping.is_some() {
            self.state = State::Down;
            return;
        }
        match Child::start(&self.spec.program, self.model()) {
            Ok(child) => {
                let now = Instant::now();
                tracing::info!(model = self.model(), pid = child.pid(), "loading {}", self.model());
                self.state = State::Up(Box::new(Running {
                    child,
                    since: now,
                    greeted: false,
                    progress: 0.0,
                    ready: None,
                    heard: now,
                    pinged: now,
                    ping: None,
                    ending: None,
                }));
            }
            Err(error) => self.fail(format!("{} cannot be started: {error}", self.spec.program.display())),
        }
    }

    /// It is not tried any more.
    fn fail(&mut self, why: String) {
        tracing::error!(model = self.model(), "{} failed: {why}", self.model());
        self.fail_waiting(&Failure::new(FailureKind::ModelUnavailable, format!("{} cannot be loaded: {why}", self.model())));
        self.wanted = false;
        self.problem = Some(why.clone());
        self.state = if self.stopping.is_some() { State::Down } else { State::Failed(why) };
    }

    fn fail_waiting(&mut self, why: &Failure) {
        for request in self.waiting.drain(..) {
            request.answer.end(Err(why.clone()));
        }
    }

    fn fail_flights(&mut self, why: &Failure) {
        for answer in std::mem::take(&mut self.flights).into_values().filter_map(|flight| flight.answer) {
            answer.end(Err(why.clone()));
        }
    }

    /// Hands waiting prompts to the child, as many as it takes; a suspect only when it is alone there.
    fn dispatch(&mut self) {
        let now = Instant::now();
        self.waiting.retain(|request| !request.answer.is_abandoned());
        let State::Up(running) = &self.state else { return };
        let slots = running.ready.as_ref().map_or(1, |ready| ready.slots as usize);
        while self.flights.len() < slots && !self.flights.values().any(|flight| flight.alone) {
            let Some(next) = self.waiting.front() else { break };
            let verdict = self.quarantine.verdict(next.digest, now);
            if verdict == Verdict::Alone && !self.flights.is_empty() {
                break;
            }
            let Some(request) = self.waiting.pop_front() else { break };
            if verdict == Verdict::Refused {
                request.answer.end(Err(quarantined()));
                continue;
            }
            if let Err(error) = running.child.send(&Down::Generate(request.generate.clone())) {
                request.answer.end(Err(Failure::new(FailureKind::InvalidRequest, error.to_string())));
                continue;
            }
            self.idle_since = None;
            let Request { id, digest, answer, .. } = request;
            let alone = verdict == Verdict::Alone;
            self.flights.insert(id, Flight { digest, answer: Some(answer), alone, started: false, cancelled: None });
        }
        if self.unload && self.flights.is_empty() && self.waiting.is_empty() {
            self.end_child();
        }
    }

    /// Tells the child to end, if there is one.
    pub(super) fn end_child(&mut self) {
        match &mut self.state {
            State::Up(running) if running.ending.is_none() => {
                running.ending = Some(Instant::now() + GOODBYE);
                let _ = running.child.send(&Down::Shutdown);
            }
            State::Up(_) => {}
            State::Down | State::Asking(_) | State::Resting(_) | State::Failed(_) => self.state = State::Down,
        }
    }

    /// The child says that it cannot, and is not asked again.
    pub(super) fn end_for_good(&mut self, why: String) {
        self.kill();
        self.fail(why);
    }

    fn kill(&mut self) {
        if let State::Up(running) = std::mem::replace(&mut self.state, State::Down) {
            running.child.kill();
        }
        self.idle_since = None;
    }

    /// The child is gone, or is to be.
    pub(super) fn on_lost(&mut self, why: &str) {
        let State::Up(running) = std::mem::replace(&mut self.state, State::Down) else { return };
        let was_ready = running.ready.is_some();
        let was_ending = running.ending.is_some();
        let pid = running.child.pid();
        running.child.kill();
        self.idle_since = None;
        if was_ending {
            tracing::info!(model = self.model(), "{} is unloaded", self.model());
            return;
        }
        self.counts.crashes += 1;
        self.deaths = self.deaths.saturating_add(1);
        tracing::error!(model = self.model(), pid, "the engine of {} died: {why}", self.model());
        let digests: HashSet<_> = self.flights.values().map(|flight| flight.digest).collect();
        self.quarantine.died_with(digests, Instant::now());
        self.fail_flights(&Failure::new(FailureKind::EngineCrashed, format!("the engine died: {why}")));
        if !was_ready {
            self.load_crashes += 1;
            if self.load_crashes >= LOAD_CRASHES {
                return self.fail(format!("its engine died {LOAD_CRASHES} times while loading it; the last time {why}"));
            }
        }
        self.problem = Some(format!("its engine died: {why}"));
        // Whoever used it finds it there again.
        self.wanted = true;
        let pause = PAUSE.saturating_mul(1 << self.deaths.saturating_sub(1).min(6)).min(LONGEST_PAUSE);
        self.state = State::Resting(Instant::now() + pause);
    }

    fn model_state(&self) -> ModelState {
        match &self.state {
            State::Failed(_) => ModelState::Failed,
            State::Up(running) if running.ending.is_some() => ModelState::Available,
            State::Up(running) if running.ready.is_some() => ModelState::Ready,
            // Its owner wants it here: prompts come and try again. The others are nobody's best model meanwhile.
            State::Asking(_) | State::Resting(_) if self.no_memory && self.policy.borrow().keep => ModelState::Available,
            State::Asking(_) | State::Resting(_) if self.no_memory => ModelState::Failed,
            State::Up(_) | State::Asking(_) => ModelState::Loading,
            State::Resting(_) if self.wanted => ModelState::Loading,
            State::Resting(_) | State::Down => ModelState::Available,
        }
    }

    fn show(&self) {
        let state = self.model_state();
        let (pid, progress) = match &self.state {
            State::Up(running) => (running.child.pid(), running.ready.is_none().then_some(running.progress)),
            _ => (None, None),
        };
        let busy = self.flights.len() + self.waiting.len();
        let idle_since = self.idle_since.filter(|_| busy == 0);
        let now = Status { state, progress, problem: self.problem.clone(), pid, busy, idle_since, ..self.counts.clone() };
        if self.publish.status.send_if_modified(|known| replace(known, now)) {
            self.publish.changed.notify_one();
        }
        let mut offer = self.spec.offer.clone();
        offer.state = state;
        if let Some(context) = self.counts.context {
            offer.context_tokens = context;
        }
        let failed = self.no_memory || matches!(self.state, State::Failed(_));
        let availability = Availability { models: vec![offer], problem: self.problem.clone().filter(|_| failed) };
        self.publish.availability.send_if_modified(|known| replace(known, availability));
    }
}

fn replace<T: PartialEq>(known: &mut T, now: T) -> bool {
    let changed = *known != now;
    *known = now;
    changed
}

fn quarantined() -> Failure {
    Failure::new(FailureKind::PromptQuarantined, "this prompt ended the engine twice and is not tried again for an hour")
}

/// What the child says, bounded and without control characters.
pub(super) fn sentence(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text[..text.floor_char_boundary(SENTENCE)].trim().to_owned()
}
