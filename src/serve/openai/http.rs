//! HTTP/1.1 to one server, on connections that are kept for the next exchange.
//!
//! A connection has no task: whoever waits for an answer drives it, so an exchange costs no hand-over between tasks, and
//! dropping the answer closes the connection, by which the server knows that nobody listens. A connection goes back to the
//! shelf only when its answer was read to the end.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures::FutureExt as _;
use http_body_util::Full;
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper::{HeaderMap, Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use super::OpenAiError;
use super::refusal::Refusal;
use crate::domain::upstream::Location;

const CONNECT: Duration = Duration::from_secs(5);
/// What is read of the body of a refusal, for its message.
const MAX_REFUSAL_BYTES: usize = 16 * 1024;
const MAX_KEY_BYTES: usize = 4 * 1024;
/// Connections kept for later. In llama-server each of them holds one of its threads until it is closed.
const KEPT: usize = 32;
/// A connection waits this long for its next exchange: llama-server and uvicorn (vLLM) close theirs after 5 s, and one that
/// they close while a request is on its way costs a second try.
const KEPT_FOR: Duration = Duration::from_secs(4);
/// A kept connection that broke within this time after the request was closed before the request came. Later than that the
/// server died of the request, and it is not sent again.
const STALE_WITHIN: Duration = Duration::from_secs(1);
/// What may follow the last event of an answer, for the connection to be kept.
const TAIL: Duration = Duration::from_secs(1);

/// Why an exchange failed. Never contains prompt or answer text, nor the key.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("the name {0:?} cannot be resolved: {1}")]
    Resolve(String, String),
    #[error("UpstreamRefused: {0}; nothing was sent")]
    Forbidden(String),
    #[error("the backend at {0} cannot be reached: {1}")]
    Connect(String, String),
    #[error("the backend broke the connection: {0}")]
    Broken(String),
    #[error("the backend {0}")]
    Refused(Refusal),
    #[error("the backend sent more than {0} bytes")]
    TooLarge(usize),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How to reach one server.
pub(super) struct Client {
    place: Location,
    allow_http: bool,
    tls: Option<TlsConnector>,
    headers: HeaderMap,
    suspicion: Notify,
    /// The one that waited longest is first. Never locked across an await.
    #[allow(clippy::vec_box)] // a line is large and moves at each step of an answer
    kept: Mutex<Vec<Box<Line>>>,
    dialled: AtomicU64,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("place", &self.place).finish_non_exhaustive()
    }
}

fn read_key(path: &Path) -> Result<header::HeaderValue, OpenAiError> {
    let failed = |source| OpenAiError::Key { path: path.to_owned(), source };
    let invalid = |what: &str| failed(std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned()));
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let key = text.trim();
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(invalid("it is empty or longer than 4 KiB"));
    }
    let mut value =
        header::HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| invalid("it has characters that no key has"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn tls() -> Result<TlsConnector, OpenAiError> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let problem = found.errors.first().map(ToString::to_string);
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err(OpenAiError::Certificates(problem.unwrap_or_else(|| "none installed".to_owned())));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| OpenAiError::Certificates(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn headers(place: &Location, key_file: Option<&Path>) -> Result<HeaderMap, OpenAiError> {
    let mut headers = HeaderMap::new();
    // The authority was checked to be of letters, digits and a few signs.
    if let Ok(host) = header::HeaderValue::from_str(&place.authority) {
        headers.insert(header::HOST, host);
    }
    headers.insert(header::ACCEPT, header::HeaderValue::from_static("text/event-stream, application/json"));
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    let agent = header::HeaderValue::from_static(concat!("opengateway/", env!("CARGO_PKG_VERSION")));
    headers.insert(header::USER_AGENT, agent);
    if let Some(key) = key_file {
        headers.insert(header::AUTHORIZATION, read_key(key)?);
    }
    Ok(headers)
}

/// One connection. It moves only while somebody polls it.
struct Line {
    sender: SendRequest<Full<Bytes>>,
    connection: Connection<TokioIo<Box<dyn Stream>>, Full<Bytes>>,
    ended: bool,
    kept_for: Duration,
    since: Instant,
}

impl Line {
    /// Waits for `future`, which needs the connection to move.
    async fn drive<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|context| {
            if let Poll::Ready(output) = future.as_mut().poll(context) {
                return Poll::Ready(output);
            }
            self.poll(context);
            future.as_mut().poll(context)
        })
        .await
    }

    fn poll(&mut self, context: &mut std::task::Context<'_>) {
        if !self.ended {
            self.ended = Pin::new(&mut self.connection).poll(context).is_ready();
        }
    }

    /// Whether another request can go out on it, as far as can be known.
    async fn is_usable(&mut self) -> bool {
        poll_fn(|context| {
            self.poll(context);
            Poll::Ready(!self.ended && self.sender.is_ready())
        })
        .await
    }
}

/// What a server says of keeping a connection: `Keep-Alive: timeout=5`.
fn kept_for(headers: &HeaderMap) -> Duration {
    let said = headers.get("keep-alive").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let seconds = said.split(',').find_map(|part| part.trim().strip_prefix("timeout=")?.parse::<u64>().ok());
    seconds.map_or(KEPT_FOR, |seconds| KEPT_FOR.min(Duration::from_secs(seconds.saturating_sub(1))))
}

impl Client {
    pub(super) fn new(url: &str, allow_http: bool, key_file: Option<&Path>) -> Result<Self, OpenAiError> {
        let bad = |reason: String| OpenAiError::Url { url: url.chars().take(80).collect(), reason };
        let place = Location::parse(url).map_err(bad)?;
        place.check(allow_http).map_err(bad)?;
        Ok(Self {
            headers: headers(&place, key_file)?,
            tls: if place.secure { Some(tls()?) } else { None },
            place,
            allow_http,
            suspicion: Notify::new(),
            kept: Mutex::default(),
            dialled: AtomicU64::new(0),
        })
    }

    pub(super) fn place(&self) -> &Location {
        &self.place
    }

    /// The path of the server's own API, beside the OpenAI one: "/v1" less at the end.
    pub(super) fn root(&self) -> &str {
        self.place.path.strip_suffix("/v1").unwrap_or(&self.place.path)
    }

    /// Connections made so far.
    pub(super) fn dialled(&self) -> u64 {
        self.dialled.load(Ordering::Relaxed)
    }

    /// An exchange failed: the server may be away.
    pub(super) fn suspect(&self) {
        self.suspicion.notify_one();
    }

    /// Resolves after [`Client::suspect`].
    pub(super) async fn suspected(&self) {
        self.suspicion.notified().await;
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, HttpError> {
        let failed = |error: String| HttpError::Connect(self.place.authority.clone(), error);
        let resolving = tokio::net::lookup_host((self.place.host.as_str(), self.place.port));
        let found = match timeout(CONNECT, resolving).await {
            Ok(found) => found.map_err(|error| HttpError::Resolve(self.place.host.clone(), error.to_string()))?,
            Err(_) => return Err(failed(format!("its name was not resolved within {} s", CONNECT.as_secs()))),
        };
        // The addresses that are dialled are the ones that were checked: a name cannot change its mind in between.
        let addresses: Vec<SocketAddr> = found.take(8).collect();
        for address in &addresses {
            self.place.check_address(address.ip(), self.allow_http).map_err(HttpError::Forbidden)?;
        }
        let stream = match timeout(CONNECT, TcpStream::connect(addresses.as_slice())).await {
            Ok(connected) => connected.map_err(|error| failed(error.to_string()))?,
            Err(_) => return Err(failed(format!("no answer within {} s", CONNECT.as_secs()))),
        };
        let _ = stream.set_nodelay(true);
        self.dialled.fetch_add(1, Ordering::Relaxed);
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = rustls::pki_types::ServerName::try_from(self.place.host.clone()).map_err(|error| failed(error.to_string()))?;
        match timeout(CONNECT, tls.connect(name, stream)).await {
            Ok(secured) => Ok(Box::new(secured.map_err(|error| failed(error.to_string()))?)),
            Err(_) => Err(failed("the TLS handshake took too long".to_owned())),
        }
    }

    async fn dial(&self) -> Result<Box<Line>, HttpError> {
        let (sender, connection) = Builder::new().handshake(TokioIo::new(self.connect().await?)).await.map_err(broken)?;
        Ok(Box::new(Line { sender, connection, ended: false, kept_for: KEPT_FOR, since: Instant::now() }))
    }

    /// The connection that was used last: the others may grow too old.
    async fn take_kept(&self) -> Option<Box<Line>> {
        loop {
            let mut line = {
                let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.retain(|line| line.since.elapsed() < line.kept_for);
                kept.pop()?
            };
            if line.is_usable().await {
                return Some(line);
            }
        }
    }

    fn keep(&self, mut line: Box<Line>) {
        line.since = Instant::now();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|line| line.since.elapsed() < line.kept_for);
        if kept.len() < KEPT && !line.kept_for.is_zero() {
            kept.push(line);
        }
    }

    /// Closes what was kept for longer than it should.
    pub(super) fn sweep(&self) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).retain(|line| line.since.elapsed() < line.kept_for);
    }

    fn request(&self, method: &Method, path: &str, body: &Bytes) -> Result<Request<Full<Bytes>>, HttpError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .body(Full::new(body.clone()))
            .map_err(|error| HttpError::Broken(error.to_string()))?;
        *request.headers_mut() = self.headers.clone();
        Ok(request)
    }

    /// Sends the request; on a kept connection that turns out to be closed once more on a new one.
    async fn send(&self, method: &Method, path: &str, body: &Bytes) -> Result<(Box<Line>, Response<Incoming>), HttpError> {
        if let Some(mut line) = self.take_kept().await {
            let request = self.request(method, path, body)?;
            let begun = Instant::now();
            let sending = line.sender.send_request(request);
            match line.drive(sending).await {
                Ok(response) => return Ok((line, response)),
                // Nothing came back on it, and what it was closed for was not this request.
                Err(error) if !error.is_parse() && begun.elapsed() < STALE_WITHIN => {}
                Err(error) => return Err(broken(error)),
            }
        }
        let mut line = self.dial().await?;
        let sending = line.sender.send_request(self.request(method, path, body)?);
        let response = line.drive(sending).await.map_err(broken)?;
        Ok((line, response))
    }

    async fn exchange(self: &Arc<Self>, method: Method, path: &str, body: Vec<u8>) -> Result<Body, HttpError> {
        let (mut line, response) = self.send(&method, path, &Bytes::from(body)).await?;
        let status = response.status();
        let headers = response.headers();
        line.kept_for = kept_for(headers);
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let event_stream = kind.starts_with("text/event-stream");
        let retry_after = headers
            .get(header::RETRY_AFTER)
            .and_then(|after| after.to_str().ok()?.trim().parse::<u64>().ok())
            .map(|seconds| Duration::from_secs(seconds.min(3600)));
        let mut body = Body { incoming: response.into_body(), event_stream, line: Some(line), client: Arc::clone(self) };
        if status.is_success() {
            return Ok(body);
        }
        let said = body.refusal().await;
        Err(HttpError::Refused(Refusal::read(status.as_u16(), retry_after, &said)))
    }

    /// GET of a path from the root of the server; the whole body, at most `limit` bytes.
    pub(super) async fn get(self: &Arc<Self>, path: &str, limit: usize) -> Result<Vec<u8>, HttpError> {
        self.exchange(Method::GET, path, Vec::new()).await?.whole(limit).await
    }

    /// POST of JSON; the whole body, at most `limit` bytes.
    pub(super) async fn post_whole(self: &Arc<Self>, path: &str, json: Vec<u8>, limit: usize) -> Result<Vec<u8>, HttpError> {
        self.exchange(Method::POST, path, json).await?.whole(limit).await
    }

    /// GET; the body as it comes.
    pub(super) async fn open(self: &Arc<Self>, path: &str) -> Result<Body, HttpError> {
        self.exchange(Method::GET, path, Vec::new()).await
    }

    /// POST of JSON; the body as it comes. Dropping it closes the connection.
    pub(super) async fn post(self: &Arc<Self>, path: &str, json: Vec<u8>) -> Result<Body, HttpError> {
        self.exchange(Method::POST, path, json).await
    }
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn broken(error: hyper::Error) -> HttpError {
    HttpError::Broken(error.to_string())
}

/// The body of a response. Dropping it before its end closes the connection.
pub(super) struct Body {
    incoming: Incoming,
    event_stream: bool,
    line: Option<Box<Line>>,
    client: Arc<Client>,
}

impl Body {
    pub(super) fn is_event_stream(&self) -> bool {
        self.event_stream
    }

    /// The next bytes; `None` at the regular end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            let Some(line) = &mut self.line else { return Ok(None) };
            let incoming = &mut self.incoming;
            match line.drive(poll_fn(|context| Pin::new(&mut *incoming).poll_frame(context))).await {
                None => break,
                Some(Err(error)) => return Err(broken(error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
        if let Some(mut line) = self.line.take()
            && line.is_usable().await
        {
            self.client.keep(line);
        }
        Ok(None)
    }

    /// The answer is known; what is left of the body matters only to the connection, which is kept when it ends soon.
    pub(super) fn finish(mut self) {
        match self.next().now_or_never() {
            Some(Ok(None) | Err(_)) => {}
            _ => drop(tokio::spawn(async move {
                let _ = timeout(TAIL, self.whole(MAX_REFUSAL_BYTES)).await;
            })),
        }
    }

    async fn whole(mut self, limit: usize) -> Result<Vec<u8>, HttpError> {
        let mut whole = Vec::new();
        while let Some(data) = self.next().await? {
            if whole.len() + data.len() > limit {
                return Err(HttpError::TooLarge(limit));
            }
            whole.extend_from_slice(&data);
        }
        Ok(whole)
    }

    async fn refusal(&mut self) -> Vec<u8> {
        let mut whole = Vec::new();
        let reading = async {
            while let Ok(Some(data)) = self.next().await {
                whole.extend_from_slice(&data);
                if whole.len() > MAX_REFUSAL_BYTES {
                    break;
                }
            }
        };
        let _ = timeout(CONNECT, reading).await;
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked_before_anything_is_sent() {
        for good in ["http://127.0.0.1:11434/v1", "http://[::1]:8080/v1/", "http://localhost/v1"] {
            assert!(Client::new(good, false, None).is_ok(), "{good}");
        }
        for bad in ["127.0.0.1:80", "http://gpu.lan/v1", "http://169.254.169.254/v1", "http://host/v1?x=1"] {
            assert!(Client::new(bad, false, None).is_err(), "{bad}");
        }
        assert!(Client::new("http://gpu.lan/v1", true, None).is_ok());
    }

    #[test]
    fn a_key_is_one_line_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let client = || Client::new("http://127.0.0.1:1/v1", false, Some(file.path()));
        std::fs::write(file.path(), "secret-canary\n").unwrap();
        assert!(!format!("{:?}", client().unwrap()).contains("canary"));
        std::fs::write(file.path(), "a\nb").unwrap();
        assert!(client().is_err());
        std::fs::write(file.path(), "k".repeat(MAX_KEY_BYTES)).unwrap();
        assert!(client().is_ok());
        std::fs::write(file.path(), "k".repeat(MAX_KEY_BYTES + 1)).unwrap();
        assert!(client().is_err());
        assert!(Client::new("http://127.0.0.1:1/v1", false, Some(Path::new("/nonexistent"))).is_err());
    }

    #[test]
    fn a_server_says_how_long_a_connection_is_kept() {
        let kept = |said: &'static str| {
            kept_for(&HeaderMap::from_iter([(
                header::HeaderName::from_static("keep-alive"),
                header::HeaderValue::from_static(said),
            )]))
        };
        assert_eq!(kept_for(&HeaderMap::new()), KEPT_FOR);
        assert_eq!(kept("timeout=3, max=100"), Duration::from_secs(2));
        assert_eq!(kept("timeout=0"), Duration::ZERO);
        assert_eq!(kept("timeout=500"), KEPT_FOR);
        assert_eq!(kept("max=x"), KEPT_FOR);
    }
}
