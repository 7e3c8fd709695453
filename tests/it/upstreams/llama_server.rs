//! llama-server, as recorded from build 11549.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::{Ask, FailureKind};
use opengateway::domain::upstream::Api;
use opengateway::serve::backend::Backend as _;

use super::stand::{Asked, Reply, Stand};
use super::{answer, ask, backend, models, until};

const PROPS: &str = r#"{"default_generation_settings":{"params":{"seed":4294967295,"stream":false},"n_ctx":512},"total_slots":2,"model_alias":"SmolLM-360M.Q8_0.gguf","model_ftype":"Q8_0","model_path":"../models/SmolLM-360M.Q8_0.gguf","modalities":{"vision":false},"chat_template":"","build_info":"b11549"}"#;
const LIST: &str = r#"{"models":[{"name":"SmolLM-360M.Q8_0.gguf","model":"SmolLM-360M.Q8_0.gguf","size":"","digest":"","details":{"parent_model":"","families":[""]}}],"object":"list","data":[{"id":"../models/SmolLM-360M.Q8_0.gguf","aliases":[],"object":"model","created":1795645491,"owned_by":"llamacpp","meta":{"vocab_type":2,"n_vocab":49152,"n_ctx":1024,"n_ctx_train":2048,"n_embd":960,"n_params":361821120,"size":384617472,"ftype":"Q8_0"}}]}"#;
pub const LOADING: &str = r#"{"error":{"message":"Loading model","type":"unavailable_error","code":503}}"#;

pub fn llama_server(asked: &Asked) -> Reply {
    match asked.path.as_str() {
        "/props" => Reply::ok(PROPS),
        "/v1/models" => Reply::ok(LIST),
        "/v1/chat/completions" => Reply::four(),
        "/v1/completions" => Reply::Events("data: {\"choices\":[{\"text\":\"upon\",\"index\":0,\"finish_reason\":null}]}\n\ndata: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\ndata: [DONE]\n\n".to_owned()),
        _ => Reply::not_found(),
    }
}

#[tokio::test]
async fn its_slots_context_size_and_file_are_read() {
    let stand = Stand::start(llama_server).await;
    let backend = backend(&stand.url(), None);
    let found = models(&backend).await;
    let [model] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(model.name, "SmolLM-360M.Q8_0", "the path of a file is no name");
    assert_eq!((model.context_tokens, model.size, model.parameters), (512, Some(384_617_472), Some(361_821_120)));
    assert_eq!((model.quantisation.as_deref(), model.state, model.slots), (Some("Q8_0"), ModelState::Ready, 2));
    assert_eq!((backend.limits().slots, backend.limits().running_per_peer), (2, 1));
    assert_eq!(answer(&backend, &model.name, ask("What is 2+2?")).await.unwrap().0, "4");
    assert_eq!(stand.asked("POST")[0].body["model"], "../models/SmolLM-360M.Q8_0.gguf");
    let raw = Ask { raw: true, max_tokens: Some(1), ..ask("once") };
    assert_eq!(answer(&backend, &model.name, raw).await.unwrap().0, "upon");
    assert_eq!(stand.asked("POST /v1/completions")[0].body["prompt"], "once");
}

#[tokio::test]
async fn written_slots_win_over_those_of_the_server() {
    let stand = Stand::start(llama_server).await;
    let mut written = super::settings(&stand.url(), None);
    written.learns_slots = false;
    written.limits.slots = 1;
    let backend = opengateway::serve::OpenAi::start(written).unwrap();
    assert_eq!((models(&backend).await[0].slots, backend.limits().slots), (1, 1));
}

#[tokio::test]
async fn loading_is_told_as_loading_and_ends_by_itself() {
    let loading = Arc::new(AtomicBool::new(true));
    let is_loading = Arc::clone(&loading);
    let answer_as = move |asked: &Asked| {
        if is_loading.load(Ordering::SeqCst) { Reply::Json(503, LOADING.to_owned()) } else { llama_server(asked) }
    };
    let stand = Stand::start(answer_as).await;
    let backend = backend(&stand.url(), Some(Api::LlamaServer));
    until(&backend, |now| now.problem.as_deref() == Some("it is loading its model")).await;
    let failure = answer(&backend, "SmolLM-360M.Q8_0", ask("x")).await.unwrap_err();
    assert!(failure.kind == FailureKind::ModelLoading && failure.retry_after.is_some(), "{failure}");
    loading.store(false, Ordering::SeqCst);
    models(&backend).await;
}

#[tokio::test]
async fn one_that_is_away_says_how_it_is_started() {
    let gone = Stand::start(llama_server).await;
    let url = gone.url();
    drop(gone);
    let backend = backend(&url, Some(Api::LlamaServer));
    until(&backend, |now| now.problem.as_ref().is_some_and(|problem| problem.contains("start it with: llama-server"))).await;
}
