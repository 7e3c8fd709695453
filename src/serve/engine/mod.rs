//! The backend that computes: one `opengateway-engine` child for each model file.
//!
//! [`Engine`] is what the queue holds. Behind it a task (`task.rs`) owns the child: it starts it when somebody asks, ends it
//! when nobody has asked for long, begins again when it dies, and keeps away the prompts that kill it (`quarantine.rs`). The
//! child is reached through one socket (`child.rs`); it is trusted with nothing but computing.

mod care;
mod child;
mod frames;
mod quarantine;
mod request;
mod task;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use opengateway_engine_protocol::Load;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use self::request::{Command, Event, Request};
use super::backend::{Answering, Availability, Backend, Limits};
use crate::domain::node::{ModelOffer, ModelState};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, MAX_TIMEOUT, Text};

/// Pieces that wait for a reader who is behind are joined up to this size.
const PIECE: usize = 4 * 1024;

/// One model and how it is computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The child's program.
    pub program: PathBuf,
    /// What the child is told to load.
    pub load: Load,
    /// What is known of the model; its state changes.
    pub offer: ModelOffer,
    /// Bytes that must be free before it is loaded.
    pub needed: u64,
}

/// How long a child is kept that has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// It is started at once and never ended for having nothing to do.
    pub keep: bool,
    /// It is ended after this time without a prompt; `None` is never.
    pub idle: Option<Duration>,
}

/// The question whether there is memory for one more child.
#[derive(Debug)]
pub struct MayStart {
    /// Which model.
    pub model: String,
    /// Bytes that it needs.
    pub needed: u64,
    /// Yes, or a sentence that says what is missing.
    pub reply: oneshot::Sender<Result<(), String>>,
}

/// What an engine is and did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Status {
    /// Of the model.
    pub state: ModelState,
    /// From 0 to 1 while it is being loaded.
    pub progress: Option<f32>,
    /// What is wrong.
    pub problem: Option<String>,
    /// Context window of a slot, once it was loaded.
    pub context: Option<u32>,
    /// Prompts at once, once it was loaded.
    pub slots: Option<u32>,
    /// Bytes besides the file, once it was loaded.
    pub memory: Option<u64>,
    /// What computes.
    pub device: Option<String>,
    /// The child.
    pub pid: Option<u32>,
    /// Prompts that it computes or that wait for it.
    pub busy: usize,
    /// Since when it is loaded and has nothing to do.
    pub idle_since: Option<Instant>,
    /// Whole answers.
    pub answered: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Tokens of the answers.
    pub completion_tokens: u64,
    /// Tokens a second of one answer, as seen lately.
    pub tokens_per_second: Option<f64>,
    /// Times that the child died.
    pub crashes: u32,
}

/// The engine of one model file.
#[derive(Debug)]
pub struct Engine {
    name: String,
    spec: Spec,
    policy: watch::Receiver<Policy>,
    limits: Limits,
    commands: mpsc::UnboundedSender<Command>,
    availability: watch::Receiver<Availability>,
    status: watch::Receiver<Status>,
    next_request: AtomicU64,
}

impl Engine {
    /// Starts the task of an engine, and the child too when it is to be kept. `changed` is notified when its status changes.
    pub fn start(
        spec: Spec,
        policy: watch::Receiver<Policy>,
        permits: mpsc::Sender<MayStart>,
        changed: Arc<Notify>,
    ) -> Arc<Self> {
        let slots = spec.load.slots.max(1) as usize;
        // Two rounds may wait for each slot; one asker has at most half of what runs while others wait.
        let limits = Limits {
            slots,
            queued: (slots * 8).max(32),
            running_per_peer: slots.div_ceil(2),
            queued_per_peer: (slots * 2).max(8),
        };
        // Whoever sends is bounded: a prompt has a slot of the queue and sends twice, the rest comes from one task.
        let (commands, receiver) = mpsc::unbounded_channel();
        let (status_sender, status) = watch::channel(Status::default());
        let (availability_sender, availability) =
            watch::channel(Availability { models: vec![spec.offer.clone()], problem: None });
        let publish = task::Publish { status: status_sender, availability: availability_sender, changed };
        task::spawn(spec.clone(), policy.clone(), permits, receiver, publish);
        let name = format!("engine {}", spec.offer.name);
        Arc::new(Self { name, spec, policy, limits, commands, availability, status, next_request: AtomicU64::new(1) })
    }

    /// What it computes and how.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What it is now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Tells the SHA-256 of the file, which was computed meanwhile.
    pub fn set_digest(&self, digest: [u8; 32]) {
        let _ = self.commands.send(Command::Digest(digest));
    }

    /// There is memory again: one that was refused for want of it need not wait any longer.
    pub fn memory_is_back(&self) {
        let _ = self.commands.send(Command::Memory);
    }

    /// It is not ended for having nothing to do.
    pub fn is_kept(&self) -> bool {
        self.policy.borrow().keep
    }

    /// Begins to load the model, also after it failed. Resolves when that has begun.
    ///
    /// # Errors
    /// Why it cannot be begun.
    pub async fn load(&self) -> Result<(), String> {
        self.ask(Command::Load).await.unwrap_or_else(|| Err("the engine is being ended".to_owned()))
    }

    /// Ends the child when its prompts have ended. Resolves when it is gone.
    pub async fn unload(&self) {
        self.ask(Command::Unload).await;
    }

    /// Ends the child if it has nothing to do. Resolves to whether it did, when it is gone.
    pub async fn unload_if_idle(&self) -> bool {
        self.ask(Command::UnloadIfIdle).await.unwrap_or(false)
    }

    /// Ends the child and this engine. Prompts in progress end with `why`. Resolves when the child is gone.
    pub async fn stop(&self, why: Failure) {
        self.ask(|reply| Command::Stop(why, reply)).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).ok()?;
        answer.await.ok()
    }

    async fn converse(&self, ask: Ask, out: mpsc::Sender<Text>, deadline: Instant) -> Result<Done, Failure> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (request, mut events) = Request::new(id, &ask, deadline);
        drop(ask);
        let _cancel = Cancel { id, commands: &self.commands };
        if self.commands.send(Command::Ask(Box::new(request))).is_err() {
            return Err(Failure::new(FailureKind::ModelUnavailable, "the model was taken away"));
        }
        let mut next = None;
        loop {
            let event = match next.take() {
                Some(event) => event,
                None => events.recv().await,
            };
            match event {
                Event::Text(mut text) => {
                    // Large ones are cut, so that what waits behind this is bounded too.
                    while text.len() > PIECE {
                        let rest = text.split_off(text.floor_char_boundary(PIECE));
                        send(&out, std::mem::replace(&mut text, rest)).await?;
                    }
                    next = events.join(&mut text, PIECE);
                    send(&out, text).await?;
                }
                Event::End(outcome) => return outcome,
            }
        }
    }
}

async fn send(out: &mpsc::Sender<Text>, text: String) -> Result<(), Failure> {
    out.send(Text::new(text)).await.map_err(|_| Failure::new(FailureKind::Cancelled, "the asker is gone"))
}

/// Tells the task that nobody waits for a prompt any more; after its end that is nothing new.
struct Cancel<'a> {
    id: u64,
    commands: &'a mpsc::UnboundedSender<Command>,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}

impl Backend for Engine {
    fn name(&self) -> &str {
        &self.name
    }

    fn availability(&self) -> watch::Receiver<Availability> {
        self.availability.clone()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn answer(&self, model: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        self.answer_by(Instant::now() + MAX_TIMEOUT, model, ask, out)
    }

    fn answer_by(&self, deadline: Instant, _: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        Box::pin(self.converse(ask, out, deadline))
    }
}
