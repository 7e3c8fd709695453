//! EXO answers only for models that were placed on its machines before: previews, instance, await. Several prompts for one
//! model place it once, and whoever waits may go away without stopping it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use serde_json::Value;
use tokio::time::timeout;

use super::http::{Client, HttpError};
use super::sse::Events;
use crate::domain::prompt::{Failure, FailureKind};

/// EXO computes placements and takes commands in well under a second.
const COMMAND: Duration = Duration::from_secs(30);
/// It waits this long at most for an instance, by its own limit.
const AWAIT_SECONDS: u64 = 300;
const MAX_BYTES: usize = 8 << 20;

type Placing = Shared<BoxFuture<'static, Result<(), Failure>>>;

/// What is placed, and what is being placed.
pub(super) struct Placements {
    client: Arc<Client>,
    placed: Mutex<HashSet<String>>,
    placing: Mutex<HashMap<String, Placing>>,
}

impl std::fmt::Debug for Placements {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Placements").field("placed", &self.placed).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Placements {
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self { client, placed: Mutex::default(), placing: Mutex::default() }
    }

    pub(super) fn is_placed(&self, model: &str) -> bool {
        lock(&self.placed).contains(model)
    }

    pub(super) fn is_being_placed(&self, model: &str) -> bool {
        lock(&self.placing).contains_key(model)
    }

    /// It was not there after all.
    pub(super) fn forget(&self, model: &str) {
        lock(&self.placed).remove(model);
    }

    /// Asks EXO what is placed now.
    pub(super) async fn look(&self) -> Result<(), String> {
        let placed = placed(&self.client).await.map_err(|error| format!("its instances cannot be read: {error}"))?;
        *lock(&self.placed) = placed;
        Ok(())
    }

    /// Resolves when the model can be asked. `changed` is called when that begins and when it ends.
    pub(super) async fn place(self: &Arc<Self>, model: &str, changed: impl Fn() + Send + Sync + 'static) -> Result<(), Failure> {
        let placing = {
            let mut all = lock(&self.placing);
            match all.get(model) {
                Some(placing) => placing.clone(),
                None => {
                    let placing = self.begin(model.to_owned(), changed);
                    all.insert(model.to_owned(), placing.clone());
                    placing
                }
            }
        };
        placing.await
    }

    /// A task of its own: its asker may go away while others wait for the same.
    fn begin(self: &Arc<Self>, model: String, changed: impl Fn() + Send + Sync + 'static) -> Placing {
        let placements = Arc::clone(self);
        let task = tokio::spawn(async move {
            changed();
            let outcome = placements.place_now(&model).await;
            if outcome.is_ok() {
                lock(&placements.placed).insert(model.clone());
            }
            lock(&placements.placing).remove(&model);
            match &outcome {
                Ok(()) => tracing::info!(model, "EXO has placed {model}"),
                Err(failure) => tracing::warn!(model, "{failure}"),
            }
            changed();
            outcome
        });
        let ended = |error| Failure::new(FailureKind::BackendFailed, format!("the placing ended: {error}"));
        async move { task.await.unwrap_or_else(|error| Err(ended(error))) }.boxed().shared()
    }

    async fn place_now(&self, model: &str) -> Result<(), Failure> {
        let cannot = |why: String| Failure::new(FailureKind::ModelUnavailable, format!("EXO cannot place {model:?}: {why}"));
        if placed(&self.client).await.is_ok_and(|placed| placed.contains(model)) {
            return Ok(());
        }
        let previews = format!("{}/instance/previews?model_id={}", self.client.root(), encoded(model));
        let previews = timed(self.client.get(&previews, MAX_BYTES)).await.map_err(cannot)?;
        let instance = best(&previews).map_err(cannot)?;
        let body = serde_json::to_vec(&serde_json::json!({ "instance": instance })).unwrap_or_default();
        let path = format!("{}/instance", self.client.root());
        timed(self.client.post_whole(&path, body, MAX_BYTES)).await.map_err(cannot)?;
        let waited = timeout(Duration::from_secs(AWAIT_SECONDS + 5), self.wait(model)).await;
        waited.unwrap_or_else(|_| Err(format!("it was not there within {AWAIT_SECONDS} s"))).map_err(cannot)
    }

    async fn wait(&self, model: &str) -> Result<(), String> {
        let path = format!("{}/instance/await?model_id={}&timeout_seconds={AWAIT_SECONDS}", self.client.root(), encoded(model));
        let mut body = self.client.open(&path).await.map_err(shown)?;
        let mut events = Events::new(true);
        while let Some(bytes) = body.next().await.map_err(shown)? {
            events.push(&bytes).map_err(|error| error.to_string())?;
            while let Some(data) = events.next_data() {
                let said: Value = serde_json::from_slice(data).unwrap_or_default();
                match said.get("type").and_then(Value::as_str) {
                    Some("ready") => return Ok(()),
                    Some("timeout") => return Err(format!("it was not there within {AWAIT_SECONDS} s")),
                    _ => {}
                }
            }
        }
        Err("EXO stopped telling whether it is there".to_owned())
    }
}

fn shown(error: HttpError) -> String {
    match error {
        HttpError::Refused(refusal) => refusal.shown(),
        error => error.to_string(),
    }
}

async fn timed(asking: impl Future<Output = Result<Vec<u8>, HttpError>>) -> Result<Vec<u8>, String> {
    match timeout(COMMAND, asking).await {
        Ok(answer) => answer.map_err(shown),
        Err(_) => Err(format!("it did not answer within {} s", COMMAND.as_secs())),
    }
}

/// Models that have an instance. In `/state/instances` each is wrapped in the name of its type.
async fn placed(client: &Arc<Client>) -> Result<HashSet<String>, HttpError> {
    let body = client.get(&format!("{}/state/instances", client.root()), MAX_BYTES).await?;
    let state: Value = serde_json::from_slice(&body).unwrap_or_default();
    let instances = state.as_object().into_iter().flatten().map(|(_, instance)| instance);
    Ok(instances.filter_map(|instance| model_of(instance).map(str::to_owned)).collect())
}

fn model_of(instance: &Value) -> Option<&str> {
    let inner = instance.as_object()?.values().find(|value| value.get("shardAssignments").is_some()).unwrap_or(instance);
    inner.get("shardAssignments")?.get("modelId")?.as_str()
}

/// The placement on the fewest machines: every further one adds its network to each token.
fn best(previews: &[u8]) -> Result<Value, String> {
    let said: Value = serde_json::from_slice(previews).map_err(|error| format!("its previews cannot be read: {error}"))?;
    let previews = said.get("previews").and_then(Value::as_array).ok_or("its answer has no previews")?;
    let machines =
        |preview: &Value| preview.get("memory_delta_by_node").and_then(Value::as_object).map_or(usize::MAX, serde_json::Map::len);
    let possible = previews.iter().filter(|preview| preview.get("instance").is_some_and(Value::is_object));
    if let Some(best) = possible.min_by_key(|preview| machines(preview)) {
        return Ok(best["instance"].clone());
    }
    let why =
        previews.iter().find_map(|preview| preview.get("error")?.as_str()).unwrap_or("it knows no machine that could take it");
    Err(why.escape_debug().take(200).collect())
}

/// For a query: everything but letters, digits and `-._~` is escaped.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_placement_on_the_fewest_machines_is_taken() {
        let preview = |nodes: &[&str]| {
            let memory: serde_json::Map<String, Value> = nodes.iter().map(|&node| (node.to_owned(), 1.into())).collect();
            serde_json::json!({"model_id": "m", "instance": {"MlxRingInstance": {"on": nodes.len()}}, "memory_delta_by_node": memory, "error": null})
        };
        let refused = serde_json::json!({"model_id": "m", "instance": null, "error": "not enough memory"});
        let body = |previews: &[Value]| serde_json::to_vec(&serde_json::json!({"previews": previews})).unwrap();
        let chosen = best(&body(&[refused.clone(), preview(&["a", "b"]), preview(&["a"])])).unwrap();
        assert_eq!(chosen["MlxRingInstance"]["on"], 1);
        assert_eq!(best(&body(&[refused])), Err("not enough memory".to_owned()));
        for nothing in [&body(&[])[..], b"{}", b"<html>", b""] {
            assert!(best(nothing).is_err());
        }
    }

    #[test]
    fn a_name_cannot_leave_its_place_in_a_query() {
        assert_eq!(encoded("mlx-community/Llama 3&x=#\u{e4}"), "mlx-community%2FLlama%203%26x%3D%23%C3%A4");
    }

    #[test]
    fn the_model_of_an_instance_is_found_in_its_wrapper() {
        let inner = serde_json::json!({"instanceId": "i", "shardAssignments": {"modelId": "m"}});
        assert_eq!(model_of(&serde_json::json!({"MlxRingInstance": inner})), Some("m"));
        assert_eq!(model_of(&inner), Some("m"));
        assert_eq!(model_of(&serde_json::json!([])), None);
    }
}
