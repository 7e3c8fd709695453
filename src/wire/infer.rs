//! `inference_request` and `inference_response`: JSON in length-prefixed frames. Unknown keys are ignored, so that a newer
//! version may add some; known ones are checked.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::frame;
use super::keys::REFERENCE_BYTES;
use super::limits::{MAX_MESSAGE_BYTES, MAX_MODEL_NAME_BYTES, MAX_REQUEST_FRAME_BYTES};
use super::version::INFERENCE_VERSION;
use crate::domain::prompt::{Ask, Done, Failure, FailureKind, FinishReason, MAX_TIMEOUT, Text, Usage};

const REQUEST: &str = "inference_request";
const RESPONSE: &str = "inference_response";
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
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
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
        max_tokens: ask.max_tokens,
        temperature: ask.temperature,
        seed: ask.seed,
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
        let ask = Ask {
            model: raw.model.map(Cow::into_owned),
            prompt: Text::new(raw.prompt),
            system: raw.system.map(Text::new),
            max_tokens: raw.max_tokens,
            temperature: raw.temperature,
            seed: raw.seed,
            ..Ask::default()
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
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    error: Option<Cow<'a, str>>,
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
    KeepAlive,
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
pub fn encode_keepalive(out: &mut Vec<u8>, id: &Uuid) {
    finish_response(out, id, blank("keepalive"));
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
    raw.error = Some(failure.kind.as_str().into());
    raw.message = Some(sentence(&failure.detail).into());
    raw.retry_after_ms = failure.retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
    finish_response(out, id, raw);
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
        error: None,
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
            Self::KeepAlive => Response::KeepAlive,
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
            "keepalive" => Ok(Self::KeepAlive),
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
                let kind = raw.error.as_deref().and_then(FailureKind::from_name).ok_or_else(|| field("error"))?;
                let detail = sentence(&raw.message.unwrap_or_default());
                let retry_after = raw.retry_after_ms.map(|after| Duration::from_millis(after.min(3_600_000)));
                Ok(Self::Error(Failure { kind, detail, retry_after }))
            }
            _ => Err(field("event")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{MAX_RESPONSE_FRAME_BYTES, MAX_TOKEN_TEXT_BYTES};
    use super::*;
    use proptest::prelude::*;

    const ID: Uuid = Uuid::from_u128(0x0123_4567_89ab_4def_8123_4567_89ab_cdef);

    fn request(ask: &Ask) -> Result<Request, InferError> {
        let mut out = Vec::new();
        encode_request(&mut out, &ID, &[3; 16], ask, Duration::from_secs(9)).unwrap();
        Request::decode(&out[4..])
    }

    #[test]
    fn a_request_reads_back() {
        let ask = Ask {
            model: Some("m".to_owned()),
            prompt: Text::new("What is \"2+2\"?\n\u{1f600}"),
            system: Some(Text::new("be brief")),
            max_tokens: Some(7),
            temperature: Some(0.5),
            seed: Some(u64::MAX),
            ..Ask::default()
        };
        let read = request(&ask).unwrap();
        assert_eq!((read.ask, read.request_id, read.cluster_ref, read.timeout), (ask, ID, [3; 16], Duration::from_secs(9)));
    }

    #[test]
    fn a_prompt_fits_up_to_the_frame_and_one_byte_more_does_not() {
        let sized = |length: usize| {
            let mut out = Vec::new();
            let ask = Ask { prompt: Text::new("a".repeat(length)), ..Ask::default() };
            encode_request(&mut out, &ID, &[3; 16], &ask, Duration::from_secs(9)).map(|()| out.len() - 4)
        };
        let envelope = sized(0).unwrap();
        let most = MAX_REQUEST_FRAME_BYTES - envelope;
        assert_eq!(sized(most).unwrap(), MAX_REQUEST_FRAME_BYTES);
        assert_eq!(sized(most + 1).unwrap_err().kind, FailureKind::InvalidRequest);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        for (ask, field) in [
            (Ask { temperature: Some(2.1), ..Ask::default() }, "temperature"),
            (Ask { temperature: Some(f64::NAN), ..Ask::default() }, "temperature"),
            (Ask { max_tokens: Some(0), ..Ask::default() }, "max_tokens"),
            (Ask { model: Some("m".repeat(129)), ..Ask::default() }, "model"),
            (Ask { model: Some(String::new()), ..Ask::default() }, "model"),
        ] {
            let failure = encode_request(&mut Vec::new(), &ID, &[0; 16], &ask, Duration::from_secs(1)).unwrap_err();
            assert!(failure.detail.contains(field), "{failure}");
        }
    }

    #[test]
    fn requests_that_lie_are_refused() {
        let good = r#"{"type":"inference_request","version":1,"request_id":"01234567-89ab-4def-8123-456789abcdef","cluster_ref":"03030303030303030303030303030303","prompt":"p","timeout_ms":5,"new_key":[1]}"#;
        assert!(Request::decode(good.as_bytes()).is_ok(), "unknown keys are ignored");
        for (from, to) in [
            ("inference_request", "inference_response"),
            ("\"version\":1", "\"version\":2"),
            ("01234567", "0123456"),
            ("0303\"", "03\""),
            ("0303\"", "03zz\""),
            ("\"timeout_ms\":5", "\"timeout_ms\":0"),
            ("\"timeout_ms\":5", "\"timeout_ms\":3600001"),
            ("\"timeout_ms\":5", "\"timeout_ms\":-5"),
            ("\"prompt\":\"p\",", ""),
        ] {
            assert!(Request::decode(good.replace(from, to).as_bytes()).is_err(), "{from} → {to}");
        }
        for length in 0..good.len() {
            assert!(Request::decode(&good.as_bytes()[..length]).is_err());
        }
    }

    #[test]
    fn parse_errors_do_not_quote_the_text() {
        let error = Request::decode(br#"{"prompt":"canary","version":"canary"}"#).unwrap_err();
        assert!(!error.to_string().contains("canary") && !format!("{error:?}").contains("canary"));
    }

    #[test]
    fn the_worst_token_still_fits_its_frame() {
        let mut out = Vec::new();
        encode_token(&mut out, &ID, &"\u{1}".repeat(MAX_TOKEN_TEXT_BYTES), Some(&"\u{1}".repeat(MAX_MODEL_NAME_BYTES)));
        assert!(out.len() - 4 <= MAX_RESPONSE_FRAME_BYTES, "{}", out.len());
    }

    #[test]
    fn responses_read_back() {
        let done = Done { finish: FinishReason::Length, usage: Usage { prompt_tokens: 1, completion_tokens: 2 } };
        let read = |write: &dyn Fn(&mut Vec<u8>), check: &dyn Fn(Response<'_>)| {
            let mut out = Vec::new();
            write(&mut out);
            check(Response::decode(&out[4..], &ID).unwrap());
        };
        read(&|out| encode_token(out, &ID, "hé", Some("m")), &|got| {
            assert_eq!(got, Response::Token { text: "hé".into(), model: Some("m".into()) });
        });
        read(&|out| encode_keepalive(out, &ID), &|got| assert_eq!(got, Response::KeepAlive));
        read(&|out| encode_end(out, &ID, "m", done.clone(), 5, "ab"), &|got| {
            assert_eq!(got, Response::End { done: done.clone(), model: "m".into(), text_bytes: 5, hash: "ab".into() });
        });
        let failure = Failure::busy("come back", Duration::from_millis(1500));
        read(&|out| encode_error(out, &ID, &failure), &|got| assert_eq!(got, Response::Error(failure.clone())));
    }

    #[test]
    fn the_message_of_an_error_is_one_line_of_at_most_512_bytes_on_both_sides() {
        let read = |detail: &str| {
            let mut out = Vec::new();
            encode_error(&mut out, &ID, &Failure::new(FailureKind::BackendFailed, detail));
            let Ok(Response::Error(failure)) = Response::decode(&out[4..], &ID) else { panic!("not read") };
            failure.detail
        };
        for sentence in ["", "the model \"größer\" is gone: C:\\x", &"m".repeat(MAX_MESSAGE_BYTES)] {
            assert_eq!(read(sentence), sentence);
        }
        assert_eq!(read("two\nlines\u{1b}[0m"), "twolines[0m");
        assert_eq!(read(&"m".repeat(MAX_MESSAGE_BYTES + 1)).len(), MAX_MESSAGE_BYTES);
        assert_eq!(read(&format!("m{}", "\u{1f600}".repeat(MAX_MESSAGE_BYTES))).len(), MAX_MESSAGE_BYTES - 3);
        let long = "\u{1f600}".repeat(MAX_MESSAGE_BYTES);
        let frame =
            format!(r#"{{"type":"inference_response","request_id":"{ID}","event":"error","error":"Busy","message":"{long}"}}"#);
        let Ok(Response::Error(failure)) = Response::decode(frame.as_bytes(), &ID) else { panic!("not read") };
        assert_eq!(failure.detail.len(), MAX_MESSAGE_BYTES);
    }

    #[test]
    fn a_deadline_that_is_nearly_over_or_far_away_is_still_one_that_is_accepted() {
        for (timeout, read) in [
            (Duration::ZERO, Duration::from_millis(1)),
            (Duration::from_micros(999), Duration::from_millis(1)),
            (Duration::from_micros(2999), Duration::from_millis(2)),
            (MAX_TIMEOUT, MAX_TIMEOUT),
            (Duration::MAX, MAX_TIMEOUT),
        ] {
            let mut out = Vec::new();
            encode_request(&mut out, &ID, &[3; 16], &Ask::default(), timeout).unwrap();
            assert_eq!(Request::decode(&out[4..]).unwrap().timeout, read, "{timeout:?}");
        }
    }

    #[test]
    fn an_answer_to_another_request_is_refused() {
        let mut out = Vec::new();
        encode_keepalive(&mut out, &Uuid::from_u128(1));
        assert!(Response::decode(&out[4..], &ID).is_err());
    }

    #[test]
    fn the_hash_is_sha256_over_all_pieces() {
        let mut hash = AnswerHash::new();
        hash.update(b"ab");
        hash.update(b"c");
        assert_eq!(hash.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    proptest! {
        #[test]
        fn any_text_survives(prompt in ".*", system in proptest::option::of(".*")) {
            let ask = Ask { prompt: Text::new(prompt), system: system.map(Text::new), ..Ask::default() };
            prop_assert_eq!(request(&ask).unwrap().ask, ask);
        }

        #[test]
        fn nonsense_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Request::decode(&bytes).is_err());
            prop_assert!(Response::decode(&bytes, &ID).is_err());
        }
    }
}
