//! The JSON of answers, whole and in pieces.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::domain::prompt::{Done, FinishReason, Usage};

/// Which of the two APIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Surface {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What all pieces of one answer have in common.
#[derive(Debug)]
pub(super) struct Shape {
    surface: Surface,
    id: String,
    created: u64,
    model: String,
    /// The usage is told at the end of a stream.
    usage: bool,
    /// What every piece of a stream begins with, up to its `choices`.
    prefix: String,
}

#[derive(Serialize)]
struct Counted {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u64,
}

impl From<Usage> for Counted {
    fn from(usage: Usage) -> Self {
        let (prompt_tokens, completion_tokens) = (usage.prompt_tokens, usage.completion_tokens);
        Self { prompt_tokens, completion_tokens, total_tokens: u64::from(prompt_tokens) + u64::from(completion_tokens) }
    }
}

#[derive(Serialize)]
struct Whole<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: [C; 1],
    usage: Counted,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<()>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct TextChoice<'a> {
    text: &'a str,
    index: u32,
    logprobs: Option<()>,
    finish_reason: &'static str,
}

fn json(out: &mut Vec<u8>, value: &impl Serialize) {
    // Writing to memory cannot fail, and nothing here is a map with keys that are no strings.
    let _ = serde_json::to_writer(out, value);
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_default()
}

/// A name that no other answer has: random for each run of the daemon, counted within it. It is no secret.
fn identifier(surface: Surface) -> String {
    static RUN: LazyLock<u64> = LazyLock::new(|| uuid::Uuid::new_v4().as_u64_pair().0);
    static ANSWERS: AtomicU64 = AtomicU64::new(0);
    let prefix = if surface == Surface::Chat { "chatcmpl" } else { "cmpl" };
    format!("{prefix}-{:016x}{:016x}", *RUN, ANSWERS.fetch_add(1, Ordering::Relaxed))
}

impl Shape {
    /// Of a new answer. The model is known once one has taken it up.
    pub fn new(surface: Surface, usage: bool) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { surface, id: identifier(surface), created, model: String::new(), usage, prefix: String::new() }
    }

    /// This model answers.
    pub fn begin(&mut self, model: String) {
        let object = if self.surface == Surface::Chat { "chat.completion.chunk" } else { "text_completion" };
        self.prefix = format!(
            "data: {{\"id\":\"{}\",\"object\":\"{object}\",\"created\":{},\"model\":{},\"choices\":[",
            self.id,
            self.created,
            quoted(&model)
        );
        self.model = model;
    }

    /// The whole answer.
    pub fn whole(&self, text: &str, done: &Done) -> Vec<u8> {
        let mut out = Vec::with_capacity(text.len() + 512);
        let (id, created, model, usage) = (&self.id, self.created, &self.model, done.usage.into());
        let finish_reason = done.finish.as_str();
        match self.surface {
            Surface::Chat => {
                let message = Message { role: "assistant", content: text, refusal: None };
                let choices = [ChatChoice { index: 0, message, logprobs: None, finish_reason }];
                json(&mut out, &Whole { id, object: "chat.completion", created, model, choices, usage });
            }
            Surface::Completion => {
                let choices = [TextChoice { text, index: 0, logprobs: None, finish_reason }];
                json(&mut out, &Whole { id, object: "text_completion", created, model, choices, usage });
            }
        }
        out
    }

    fn end_of_piece(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" });
    }

    /// The first piece of a stream: whose words follow. A completion has none.
    pub fn first(&self, out: &mut Vec<u8>) {
        if self.surface == Surface::Chat {
            out.extend_from_slice(self.prefix.as_bytes());
            out.extend_from_slice(
                br#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#,
            );
            self.end_of_piece(out);
        }
    }

    /// More text.
    pub fn text(&self, out: &mut Vec<u8>, text: &str) {
        out.extend_from_slice(self.prefix.as_bytes());
        match self.surface {
            Surface::Chat => {
                out.extend_from_slice(br#"{"index":0,"delta":{"content":"#);
                json(out, &text);
                out.extend_from_slice(br#"},"logprobs":null,"finish_reason":null}"#);
            }
            Surface::Completion => {
                out.extend_from_slice(br#"{"text":"#);
                json(out, &text);
                out.extend_from_slice(br#","index":0,"logprobs":null,"finish_reason":null}"#);
            }
        }
        self.end_of_piece(out);
    }

    /// The end of a whole stream.
    pub fn last(&self, out: &mut Vec<u8>, done: &Done) {
        self.finish(out, done.finish);
        if self.usage {
            out.extend_from_slice(self.prefix.as_bytes());
            out.extend_from_slice(b"],\"usage\":");
            json(out, &Counted::from(done.usage));
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn finish(&self, out: &mut Vec<u8>, reason: FinishReason) {
        out.extend_from_slice(self.prefix.as_bytes());
        let start: &[u8] = match self.surface {
            Surface::Chat => br#"{"index":0,"delta":{},"logprobs":null,"finish_reason":""#,
            Surface::Completion => br#"{"text":"","index":0,"logprobs":null,"finish_reason":""#,
        };
        out.extend_from_slice(start);
        out.extend_from_slice(reason.as_str().as_bytes());
        out.extend_from_slice(b"\"}");
        self.end_of_piece(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn pieces(bytes: &[u8]) -> Vec<Value> {
        let text = std::str::from_utf8(bytes).unwrap();
        let events = text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
        events.filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    #[test]
    fn a_stream_has_the_pieces_that_clients_know() {
        let done = Done { finish: FinishReason::Length, usage: Usage { prompt_tokens: 3, completion_tokens: u32::MAX } };
        for (surface, usage) in
            [(Surface::Chat, true), (Surface::Chat, false), (Surface::Completion, true), (Surface::Completion, false)]
        {
            let mut shape = Shape::new(surface, usage);
            shape.begin("m\"\n".to_owned());
            let mut out = Vec::new();
            shape.first(&mut out);
            shape.text(&mut out, "a\"\n\u{2028}😀\0");
            shape.last(&mut out, &done);
            assert!(out.ends_with(b"data: [DONE]\n\n"));
            let pieces = pieces(&out);
            assert!(
                pieces
                    .iter()
                    .all(|piece| piece["id"] == pieces[0]["id"] && piece["model"] == "m\"\n" && piece["created"].is_u64())
            );
            let chat = surface == Surface::Chat;
            assert_eq!(pieces.len(), 2 + usize::from(chat) + usize::from(usage));
            let text = &pieces[usize::from(chat)]["choices"][0];
            assert_eq!(if chat { &text["delta"]["content"] } else { &text["text"] }, "a\"\n\u{2028}😀\0");
            assert!(text["finish_reason"].is_null());
            assert_eq!(pieces[1 + usize::from(chat)]["choices"][0]["finish_reason"], "length");
            if chat {
                assert_eq!(pieces[0]["choices"][0]["delta"], serde_json::json!({"role": "assistant", "content": ""}));
            }
            let last = pieces.last().unwrap();
            assert_eq!(last.get("usage").is_some(), usage);
            if usage {
                assert_eq!(last["choices"], serde_json::json!([]));
                assert_eq!(last["usage"]["total_tokens"], 3 + u64::from(u32::MAX));
                assert!(pieces[0]["usage"].is_null());
            }
        }
    }

    #[test]
    fn a_whole_answer_is_one_object() {
        let done = Done { finish: FinishReason::Stop, usage: Usage { prompt_tokens: 3, completion_tokens: 1 } };
        let mut shape = Shape::new(Surface::Chat, false);
        shape.begin("m".to_owned());
        let chat: Value = serde_json::from_slice(&shape.whole("4", &done)).unwrap();
        assert_eq!((&chat["object"], &chat["choices"][0]["message"]["content"]), (&"chat.completion".into(), &"4".into()));
        assert_eq!(chat["usage"], serde_json::json!({"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}));
        let mut shape = Shape::new(Surface::Completion, false);
        shape.begin("m".to_owned());
        let text: Value = serde_json::from_slice(&shape.whole("4", &done)).unwrap();
        assert_eq!((&text["object"], &text["choices"][0]["text"]), (&"text_completion".into(), &"4".into()));
        assert!(text["id"].as_str().unwrap().starts_with("cmpl-") && chat["id"].as_str().unwrap().starts_with("chatcmpl-"));
    }
}
