//! The backend for any OpenAI-compatible server: Ollama, llama-server, vLLM, LM Studio, EXO, mesh-llm.
//!
//! Dropping a prompt closes its connection, and a server that watches its connections stops generating. No redirect is
//! followed and no proxy variable is read: the URL in the configuration is the whole truth about where text goes.

mod answer;
mod exo;
mod http;
mod identify;
mod look;
mod models;
mod refusal;
mod request;
mod sse;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use self::answer::IDLE;
use self::exo::Placements;
use self::http::{Body, Client, HttpError};
use self::look::Look;
use super::backend::{Answering, Availability, Backend, Limits};
use crate::domain::node::ModelState;
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, Text};
use crate::domain::upstream::Api;

/// What the configuration says of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenAiSettings {
    /// `http://127.0.0.1:11434/v1`; the path is completed with `/models` and `/chat/completions`.
    pub url: String,
    /// File that holds the key for `Authorization: Bearer`.
    pub api_key_file: Option<PathBuf>,
    /// Only these models are offered; empty offers all.
    pub models: Vec<String>,
    /// Which server it is; `None` finds out.
    pub api: Option<Api>,
    /// Text may go there in clear, though it is another machine.
    pub allow_http: bool,
    /// How much it takes at once.
    pub limits: Limits,
    /// What the server says of its slots counts, not `limits.slots`.
    pub learns_slots: bool,
}

/// Why a server cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenAiError {
    /// The URL is not `http://HOST[:PORT][/PATH]` or `https://…`, or no text may go there.
    #[error("{url:?} is not a URL of an OpenAI-compatible server: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The key cannot be read.
    #[error("the key in {path} cannot be read: {source}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// No trusted certificates for `https`.
    #[error("no certificates to trust were found on this machine: {0}")]
    Certificates(String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What prompts and looks share of one server. No lock is held across an await.
#[derive(Debug)]
struct Server {
    name: String,
    client: Arc<Client>,
    /// It was found on this machine; nobody named it.
    found: bool,
    /// What it is, as soon as that is known.
    api: Mutex<Option<Api>>,
    /// Names of models that the server knows by another one.
    ids: Mutex<HashMap<String, String>>,
    publish: watch::Sender<Availability>,
    /// When it last gave a whole answer.
    answered: Mutex<Option<Instant>>,
    placements: Arc<Placements>,
    limits: Limits,
    learns_slots: bool,
    /// Slots by its own word; 0 is unknown.
    learned: AtomicUsize,
}

impl Server {
    fn api(&self) -> Option<Api> {
        *lock(&self.api)
    }

    fn slots(&self) -> usize {
        self.limits_now().slots
    }

    fn limits_now(&self) -> Limits {
        let learned = self.learned.load(Ordering::Relaxed);
        let slots = match (self.learns_slots, learned) {
            (false, _) => self.limits.slots,
            (true, 0) => self.api().map_or(self.limits.slots, Api::usual_slots),
            (true, learned) => learned.min(4096),
        };
        // Half of the slots for one peer is the default; what was written otherwise stays.
        let is_default = self.learns_slots && self.limits.running_per_peer == (self.limits.slots / 2).max(1);
        let running_per_peer = if is_default { (slots / 2).max(1) } else { self.limits.running_per_peer };
        Limits { slots, running_per_peer, ..self.limits }
    }

    /// What a model of EXO is now.
    fn placement_state(&self, model: &str) -> ModelState {
        if self.placements.is_being_placed(model) {
            ModelState::Loading
        } else if self.placements.is_placed(model) {
            ModelState::Ready
        } else {
            ModelState::Available
        }
    }

    fn placement_changed(&self, model: &str) {
        let state = self.placement_state(model);
        self.publish.send_if_modified(|known| {
            let offer = known.models.iter_mut().find(|offer| offer.name == model);
            offer.is_some_and(|offer| std::mem::replace(&mut offer.state, state) != state)
        });
    }

    /// Has EXO place the model, when it is not placed already.
    async fn prepare(self: &Arc<Self>, model: &str) -> Result<(), Failure> {
        if self.placements.is_placed(model) {
            return Ok(());
        }
        let (server, name) = (Arc::clone(self), model.to_owned());
        self.placements.place(model, move || server.placement_changed(&name)).await
    }

    async fn post(&self, model: &str, ask: &Ask) -> Result<Body, Failure> {
        let (path, body) = request::request(model, ask);
        match timeout(IDLE, self.client.post(&format!("{}{path}", self.client.place().path), body)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(HttpError::Refused(refusal))) => {
                if refusal.is_loading() {
                    self.client.suspect();
                }
                Err(refusal.failure(model, ask))
            }
            Ok(Err(error)) => {
                self.client.suspect();
                Err(Failure::new(FailureKind::BackendFailed, error.to_string()))
            }
            Err(_) => {
                let seconds = IDLE.as_secs();
                Err(Failure::new(FailureKind::BackendFailed, format!("the backend did not begin an answer within {seconds} s")))
            }
        }
    }

    async fn answer(self: &Arc<Self>, model: &str, ask: &Ask, out: &mpsc::Sender<Text>) -> Result<Done, Failure> {
        let id = lock(&self.ids).get(model).cloned();
        let id = id.as_deref().unwrap_or(model);
        let response = if self.api() == Some(Api::Exo) { self.post_to_exo(id, ask).await? } else { self.post(id, ask).await? };
        let done = answer::read(response, id, ask, out).await?;
        *lock(&self.answered) = Some(Instant::now());
        Ok(done)
    }

    async fn post_to_exo(self: &Arc<Self>, model: &str, ask: &Ask) -> Result<Body, Failure> {
        if ask.raw {
            let detail = "EXO answers conversations alone: it has no endpoint for raw text";
            return Err(Failure::new(FailureKind::InvalidRequest, detail));
        }
        self.prepare(model).await?;
        match self.post(model, ask).await {
            // Somebody took it away since.
            Err(failure) if failure.kind == FailureKind::ModelUnavailable => {
                self.placements.forget(model);
                self.prepare(model).await?;
                self.post(model, ask).await
            }
            outcome => outcome,
        }
    }
}

/// One OpenAI-compatible server.
#[derive(Debug)]
pub struct OpenAi {
    server: Arc<Server>,
    looking: tokio::task::JoinHandle<()>,
}

impl Drop for OpenAi {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

impl OpenAi {
    /// Checks the settings and starts to look after the server, which may come and go.
    ///
    /// # Errors
    /// [`OpenAiError`].
    pub fn start(settings: OpenAiSettings) -> Result<Self, OpenAiError> {
        let name = format!("openai {}", settings.url);
        Self::start_as(name, false, settings)
    }

    /// One that was found at an address of this machine.
    ///
    /// # Errors
    /// [`OpenAiError`].
    pub(super) fn found(api: Api, origin: &str) -> Result<Self, OpenAiError> {
        let slots = api.usual_slots();
        let limits = Limits { slots, queued: 32, running_per_peer: slots / 2, queued_per_peer: 8 };
        let settings = OpenAiSettings {
            url: format!("{origin}/v1"),
            api_key_file: None,
            models: Vec::new(),
            api: Some(api),
            allow_http: false,
            limits,
            learns_slots: true,
        };
        Self::start_as(format!("{} at {origin}", api.as_str()), true, settings)
    }

    fn start_as(name: String, found: bool, settings: OpenAiSettings) -> Result<Self, OpenAiError> {
        let OpenAiSettings { url, api_key_file, models, api, allow_http, limits, learns_slots } = settings;
        let client = Arc::new(Client::new(&url, allow_http, api_key_file.as_deref())?);
        let problem = (!found).then(|| "not reached yet".to_owned());
        let (publish, _) = watch::channel(Availability { models: Vec::new(), problem });
        let server = Arc::new(Server {
            name,
            placements: Arc::new(Placements::new(Arc::clone(&client))),
            client,
            found,
            api: Mutex::new(api),
            ids: Mutex::default(),
            publish,
            answered: Mutex::default(),
            limits,
            learns_slots,
            learned: AtomicUsize::new(0),
        });
        let looking = tokio::spawn(Look::new(Arc::clone(&server), models).run());
        Ok(Self { server, looking })
    }

    /// Connections made to the server so far: fewer than exchanges, because they are kept.
    pub fn connections(&self) -> u64 {
        self.server.client.dialled()
    }
}

/// Which of `candidates` listens at `origin`, such as `http://127.0.0.1:8080`.
pub(super) async fn identify(origin: &str, candidates: &[Api]) -> Option<Api> {
    let client = Arc::new(Client::new(&format!("{origin}/v1"), false, None).ok()?);
    identify::identify(&client, candidates).await
}

impl Backend for OpenAi {
    fn name(&self) -> &str {
        &self.server.name
    }

    fn availability(&self) -> watch::Receiver<Availability> {
        self.server.publish.subscribe()
    }

    fn limits(&self) -> Limits {
        self.server.limits_now()
    }

    fn answer(&self, model: String, ask: Ask, out: mpsc::Sender<Text>) -> Answering<'_> {
        Box::pin(async move { self.server.answer(&model, &ask, &out).await })
    }
}
