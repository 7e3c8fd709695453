//! What clients send, read with tolerance: unknown fields are ignored, `null` is absent, and what is wrong is named.
//!
//! The fields stay raw until they are wanted, so that an error names its field and a field that is not wanted costs
//! nothing.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::errors::Refusal;
use crate::domain::prompt::{MAX_STOP_BYTES, MAX_STOPS, MAX_TURNS, Role, Text, Turn};

/// The fields of both kinds of request.
#[derive(Debug, Deserialize)]
pub(super) struct Fields<'a> {
    #[serde(borrow)]
    pub model: Option<&'a RawValue>,
    #[serde(borrow)]
    pub messages: Option<&'a RawValue>,
    #[serde(borrow)]
    pub prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    pub stream: Option<&'a RawValue>,
    #[serde(borrow)]
    pub stream_options: Option<&'a RawValue>,
    #[serde(borrow)]
    pub max_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    pub max_completion_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    pub temperature: Option<&'a RawValue>,
    #[serde(borrow)]
    pub top_p: Option<&'a RawValue>,
    #[serde(borrow)]
    pub seed: Option<&'a RawValue>,
    #[serde(borrow)]
    pub stop: Option<&'a RawValue>,
    #[serde(borrow)]
    pub n: Option<&'a RawValue>,
    #[serde(borrow)]
    pub best_of: Option<&'a RawValue>,
    #[serde(borrow)]
    pub logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    pub top_logprobs: Option<&'a RawValue>,
    #[serde(borrow)]
    pub logit_bias: Option<&'a RawValue>,
    #[serde(borrow)]
    pub tools: Option<&'a RawValue>,
    #[serde(borrow)]
    pub functions: Option<&'a RawValue>,
    #[serde(borrow)]
    pub response_format: Option<&'a RawValue>,
    #[serde(borrow)]
    pub modalities: Option<&'a RawValue>,
    #[serde(borrow)]
    pub audio: Option<&'a RawValue>,
    #[serde(borrow)]
    pub suffix: Option<&'a RawValue>,
    #[serde(borrow)]
    pub echo: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Option<&'a RawValue>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
    #[serde(borrow)]
    function_call: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: Option<bool>,
}

/// Reads one field; `wanted` says what it should be.
pub(super) fn field<T: DeserializeOwned>(name: &'static str, raw: Option<&RawValue>, wanted: &str) -> Result<Option<T>, Refusal> {
    raw.map(|raw| serde_json::from_str(raw.get()))
        .transpose()
        .map_err(|_| Refusal::field(name, format!("{name} is not {wanted}")))
}

/// An empty list, an empty object or `false` asks for nothing.
fn is_empty(raw: &RawValue) -> bool {
    let text = raw.get();
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let inner = inner.or_else(|| text.strip_prefix('{').and_then(|text| text.strip_suffix('}')));
    text == "false" || text == "\"\"" || inner.is_some_and(|inner| inner.trim().is_empty())
}

/// Refuses what would be silently missing from the answer.
pub(super) fn check_supported(fields: &Fields<'_>) -> Result<(), Refusal> {
    for (name, count) in [("n", fields.n), ("best_of", fields.best_of)] {
        match field::<u64>(name, count, "a whole number")? {
            None | Some(1) => {}
            Some(0) => return Err(Refusal::field(name, format!("{name} is at least 1"))),
            Some(_) => {
                return Err(Refusal::unsupported(name, format!("{name} above 1: a request has one answer here; send several")));
            }
        }
    }
    if fields.top_logprobs.is_some_and(|raw| raw.get() != "0") {
        return Err(Refusal::unsupported("top_logprobs", "probabilities of tokens are not told here"));
    }
    for (name, raw, why) in [
        ("logprobs", fields.logprobs, "probabilities of tokens are not told here"),
        ("logit_bias", fields.logit_bias, "biases of tokens are not supported here"),
        ("tools", fields.tools, "tools are not supported here; leave them out"),
        ("functions", fields.functions, "functions are not supported here; leave them out"),
        ("audio", fields.audio, "answers are text here"),
        ("suffix", fields.suffix, "text is continued at its end alone"),
        ("echo", fields.echo, "the prompt is not repeated before the answer"),
    ] {
        if raw.is_some_and(|raw| !is_empty(raw)) {
            return Err(Refusal::unsupported(name, why));
        }
    }
    if let Some(modalities) = field::<Vec<String>>("modalities", fields.modalities, "a list of texts")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(Refusal::unsupported("modalities", "answers are text here"));
    }
    if let Some(format) = field::<Part>("response_format", fields.response_format, "an object with a type")?
        && format.kind.as_deref() != Some("text")
    {
        return Err(Refusal::unsupported("response_format", "answers are plain text here: only {\"type\": \"text\"} is taken"));
    }
    Ok(())
}

/// Whether the answer comes as a stream, and with the usage at its end.
pub(super) fn stream(fields: &Fields<'_>) -> Result<(bool, bool), Refusal> {
    let stream = field::<bool>("stream", fields.stream, "true or false")?.unwrap_or(false);
    let options = field::<StreamOptions>("stream_options", fields.stream_options, "an object")?;
    Ok((stream, options.and_then(|options| options.include_usage).unwrap_or(false)))
}

/// The newer name wins over the older one.
pub(super) fn max_tokens(fields: &Fields<'_>) -> Result<Option<u32>, Refusal> {
    for (name, raw) in [("max_completion_tokens", fields.max_completion_tokens), ("max_tokens", fields.max_tokens)] {
        match field::<u32>(name, raw, "a whole number from 1 to 4294967295")? {
            Some(0) => return Err(Refusal::field(name, format!("{name} is at least 1"))),
            Some(most) => return Ok(Some(most)),
            None => {}
        }
    }
    Ok(None)
}

/// A number of the sampler within its range.
pub(super) fn number(
    name: &'static str,
    raw: Option<&RawValue>,
    fits: impl Fn(f64) -> bool,
    range: &str,
) -> Result<Option<f64>, Refusal> {
    match field::<f64>(name, raw, "a number")? {
        Some(value) if !fits(value) => Err(Refusal::field(name, format!("{name} is {range}"))),
        value => Ok(value),
    }
}

/// A seed of any sign. -1 is what many programs send for "any".
pub(super) fn seed(fields: &Fields<'_>) -> Result<Option<u64>, Refusal> {
    match fields.seed.map(RawValue::get) {
        Some(text) if text.starts_with('-') => {
            let seed = field::<i64>("seed", fields.seed, "a whole number of 64 bits")?;
            Ok(seed.filter(|&seed| seed != -1).map(i64::cast_unsigned))
        }
        _ => field("seed", fields.seed, "a whole number of 64 bits"),
    }
}

/// Texts that end the answer.
pub(super) fn stop(fields: &Fields<'_>) -> Result<Vec<Text>, Refusal> {
    let texts: Vec<String> = match fields.stop {
        Some(raw) if raw.get().starts_with('"') => field("stop", fields.stop, "a text")?.into_iter().collect(),
        _ => field("stop", fields.stop, "a text or a list of texts")?.unwrap_or_default(),
    };
    let texts: Vec<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
    if texts.len() > MAX_STOPS {
        return Err(Refusal::field("stop", format!("stop has {} texts; at most {MAX_STOPS} are taken", texts.len())));
    }
    if let Some(long) = texts.iter().find(|text| text.len() > MAX_STOP_BYTES) {
        return Err(Refusal::field(
            "stop",
            format!("a text of stop has {} bytes; at most {MAX_STOP_BYTES} are taken", long.len()),
        ));
    }
    Ok(texts.into_iter().map(Text::new).collect())
}

/// The messages of a conversation, oldest first.
pub(super) fn messages(fields: &Fields<'_>) -> Result<Vec<Turn>, Refusal> {
    let wrong = |what: &str| Refusal::field("messages", what.to_owned());
    let raw = fields.messages.ok_or_else(|| wrong("messages is missing"))?;
    let raw: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(|_| wrong("messages is not a list"))?;
    if raw.is_empty() {
        return Err(wrong("messages is empty"));
    }
    if raw.len() > MAX_TURNS {
        return Err(wrong(&format!("there are {} messages; at most {MAX_TURNS} are taken", raw.len())));
    }
    raw.into_iter().enumerate().map(|(at, raw)| message(at, raw)).collect()
}

fn message(at: usize, raw: &RawValue) -> Result<Turn, Refusal> {
    let here = |part: &str| format!("messages[{at}]{part}");
    let wrong = |part: &str, what: &str| Refusal::field(here(part), format!("{} {what}", here(part)));
    let message: Message<'_> = serde_json::from_str(raw.get()).map_err(|_| wrong("", "is not a message"))?;
    let role: Option<String> = message.role.and_then(|role| serde_json::from_str(role.get()).ok());
    let role = match role.as_deref() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool" | "function") => {
            return Err(Refusal::unsupported(here(".role"), "tools are not supported here: no message is a tool's"));
        }
        _ => return Err(wrong(".role", "is none of system, developer, user, assistant")),
    };
    for (part, calls) in [(".tool_calls", message.tool_calls), (".function_call", message.function_call)] {
        if calls.is_some_and(|calls| !is_empty(calls)) {
            return Err(Refusal::unsupported(here(part), "tools are not supported here: no message calls one"));
        }
    }
    let text = match message.content {
        // An assistant that said nothing.
        None if role == Role::Assistant => String::new(),
        None => return Err(wrong(".content", "is missing")),
        Some(content) if content.get().starts_with('"') => {
            serde_json::from_str(content.get()).map_err(|_| wrong(".content", "is not a text"))?
        }
        Some(content) => parts(content, &here(".content"))?,
    };
    Ok(Turn { role, text: Text::new(text) })
}

/// The texts of a list of parts.
fn parts(raw: &RawValue, place: &str) -> Result<String, Refusal> {
    let wrong = |what: &str| Refusal::field(place.to_owned(), format!("{place} {what}"));
    let raw: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(|_| wrong("is neither a text nor a list of parts"))?;
    let mut text = String::new();
    for part in raw {
        let part: Part = serde_json::from_str(part.get()).map_err(|_| wrong("has a part that is none"))?;
        match (part.kind.as_deref(), part.text) {
            (Some("text") | None, Some(more)) => text.push_str(&more),
            (Some("text") | None, None) => return Err(wrong("has a text part without text")),
            (Some(_), _) => {
                return Err(Refusal::unsupported(place.to_owned(), "only text can be asked here: no images, audio or files"));
            }
        }
    }
    Ok(text)
}

/// The text that is to be continued.
pub(super) fn prompt(fields: &Fields<'_>) -> Result<String, Refusal> {
    let raw = fields.prompt.ok_or_else(|| Refusal::field("prompt", "prompt is missing"))?;
    if raw.get().starts_with('"') {
        return Ok(field("prompt", fields.prompt, "a text")?.unwrap_or_default());
    }
    let list: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(|_| Refusal::field("prompt", "prompt is not a text"))?;
    match list.as_slice() {
        [one] if one.get().starts_with('"') => {
            serde_json::from_str(one.get()).map_err(|_| Refusal::field("prompt", "prompt is not a text"))
        }
        [] => Err(Refusal::field("prompt", "prompt is empty")),
        [one, ..] if one.get().starts_with('"') => {
            Err(Refusal::unsupported("prompt", "a request has one prompt here; send several requests"))
        }
        _ => Err(Refusal::unsupported("prompt", "a prompt is text here: tokens are not taken")),
    }
}
