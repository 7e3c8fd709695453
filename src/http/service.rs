//! One request: is it for us, whose is it, what does it want. In this order, so that nothing of a request is read that is
//! refused by what came before it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hyper::body::{Body as _, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, EXPECT, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;

use super::body::{self, Reply};
use super::connections::{Busy, Watch};
use super::errors::Refusal;
use super::shape::Surface;
use super::{Shared, answer as prompts, models, origin};

/// Whose share a request counts against that shows no key where none is asked for: `nobody`.
const NOBODY: u32 = 65_534;

/// Answers a request; `uid` is whose connection it is, where the kernel says so.
pub(super) fn answer(
    shared: &Arc<Shared>,
    watch: &Arc<Watch>,
    uid: Option<u32>,
    request: Request<Incoming>,
) -> impl Future<Output = Result<Response<Reply>, Infallible>> + use<> {
    let busy = Busy::begin(watch);
    let shared = Arc::clone(shared);
    let watch = Arc::clone(watch);
    async move { Ok(respond(&shared, &watch, uid, request).await.map(|body| body.while_it_lives(busy))) }
}

async fn respond(shared: &Shared, watch: &Watch, uid: Option<u32>, mut request: Request<Incoming>) -> Response<Reply> {
    let page = match origin::check_origin(request.headers(), &shared.settings) {
        Ok(page) => page,
        Err(refusal) => return refused(&refusal, watch, request).await,
    };
    let mut response = match handle(shared, watch, uid, &mut request, page.is_some()).await {
        Ok(response) => response,
        Err(refusal) => refused(&refusal, watch, request).await,
    };
    if let Some(page) = page {
        origin::open_to(page, &mut response);
    }
    response
}

/// The response to a request whose body nobody has read, or not all of it.
async fn refused(refusal: &Refusal, watch: &Watch, mut request: Request<Incoming>) -> Response<Reply> {
    let body = request.body();
    // Who waits to be told to go on is told not to.
    if !body.is_end_stream() && !request.headers().contains_key(EXPECT) {
        // In a crowd it may be ended meanwhile: who has shown no key keeps nobody out.
        watch.leaving();
        body::drain(request.body_mut()).await;
        watch.working();
    }
    refusal.response()
}

async fn handle(
    shared: &Shared,
    watch: &Watch,
    uid: Option<u32>,
    request: &mut Request<Incoming>,
    from_a_page: bool,
) -> Result<Response<Reply>, Refusal> {
    // Names are pointed elsewhere by whoever owns them; a path is not, and the kernel says who comes by it.
    if uid.is_none() {
        origin::check_host(request, &shared.settings)?;
    }
    let path = request.uri().path();
    if request.method() == Method::OPTIONS && from_a_page {
        return Ok(origin::preflight());
    }
    if path == "/health" {
        return get(request.method()).map(|()| health(shared));
    }
    let uid = user(shared, uid, request.headers())?;
    match path {
        "/v1/chat/completions" => prompt(shared, watch, uid, Surface::Chat, request).await,
        "/v1/completions" => prompt(shared, watch, uid, Surface::Completion, request).await,
        "/v1/models" => {
            get(request.method())?;
            let data = models::list(shared, prompts::cluster_wish(request.headers())?)?;
            Ok(json(StatusCode::OK, &List { object: "list", data }))
        }
        _ => match path.strip_prefix("/v1/models/") {
            Some(name) => {
                get(request.method())?;
                model(shared, name, request.headers())
            }
            None => Err(Refusal::not_found(
                "unknown_url",
                "there is no such path; there are: GET /v1/models, POST /v1/chat/completions, POST /v1/completions, GET /health",
            )),
        },
    }
}

/// Whose request it is.
fn user(shared: &Shared, uid: Option<u32>, headers: &HeaderMap) -> Result<u32, Refusal> {
    if let Some(uid) = uid {
        return Ok(uid);
    }
    let key = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let bearer = key.and_then(|key| key.split_at_checked(7)).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    match bearer.and_then(|(_, key)| shared.keys.user(key.trim_ascii())) {
        Some(uid) => Ok(uid),
        None if shared.settings.key_required => Err(Refusal::no_key(key.is_some())),
        None => Ok(NOBODY),
    }
}

fn get(method: &Method) -> Result<(), Refusal> {
    // hyper leaves the body of an answer to HEAD out.
    if [Method::GET, Method::HEAD].contains(method) { Ok(()) } else { Err(Refusal::method("GET")) }
}

async fn prompt(
    shared: &Shared,
    watch: &Watch,
    uid: u32,
    surface: Surface,
    request: &mut Request<Incoming>,
) -> Result<Response<Reply>, Refusal> {
    if request.method() != Method::POST {
        return Err(Refusal::method("POST"));
    }
    if !is_json(request.headers()) {
        return Err(Refusal::content_type());
    }
    if shared.stopping.load(Ordering::Relaxed) {
        return Err(Refusal::stopping());
    }
    watch.arriving();
    let body = body::read(request.body_mut()).await?;
    watch.working();
    prompts::answer(shared, uid, surface, request.headers(), &body).await
}

/// A page of a browser cannot send this type without asking first.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()) else { return false };
    let kind = kind.split_once(';').map_or(kind, |(kind, _)| kind);
    kind.trim().eq_ignore_ascii_case("application/json")
}

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<models::Listed>,
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
    models: usize,
}

fn health(shared: &Shared) -> Response<Reply> {
    let (status, models) = models::health(shared);
    let code = match status {
        "ok" | "echo-only" => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    json(code, &Health { status, models })
}

fn model(shared: &Shared, name: &str, headers: &HeaderMap) -> Result<Response<Reply>, Refusal> {
    let name = decoded(name);
    let models = models::list(shared, prompts::cluster_wish(headers)?)?;
    match models.into_iter().find(|model| model.id.as_bytes() == name) {
        Some(model) => Ok(json(StatusCode::OK, &model)),
        None => Err(Refusal::no_model("there is no such model now; see GET /v1/models")),
    }
}

/// The bytes of a percent-encoded part of a path.
fn decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        rest = match (first, tail) {
            (b'%', [high, low, after @ ..]) if digit(*high).is_some() && digit(*low).is_some() => {
                out.push(digit(*high).unwrap_or(0) * 16 + digit(*low).unwrap_or(0));
                after
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

fn json(status: StatusCode, value: &impl Serialize) -> Response<Reply> {
    let mut response = Response::new(Reply::whole(serde_json::to_vec(value).unwrap_or_default()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_a_path_is_decoded_once() {
        assert_eq!(decoded("llama3.2%3A3b"), b"llama3.2:3b");
        assert_eq!(decoded("a%2525"), b"a%25");
        assert_eq!(decoded("%"), b"%");
        assert_eq!(decoded("%zz%4"), b"%zz%4");
        assert_eq!(decoded("a/b"), b"a/b");
    }

    #[test]
    fn json_is_json_with_any_parameter() {
        let with = |kind: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            is_json(&headers)
        };
        assert!(with("application/json") && with("Application/JSON; charset=utf-8"));
        for other in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "text/plain; application/json", ""]
        {
            assert!(!with(other), "{other}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }
}
