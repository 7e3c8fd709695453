//! `inference_request` and `inference_response`: JSON in length-prefixed frames. Unknown keys are ignored, so that a newer
//! version may add some; known ones are checked.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::frame;
use super::keys::REFERENCE_BYTES;
use super::limits::{MAX_MESSAGE_BYTES, MAX_MODEL_NAME_BYTES, MAX_REQUEST_FRAME_BYTES};
use super::version::INFERENCE_VERSION;
use crate::domain::prompt::{
    Ask, Done, Failure, FailureKind, FinishReason, MAX_STOP_BYTES, MAX_STOPS, MAX_TIMEOUT, MAX_TURNS, Role, Text, Turn, Usage,
};

const REQUEST: &str = "inference_request";
const RESPONSE: &str = "inference_response";
/// Characters that are shown of an error's name that is not known.
const MAX_ERROR_NAME_CHARS: usize = 64;
/// Highest temperature that the OpenAI API takes.
pub const MAX_TEMPERATURE: f64 = 2.0;

/// Why bytes are no inference message. Never contains prompt or answer text.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    /// Not the JSON that was expected. Only the place is told: the message of the parser may quote text.
    #[error("not a valid {what} (line {line}, column {column})")]
    Json {
        /// Which message.
        what: &'static str,
        /// Line of the first error.
        line: usize,
        /// Column of the first error.
        column: usize,
    },
    /// Text that is to be continued as it stands has no conversation around it.
    #[error("raw text has no system text and no earlier messages")]
    RawConversation,
    /// A field is out of range.
    #[error("{field} is out of range")]
    Field {
        /// Which.
        field: &'static str,
    },
}

fn json(what: &'static str) -> impl Fn(serde_json::Error) -> InferError {
    move |error| InferError::Json { what, line: error.line(), column: error.column() }
}

/// A running SHA-256 over the answer's text, as both sides keep it.
#[derive(Debug, Clone, Default)]
pub struct AnswerHash(Sha256);

impl AnswerHash {
    /// Of no text yet.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds text.
    pub fn update(&mut self, text: &[u8]) {
        self.0.update(text);
    }
    /// Lower-case hex of the hash so far.
    pub fn finish(&self) -> String {
        hex(&self.0.clone().finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]).map(char::from).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (at, pair) in digits.chunks_exact(2).enumerate() {
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        bytes[at] = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// A list that is refused while it is being read once it has more than `MOST` items.
#[derive(Serialize)]
#[serde(transparent)]
struct Bounded<T, const MOST: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for Bounded<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items<T, const MOST: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Items<T, MOST> {
            type Value = Vec<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MOST}")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    if list.len() == MOST {
                        return Err(serde::de::Error::invalid_length(MOST + 1, &self));
                    }
                    list.push(item);
                }
                Ok(list)
            }
        }
        deserializer.deserialize_seq(Items::<T, MOST>(PhantomData)).map(Self)
    }
}

impl<T, const MOST: usize> Bounded<T, MOST> {
    /// `None` for an empty list, which is written as no list at all.
    fn of(items: impl Iterator<Item = T>) -> Option<Self> {
        let items: Vec<T> = items.collect();
        (!items.is_empty()).then_some(Self(items))
    }
}

#[derive(Serialize, Deserialize)]
struct RawTurn<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    text: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
struct RawRequest<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    version: u16,
    #[serde(borrow)]
    request_id: Cow<'a, str>,
    #[serde(borrow)]
    cluster_ref: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    model: Option<Cow<'a, str>>,
    #[serde(borrow)]
    prompt: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    system: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    messages: Option<Bounded<RawTurn<'a>, MAX_TURNS>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    raw: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    stop: Option<Bounded<Cow<'a, str>, MAX_STOPS>>,
    timeout_ms: u64,
}

/// A prompt as it arrived.
#[derive(Debug)]
pub struct Request {
    /// Chosen by the asker; never answered twice.
    pub request_id: Uuid,
    /// In which cluster.
    pub cluster_ref: [u8; REFERENCE_BYTES],
    /// What.
    pub ask: Ask,
    /// Time left at the asker.
    pub timeout: Duration,
}

/// The id of a request of which only the beginning is there, for an answer that it is not taken; `None` when it does not stand
/// there as this software writes it. Within a text its quotes would be escaped.
pub fn id_in(head: &[u8]) -> Option<Uuid> {
    const KEY: &[u8] = b"\"request_id\":\"";
    let at = head.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    Uuid::try_parse_ascii(head[at..].split(|&byte| byte == b'"').next()?).ok()
}

/// Appends a request frame to `out`.
///
/// # Errors
/// `InvalidRequest` naming the field, when the request is larger than a frame may be or a field is out of range.
pub fn encode_request(
    out: &mut Vec<u8>,
    id: &Uuid,
    cluster_ref: &[u8; REFERENCE_BYTES],
    ask: &Ask,
    timeout: Duration,
) -> Result<(), Failure> {
    check(ask).map_err(|error| Failure::new(FailureKind::InvalidRequest, error.to_string()))?;
    let mut id_text = Uuid::encode_buffer();
    let raw = RawRequest {
        kind: REQUEST.into(),
        version: INFERENCE_VERSION,
        request_id: Cow::Borrowed(id.hyphenated().encode_lower(&mut id_text)),
        cluster_ref: hex(cluster_ref).into(),
        model: ask.model.as_deref().map(Cow::Borrowed),
        prompt: ask.prompt.as_str().into(),
        system: ask.system.as_ref().map(|system| system.as_str().into()),
        messages: Bounded::of(
            ask.history.iter().map(|turn| RawTurn { role: turn.role.as_str().into(), text: turn.text.as_str().into() }),
        ),
        raw: ask.raw,
        max_tokens: ask.max_tokens,
        temperature: ask.temperature,
        top_p: ask.top_p,
        seed: ask.seed,
        stop: Bounded::of(ask.stop.iter().map(|text| text.as_str().into())),
        // A deadline that is nearly over is no zero, which the other side would have to take for a broken request.
        timeout_ms: u64::try_from(timeout.min(MAX_TIMEOUT).as_millis()).unwrap_or(u64::MAX).max(1),
    };
    let start = frame::begin(out);
    put(out, &raw);
    let bytes = out.len() - start;
    if bytes > MAX_REQUEST_FRAME_BYTES {
        return Err(Failure::new(
            FailureKind::InvalidRequest,
            format!("the request is {bytes} bytes on the wire; at most {MAX_REQUEST_FRAME_BYTES} can be sent"),
        ));
    }
    frame::finish(out, start);
    Ok(())
}

fn put(out: &mut Vec<u8>, message: &impl Serialize) {
    // Writing to memory cannot fail, and the messages have no maps with keys that are no strings.
    let _ = serde_json::to_writer(out, message);
}

/// Checks the ranges of what a user may choose.
///
/// # Errors
/// [`InferError::Field`].
pub fn check(ask: &Ask) -> Result<(), InferError> {
    let out_of_range = |field| Err(InferError::Field { field });
    if ask.model.as_ref().is_some_and(|model| model.is_empty() || model.len() > MAX_MODEL_NAME_BYTES) {
        return out_of_range("model");
    }
    if ask.max_tokens == Some(0) {
        return out_of_range("max_tokens");
    }
    if ask.temperature.is_some_and(|temperature| !(0.0..=MAX_TEMPERATURE).contains(&temperature)) {
        return out_of_range("temperature");
    }
    if ask.top_p.is_some_and(|top_p| !(top_p > 0.0 && top_p <= 1.0)) {
        return out_of_range("top_p");
    }
    if ask.history.len() > MAX_TURNS {
        return out_of_range("messages");
    }
    if ask.stop.len() > MAX_STOPS || ask.stop.iter().any(|text| !(1..=MAX_STOP_BYTES).contains(&text.as_str().len())) {
        return out_of_range("stop");
    }
    if ask.raw && (ask.system.is_some() || !ask.history.is_empty()) {
        return Err(InferError::RawConversation);
    }
    Ok(())
}

impl Request {
    /// Reads the body of a request frame.
    ///
    /// # Errors
    /// [`InferError`]: the sender broke the protocol.
    pub fn decode(body: &[u8]) -> Result<Self, InferError> {
        let raw: RawRequest<'_> = serde_json::from_slice(body).map_err(json(REQUEST))?;
        let field = |field| InferError::Field { field };
        if raw.kind != REQUEST {
            return Err(field("type"));
        }
        if raw.version != INFERENCE_VERSION {
            return Err(field("version"));
        }
        let request_id = Uuid::try_parse(&raw.request_id).map_err(|_| field("request_id"))?;
        let cluster_ref = unhex(&raw.cluster_ref).ok_or_else(|| field("cluster_ref"))?;
        let timeout = Duration::from_millis(raw.timeout_ms);
        if timeout.is_zero() || timeout > MAX_TIMEOUT {
            return Err(field("timeout_ms"));
        }
        let turn = |turn: RawTurn<'_>| {
            let role = Role::from_name(&turn.role).ok_or_else(|| field("messages"))?;
            Ok(Turn { role, text: Text::new(turn.text) })
        };
        let ask = Ask {
            model: raw.model.map(Cow::into_owned),
            prompt: Text::new(raw.prompt),
            system: raw.system.map(Text::new),
            history: raw
                .messages
                .map_or_else(Vec::new, |list| list.0)
                .into_iter()
                .map(turn)
                .collect::<Result<_, InferError>>()?,
            raw: raw.raw,
            max_tokens: raw.max_tokens,
            temperature: raw.temperature,
            top_p: raw.top_p,
            seed: raw.seed,
            stop: raw.stop.map_or_else(Vec::new, |list| list.0).into_iter().map(Text::new).collect(),
        };
        check(&ask)?;
        Ok(Self { request_id, cluster_ref, ask, timeout })
    }
}

#[derive(Serialize, Deserialize)]
struct RawUsage {
    prompt_tokens: u32,
    completion_tokens: u32,
}

#[derive(Serialize, Deserialize)]
struct RawResponse<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    request_id: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    model: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    finish_reason: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    usage: Option<RawUsage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text_bytes: Option<u64>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    hash: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    position: Option<u32>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    error: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    reason: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    message: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
}

/// One piece of an answer as it arrived.
#[derive(Debug, PartialEq)]
pub enum Response<'a> {
    /// More text; the first one names the model.
    Token {
        /// The text.
        text: Cow<'a, str>,
        /// The model that answers.
        model: Option<Cow<'a, str>>,
    },
    /// Nothing yet, but the server lives.
    KeepAlive {
        /// Prompts before this one, while it waits.
        position: Option<u32>,
    },
    /// The whole answer is there.
    End {
        /// How it ended and what it took.
        done: Done,
        /// The model that answered.
        model: Cow<'a, str>,
        /// Bytes of text in all.
        text_bytes: u64,
        /// Hash of the text in all.
        hash: Cow<'a, str>,
    },
    /// There will be no (further) text.
    Error(Failure),
}

/// Appends a token frame. `text` is at most `MAX_TOKEN_TEXT_BYTES`; `model` comes with the first one.
pub fn encode_token(out: &mut Vec<u8>, id: &Uuid, text: &str, model: Option<&str>) {
    let mut raw = blank("token");
    raw.text = Some(text.into());
    raw.model = model.map(Cow::Borrowed);
    finish_response(out, id, raw);
}

/// Appends a keep-alive frame.
pub fn encode_keepalive(out: &mut Vec<u8>, id: &Uuid, position: Option<u32>) {
    finish_response(out, id, RawResponse { position, ..blank("keepalive") });
}

/// Appends the last frame of a whole answer.
pub fn encode_end(out: &mut Vec<u8>, id: &Uuid, model: &str, done: Done, text_bytes: u64, hash: &str) {
    let mut raw = blank("end");
    raw.model = Some(model.into());
    raw.finish_reason = Some(done.finish.as_str().into());
    raw.usage = Some(RawUsage { prompt_tokens: done.usage.prompt_tokens, completion_tokens: done.usage.completion_tokens });
    raw.text_bytes = Some(text_bytes);
    raw.hash = Some(hash.into());
    finish_response(out, id, raw);
}

/// Appends the last frame of an answer that is not whole.
pub fn encode_error(out: &mut Vec<u8>, id: &Uuid, failure: &Failure) {
    let mut raw = blank("error");
    let known = failure.kind.in_version_one();
    raw.error = Some(known.as_str().into());
    raw.reason = (known != failure.kind).then(|| failure.kind.as_str().into());
    raw.message = Some(sentence(&failure.detail).into());
    raw.retry_after_ms = failure.retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
    finish_response(out, id, raw);
}

/// What an error means to this software. A name that it does not know is of a later version: the backend failed, for all
/// that can be said, and the name stands in the detail.
fn named(reason: Option<FailureKind>, error: &str, message: &str) -> (FailureKind, String) {
    match reason.or_else(|| FailureKind::from_name(error)) {
        Some(kind) => (kind, sentence(message)),
        None => {
            let name: String = error.chars().take(MAX_ERROR_NAME_CHARS).collect();
            (FailureKind::BackendFailed, sentence(&format!("the serving node says {name}: {message}")))
        }
    }
}

/// The message of an error: one line, at most [`MAX_MESSAGE_BYTES`], for the sender and for the reader alike.
fn sentence(text: &str) -> String {
    let mut text: String = text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE_BYTES).collect();
    text.truncate(text.floor_char_boundary(MAX_MESSAGE_BYTES));
    text
}

fn blank(event: &'static str) -> RawResponse<'static> {
    RawResponse {
        kind: RESPONSE.into(),
        request_id: Cow::Borrowed(""),
        event: event.into(),
        model: None,
        text: None,
        finish_reason: None,
        usage: None,
        text_bytes: None,
        hash: None,
        position: None,
        error: None,
        reason: None,
        message: None,
        retry_after_ms: None,
    }
}

fn finish_response(out: &mut Vec<u8>, id: &Uuid, mut raw: RawResponse<'_>) {
    let mut id_text = Uuid::encode_buffer();
    let id_text: &str = id.hyphenated().encode_lower(&mut id_text);
    raw.request_id = Cow::Owned(id_text.to_owned());
    let start = frame::begin(out);
    put(out, &raw);
    frame::finish(out, start);
}

impl<'a> Response<'a> {
    /// The same, independent of the frame that it was read from.
    pub fn into_owned(self) -> Response<'static> {
        let own = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        match self {
            Self::Token { text, model } => Response::Token { text: own(text), model: model.map(own) },
            Self::KeepAlive { position } => Response::KeepAlive { position },
            Self::End { done, model, text_bytes, hash } => Response::End { done, model: own(model), text_bytes, hash: own(hash) },
            Self::Error(failure) => Response::Error(failure),
        }
    }

    /// Reads the body of a response frame.
    ///
    /// # Errors
    /// [`InferError`]: the sender broke the protocol.
    pub fn decode(body: &'a [u8], id: &Uuid) -> Result<Self, InferError> {
        let raw: RawResponse<'a> = serde_json::from_slice(body).map_err(json(RESPONSE))?;
        let field = |field| InferError::Field { field };
        if raw.kind != RESPONSE {
            return Err(field("type"));
        }
        if Uuid::try_parse(&raw.request_id).ok().as_ref() != Some(id) {
            return Err(field("request_id"));
        }
        if raw.model.as_ref().is_some_and(|model| model.len() > MAX_MODEL_NAME_BYTES) {
            return Err(field("model"));
        }
        match raw.event.as_ref() {
            "token" => Ok(Self::Token { text: raw.text.ok_or_else(|| field("text"))?, model: raw.model }),
            "keepalive" => Ok(Self::KeepAlive { position: raw.position }),
            "end" => {
                let finish = match raw.finish_reason.as_deref() {
                    Some("stop") => FinishReason::Stop,
                    Some("length") => FinishReason::Length,
                    _ => return Err(field("finish_reason")),
                };
                let usage = raw.usage.ok_or_else(|| field("usage"))?;
                let usage = Usage { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens };
                Ok(Self::End {
                    done: Done { finish, usage },
                    model: raw.model.ok_or_else(|| field("model"))?,
                    text_bytes: raw.text_bytes.ok_or_else(|| field("text_bytes"))?,
                    hash: raw.hash.ok_or_else(|| field("hash"))?,
                })
            }
            "error" => {
                let (kind, detail) = named(
                    raw.reason.as_deref().and_then(FailureKind::from_name),
                    &raw.error.ok_or_else(|| field("error"))?,
                    &raw.message.unwrap_or_default(),
                );
                let retry_after = raw.retry_after_ms.map(|after| Duration::from_millis(after.min(3_600_000)));
                Ok(Self::Error(Failure { kind, detail, retry_after }))
            }
            _ => Err(field("event")),
        }
    }
}

#[cfg(test)]
mod tests;
