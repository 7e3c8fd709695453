//! LM Studio, by the examples of its documentation.

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::FailureKind;

use super::stand::{Asked, Reply, Stand};
use super::{answer, ask, backend, models};

const LIST: &str = r#"{"object":"list","data":[{"id":"qwen2-vl-7b-instruct","object":"model","type":"vlm","publisher":"mlx-community","arch":"qwen2_vl","compatibility_type":"mlx","quantization":"4bit","state":"not-loaded","max_context_length":32768},{"id":"meta-llama-3.1-8b-instruct","object":"model","type":"llm","publisher":"lmstudio-community","arch":"llama","compatibility_type":"gguf","quantization":"Q4_K_M","state":"loaded","max_context_length":131072,"loaded_context_length":4096},{"id":"text-embedding-nomic-embed-text-v1.5","object":"model","type":"embeddings","publisher":"nomic-ai","arch":"nomic-bert","compatibility_type":"gguf","quantization":"Q4_0","state":"not-loaded","max_context_length":2048}]}"#;

pub fn lm_studio(asked: &Asked) -> Reply {
    match asked.path.as_str() {
        "/api/v0/models" => Reply::ok(LIST),
        "/v1/models" => Reply::ok(
            r#"{"data":[{"id":"meta-llama-3.1-8b-instruct","object":"model","owned_by":"organization_owner"}],"object":"list"}"#,
        ),
        "/v1/chat/completions" => Reply::four(),
        // It answers unknown paths with 200 and an error.
        path => Reply::ok(serde_json::json!({"error": format!("Unexpected endpoint or method. (GET {path})")})),
    }
}

#[tokio::test]
async fn what_is_loaded_is_ready_and_embeddings_are_no_models() {
    let stand = Stand::start(lm_studio).await;
    let backend = backend(&stand.url(), None);
    let models = models(&backend).await;
    let told: Vec<_> = models
        .iter()
        .map(|model| (model.name.as_str(), model.state, model.context_tokens, model.quantisation.as_deref()))
        .collect();
    assert_eq!(
        told,
        [
            ("qwen2-vl-7b-instruct", ModelState::Available, 32768, Some("4bit")),
            ("meta-llama-3.1-8b-instruct", ModelState::Ready, 4096, Some("Q4_K_M")),
        ]
    );
    assert_eq!(answer(&backend, "meta-llama-3.1-8b-instruct", ask("What is 2+2?")).await.unwrap().0, "4");
}

#[tokio::test]
async fn an_error_inside_a_stream_that_began_well_is_named() {
    let event = "event: error\ndata: {\"error\":{\"message\":\"Trying to keep the first 10136 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens\"}}\n\n";
    let stand =
        Stand::start(move |asked| if asked.method == "POST" { Reply::Events(event.to_owned()) } else { lm_studio(asked) }).await;
    let backend = backend(&stand.url(), None);
    models(&backend).await;
    let failure = answer(&backend, "meta-llama-3.1-8b-instruct", ask("x")).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::ContextOverflow, "{failure}");
}
