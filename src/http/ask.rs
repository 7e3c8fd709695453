//! From a request to what is asked.

use super::errors::Refusal;
use super::request::{self, Fields};
use super::shape::Surface;
use crate::domain::prompt::{Ask, MAX_PROMPT_BYTES, Role, Text, Turn};

/// A request as it was understood.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Without a model: that depends on who is there.
    pub ask: Ask,
    /// The model as it was written.
    pub model: Option<String>,
    /// Piece by piece.
    pub stream: bool,
    /// The usage at the end of the stream.
    pub usage: bool,
}

/// Reads a body.
///
/// # Errors
/// 400, naming the field.
pub(super) fn read(surface: Surface, body: &[u8]) -> Result<Wanted, Refusal> {
    let fields: Fields<'_> = serde_json::from_slice(body).map_err(|error| Refusal::json(&error))?;
    request::check_supported(&fields)?;
    let (stream, usage) = request::stream(&fields)?;
    let conversation = match surface {
        Surface::Chat => conversation(request::messages(&fields)?)?,
        Surface::Completion => Ask { prompt: Text::new(request::prompt(&fields)?), raw: true, ..Ask::default() },
    };
    check_size(&conversation, surface)?;
    let ask = Ask {
        max_tokens: request::max_tokens(&fields)?,
        temperature: request::number("temperature", fields.temperature, |t| (0.0..=2.0).contains(&t), "from 0 to 2")?,
        top_p: request::number("top_p", fields.top_p, |p| p > 0.0 && p <= 1.0, "above 0, and at most 1")?,
        seed: request::seed(&fields)?,
        stop: request::stop(&fields)?,
        ..conversation
    };
    let model = request::field::<String>("model", fields.model, "a text")?;
    Ok(Wanted { ask, model, stream, usage })
}

/// Instructions at the beginning are the system text, the last message is the prompt, what is between them was said before.
fn conversation(mut messages: Vec<Turn>) -> Result<Ask, Refusal> {
    let last = messages.pop().filter(|last| last.role == Role::User);
    let Some(last) = last else {
        return Err(Refusal::field("messages", "the last message must be the user's: it is what is answered"));
    };
    let instructions = messages.iter().take_while(|turn| turn.role == Role::System).count();
    let history = messages.split_off(instructions);
    let texts: Vec<&str> = messages.iter().map(|turn| turn.text.as_str()).collect();
    let system = (!texts.is_empty()).then(|| Text::new(texts.join("\n\n")));
    Ok(Ask { prompt: last.text, system, history, ..Ask::default() })
}

fn check_size(ask: &Ask, surface: Surface) -> Result<(), Refusal> {
    let texts = ask.history.iter().map(|turn| &turn.text).chain(&ask.system).chain([&ask.prompt]);
    let bytes: usize = texts.map(|text| text.as_str().len()).sum();
    if bytes > MAX_PROMPT_BYTES {
        let name = if surface == Surface::Chat { "messages" } else { "prompt" };
        return Err(Refusal::field(name, format!("{name} has {bytes} bytes of text; at most {MAX_PROMPT_BYTES} are taken")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn chat(body: &Value) -> Result<Wanted, Value> {
        read(Surface::Chat, body.to_string().as_bytes()).map_err(|refusal| error(&refusal))
    }

    fn completion(body: &Value) -> Result<Wanted, Value> {
        read(Surface::Completion, body.to_string().as_bytes()).map_err(|refusal| error(&refusal))
    }

    fn error(refusal: &Refusal) -> Value {
        assert_eq!(refusal.status, 400);
        let text: Value = serde_json::from_slice(&refusal.json_text()).unwrap();
        text["error"].clone()
    }

    fn with(more: Value) -> Value {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    #[test]
    fn a_conversation_is_taken_apart() {
        let wanted = chat(&json!({"model": "m", "stream": true, "stream_options": {"include_usage": true}, "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
            {"role": "user", "content": "one", "name": "bob"},
            {"role": "assistant", "content": null},
            {"role": "system", "content": "now in French"},
            {"role": "user", "content": [{"type": "text", "text": "two"}]},
        ]}))
        .unwrap();
        assert_eq!((wanted.model.as_deref(), wanted.stream, wanted.usage), (Some("m"), true, true));
        let turn = |role, text: &str| Turn { role, text: Text::new(text) };
        let history = vec![turn(Role::User, "one"), turn(Role::Assistant, ""), turn(Role::System, "now in French")];
        let system = Some(Text::new("be brief\n\nbe kind"));
        assert_eq!(wanted.ask, Ask { prompt: Text::new("two"), system, history, ..Ask::default() });
    }

    #[test]
    fn what_clients_send_beside_it_is_ignored_and_null_is_absent() {
        let nulls = json!({"n": null, "tools": null, "stop": null, "stream": null, "stream_options": null, "seed": null,
            "temperature": null, "top_p": null, "max_tokens": null, "logprobs": null, "response_format": null, "logit_bias": null});
        assert_eq!(chat(&with(nulls)).unwrap().ask, chat(&with(json!({}))).unwrap().ask);
        let more = json!({"n": 1, "tools": [], "tool_choice": "none", "parallel_tool_calls": true, "store": true, "user": "u",
            "reasoning_effort": "low", "presence_penalty": 0.5, "logprobs": false, "top_logprobs": 0, "logit_bias": {},
            "response_format": {"type": "text"}, "modalities": ["text"], "metadata": {"a": [1, {"b": 2}]}, "surprise": [[]]});
        assert_eq!(chat(&with(more)).unwrap().ask, chat(&with(json!({}))).unwrap().ask);
    }

    #[test]
    fn the_sampler_is_read_within_its_ranges() {
        let body =
            with(json!({"temperature": 2, "top_p": 1, "seed": 7, "max_tokens": 5, "max_completion_tokens": 6, "stop": "a"}));
        let ask = chat(&body).unwrap().ask;
        assert_eq!((ask.temperature, ask.top_p, ask.seed, ask.max_tokens), (Some(2.0), Some(1.0), Some(7), Some(6)));
        assert_eq!(ask.stop, [Text::new("a")]);
        assert_eq!(chat(&with(json!({"seed": -1}))).unwrap().ask.seed, None);
        assert_eq!(chat(&with(json!({"seed": -2}))).unwrap().ask.seed, Some(u64::MAX - 1));
        let stops = |count: usize, bytes: usize| chat(&with(json!({"stop": vec!["s".repeat(bytes); count]})));
        assert!(stops(16, 256).is_ok() && stops(17, 1).is_err() && stops(1, 257).is_err());
        assert!(chat(&with(json!({"stop": ["", "a"]}))).unwrap().ask.stop == [Text::new("a")]);
    }

    #[test]
    fn what_is_wrong_or_not_done_here_is_named() {
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]);
        for (more, param) in [
            (json!({"n": 2}), "n"),
            (json!({"n": 0}), "n"),
            (json!({"n": "1"}), "n"),
            (json!({"logprobs": true}), "logprobs"),
            (json!({"top_logprobs": 1}), "top_logprobs"),
            (json!({"logit_bias": {"1": 1}}), "logit_bias"),
            (json!({"tools": [{"type": "function"}]}), "tools"),
            (json!({"functions": [{}]}), "functions"),
            (json!({"response_format": {"type": "json_object"}}), "response_format"),
            (json!({"response_format": 1}), "response_format"),
            (json!({"modalities": ["audio"]}), "modalities"),
            (json!({"audio": {"voice": "x"}}), "audio"),
            (json!({"temperature": 2.1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_p": 1.1}), "top_p"),
            (json!({"max_tokens": 0}), "max_tokens"),
            (json!({"max_tokens": 4_294_967_296_u64}), "max_tokens"),
            (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"stop": 5}), "stop"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stream_options": true}), "stream_options"),
            (json!({"model": 5}), "model"),
            (json!({"messages": null}), "messages"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": "x"}), "messages"),
            (json!({"messages": ["x"]}), "messages[0]"),
            (json!({"messages": [{"content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "wizard", "content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "messages[0].content"),
            (json!({"messages": image}), "messages[0].content"),
            (json!({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "messages[0].tool_calls"),
            (json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}), "messages"),
            (json!({"messages": [{"role": "system", "content": "a"}]}), "messages"),
        ] {
            assert_eq!(chat(&with(more.clone())).map(|_| ()).unwrap_err()["param"], param, "{more}");
        }
        for body in ["", "{", "[]", "5", "{\"model\": \"m\", \"model\": \"m\"}"] {
            assert!(read(Surface::Chat, body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn messages_and_bytes_at_the_limit_pass_and_one_more_does_not() {
        let message = json!({"role": "user", "content": "x"});
        let many = |count: usize| chat(&json!({"messages": vec![message.clone(); count]}));
        assert_eq!(many(1024).unwrap().ask.history.len(), 1023);
        assert_eq!(many(1025).map(|_| ()).unwrap_err()["param"], "messages");
        let long = |bytes: usize| completion(&json!({"prompt": "x".repeat(bytes)}));
        assert!(long(MAX_PROMPT_BYTES).is_ok());
        assert_eq!(long(MAX_PROMPT_BYTES + 1).map(|_| ()).unwrap_err()["param"], "prompt");
    }

    #[test]
    fn a_completion_has_one_text() {
        let ask = completion(&json!({"prompt": "2+2=", "max_tokens": 3})).unwrap().ask;
        assert_eq!((ask.prompt.as_str(), ask.raw, ask.max_tokens), ("2+2=", true, Some(3)));
        assert_eq!(completion(&json!({"prompt": ["2+2="]})).unwrap().ask.prompt.as_str(), "2+2=");
        for prompt in [json!(null), json!([]), json!(["a", "b"]), json!([1, 2]), json!([[1, 2]]), json!(5), json!({})] {
            assert_eq!(completion(&json!({"prompt": prompt})).map(|_| ()).unwrap_err()["param"], "prompt", "{prompt}");
        }
        for (more, param) in [
            (json!({"best_of": 2}), "best_of"),
            (json!({"suffix": "x"}), "suffix"),
            (json!({"echo": true}), "echo"),
            (json!({"logprobs": 1}), "logprobs"),
        ] {
            let mut body = json!({"prompt": "x"});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            assert_eq!(completion(&body).map(|_| ()).unwrap_err()["param"], param);
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-z\\PC\"\\\\]{0,8}".prop_map(Value::from),
            prop_oneof![Just("user"), Just("assistant"), Just("text"), Just("tool")].prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let key = prop_oneof![Just("role"), Just("content"), Just("type"), Just("text"), Just("x")].prop_map(str::to_owned);
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key, inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_understood_or_refused_with_400(
            fields in proptest::collection::btree_map(
                proptest::sample::select(vec!["model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature",
                    "top_p", "seed", "stop", "n", "logprobs", "top_logprobs", "tools", "response_format", "modalities", "echo"]),
                any_json(), 0..6),
            cut in any::<proptest::sample::Index>(),
        ) {
            let body = serde_json::to_vec(&fields).unwrap();
            for surface in [Surface::Chat, Surface::Completion] {
                for body in [&body[..], &body[..cut.index(body.len())]] {
                    if let Err(refusal) = read(surface, body) {
                        prop_assert_eq!(refusal.status, 400);
                    }
                }
            }
        }

        #[test]
        fn any_bytes_are_refused_with_400(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for surface in [Surface::Chat, Surface::Completion] {
                prop_assert!(read(surface, &bytes).is_err_and(|refusal| refusal.status == 400));
            }
        }
    }
}
