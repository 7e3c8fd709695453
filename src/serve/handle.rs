//! The handle through which `net` (for members) and `dispatch` (for this machine's own users) submit prompts.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::backend::Backend;
use crate::domain::node::{NodeId, Offer};
use crate::domain::prompt::{Ask, Failure, FailureKind};
use crate::net::{AnswerEvent, AnswerNow, InboundPrompt, Service};
use crate::wire::infer;

/// Whose share a prompt counts against.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Requester {
    /// A member of a cluster.
    Peer(NodeId),
    /// A user of this machine.
    Local(u32),
}

/// A prompt handed in.
#[derive(Debug)]
pub struct Served {
    /// Whose.
    pub requester: Requester,
    /// What.
    pub ask: Ask,
    /// Time left.
    pub timeout: Duration,
    /// Where the answer goes; closed means cancelled.
    pub events: mpsc::Sender<AnswerEvent>,
}

/// Names one backend for as long as the daemon lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(u64);

/// What the worker is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Queue and answer.
    Serve(Served),
    /// A backend was entered.
    Added(BackendId, Arc<dyn Backend>),
    /// A backend is gone.
    Removed(BackendId),
    /// Take no new prompts; tell when the running ones have ended.
    Drain(oneshot::Sender<()>),
    /// Answer at once.
    Probe(oneshot::Sender<()>),
}

/// What the worker shares with its handles, for answers that need no queue.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Held for a look or one change, never across an await.
    pub backends: RwLock<Vec<(BackendId, Arc<dyn Backend>)>>,
    pub next_backend: AtomicU64,
    pub draining: AtomicBool,
    /// Prompts that wait: while there are any, nobody is answered past them.
    pub waiting: AtomicUsize,
    /// Prompts answered so far, of any kind.
    pub answered: AtomicU64,
    /// Prompts being answered now.
    pub running: AtomicUsize,
}

impl Shared {
    pub(crate) fn enter(&self, backend: Arc<dyn Backend>) -> BackendId {
        let id = BackendId(self.next_backend.fetch_add(1, Ordering::Relaxed));
        self.backends.write().unwrap_or_else(PoisonError::into_inner).push((id, backend));
        id
    }

    /// All backends in the order in which they are asked: the last resort last.
    pub(crate) fn backends(&self) -> Vec<(BackendId, Arc<dyn Backend>)> {
        let mut backends = self.backends.read().unwrap_or_else(PoisonError::into_inner).clone();
        backends.sort_by_key(|(_, backend)| backend.is_last_resort());
        backends
    }

    /// The backend for a prompt and the model it will use.
    ///
    /// # Errors
    /// `ModelUnavailable`, naming the models that there are.
    pub(crate) fn pick(&self, wanted: Option<&str>) -> Result<(BackendId, Arc<dyn Backend>, String), Failure> {
        let backends = self.backends();
        for (id, backend) in &backends {
            let availability = backend.availability();
            let availability = availability.borrow();
            let model = match wanted {
                Some(wanted) => availability.models.iter().find(|model| model.name == wanted),
                None => availability.models.first(),
            };
            if let Some(model) = model {
                return Ok((*id, Arc::clone(backend), model.name.clone()));
            }
        }
        let names: Vec<String> = backends
            .iter()
            .flat_map(|(_, backend)| {
                backend.availability().borrow().models.iter().map(|model| model.name.clone()).collect::<Vec<_>>()
            })
            .take(16)
            .collect();
        let there = if names.is_empty() { "it has none now".to_owned() } else { format!("it has: {}", names.join(", ")) };
        Err(Failure::new(
            FailureKind::ModelUnavailable,
            format!("this node does not have model {:?}; {there}", wanted.unwrap_or_default()),
        ))
    }
}

/// A cheap clone that submits prompts to the queue.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) offer: watch::Receiver<Offer>,
    pub(crate) shared: Arc<Shared>,
}

impl Handle {
    /// Hands in a prompt; the outcome comes as the last [`AnswerEvent`].
    ///
    /// # Errors
    /// [`FailureKind::Busy`] or [`FailureKind::ShuttingDown`], at once.
    pub fn submit(&self, prompt: Served) -> Result<(), Failure> {
        if self.shared.draining.load(Ordering::Relaxed) {
            return Err(stopping());
        }
        self.commands.try_send(Command::Serve(prompt)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Failure::busy("this node has too many prompts waiting", Duration::from_secs(1)),
            mpsc::error::TrySendError::Closed(_) => stopping(),
        })
    }

    /// Enters one more source of answers; it serves from now on.
    ///
    /// Cancel-safe.
    pub async fn add(&self, backend: Arc<dyn Backend>) -> BackendId {
        let id = self.shared.enter(Arc::clone(&backend));
        let _ = self.commands.send(Command::Added(id, backend)).await;
        id
    }

    /// Takes a source of answers out. Prompts that wait for it are refused, those that run may end.
    ///
    /// Cancel-safe.
    pub async fn remove(&self, id: BackendId) {
        self.shared.backends.write().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| *known != id);
        let _ = self.commands.send(Command::Removed(id)).await;
    }

    /// Takes no new prompts from now on; resolves when the running ones have ended, or after `deadline`.
    pub async fn drain(&self, deadline: Duration) {
        let (reply, drained) = oneshot::channel();
        if self.commands.send(Command::Drain(reply)).await.is_ok() {
            let _ = tokio::time::timeout(deadline, drained).await;
        }
    }

    /// Resolves to true when the serving task answered: the watchdog's proof of life.
    pub async fn probe(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Probe(reply)).is_ok() && answer.await.is_ok()
    }

    /// What this node offers, as it changes.
    pub fn offer(&self) -> watch::Receiver<Offer> {
        self.offer.clone()
    }

    /// Prompts being answered now, for members and for this machine's users.
    pub fn running(&self) -> usize {
        self.shared.running.load(Ordering::Relaxed)
    }

    /// Name of the best backend that works, and what is wrong with the others.
    pub fn backends(&self) -> (String, Vec<String>) {
        let mut best: Option<&Arc<dyn Backend>> = None;
        let mut problems = Vec::new();
        let backends = self.shared.backends();
        for (_, backend) in &backends {
            let availability = backend.availability();
            let availability = availability.borrow();
            if let Some(problem) = &availability.problem {
                problems.push(format!("backend {}: {problem}", backend.name()));
            }
            // The first that works, and the echo only where nothing else does.
            if !availability.models.is_empty() && best.is_none_or(|best| best.is_last_resort() && !backend.is_last_resort()) {
                best = Some(backend);
            }
        }
        let best = best.map_or_else(String::new, |best| best.name().to_owned());
        (best, problems)
    }
}

pub(crate) fn stopping() -> Failure {
    Failure::new(FailureKind::ShuttingDown, "this node is stopping")
}

impl Service for Handle {
    fn answer_now(&self, _: &NodeId, ask: &Ask) -> Option<Result<AnswerNow, Failure>> {
        if self.shared.draining.load(Ordering::Relaxed) {
            return Some(Err(stopping()));
        }
        if self.shared.waiting.load(Ordering::Relaxed) > 0 {
            return None;
        }
        if let Err(error) = infer::check(ask) {
            return Some(Err(Failure::new(FailureKind::InvalidRequest, error.to_string())));
        }
        let (_, backend, model) = match self.shared.pick(ask.model.as_deref()) {
            Ok(picked) => picked,
            Err(failure) => return Some(Err(failure)),
        };
        let (pieces, done) = backend.answer_now(&model, ask)?;
        self.shared.answered.fetch_add(1, Ordering::Relaxed);
        Some(Ok(AnswerNow { model, pieces, done }))
    }

    fn submit(&self, prompt: InboundPrompt) -> Result<(), Failure> {
        let InboundPrompt { from, ask, timeout, reply, .. } = prompt;
        Handle::submit(self, Served { requester: Requester::Peer(from), ask, timeout, events: reply.into_events() })
    }

    fn offer(&self) -> watch::Receiver<Offer> {
        self.offer.clone()
    }
}
