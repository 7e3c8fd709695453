//! Errors as OpenAI's clients know them: status, type, code, `param`. One exhaustive table for the failures of prompts.

use std::borrow::Cow;
use std::time::Duration;

use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::body::{MAX_BODY_BYTES, Reply};
use crate::domain::prompt::{Failure, FailureKind};

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

/// A request that is answered with an error.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<Cow<'static, str>>,
    message: String,
    retry_after: Option<Duration>,
    /// What follows on the connection cannot be told from the body: it is closed.
    close: bool,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, kind, code, param: None, message: message.into(), retry_after: None, close: false }
    }

    /// A field of the request is wrong.
    pub fn field(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        let refusal = Self::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_value"), message);
        Self { param: Some(param.into()), ..refusal }
    }

    /// A field asks for what this endpoint does not do.
    pub fn unsupported(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// The body is no JSON, or no object.
    pub fn json(error: &serde_json::Error) -> Self {
        // The error of serde_json names a place and never quotes: what was sent is not repeated.
        let place = (error.line(), error.column());
        let what = if error.is_data() { "is no JSON object of this API" } else { "is no JSON" };
        Self::new(StatusCode::BAD_REQUEST, INVALID, None, format!("the body {what}; see line {}, column {}", place.0, place.1))
    }

    /// A header, or a wish in the name of the model, is wrong.
    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some(code), message)
    }

    pub fn no_key(shown: bool) -> Self {
        let message = if shown {
            "this key is not (or no longer) good here; get yours with: ogctl key"
        } else {
            "this endpoint wants a key: Authorization: Bearer KEY; get yours with: ogctl key"
        };
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", Some(code), message)
    }

    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, Some(code), message)
    }

    /// No model of this name can be asked.
    pub fn no_model(message: impl Into<String>) -> Self {
        Self { param: Some("model".into()), ..Self::not_found("model_not_found", message) }
    }

    /// The model is there, but could not be loaded: it is tried again once its file or the configuration changes.
    pub fn model_failed(message: impl Into<String>) -> Self {
        let refusal = Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("model_unavailable"), message);
        Self { param: Some("model".into()), retry_after: Some(Duration::from_secs(60)), ..refusal }
    }

    pub fn method(allowed: &'static str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"), format!("this path takes {allowed}"))
    }

    pub fn content_type() -> Self {
        let message = "the body must be JSON, sent with: Content-Type: application/json";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, Some("unsupported_media_type"), message)
    }

    pub fn too_large() -> Self {
        let message = format!("the body is larger than {MAX_BODY_BYTES} bytes");
        let refusal = Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large"), message);
        Self { close: true, ..refusal }
    }

    pub fn slow_body(patience: Duration) -> Self {
        let message = format!("the body did not arrive within {} s", patience.as_secs());
        Self { close: true, ..Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, Some("timeout"), message) }
    }

    pub fn broken_body() -> Self {
        let message = "the body broke off, or its chunks are none";
        Self { close: true, ..Self::new(StatusCode::BAD_REQUEST, INVALID, None, message) }
    }

    pub fn stopping() -> Self {
        let refusal = Self::from(&Failure::new(FailureKind::ShuttingDown, "the daemon is stopping"));
        Self { close: true, ..refusal }
    }

    /// A mistake of ours.
    pub fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, None, message)
    }

    /// The JSON of it.
    pub fn json_text(&self) -> Vec<u8> {
        let inner = Inner { message: &self.message, r#type: self.kind, param: self.param.as_deref(), code: self.code };
        serde_json::to_vec(&Body { error: inner }).unwrap_or_default()
    }

    /// The response.
    pub fn response(&self) -> Response<Reply> {
        let mut response = Response::new(Reply::whole(self.json_text()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(time) = self.retry_after {
            // Seconds, and never 0: who comes back at once finds the same.
            let seconds = time.as_millis().div_ceil(1000).clamp(1, 3600);
            headers.insert(RETRY_AFTER, HeaderValue::from(u64::try_from(seconds).unwrap_or(3600)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Status, type and code of each failure, and after how many seconds it is worth another try where the failure does not say.
const fn of(kind: FailureKind) -> (StatusCode, &'static str, &'static str, Option<u64>) {
    const RATE: &str = "rate_limit_error";
    match kind {
        FailureKind::ModelUnavailable => (StatusCode::NOT_FOUND, INVALID, "model_not_found", None),
        FailureKind::InvalidRequest => (StatusCode::BAD_REQUEST, INVALID, "invalid_value", None),
        FailureKind::ContextOverflow => (StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded", None),
        FailureKind::PromptQuarantined => (StatusCode::UNPROCESSABLE_ENTITY, INVALID, "prompt_quarantined", None),
        FailureKind::NotAuthorized => (StatusCode::FORBIDDEN, "permission_error", "not_authorized", None),
        FailureKind::Cancelled => (StatusCode::REQUEST_TIMEOUT, SERVER, "cancelled", None),
        FailureKind::SlowConsumer => (StatusCode::REQUEST_TIMEOUT, SERVER, "slow_consumer", None),
        FailureKind::Duplicate => (StatusCode::CONFLICT, SERVER, "duplicate", None),
        FailureKind::Busy => (StatusCode::TOO_MANY_REQUESTS, RATE, "busy", Some(1)),
        FailureKind::QuotaExceeded => (StatusCode::TOO_MANY_REQUESTS, RATE, "rate_limit_exceeded", Some(5)),
        FailureKind::NoEligiblePeer => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "no_eligible_node", Some(5)),
        FailureKind::ModelLoading => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "model_loading", Some(2)),
        FailureKind::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "shutting_down", Some(5)),
        FailureKind::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, SERVER, "deadline_exceeded", None),
        FailureKind::Stalled => (StatusCode::GATEWAY_TIMEOUT, SERVER, "stalled", None),
        FailureKind::EngineCrashed => (StatusCode::BAD_GATEWAY, SERVER, "engine_crashed", None),
        FailureKind::BackendFailed => (StatusCode::BAD_GATEWAY, SERVER, "backend_failed", None),
        FailureKind::PeerLost => (StatusCode::BAD_GATEWAY, SERVER, "node_lost", None),
        FailureKind::Interrupted => (StatusCode::BAD_GATEWAY, SERVER, "interrupted", None),
        FailureKind::AnswerTooLarge => (StatusCode::BAD_GATEWAY, SERVER, "answer_too_large", None),
        FailureKind::RelayLimit => (StatusCode::BAD_GATEWAY, SERVER, "relay_limit", None),
        FailureKind::ProtocolError => (StatusCode::BAD_GATEWAY, SERVER, "protocol_error", None),
    }
}

impl From<&Failure> for Refusal {
    fn from(failure: &Failure) -> Self {
        let (status, kind, code, again) = of(failure.kind);
        let param = match failure.kind {
            FailureKind::ModelUnavailable => Some("model".into()),
            FailureKind::ContextOverflow => Some("messages".into()),
            _ => None,
        };
        let retry_after = again.map(|seconds| failure.retry_after.unwrap_or(Duration::from_secs(seconds)));
        Self { param, retry_after, ..Self::new(status, kind, Some(code), failure.detail.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_a_status_and_429_and_503_say_when_to_come_back() {
        for kind in FailureKind::ALL {
            let refusal = Refusal::from(&Failure::new(kind, "why"));
            let response = refusal.response();
            let again = response.headers().get(RETRY_AFTER);
            let wants = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&response.status());
            assert_eq!(again.is_some(), wants, "{kind:?}");
            assert!(response.status().is_client_error() || response.status().is_server_error());
            let text: serde_json::Value = serde_json::from_slice(&refusal.json_text()).unwrap();
            assert_eq!(text["error"]["message"], "why");
            assert!(text["error"]["code"].is_string() && text["error"]["type"].is_string());
        }
    }

    #[test]
    fn the_time_to_come_back_is_rounded_up_and_never_zero() {
        for (time, said) in [(0, "1"), (100, "1"), (1000, "1"), (1001, "2"), (86_400_000, "3600")] {
            let failure = Failure::busy("full", Duration::from_millis(time));
            assert_eq!(Refusal::from(&failure).response().headers()[RETRY_AFTER], said);
        }
    }
}
