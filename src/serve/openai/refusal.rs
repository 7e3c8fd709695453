//! What a server says when it does not answer, and what it means to the asker. The words of servers differ, their codes are
//! texts or numbers, and some of them quote the prompt.

use std::time::Duration;

use serde_json::Value;

use crate::domain::prompt::{Ask, Failure, FailureKind};

/// Shown of what a server says.
const MAX_SHOWN_CHARS: usize = 200;
/// A model that is being loaded: come back after this.
const LOADING: Duration = Duration::from_secs(2);
/// So much of a prompt in the words of a server is a quotation.
const QUOTED_CHARS: usize = 16;
/// So much of each text is looked for in them.
const LOOKED_FOR_CHARS: usize = 64 * 1024;

/// How servers say that a prompt does not fit. Codes and types: OpenAI, llama-server.
const OVERFLOW_CODES: [&str; 2] = ["context_length_exceeded", "exceed_context_size_error"];
/// Words, in lower case: OpenAI and vLLM; llama-server; llama-cpp-python; Ollama; LM Studio.
const OVERFLOW_WORDS: [&str; 9] = [
    "maximum context length",
    "available context size",
    "exceed context window",
    "exceeds the context",
    "exceeds context length",
    "prompt is too long",
    "context the overflows",
    "greater than the context length",
    ">= n_ctx",
];

/// A refusal as it was said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Refusal {
    /// HTTP status; 200 when it came in the middle of an answer.
    pub status: u16,
    /// When to come back.
    pub retry_after: Option<Duration>,
    message: String,
    /// `code` and `type`, where they are texts.
    codes: Vec<String>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.status == 200 {
            write!(f, "reported an error")?;
        } else {
            write!(f, "refused with HTTP status {}", self.status)?;
        }
        if self.message.is_empty() { Ok(()) } else { write!(f, ": {}", self.message) }
    }
}

impl Refusal {
    /// Reads the body: `{"error":{"message","type","code"}}`, `{"error":"…"}`, the error without its wrapper (older vLLM),
    /// `{"detail":"…"}` (FastAPI), or anything.
    pub(super) fn read(status: u16, retry_after: Option<Duration>, body: &[u8]) -> Self {
        let said: Value = serde_json::from_slice(body).unwrap_or_default();
        Self { retry_after, ..Self::of_error(status, said.get("error").unwrap_or(&said)) }
    }

    /// An error object that came as an event of an answer.
    pub(super) fn in_answer(error: &Value) -> Self {
        Self::of_error(200, error)
    }

    fn of_error(status: u16, error: &Value) -> Self {
        let text = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
        let message = text("message").or_else(|| text("detail")).or_else(|| error.as_str().map(str::to_owned));
        let codes = ["code", "type"].into_iter().filter_map(text).map(|code| code.chars().take(64).collect()).collect();
        Self { status, retry_after: None, message: message.unwrap_or_default().chars().take(4096).collect(), codes }
    }

    fn is_overflow(&self) -> bool {
        let words = self.message.to_lowercase();
        self.codes.iter().any(|code| OVERFLOW_CODES.contains(&code.as_str()))
            || (matches!(self.status, 200 | 400 | 413 | 422 | 500) && OVERFLOW_WORDS.iter().any(|word| words.contains(word)))
    }

    /// The model is on its way into memory.
    pub(super) fn is_loading(&self) -> bool {
        self.status == 503 && self.message.to_lowercase().contains("loading model")
    }

    /// The failure for whoever asked `ask`, whose text it never contains.
    pub(super) fn failure(mut self, model: &str, ask: &Ask) -> Failure {
        let (overflow, loading) = (self.is_overflow(), self.is_loading());
        if quotes(&self.message, ask) {
            self.message = "its words quote the prompt and are not repeated here".to_owned();
        }
        self.message = self.message.escape_debug().take(MAX_SHOWN_CHARS).collect();
        let detail = format!("the backend {self}");
        if overflow {
            return Failure::new(
                FailureKind::ContextOverflow,
                format!("{detail}; ask with less text or a model with more context"),
            );
        }
        match self.status {
            _ if loading => Failure {
                retry_after: Some(self.retry_after.unwrap_or(LOADING)),
                ..Failure::new(FailureKind::ModelLoading, format!("the backend is loading model {model:?}"))
            },
            400 | 413 | 415 | 422 => Failure::new(FailureKind::InvalidRequest, detail),
            401 | 403 => {
                let help = "check api_key_file or api_key_credential of this backend";
                Failure::new(FailureKind::BackendFailed, format!("{detail}; {help}"))
            }
            404 => Failure::new(FailureKind::ModelUnavailable, format!("{detail} (asked for model {model:?})")),
            429 | 503 => Failure::busy(detail, self.retry_after.unwrap_or(Duration::from_secs(1))),
            _ => Failure::new(FailureKind::BackendFailed, detail),
        }
    }

    /// The same when no prompt is the cause.
    pub(super) fn shown(mut self) -> String {
        self.message = self.message.escape_debug().take(MAX_SHOWN_CHARS).collect();
        format!("it {self}")
    }
}

/// Whether a server's words contain text of the prompt: validation errors of vLLM and FastAPI have the whole request in them.
fn quotes(words: &str, ask: &Ask) -> bool {
    let texts = [Some(&ask.prompt), ask.system.as_ref()].into_iter().flatten().chain(ask.history.iter().map(|turn| &turn.text));
    texts.chain(&ask.stop).any(|text| {
        let chars: Vec<char> = text.as_str().chars().take(LOOKED_FOR_CHARS).collect();
        // A quotation may be escaped or cut anywhere: parts of it are looked for. A part shorter than four is a word like any.
        chars.chunks(QUOTED_CHARS).filter(|part| part.len() >= 4).any(|part| {
            let part: String = part.iter().collect();
            !part.trim().is_empty() && words.contains(part.trim())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::prompt::Text;

    fn failure(status: u16, body: &str) -> Failure {
        let ask = Ask { prompt: Text::new("the canary sings in the coal mine at noon"), ..Ask::default() };
        Refusal::read(status, None, body.as_bytes()).failure("m", &ask)
    }

    #[test]
    fn a_prompt_that_does_not_fit_is_understood_in_the_words_of_every_server() {
        for (server, status, body) in [
            (
                "OpenAI",
                400,
                r#"{"error":{"message":"This model's maximum context length is 128000 tokens. However, your messages resulted in 200000 tokens.","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}"#,
            ),
            (
                "llama-server",
                400,
                r#"{"error":{"code":400,"message":"request (15000 tokens) exceeds the available context size (512 tokens), try increasing it","type":"exceed_context_size_error","n_prompt_tokens":15000,"n_ctx":512}}"#,
            ),
            (
                "llama-server 2025",
                500,
                r#"{"error":{"code":500,"message":"the request exceeds the available context size. try increasing the context size or enable context shift","type":"exceed_context_size_error","n_prompt_tokens":1407,"n_ctx":256}}"#,
            ),
            (
                "vLLM",
                400,
                r#"{"error":{"message":"This model's maximum context length is 2048 tokens. However, you requested 3000 tokens in the messages. Please reduce the length of the messages.","type":"BadRequestError","param":null,"code":400}}"#,
            ),
            (
                "old vLLM",
                400,
                r#"{"object":"error","message":"This model's maximum context length is 6048 tokens. However, you requested 6616 tokens (568 in the messages, 6048 in the completion).","type":"BadRequestError","param":null,"code":400}"#,
            ),
            (
                "Ollama",
                400,
                r#"{"error":{"message":"prompt is too long: the input exceeds the context length","type":"invalid_request_error","param":null,"code":null}}"#,
            ),
            (
                "LM Studio",
                400,
                r#"{"error":"Trying to keep the first 10136 tokens when context the overflows. However, the model is loaded with context length of only 7866 tokens, which is not enough."}"#,
            ),
            ("LM Studio 0.4", 400, r#"{"error":"Cannot truncate prompt with n_keep (15028) >= n_ctx (7424)"}"#),
            (
                "llama-cpp-python",
                400,
                r#"{"error":{"message":"Requested tokens (2285) exceed context window of 2048","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}"#,
            ),
        ] {
            assert_eq!(failure(status, body).kind, FailureKind::ContextOverflow, "{server}");
        }
        let error = serde_json::json!({"message": "The number of tokens to keep from the initial prompt is greater than the context length"});
        assert_eq!(Refusal::in_answer(&error).failure("m", &Ask::default()).kind, FailureKind::ContextOverflow);
    }

    #[test]
    fn a_model_that_is_being_loaded_is_not_a_full_queue() {
        let loading = failure(503, r#"{"error":{"message":"Loading model","type":"unavailable_error","code":503}}"#);
        assert_eq!((loading.kind, loading.retry_after), (FailureKind::ModelLoading, Some(LOADING)));
        let busy = failure(503, r#"{"error":{"message":"server busy, please try again. maximum pending requests exceeded"}}"#);
        assert_eq!((busy.kind, busy.retry_after), (FailureKind::Busy, Some(Duration::from_secs(1))));
    }

    #[test]
    fn what_quotes_the_prompt_is_not_repeated() {
        for body in [
            r#"{"error":{"message":"[{'type':'x','input':{'content':'the canary sings in the coal mine at noon'}}]","code":400}}"#,
            r#"{"detail":"cannot parse ...sings in the coal mine..."}"#,
        ] {
            let failure = failure(400, body);
            assert!(failure.kind == FailureKind::InvalidRequest && !failure.detail.contains("mine"), "{failure}");
        }
        assert!(failure(400, r#"{"error":{"message":"temperature\nmust be below 2"}}"#).detail.contains("temperature\\nmust"));
        for garbage in ["", "<html>", "[]", "{\"error\":7}", "{\"error\":{\"message\":7,\"code\":{}}}", "\u{0}"] {
            assert_eq!(failure(500, garbage).kind, FailureKind::BackendFailed, "{garbage}");
        }
        let long = format!("{{\"error\":\"{}\"}}", "x".repeat(10_000));
        assert!(failure(500, &long).detail.len() < 300);
    }
}
