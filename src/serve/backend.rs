//! What a backend is. `echo`, `openai` and `engine` implement it.

use std::future::Future;
use std::pin::Pin;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::domain::node::ModelOffer;
use crate::domain::prompt::{Ask, Done, Failure, Text};

/// What a backend can do now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Availability {
    /// Models that can be asked for now; empty while the upstream is away.
    pub models: Vec<ModelOffer>,
    /// Why there are none, for `status`; `None` when all is well.
    pub problem: Option<String>,
}

/// How much a backend takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Prompts running at once.
    pub slots: usize,
    /// Prompts waiting, in all.
    pub queued: usize,
    /// Prompts of one peer running at once while others wait.
    pub running_per_peer: usize,
    /// Prompts of one peer waiting.
    pub queued_per_peer: usize,
}

/// An answer in the making.
pub type Answering<'a> = Pin<Box<dyn Future<Output = Result<Done, Failure>> + Send + 'a>>;

/// One source of answers. Shared by all prompts; its methods take `&self`.
pub trait Backend: std::fmt::Debug + Send + Sync + 'static {
    /// For people: "echo", "openai http://127.0.0.1:11434/v1".
    fn name(&self) -> &str;

    /// "echo" answers are no answers of a model: used only when nothing else serves.
    fn is_last_resort(&self) -> bool {
        false
    }

    /// What it can do, as it changes.
    fn availability(&self) -> watch::Receiver<Availability>;

    /// How much it takes at once.
    fn limits(&self) -> Limits;

    /// The whole answer without waiting, for a backend that computes nothing; `None` asks for [`Backend::answer`].
    fn answer_now(&self, _model: &str, _ask: &Ask) -> Option<(Vec<Text>, Done)> {
        None
    }

    /// Answers `ask` (whose model is one of [`Availability::models`]) piece by piece into `out`.
    ///
    /// Dropping the future cancels the work, at the upstream too. `out` being full pauses it; `out` being closed
    /// ends it with `Cancelled`.
    fn answer(&self, model: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_>;

    /// The same for a backend that can say early that it will not be in time; `deadline` itself is kept by the queue.
    fn answer_by(&self, _deadline: Instant, model: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        self.answer(model, ask, out)
    }
}
