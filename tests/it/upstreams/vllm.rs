//! vLLM: `/version`, and its signature in the list of models.

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::FailureKind;
use opengateway::serve::backend::Backend as _;

use super::stand::{Asked, Reply, Stand};
use super::{answer, ask, backend, models};

pub const VERSION: &str = r#"{"version":"0.11.0"}"#;
pub const LIST: &str = r#"{"object":"list","data":[{"id":"Qwen/Qwen2.5-0.5B-Instruct","object":"model","created":1750000000,"owned_by":"vllm","root":"Qwen/Qwen2.5-0.5B-Instruct","parent":null,"max_model_len":32768,"permission":[]}]}"#;

pub fn vllm(asked: &Asked) -> Reply {
    match asked.path.as_str() {
        "/version" => Reply::ok(VERSION),
        "/v1/models" => Reply::ok(LIST),
        "/v1/chat/completions" | "/v1/completions" => Reply::four(),
        _ => Reply::Json(404, r#"{"detail":"Not Found"}"#.to_owned()),
    }
}

#[tokio::test]
async fn it_is_recognised_and_takes_many_at_once() {
    let stand = Stand::start(vllm).await;
    let backend = backend(&stand.url(), None);
    let models = models(&backend).await;
    let [model] = models.as_slice() else { panic!("{models:?}") };
    assert_eq!((model.context_tokens, model.state, model.slots), (32768, ModelState::Ready, 32));
    assert_eq!((backend.limits().slots, backend.limits().running_per_peer), (32, 16));
    let (text, done) = answer(&backend, &model.name, ask("What is 2+2?")).await.unwrap();
    assert_eq!((text.as_str(), done.usage.prompt_tokens, done.usage.completion_tokens), ("4", 20, 2));
    assert_eq!(stand.asked("POST /v1/chat/completions")[0].body["model"], "Qwen/Qwen2.5-0.5B-Instruct");
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_has_its_own_name() {
    let too_long = r#"{"error":{"message":"This model's maximum context length is 32768 tokens. However, you requested 40000 tokens","type":"BadRequestError","param":null,"code":400}}"#;
    let stand =
        Stand::start(move |asked| if asked.method == "POST" { Reply::Json(400, too_long.to_owned()) } else { vllm(asked) }).await;
    let backend = backend(&stand.url(), None);
    let name = models(&backend).await[0].name.clone();
    let failure = answer(&backend, &name, ask("x")).await.unwrap_err();
    assert!(failure.kind == FailureKind::ContextOverflow && failure.detail.contains("32768"), "{failure}");
}
