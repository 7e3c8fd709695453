//! Upstreams of every kind, played by stand-ins that answer as the recorded servers do.

mod connections;
mod discovery;
mod exo;
mod llama_server;
mod lm_studio;
mod ollama;
mod refused;
mod stand;
mod vllm;

use std::sync::Arc;
use std::time::Duration;

use opengateway::domain::node::ModelOffer;
use opengateway::domain::prompt::{Ask, Done, Failure, Text};
use opengateway::domain::upstream::Api;
use opengateway::serve::backend::{Availability, Backend, Limits};
use opengateway::serve::{OpenAi, OpenAiSettings};
use tokio::sync::mpsc;
use tokio::time::timeout;

pub const DEADLINE: Duration = Duration::from_secs(20);

pub fn settings(url: &str, api: Option<Api>) -> OpenAiSettings {
    OpenAiSettings {
        url: url.to_owned(),
        api_key_file: None,
        models: Vec::new(),
        api,
        allow_http: false,
        limits: Limits { slots: 4, queued: 32, running_per_peer: 2, queued_per_peer: 8 },
        learns_slots: true,
    }
}

pub fn backend(url: &str, api: Option<Api>) -> Arc<OpenAi> {
    Arc::new(OpenAi::start(settings(url, api)).unwrap())
}

/// What it offers, once `wanted` holds.
pub async fn until(backend: &OpenAi, wanted: impl FnMut(&Availability) -> bool) -> Vec<ModelOffer> {
    let mut availability = backend.availability();
    let found = timeout(DEADLINE, availability.wait_for(wanted)).await;
    let last = backend.availability().borrow().clone();
    found.unwrap_or_else(|_| panic!("in time; last: {last:?}")).unwrap().models.clone()
}

pub async fn models(backend: &OpenAi) -> Vec<ModelOffer> {
    until(backend, |now| !now.models.is_empty()).await
}

pub fn ask(text: &str) -> Ask {
    Ask { prompt: Text::new(text), ..Ask::default() }
}

/// The whole answer.
pub async fn answer(backend: &OpenAi, model: &str, ask: Ask) -> Result<(String, Done), Failure> {
    let (out, mut pieces) = mpsc::channel::<Text>(64);
    let collecting = async {
        let mut text = String::new();
        while let Some(piece) = pieces.recv().await {
            text.push_str(piece.as_str());
        }
        text
    };
    let both = async { tokio::join!(backend.answer(model.to_owned(), ask, out), collecting) };
    let (outcome, text) = timeout(DEADLINE, both).await.expect("an outcome in time");
    outcome.map(|done| (text, done))
}
