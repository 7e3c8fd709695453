//! One HTTP/1.1 exchange on a connection of its own.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::OpenAiError;

const CONNECT: Duration = Duration::from_secs(5);
/// What is read of the body of a refusal, for its message.
const MAX_REFUSAL_BYTES: usize = 4 * 1024;
const MAX_KEY_BYTES: usize = 4 * 1024;

/// Why an exchange failed. Never contains prompt or answer text, nor the key.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("the name {0:?} cannot be resolved: {1}")]
    Resolve(String, String),
    #[error("{0} is a link-local address, which is never an inference server")]
    Forbidden(IpAddr),
    #[error("the backend at {0} cannot be reached: {1}")]
    Connect(String, String),
    #[error("the backend broke the connection: {0}")]
    Broken(String),
    #[error("the backend refused with HTTP status {status}{message}")]
    Status { status: u16, message: String, retry_after: Option<Duration> },
    #[error("the backend sent more than {0} bytes")]
    TooLarge(usize),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How to reach one server.
pub(super) struct Client {
    host: String,
    port: u16,
    authority: String,
    path: String,
    tls: Option<TlsConnector>,
    key: Option<header::HeaderValue>,
    suspicion: Notify,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("authority", &self.authority).field("path", &self.path).finish_non_exhaustive()
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

impl Client {
    pub(super) fn new(url: &str, key_file: Option<&Path>) -> Result<Self, OpenAiError> {
        let bad = |reason: &str| OpenAiError::Url { url: url.to_owned(), reason: reason.to_owned() };
        let uri: Uri = url.parse().map_err(|error| bad(&format!("{error}")))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it begins with http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("a password in a URL ends up in logs: use api_key_file"));
        }
        if uri.query().is_some() {
            return Err(bad("it has a query"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Self {
            port: authority.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            authority: authority.to_string(),
            path: uri.path().trim_end_matches('/').to_owned(),
            tls: if secure { Some(tls()?) } else { None },
            key: key_file.map(read_key).transpose()?,
            host,
            suspicion: Notify::new(),
        })
    }

    pub(super) fn authority(&self) -> &str {
        &self.authority
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
        let failed = |error: String| HttpError::Connect(self.authority.clone(), error);
        let found = tokio::net::lookup_host((self.host.as_str(), self.port))
            .await
            .map_err(|error| HttpError::Resolve(self.host.clone(), error.to_string()))?;
        // The addresses that are dialled are the ones that were checked: a name cannot change its mind in between.
        let addresses: Vec<SocketAddr> = found.take(8).collect();
        if let Some(forbidden) = addresses.iter().map(SocketAddr::ip).find(is_link_local) {
            return Err(HttpError::Forbidden(forbidden));
        }
        let stream = match timeout(CONNECT, TcpStream::connect(addresses.as_slice())).await {
            Ok(connected) => connected.map_err(|error| failed(error.to_string()))?,
            Err(_) => return Err(failed(format!("no answer within {} s", CONNECT.as_secs()))),
        };
        let _ = stream.set_nodelay(true);
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = rustls::pki_types::ServerName::try_from(self.host.clone()).map_err(|error| failed(error.to_string()))?;
        match timeout(CONNECT, tls.connect(name, stream)).await {
            Ok(secured) => Ok(Box::new(secured.map_err(|error| failed(error.to_string()))?)),
            Err(_) => Err(failed("the TLS handshake took too long".to_owned())),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Body, HttpError> {
        let broken = |error: hyper::Error| HttpError::Broken(error.to_string());
        let (mut sender, connection) =
            hyper::client::conn::http1::Builder::new().handshake(TokioIo::new(self.connect().await?)).await.map_err(broken)?;
        let driver = AbortOnDrop(tokio::spawn(async move {
            let _ = connection.await;
        }));
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.path))
            .header(header::HOST, &self.authority)
            .header(header::ACCEPT, "text/event-stream, application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("opengateway/", env!("CARGO_PKG_VERSION")))
            .header(header::CONNECTION, "close")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| HttpError::Broken(error.to_string()))?;
        if let Some(key) = &self.key {
            request.headers_mut().insert(header::AUTHORIZATION, key.clone());
        }
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let headers = response.headers();
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let event_stream = kind.starts_with("text/event-stream");
        let retry_after = headers
            .get(header::RETRY_AFTER)
            .and_then(|after| after.to_str().ok()?.trim().parse::<u64>().ok())
            .map(|seconds| Duration::from_secs(seconds.min(3600)));
        let mut body = Body { incoming: response.into_body(), event_stream, _driver: driver };
        if status.is_success() {
            return Ok(body);
        }
        let message = body.refusal().await;
        Err(HttpError::Status { status: status.as_u16(), message, retry_after })
    }

    /// GET; the whole body, at most `limit` bytes.
    pub(super) async fn get(&self, path: &str, limit: usize) -> Result<Vec<u8>, HttpError> {
        let mut body = self.exchange(Method::GET, path, Vec::new()).await?;
        let mut whole = Vec::new();
        while let Some(data) = body.next().await? {
            if whole.len() + data.len() > limit {
                return Err(HttpError::TooLarge(limit));
            }
            whole.extend_from_slice(&data);
        }
        Ok(whole)
    }

    /// POST of JSON; the body as it comes. Dropping it closes the connection.
    pub(super) async fn post(&self, path: &str, json: Vec<u8>) -> Result<Body, HttpError> {
        self.exchange(Method::POST, path, json).await
    }
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_link_local()),
    }
}

/// Ends the task that drives a connection, and with it the connection.
#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The body of a response.
#[derive(Debug)]
pub(super) struct Body {
    incoming: Incoming,
    event_stream: bool,
    _driver: AbortOnDrop,
}

impl Body {
    pub(super) fn is_event_stream(&self) -> bool {
        self.event_stream
    }

    /// The next bytes; `None` at the regular end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        while let Some(frame) = self.incoming.frame().await {
            let frame = frame.map_err(|error| HttpError::Broken(error.to_string()))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The message in the body of a refusal, as OpenAI-compatible servers send it; bounded and without control characters.
    async fn refusal(&mut self) -> String {
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
        let said: Option<serde_json::Value> = serde_json::from_slice(&whole).ok();
        let message = said.as_ref().and_then(|said| {
            let error = said.get("error")?;
            error.get("message").unwrap_or(error).as_str()
        });
        message.map_or_else(String::new, |message| format!(": {}", message.escape_debug().take(200).collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked_before_anything_is_sent() {
        for good in ["http://127.0.0.1:11434/v1", "http://[::1]:8080/v1/", "http://gpu.lan/v1"] {
            assert!(Client::new(good, None).is_ok(), "{good}");
        }
        for bad in ["127.0.0.1:80", "ftp://x/v1", "http://", "http://user:pass@host/v1", "http://host/v1?x=1", ""] {
            assert!(Client::new(bad, None).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_metadata_service_of_a_cloud_is_never_asked() {
        let client = Client::new("http://169.254.169.254/v1", None).unwrap();
        assert!(matches!(client.get("/models", 10).await, Err(HttpError::Forbidden(_))));
    }

    #[test]
    fn a_key_is_one_line_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "secret-canary\n").unwrap();
        let client = Client::new("http://127.0.0.1:1/v1", Some(file.path())).unwrap();
        assert!(!format!("{client:?}").contains("canary"));
        std::fs::write(file.path(), "a\nb").unwrap();
        assert!(Client::new("http://127.0.0.1:1/v1", Some(file.path())).is_err());
        assert!(Client::new("http://127.0.0.1:1/v1", Some(Path::new("/nonexistent"))).is_err());
    }
}
