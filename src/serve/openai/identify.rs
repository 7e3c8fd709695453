//! Which kind of server answers. Strict: ports 8000 and 8080 are everybody's, so a server is of a kind only when it answers a
//! question of that kind in the right words.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::http::{Client, HttpError};
use super::models;
use crate::domain::upstream::Api;

/// All the questions for one kind.
const QUESTIONS: Duration = Duration::from_secs(3);
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// The first of `candidates` that the server is.
pub(super) async fn identify(client: &Arc<Client>, candidates: &[Api]) -> Option<Api> {
    for &api in candidates {
        if timeout(QUESTIONS, is(client, api)).await.is_ok_and(|is| is) {
            return Some(api);
        }
    }
    None
}

async fn is(client: &Arc<Client>, api: Api) -> bool {
    match api {
        Api::OpenAi => false,
        Api::Ollama => {
            has_version(client, "/api/version").await
                && get(client, "/api/tags").await.is_some_and(|tags| models::ollama(&tags).is_ok())
        }
        Api::LlamaServer => match client.get(&format!("{}/props", client.root()), MAX_ANSWER_BYTES).await {
            Ok(props) => models::props(&props).is_some(),
            Err(HttpError::Refused(refusal)) => refusal.is_loading(),
            Err(_) => false,
        },
        Api::Vllm => has_version(client, "/version").await && is_owned_by(client, "vllm").await,
        Api::LmStudio => get(client, "/api/v0/models").await.is_some_and(|list| models::is_lm_studio(&list)),
        Api::Exo => get(client, "/node_id").await.is_some_and(|id| is_node_id(&id)) && is_owned_by(client, "exo").await,
        Api::MeshLlm => is_owned_by(client, "mesh-llm").await,
    }
}

async fn get(client: &Arc<Client>, path: &str) -> Option<Vec<u8>> {
    client.get(&format!("{}{path}", client.root()), MAX_ANSWER_BYTES).await.ok()
}

async fn has_version(client: &Arc<Client>, path: &str) -> bool {
    let Some(body) = get(client, path).await else { return false };
    serde_json::from_slice::<Value>(&body).is_ok_and(|said| said.get("version").is_some_and(Value::is_string))
}

async fn is_owned_by(client: &Arc<Client>, owner: &str) -> bool {
    get(client, "/v1/models").await.and_then(|list| models::owner(&list)).is_some_and(|owned_by| owned_by == owner)
}

/// EXO's source answers with the bare text, its documentation with an object.
fn is_node_id(body: &[u8]) -> bool {
    let said: Value = serde_json::from_slice(body).unwrap_or_default();
    said.get("node_id").unwrap_or(&said).as_str().is_some_and(|id| !id.is_empty())
}
