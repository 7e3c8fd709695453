//! What is asked, in the words of the OpenAI API.

use serde::Serialize;

use crate::domain::prompt::{Ask, Text};

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    messages: Vec<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stop: Vec<&'a str>,
}

/// The path below the base URL, and the body. The answer is always streamed: a whole one would say nothing while it is
/// made, and an asker that is gone would be noticed only at its end.
pub(super) fn request(model: &str, ask: &Ask) -> (&'static str, Vec<u8>) {
    let system = ask.system.as_ref().map(|system| Message { role: "system", content: system.as_str() });
    let turns = ask.history.iter().map(|turn| Message { role: turn.role.as_str(), content: turn.text.as_str() });
    let user = Message { role: "user", content: ask.prompt.as_str() };
    let body = Body {
        model,
        messages: if ask.raw { Vec::new() } else { system.into_iter().chain(turns).chain([user]).collect() },
        prompt: ask.raw.then_some(ask.prompt.as_str()),
        stream: true,
        stream_options: StreamOptions { include_usage: true },
        max_tokens: ask.max_tokens,
        temperature: ask.temperature,
        top_p: ask.top_p,
        // Servers keep it in 64 bits with a sign.
        seed: ask.seed.map(|seed| seed & (u64::MAX >> 1)),
        stop: ask.stop.iter().map(Text::as_str).collect(),
    };
    // The type has no maps and no numbers that JSON lacks: checked before (`infer::check`).
    (if ask.raw { "/completions" } else { "/chat/completions" }, serde_json::to_vec(&body).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::prompt::{Role, Turn};

    fn body(ask: &Ask) -> (&'static str, serde_json::Value) {
        let (path, body) = request("m", ask);
        (path, serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn a_conversation_keeps_its_order() {
        let turn = |role, text: &str| Turn { role, text: Text::new(text) };
        let ask = Ask {
            prompt: Text::new("and 3+3?"),
            system: Some(Text::new("be brief")),
            history: vec![turn(Role::User, "2+2?"), turn(Role::Assistant, "4")],
            max_tokens: Some(5),
            temperature: Some(0.0),
            top_p: Some(0.9),
            seed: Some(7),
            stop: vec![Text::new("\n")],
            ..Ask::default()
        };
        let (path, body) = body(&ask);
        assert_eq!(path, "/chat/completions");
        let said = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let messages = [said("system", "be brief"), said("user", "2+2?"), said("assistant", "4"), said("user", "and 3+3?")];
        assert_eq!(body["messages"], serde_json::json!(messages));
        assert_eq!((&body["max_tokens"], &body["seed"], &body["stream"]), (&5.into(), &7.into(), &true.into()));
        assert_eq!((&body["top_p"], &body["stop"]), (&serde_json::json!(0.9), &serde_json::json!(["\n"])));
        assert!(body.get("prompt").is_none());
    }

    #[test]
    fn raw_text_goes_without_a_template_and_what_was_not_said_is_not_sent() {
        let (path, body) = body(&Ask { prompt: Text::new("once upon"), raw: true, ..Ask::default() });
        assert_eq!((path, &body["prompt"]), ("/completions", &"once upon".into()));
        let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["model", "prompt", "stream", "stream_options"]);
    }

    #[test]
    fn a_seed_fits_into_what_servers_have() {
        let seed = |seed| body(&Ask { seed: Some(seed), ..Ask::default() }).1["seed"].as_u64().unwrap();
        assert_eq!((seed(u64::MAX), seed(7)), (i64::MAX as u64, 7));
    }
}
