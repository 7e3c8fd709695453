//! Looks after one server: whether it is there, which kind it is, which models it has.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::http::{Client, HttpError};
use super::identify::identify;
use super::models::{self, Found, Shown};
use super::{Server, lock};
use crate::domain::node::ModelState;
use crate::domain::upstream::Api;
use crate::serve::backend::Availability;

/// Between two looks at a server that is well.
const HEALTHY: Duration = Duration::from_secs(30);
/// Answers say as much as a look, but not which models are new: that is asked this often all the same.
const NEWS: Duration = Duration::from_secs(300);
/// Between two looks at a server that is away: first, and at most.
const AWAY_FIRST: Duration = Duration::from_secs(1);
const AWAY_LONGEST: Duration = Duration::from_secs(30);
/// A look takes at most this long.
const LOOK: Duration = Duration::from_secs(5);
/// `/v1/models` of a server with many models is some tens of KiB.
const MAX_LIST_BYTES: usize = 1 << 20;
/// To find out what a server is; one that does not answer these questions is taken as it is.
const RECOGNISED: Duration = Duration::from_secs(2);

pub(super) struct Look {
    server: Arc<Server>,
    wanted: Vec<String>,
    /// Ollama's details of a model, by the digest of its manifest: they do not change.
    shown: HashMap<String, Shown>,
}

impl Look {
    pub(super) fn new(server: Arc<Server>, wanted: Vec<String>) -> Self {
        Self { server, wanted, shown: HashMap::new() }
    }

    /// Often while the server is away, rarely while it is well, hardly while it answers.
    pub(super) async fn run(mut self) {
        let mut away = AWAY_FIRST;
        let mut looked = Instant::now();
        loop {
            let quiet = self.server.answered.lock().is_ok_and(|at| at.is_none_or(|at| at.elapsed() >= HEALTHY));
            let is_well = self.server.publish.borrow().problem.is_none();
            let mut pause = HEALTHY;
            if quiet || !is_well || looked.elapsed() >= NEWS {
                looked = Instant::now();
                let found = match timeout(LOOK, self.models()).await {
                    Ok(found) => found,
                    Err(_) => Err(format!("it did not answer within {} s", LOOK.as_secs())),
                };
                match &found {
                    Ok(_) => away = AWAY_FIRST,
                    Err(_) => {
                        pause = away;
                        away = (away * 2).min(AWAY_LONGEST);
                    }
                }
                self.tell(found);
            }
            self.server.client.sweep();
            tokio::select! {
                () = sleep(pause) => {}
                () = self.server.client.suspected() => *lock(&self.server.answered) = None,
            }
        }
    }

    fn tell(&self, found: Result<Vec<Found>, String>) {
        let now = match found {
            Ok(found) => {
                let ids = found.iter().filter(|found| found.id != found.offer.name);
                *lock(&self.server.ids) = ids.map(|found| (found.offer.name.clone(), found.id.clone())).collect();
                let problem = found.is_empty().then(|| self.without_models()).flatten();
                Availability { models: found.into_iter().map(|found| found.offer).collect(), problem }
            }
            Err(problem) => Availability { models: Vec::new(), problem: Some(problem) },
        };
        self.server.publish.send_if_modified(|known| {
            let changed = *known != now;
            if changed {
                let (backend, models) = (&self.server.name, now.models.len());
                match &now.problem {
                    None => tracing::info!(backend, models, "backend {backend} is there, with {models} models"),
                    Some(problem) => tracing::warn!(backend, "backend {backend} is away: {problem}"),
                }
                *known = now;
            }
            changed
        });
    }

    /// One that was found by itself and has no model yet is nobody's problem.
    fn without_models(&self) -> Option<String> {
        if self.server.found {
            return None;
        }
        let hint = self.server.api().and_then(Api::model_hint);
        Some(hint.map_or_else(|| "it serves no model".to_owned(), |hint| format!("it serves no model; {hint}")))
    }

    async fn models(&mut self) -> Result<Vec<Found>, String> {
        let server = Arc::clone(&self.server);
        let api = match server.api() {
            Some(api) => api,
            // Its own questions go to a server of this network; elsewhere "https" is the OpenAI API and nothing else.
            None if server.client.place().secure => Api::OpenAi,
            None => self.recognise().await?,
        };
        let found = self.list(api).await?;
        *lock(&server.api) = Some(api);
        let slots = server.slots();
        Ok(models::offered(found, &self.wanted, slots))
    }

    async fn recognise(&self) -> Result<Api, String> {
        let client = &self.server.client;
        let candidates = match client.get(&format!("{}/models", client.place().path), MAX_LIST_BYTES).await {
            Ok(list) => models::candidates(&list),
            Err(HttpError::Refused(refusal)) if refusal.is_loading() => &[Api::LlamaServer],
            Err(error) => return Err(problem(client, Api::OpenAi, error)),
        };
        let recognised = timeout(RECOGNISED, identify(client, candidates)).await;
        Ok(recognised.ok().flatten().unwrap_or(Api::OpenAi))
    }

    async fn list(&mut self, api: Api) -> Result<Vec<Found>, String> {
        let client = Arc::clone(&self.server.client);
        let base = format!("{}/models", client.place().path);
        match api {
            Api::Ollama => self.ollama().await,
            Api::LmStudio => models::lm_studio(&self.get(&format!("{}/api/v0/models", client.root()), api).await?),
            Api::LlamaServer => self.llama_server(&base).await,
            Api::Exo => self.exo(&base).await,
            Api::OpenAi | Api::Vllm | Api::MeshLlm => {
                let list = self.get(&base, api).await?;
                if models::owner(&list).is_some_and(|owner| owner == models::OWN_NAME) {
                    return Err(
                        "it is an endpoint of OpenGateway, which would ask itself: take it out of the configuration".to_owned()
                    );
                }
                models::openai(&list, api)
            }
        }
    }

    async fn get(&self, path: &str, api: Api) -> Result<Vec<u8>, String> {
        self.server.client.get(path, MAX_LIST_BYTES).await.map_err(|error| problem(&self.server.client, api, error))
    }

    async fn llama_server(&self, base: &str) -> Result<Vec<Found>, String> {
        let api = Api::LlamaServer;
        let mut found = models::openai(&self.get(base, api).await?, api)?;
        let props = self.get(&format!("{}/props", self.server.client.root()), api).await?;
        let props = models::props(&props).unwrap_or_default();
        self.server.learned.store(props.slots.unwrap_or(0), Ordering::Relaxed);
        if let (Some(context), [only]) = (props.context, found.as_mut_slice()) {
            only.offer.context_tokens = context;
        }
        Ok(found)
    }

    async fn ollama(&mut self) -> Result<Vec<Found>, String> {
        let api = Api::Ollama;
        let root = self.server.client.root().to_owned();
        let mut tagged = models::ollama(&self.get(&format!("{root}/api/tags"), api).await?)?;
        tagged.truncate(models::MAX_MODELS);
        let loaded = self.get(&format!("{root}/api/ps"), api).await.map(|body| models::ollama_loaded(&body)).unwrap_or_default();
        let mut found = Vec::with_capacity(tagged.len());
        for tag in &mut tagged {
            let shown = self.show(&root, tag).await;
            if shown.mute {
                continue;
            }
            let mut model = tag.found.clone();
            model.offer.parameters = shown.parameters.or(model.offer.parameters);
            model.offer.digest = shown.digest;
            model.offer.context_tokens = shown.context.unwrap_or(0);
            if let Some(context) = loaded.get(&model.id) {
                model.offer.state = ModelState::Ready;
                model.offer.context_tokens = context.unwrap_or(model.offer.context_tokens);
            }
            found.push(model);
        }
        self.shown.retain(|manifest, _| tagged.iter().any(|tag| tag.manifest == *manifest));
        Ok(found)
    }

    async fn show(&mut self, root: &str, tag: &models::Tagged) -> Shown {
        if let Some(shown) = self.shown.get(&tag.manifest) {
            return shown.clone();
        }
        let ask = serde_json::to_vec(&serde_json::json!({ "model": tag.found.id })).unwrap_or_default();
        let shown = self.server.client.post_whole(&format!("{root}/api/show"), ask, MAX_LIST_BYTES * 16).await;
        let Ok(shown) = shown.map(|body| models::ollama_show(&body)) else { return Shown::default() };
        self.shown.insert(tag.manifest.clone(), shown.clone());
        shown
    }

    /// What is downloaded, and what the configuration names: to place that may begin a download of many GB.
    async fn exo(&self, base: &str) -> Result<Vec<Found>, String> {
        let api = Api::Exo;
        let list = if self.wanted.is_empty() { format!("{base}?status=downloaded") } else { base.to_owned() };
        let mut found = models::openai(&self.get(&list, api).await?, api)?;
        self.server.placements.look().await?;
        for model in &mut found {
            model.offer.state = self.server.placement_state(&model.id);
        }
        Ok(found)
    }
}

/// What is wrong with a server, for `status`, with what may mend it.
fn problem(client: &Client, api: Api, error: HttpError) -> String {
    let place = client.place();
    let is_away = matches!(error, HttpError::Connect(..));
    let said = match error {
        HttpError::Refused(refusal) if refusal.is_loading() => return "it is loading its model".to_owned(),
        HttpError::Refused(refusal) if matches!(refusal.status, 401 | 403) => {
            format!("{}; give it a key with api_key_file", refusal.shown())
        }
        HttpError::Refused(refusal) => refusal.shown(),
        error => error.to_string(),
    };
    let usual = Api::ALL.into_iter().find(|usual| usual.usual_port() == Some(place.port));
    let api = if api == Api::OpenAi { usual.unwrap_or(api) } else { api };
    match api.start_hint() {
        Some(start) if is_away && place.is_loopback() => format!("{said}; start it with: {start}"),
        _ if is_away => format!("{said}; is its address right, and does it listen for other machines?"),
        _ => said,
    }
}
