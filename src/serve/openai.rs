//! The backend for any OpenAI-compatible server: Ollama, llama-server, vLLM, LM Studio, EXO.
//!
//! Each prompt has a connection of its own, so dropping the prompt closes it, and a server that watches its connections
//! stops generating. No redirect is followed and no proxy variable is read: the URL in the configuration is the whole
//! truth about where text goes.

mod http;
mod sse;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use self::http::{Client, HttpError};
use self::sse::Chunk;
use super::backend::{Answering, Availability, Backend, Limits};
use crate::domain::node::{ModelOffer, ModelSource};
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, MAX_ANSWER_BYTES, Text, Usage};

/// Between two looks at a server that is well.
const HEALTHY: Duration = Duration::from_secs(30);
/// Between two looks at a server that is away: first, and at most.
const AWAY_FIRST: Duration = Duration::from_secs(1);
const AWAY_LONGEST: Duration = Duration::from_secs(30);
/// A look takes at most this long.
const LOOK: Duration = Duration::from_secs(5);
/// A server that sends nothing for this long in the middle of an answer is given up.
const IDLE: Duration = Duration::from_secs(60);
/// Models that one server may list.
const MAX_MODELS: usize = 64;
/// `/v1/models` of a server with many models is some tens of KiB.
const MAX_LIST_BYTES: usize = 1 << 20;

/// What the configuration says of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenAiSettings {
    /// `http://127.0.0.1:11434/v1`; the path is completed with `/models` and `/chat/completions`.
    pub url: String,
    /// File that holds the key for `Authorization: Bearer`.
    pub api_key_file: Option<PathBuf>,
    /// Only these models are offered; empty offers all.
    pub models: Vec<String>,
    /// How much it takes at once.
    pub limits: Limits,
}

/// Why a server cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenAiError {
    /// The URL is not `http://HOST[:PORT][/PATH]` or `https://…`.
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

/// One OpenAI-compatible server.
#[derive(Debug)]
pub struct OpenAi {
    name: String,
    client: Arc<Client>,
    limits: Limits,
    availability: watch::Receiver<Availability>,
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
        let OpenAiSettings { url, api_key_file, models, limits } = settings;
        let client = Arc::new(Client::new(&url, api_key_file.as_deref())?);
        let waiting = Availability { models: Vec::new(), problem: Some("not reached yet".to_owned()) };
        let (publish, availability) = watch::channel(waiting);
        let looking = tokio::spawn(look_after(Arc::clone(&client), models, publish));
        Ok(Self { name: format!("openai {url}"), client, limits, availability, looking })
    }
}

#[derive(Deserialize)]
struct ModelList {
    data: Vec<ModelEntry>,
}

#[derive(Deserialize)]
struct ModelEntry {
    id: String,
    /// vLLM's name for the context window.
    #[serde(default)]
    max_model_len: Option<u32>,
    #[serde(default)]
    context_length: Option<u32>,
}

/// Asks for the models again and again: often while the server is away, rarely while it is well.
async fn look_after(client: Arc<Client>, wanted: Vec<String>, publish: watch::Sender<Availability>) {
    let mut away = AWAY_FIRST;
    loop {
        let found = match timeout(LOOK, client.get("/models", MAX_LIST_BYTES)).await {
            Ok(Ok(body)) => read_models(&body, &wanted),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("it did not answer within {} s", LOOK.as_secs())),
        };
        let (now, pause) = match found {
            Ok(models) => {
                away = AWAY_FIRST;
                let problem = models.is_empty().then(|| "it serves no model".to_owned());
                (Availability { models, problem }, HEALTHY)
            }
            Err(problem) => {
                let pause = away;
                away = (away * 2).min(AWAY_LONGEST);
                (Availability { models: Vec::new(), problem: Some(problem) }, pause)
            }
        };
        publish.send_if_modified(|known| {
            let changed = *known != now;
            if changed {
                let (backend, models) = (client.authority(), now.models.len());
                match &now.problem {
                    None => tracing::info!(backend, models, "backend {backend} is there, with {models} models"),
                    Some(problem) => tracing::warn!(backend, "backend {backend} is away: {problem}"),
                }
                *known = now;
            }
            changed
        });
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = client.suspected() => {}
        }
    }
}

fn read_models(body: &[u8], wanted: &[String]) -> Result<Vec<ModelOffer>, String> {
    let list: ModelList = serde_json::from_slice(body).map_err(|error| format!("its list of models cannot be read: {error}"))?;
    Ok(list
        .data
        .into_iter()
        .filter(|entry| wanted.is_empty() || wanted.contains(&entry.id))
        .filter(|entry| !entry.id.is_empty() && entry.id.len() <= crate::wire::limits::MAX_MODEL_NAME_BYTES)
        .take(MAX_MODELS)
        .map(|entry| ModelOffer {
            context_tokens: entry.max_model_len.or(entry.context_length).unwrap_or(0),
            source: ModelSource::Upstream,
            ..ModelOffer::named(entry.id)
        })
        .collect())
}

#[derive(serde::Serialize)]
struct ChatMessage<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(serde::Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(serde::Serialize)]
struct ChatRequest<'a> {
    model: &'a str,
    messages: Vec<ChatMessage<'a>>,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
}

fn request(model: &str, ask: &Ask) -> Vec<u8> {
    let system = ask.system.as_ref().map(|system| ChatMessage { role: "system", content: system.as_str() });
    let user = ChatMessage { role: "user", content: ask.prompt.as_str() };
    let body = ChatRequest {
        model,
        messages: system.into_iter().chain([user]).collect(),
        stream: true,
        stream_options: StreamOptions { include_usage: true },
        max_tokens: ask.max_tokens,
        temperature: ask.temperature,
        seed: ask.seed,
    };
    // The type has no maps and no numbers that JSON lacks: checked before (`infer::check`).
    serde_json::to_vec(&body).unwrap_or_default()
}

/// What the HTTP status of a refusal means to the asker.
fn refused(error: HttpError, model: &str) -> Failure {
    let detail = error.to_string();
    match error {
        HttpError::Status { status: 400 | 413 | 415 | 422, .. } => Failure::new(FailureKind::InvalidRequest, detail),
        HttpError::Status { status: 404, .. } => {
            Failure::new(FailureKind::ModelUnavailable, format!("{detail} (asked for model {model:?})"))
        }
        HttpError::Status { status: 429 | 503, retry_after, .. } => {
            Failure::busy(detail, retry_after.unwrap_or(Duration::from_secs(1)))
        }
        _ => Failure::new(FailureKind::BackendFailed, detail),
    }
}

fn broken(said: bool, what: &str) -> Failure {
    let kind = if said { FailureKind::Interrupted } else { FailureKind::BackendFailed };
    Failure::new(kind, format!("the backend's answer broke off: {what}"))
}

impl Backend for OpenAi {
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
        Box::pin(async move {
            let response = match timeout(IDLE, self.client.post("/chat/completions", request(&model, &ask))).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    if !matches!(error, HttpError::Status { .. }) {
                        self.client.suspect();
                    }
                    return Err(refused(error, &model));
                }
                Err(_) => {
                    return Err(Failure::new(FailureKind::BackendFailed, "the backend did not begin an answer within 60 s"));
                }
            };
            read_answer(response, &ask, &out).await
        })
    }
}

async fn read_answer(mut response: http::Body, ask: &Ask, out: &mpsc::Sender<Text>) -> Result<Done, Failure> {
    let mut events = sse::Events::new(response.is_event_stream());
    let mut finish = None;
    let mut usage = None;
    let mut pieces = 0_u32;
    let mut bytes = 0;
    'reading: loop {
        let data = match timeout(IDLE, response.next()).await {
            Ok(Ok(Some(data))) => data,
            Ok(Ok(None)) => break,
            Ok(Err(error)) => return Err(broken(pieces > 0, &error.to_string())),
            Err(_) => return Err(broken(pieces > 0, "it sent nothing for 60 s")),
        };
        events.push(&data).map_err(|error| broken(pieces > 0, &error.to_string()))?;
        while let Some(chunk) = events.next().map_err(|error| broken(pieces > 0, &error.to_string()))? {
            match chunk {
                Chunk::Done => break 'reading,
                Chunk::Error(message) => return Err(broken(pieces > 0, &message)),
                Chunk::Data { text, finish_reason, usage: counted } => {
                    if let Some(text) = text.filter(|text| !text.is_empty()) {
                        pieces += 1;
                        bytes += text.len();
                        // The queue has the limit too; here it saves the memory of a server that never ends a line.
                        if bytes > MAX_ANSWER_BYTES {
                            return Err(Failure::new(FailureKind::AnswerTooLarge, "the answer passed the limit of 4 MiB"));
                        }
                        out.send(Text::new(text)).await.map_err(|_| Failure::new(FailureKind::Cancelled, "the asker is gone"))?;
                    }
                    finish = finish_reason.or(finish);
                    usage = counted.or(usage);
                }
            }
        }
    }
    if let Some(Chunk::Data { text, finish_reason, usage: counted }) =
        events.finish().map_err(|error| broken(pieces > 0, &error.to_string()))?
    {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            pieces += 1;
            out.send(Text::new(text)).await.map_err(|_| Failure::new(FailureKind::Cancelled, "the asker is gone"))?;
        }
        finish = finish_reason.or(finish);
        usage = counted.or(usage);
    }
    let Some(reason) = finish else {
        return Err(broken(pieces > 0, "it ended without a finish reason"));
    };
    let finish = if reason == "length" { FinishReason::Length } else { FinishReason::Stop };
    // A server that does not count: a piece is about a token, and a word of the prompt about one and a third.
    let usage = usage.unwrap_or_else(|| Usage {
        prompt_tokens: u32::try_from(ask.prompt.as_str().split_whitespace().count() * 4 / 3).unwrap_or(u32::MAX),
        completion_tokens: pieces,
    });
    Ok(Done { finish, usage })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_models_is_filtered_and_bounded() {
        let body = br#"{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"b"},{"id":""}]}"#;
        let all = read_models(body, &[]).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(
            all[0],
            ModelOffer { name: "a".to_owned(), context_tokens: 4096, source: ModelSource::Upstream, ..ModelOffer::default() }
        );
        assert_eq!(read_models(body, &["b".to_owned()]).unwrap()[0].name, "b");
        assert!(read_models(b"<html>", &[]).is_err());
    }

    #[test]
    fn the_request_says_what_was_asked() {
        let ask = Ask {
            prompt: Text::new("hi"),
            system: Some(Text::new("be brief")),
            max_tokens: Some(5),
            temperature: Some(0.0),
            seed: Some(7),
            ..Ask::default()
        };
        let body: serde_json::Value = serde_json::from_slice(&request("m", &ask)).unwrap();
        assert_eq!(body["messages"][0]["role"], "system");
        assert_eq!(body["messages"][1]["content"], "hi");
        assert_eq!((&body["max_tokens"], &body["seed"], &body["stream"]), (&5.into(), &7.into(), &true.into()));
    }
}
