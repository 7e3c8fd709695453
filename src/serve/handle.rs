//! The handle through which `net` (for members) and `dispatch` (for this machine's own users) submit prompts.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::backend::{Availability, Backend};
use crate::domain::node::{ModelOffer, ModelState, NodeId, Offer};
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

/// One backend as prompts find it.
#[derive(Debug)]
pub(crate) struct Source {
    pub id: BackendId,
    pub backend: Arc<dyn Backend>,
    availability: watch::Receiver<Availability>,
    /// A prompt would begin at once; the worker keeps it.
    pub free: AtomicBool,
}

impl Source {
    /// What the backend can do now; held for a look.
    pub(crate) fn now(&self) -> watch::Ref<'_, Availability> {
        self.availability.borrow()
    }
}

/// How good a model of a source is for a prompt: its rank, a real model, loaded, nobody waits for it.
type Worth = ((u8, u64), bool, bool, bool);

/// What the worker shares with its handles, for answers that need no queue.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// In the order in which they are asked, the last resort last. Held for a look or one change, never across an await; a
    /// prompt takes the list as it is, without a copy.
    sources: RwLock<Arc<[Arc<Source>]>>,
    next_backend: AtomicU64,
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
        let availability = backend.availability();
        let source = Arc::new(Source { id, backend, availability, free: AtomicBool::new(true) });
        self.change(|sources| {
            let at = sources.partition_point(|known| known.backend.is_last_resort() <= source.backend.is_last_resort());
            sources.insert(at, source);
        });
        id
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Source>>)) {
        let mut sources = self.sources.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = sources.to_vec();
        change(&mut list);
        *sources = list.into();
    }

    /// All backends in the order in which they are asked: the last resort last.
    pub(crate) fn sources(&self) -> Arc<[Arc<Source>]> {
        Arc::clone(&self.sources.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The backend for a prompt and the model it will use: the one that was named, else the greatest. Of several that have
    /// it, one where it is loaded, then one where nobody waits, then the first.
    ///
    /// # Errors
    /// `ModelUnavailable`, naming the models that there are.
    pub(crate) fn pick(&self, wanted: Option<&str>) -> Result<(Arc<Source>, String), Failure> {
        let sources = self.sources();
        let mut best: Option<(Worth, &Arc<Source>, String)> = None;
        for source in sources.iter() {
            let free = source.free.load(Ordering::Relaxed);
            for model in &source.now().models {
                if model.state == ModelState::Failed || wanted.is_some_and(|wanted| model.name != wanted) {
                    continue;
                }
                let rank = if wanted.is_none() { model.rank() } else { (0, 0) };
                let worth = (rank, !source.backend.is_last_resort(), model.state == ModelState::Ready, free);
                if best.as_ref().is_none_or(|(known, ..)| *known < worth) {
                    best = Some((worth, source, model.name.clone()));
                }
            }
        }
        match best {
            Some((_, source, model)) => Ok((Arc::clone(source), model)),
            None => Err(no_model(&sources, wanted)),
        }
    }
}

fn no_model(sources: &[Arc<Source>], wanted: Option<&str>) -> Failure {
    let mut names = Vec::new();
    let mut failed = false;
    for source in sources {
        for model in &source.now().models {
            if model.state != ModelState::Failed {
                names.push(model.name.clone());
            } else {
                failed |= wanted == Some(model.name.as_str());
            }
        }
    }
    names.truncate(16);
    let there = if names.is_empty() { "it has none now".to_owned() } else { format!("it has: {}", names.join(", ")) };
    let detail = match wanted {
        Some(wanted) if failed => format!("this node could not load model {wanted:?}; {there}"),
        Some(wanted) => format!("this node does not have model {wanted:?}; {there}"),
        None => "this node has no model now".to_owned(),
    };
    Failure::new(FailureKind::ModelUnavailable, detail)
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
        self.shared.change(|sources| sources.retain(|known| known.id != id));
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
        let mut best: Option<(_, &Arc<dyn Backend>)> = None;
        let mut problems = Vec::new();
        let sources = self.shared.sources();
        for source in sources.iter() {
            let (backend, availability) = (&source.backend, source.now());
            if let Some(problem) = &availability.problem {
                problems.push(format!("backend {}: {problem}", backend.name()));
            }
            // The one that has the model which a prompt gets that names none; of equals the first.
            let rank = availability.models.iter().map(ModelOffer::rank).max().map(|rank| (!backend.is_last_resort(), rank));
            if let Some(rank) = rank
                && best.is_none_or(|(known, _)| known < rank)
            {
                best = Some((rank, backend));
            }
        }
        let best = best.map_or_else(String::new, |(_, best)| best.name().to_owned());
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
        let (source, model) = match self.shared.pick(ask.model.as_deref()) {
            Ok(picked) => picked,
            Err(failure) => return Some(Err(failure)),
        };
        let (pieces, done) = source.backend.answer_now(&model, ask)?;
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
