//! EXO, by its source at b5375f8: a model is placed before its first prompt.

use std::sync::{Arc, Mutex};

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::{Ask, FailureKind};

use super::stand::{Asked, Reply, Stand};
use super::{answer, ask, backend, models, until};

const MODEL: &str = "mlx-community/Llama-3.2-1B-Instruct-4bit";

#[derive(Default)]
struct Cluster {
    placed: bool,
    /// Nothing has enough memory.
    full: bool,
    /// The instance never comes.
    stuck: bool,
}

fn instance() -> serde_json::Value {
    serde_json::json!({"MlxRingInstance": {"instanceId": "i-1", "shardAssignments": {"modelId": MODEL, "runnerToShard": {}, "nodeToRunner": {}},
        "hostsByNode": {}, "ephemeralPort": 50000}})
}

fn exo(cluster: &Mutex<Cluster>, asked: &Asked) -> Reply {
    let mut cluster = cluster.lock().unwrap();
    let query = "model_id=mlx-community%2FLlama-3.2-1B-Instruct-4bit";
    match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/node_id") => Reply::ok(r#""12D3KooWNode""#),
        ("GET", "/v1/models" | "/v1/models?status=downloaded") => {
            Reply::ok(serde_json::json!({"object": "list", "data": [{"id": MODEL, "object": "model",
            "created": 1, "owned_by": "exo", "hugging_face_id": MODEL, "context_length": 131_072, "storage_size_megabytes": 696, "quantization": "4bit"}]}))
        }
        ("GET", "/state/instances") if cluster.placed => Reply::ok(serde_json::json!({"i-1": instance()})),
        ("GET", "/state/instances") => Reply::ok("{}"),
        ("GET", path) if path == format!("/instance/previews?{query}") => {
            let refused = serde_json::json!({"model_id": MODEL, "sharding": "Tensor", "instance_meta": "MlxRing", "instance": null, "memory_delta_by_node": null,
                "error": "No cycles found with sufficient memory"});
            let possible = serde_json::json!({"model_id": MODEL, "sharding": "Pipeline", "instance_meta": "MlxRing", "instance": instance(),
                "memory_delta_by_node": {"n1": 729_808_896}, "error": null});
            Reply::ok(serde_json::json!({"previews": if cluster.full { vec![refused] } else { vec![refused, possible] }}))
        }
        ("POST", "/instance") => {
            assert_eq!(asked.body["instance"], instance());
            cluster.placed = !cluster.stuck;
            Reply::ok(r#"{"message":"Command received.","command_id":"c-1","model_card":{}}"#)
        }
        ("GET", path) if path.starts_with(&format!("/instance/await?{query}")) => {
            if cluster.stuck {
                return Reply::Events(format!(
                    ": keep-alive\n\ndata: {{\"type\":\"timeout\",\"message\":\"No instance found for model {MODEL}\"}}\n\n"
                ));
            }
            Reply::Events(format!(": keep-alive\n\ndata: {}\n\n", serde_json::json!({"type": "ready", "instance": instance()})))
        }
        ("POST", "/v1/chat/completions") if cluster.placed => Reply::four(),
        ("POST", "/v1/chat/completions") => Reply::Json(
            404,
            format!(r#"{{"error":{{"message":"No instance found for model {MODEL}","type":"Not Found","code":404}}}}"#),
        ),
        _ => Reply::Json(404, r#"{"error":{"message":"Not Found","type":"Not Found","code":404}}"#.to_owned()),
    }
}

async fn stand(cluster: Cluster) -> (Stand, Arc<Mutex<Cluster>>) {
    let cluster = Arc::new(Mutex::new(cluster));
    let played = Arc::clone(&cluster);
    (Stand::start(move |asked| exo(&played, asked)).await, cluster)
}

/// The commands in their order.
fn order(stand: &Stand) -> Vec<String> {
    let words = stand.asked("").into_iter().map(|asked| format!("{} {}", asked.method, asked.path.split('?').next().unwrap()));
    words.filter(|line| line.contains("/instance") && !line.contains("/state") || line.contains("chat")).collect()
}

#[tokio::test]
async fn several_prompts_at_once_place_a_model_once_and_in_order() {
    let (stand, _) = stand(Cluster::default()).await;
    let backend = backend(&stand.url(), None);
    let offered = models(&backend).await;
    assert_eq!((offered[0].name.as_str(), offered[0].context_tokens, offered[0].state), (MODEL, 131_072, ModelState::Available));
    assert_eq!(offered[0].size, Some(696 << 20));
    let all = (0..5).map(|_| answer(&backend, MODEL, ask("What is 2+2?")));
    for outcome in futures::future::join_all(all).await {
        assert_eq!(outcome.unwrap().0, "4");
    }
    let order = order(&stand);
    assert_eq!(order[..3], ["GET /instance/previews", "POST /instance", "GET /instance/await"]);
    assert!(order.len() == 8 && order[3..].iter().all(|line| line == "POST /v1/chat/completions"), "{order:?}");
    until(&backend, |now| now.models[0].state == ModelState::Ready).await;
}

#[tokio::test]
async fn a_model_that_is_placed_is_asked_at_once_and_placed_anew_when_it_was_taken_away() {
    let (stand, cluster) = stand(Cluster { placed: true, ..Cluster::default() }).await;
    let backend = backend(&stand.url(), None);
    assert_eq!(models(&backend).await[0].state, ModelState::Ready);
    answer(&backend, MODEL, ask("x")).await.unwrap();
    assert_eq!(order(&stand), ["POST /v1/chat/completions"]);
    cluster.lock().unwrap().placed = false;
    assert_eq!(answer(&backend, MODEL, ask("x")).await.unwrap().0, "4");
    assert_eq!(stand.asked("POST /instance").len(), 1);
}

#[tokio::test]
async fn a_placement_that_fails_is_named_and_may_be_tried_again() {
    let (stand, cluster) = stand(Cluster { full: true, ..Cluster::default() }).await;
    let backend = backend(&stand.url(), None);
    models(&backend).await;
    let failure = answer(&backend, MODEL, ask("x")).await.unwrap_err();
    assert!(failure.kind == FailureKind::ModelUnavailable && failure.detail.contains("sufficient memory"), "{failure}");
    assert!(stand.asked("POST /instance").is_empty());
    *cluster.lock().unwrap() = Cluster { stuck: true, ..Cluster::default() };
    let failure = answer(&backend, MODEL, ask("x")).await.unwrap_err();
    assert!(failure.detail.contains("300 s"), "{failure}");
    *cluster.lock().unwrap() = Cluster::default();
    answer(&backend, MODEL, ask("x")).await.unwrap();
    let raw = answer(&backend, MODEL, Ask { raw: true, ..ask("x") }).await.unwrap_err();
    assert_eq!(raw.kind, FailureKind::InvalidRequest);
}

#[tokio::test]
async fn an_asker_that_goes_away_does_not_stop_the_placement() {
    let (stand, _) = stand(Cluster::default()).await;
    let backend = backend(&stand.url(), None);
    models(&backend).await;
    let mut asking = Box::pin(answer(&backend, MODEL, ask("x")));
    while stand.asked("GET /instance/previews").is_empty() {
        let _ = tokio::time::timeout(std::time::Duration::from_millis(1), &mut asking).await;
    }
    drop(asking);
    until(&backend, |now| now.models[0].state == ModelState::Ready).await;
    assert_eq!(stand.asked("POST /instance").len(), 1);
}
