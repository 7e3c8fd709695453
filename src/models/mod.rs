//! The models on this machine: GGUF files in the models directories, and what the engine makes of them.
//!
//! The task behind [`Handle`] owns the list; whoever wants to change it asks.

mod digest;
mod entry;
pub mod gguf;
pub mod library;
mod memory;
mod notice;
mod store;
mod task;

pub use digest::{hex, unhex};
pub use entry::{DEFAULT_MAX_CONTEXT, Settings};
pub use task::{Config, Models, spawn};

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use tokio::sync::{mpsc, oneshot, watch};

use crate::domain::node::ModelState;

/// Requests that may wait for the task.
const QUEUE: usize = 64;

/// One model file.
#[derive(Debug, Clone, PartialEq)]
pub struct Local {
    /// The name to ask for: that of the file without `.gguf`.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Bytes of the file.
    pub size: u64,
    /// SHA-256 of the file; `None` until it was computed.
    pub digest: Option<[u8; 32]>,
    /// What the header says, such as "llama".
    pub architecture: Option<String>,
    /// Weights.
    pub parameters: Option<u64>,
    /// Such as "Q4_K_M".
    pub quantisation: Option<String>,
    /// Context window that the model was trained with, in tokens.
    pub trained_context: Option<u32>,
    /// Context window that a prompt has here, in tokens.
    pub context: Option<u32>,
    /// Prompts answered at once.
    pub slots: u32,
    /// What it is now.
    pub state: ModelState,
    /// From 0 to 1 while it is being loaded.
    pub progress: Option<f32>,
    /// What is wrong with it, a sentence.
    pub problem: Option<String>,
    /// Bytes of memory that it needs besides its file; an estimate before it was loaded.
    pub memory: Option<u64>,
    /// What computes it while it is loaded.
    pub device: Option<String>,
    /// Process id of its engine while it has one.
    pub engine_pid: Option<u32>,
    /// It lies in the directory that `ogctl models add` writes to, so it can be removed.
    pub removable: bool,
    /// Prompts answered since the start.
    pub answered: u64,
    /// Tokens of prompts and of answers since the start.
    pub prompt_tokens: u64,
    /// See `prompt_tokens`.
    pub completion_tokens: u64,
    /// Tokens a second of one answer, as seen lately.
    pub tokens_per_second: Option<f64>,
    /// Times that its engine died since the start.
    pub crashes: u32,
}

/// Why something could not be done with a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No model of this name is on this machine.
    #[error("no model {0:?} is on this machine")]
    NoSuchModel(String),
    /// A model of this name is there.
    #[error("{0}")]
    Exists(String),
    /// The name is none, or the file is no model.
    #[error("{0}")]
    Invalid(String),
    /// No space, or the directory cannot be written.
    #[error("{0}")]
    Storage(String),
    /// It is not one that can be removed, or it is in use.
    #[error("{0}")]
    Refused(String),
    /// There is no engine in this installation, or it is switched off.
    #[error("{0}")]
    NoEngine(String),
    /// Too much is asked at once.
    #[error("the models are busy; try again in a moment")]
    Busy,
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    ShuttingDown,
}

/// How far a copy or a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What a check of a file found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// SHA-256 of the file now.
    pub digest: [u8; 32],
    /// SHA-256 when it was added or first seen; `None` when none was kept.
    pub expected: Option<[u8; 32]>,
}

/// A request with its reply.
#[derive(Debug)]
pub enum Request {
    /// Copy this file into the models directory under a temporary name, hash it, rename it to `NAME.gguf`. A closed
    /// `progress` cancels it and leaves nothing.
    Add {
        /// Its name here.
        name: String,
        /// Open for reading, at its beginning.
        file: OwnedFd,
        /// Refuse it unless it has this SHA-256.
        digest: Option<[u8; 32]>,
        /// How far it is, as it goes.
        progress: mpsc::Sender<Progress>,
        /// The outcome.
        reply: oneshot::Sender<Result<Local, ModelError>>,
    },
    /// Remove the file; its engine is ended first.
    Remove(String, oneshot::Sender<Result<(), ModelError>>),
    /// Hash the file again. A closed `progress` cancels it.
    Verify {
        /// Which.
        name: String,
        /// How far it is, as it goes.
        progress: mpsc::Sender<Progress>,
        /// The outcome.
        reply: oneshot::Sender<Result<Verified, ModelError>>,
    },
    /// Load it now (again, when it had failed); the reply comes when the loading has begun.
    Load(String, oneshot::Sender<Result<(), ModelError>>),
    /// End its engine when its prompts have ended.
    Unload(String, oneshot::Sender<Result<(), ModelError>>),
}

/// A cheap clone that shows the models and asks for changes.
#[derive(Debug, Clone)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    models: watch::Receiver<Vec<Local>>,
}

impl Handle {
    /// A handle and its other ends: the task's, or a test's.
    pub fn new(models: Vec<Local>) -> (Self, mpsc::Receiver<Request>, watch::Sender<Vec<Local>>) {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let (publish, models) = watch::channel(models);
        (Self { requests, models }, receiver, publish)
    }

    /// The models of this machine by name.
    pub fn list(&self) -> Vec<Local> {
        self.models.borrow().clone()
    }

    /// Wakes when that changes.
    pub fn watch(&self) -> watch::Receiver<Vec<Local>> {
        self.models.clone()
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<Result<T, ModelError>>) -> Request) -> Result<T, ModelError> {
        let (reply, answer) = oneshot::channel();
        self.requests.try_send(request(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ModelError::Busy,
            mpsc::error::TrySendError::Closed(_) => ModelError::ShuttingDown,
        })?;
        answer.await.map_err(|_| ModelError::ShuttingDown)?
    }

    /// Copies a file into the models directory; see [`Request::Add`]. Not cancel-safe: close `progress` to cancel it.
    ///
    /// # Errors
    /// [`ModelError`]; then nothing is left of it.
    pub async fn add(
        &self,
        name: String,
        file: OwnedFd,
        digest: Option<[u8; 32]>,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Local, ModelError> {
        self.ask(|reply| Request::Add { name, file, digest, progress, reply }).await
    }

    /// Removes a model.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn remove(&self, name: String) -> Result<(), ModelError> {
        self.ask(|reply| Request::Remove(name, reply)).await
    }

    /// Hashes a model's file again.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn verify(&self, name: String, progress: mpsc::Sender<Progress>) -> Result<Verified, ModelError> {
        self.ask(|reply| Request::Verify { name, progress, reply }).await
    }

    /// Begins to load a model.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn load(&self, name: String) -> Result<(), ModelError> {
        self.ask(|reply| Request::Load(name, reply)).await
    }

    /// Ends the engine of a model when its prompts have ended.
    ///
    /// # Errors
    /// [`ModelError`].
    pub async fn unload(&self, name: String) -> Result<(), ModelError> {
        self.ask(|reply| Request::Unload(name, reply)).await
    }
}
