//! `[http]` as checked: where the OpenAI endpoint listens, and whom it trusts.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::raw;

/// The port that `systemd/opengatewayd-http.socket` has too.
pub const DEFAULT_HTTP_PORT: u16 = 11480;
/// Addresses that are listened on.
const MAX_LISTEN: usize = 16;
/// Names and origins.
const MAX_NAMES: usize = 64;
/// Longest path of a UNIX socket: what `sockaddr_un` holds, and room for the temporary name that it is made under.
pub const MAX_SOCKET_PATH_BYTES: usize = 100;
/// Bytes of one name or origin.
const MAX_NAME_BYTES: usize = 255;
const MAX_CONNECTIONS: u32 = 4096;

/// An address of the endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpAddress {
    /// TCP.
    Tcp(SocketAddr),
    /// A UNIX socket.
    Unix(PathBuf),
}

impl fmt::Display for HttpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What the endpoint is configured to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSettings {
    /// Where the daemon listens of its own accord; empty is "off".
    pub listen: Vec<HttpAddress>,
    /// Whoever comes by TCP shows a key.
    pub key_required: bool,
    /// Addresses that other machines reach are taken.
    pub allow_remote: bool,
    /// Connections at once.
    pub max_connections: usize,
    /// Names, besides `localhost`, that a `Host` header may have; in lower case.
    pub hosts: Vec<String>,
    /// Web pages that may call from a browser, such as `https://app.example.org`.
    pub origins: Vec<String>,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            key_required: true,
            allow_remote: false,
            max_connections: 64,
            hosts: Vec::new(),
            origins: Vec::new(),
        }
    }
}

/// Why an address that other machines reach is not taken, or `None` when it is.
pub fn refuses(address: IpAddr, settings: &HttpSettings) -> Option<&'static str> {
    match (address.to_canonical().is_loopback(), settings.allow_remote, settings.key_required) {
        (true, _, _) | (false, true, true) => None,
        (false, false, _) => Some("other machines reach it; that needs http.allow_remote = true"),
        (false, true, false) => Some("other machines reach it, so http.key cannot be \"none\""),
    }
}

fn address(text: &str) -> Result<HttpAddress, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return if path.starts_with('/') && path.len() <= MAX_SOCKET_PATH_BYTES && !path.contains('\0') && !path.ends_with('/') {
            Ok(HttpAddress::Unix(path.into()))
        } else {
            Err(format!("{}: the path of a socket is absolute and has at most {MAX_SOCKET_PATH_BYTES} bytes", shown(text)))
        };
    }
    text.parse().map(HttpAddress::Tcp).map_err(|_| {
        format!(
            "{} is no address; write \"127.0.0.1:{DEFAULT_HTTP_PORT}\", \"[::1]:{DEFAULT_HTTP_PORT}\", \"unix:/PATH\" or \"off\"",
            shown(text)
        )
    })
}

fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(120).collect::<String>())
}

fn names(key: &str, list: Option<Vec<String>>, fits: impl Fn(&str) -> bool, like: &str) -> Result<Vec<String>, String> {
    let list = list.unwrap_or_default();
    if list.len() > MAX_NAMES {
        return Err(format!("{key} has {} entries; at most {MAX_NAMES} are taken", list.len()));
    }
    match list.iter().find(|name| name.is_empty() || name.len() > MAX_NAME_BYTES || !fits(name)) {
        Some(bad) => Err(format!("{key}: {} is not like {like}", shown(bad))),
        None => Ok(list),
    }
}

/// Such as `https://app.example.org` or `http://localhost:3000`: as a browser writes it, so that equal is the same.
fn is_origin(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    rest.is_some_and(|host| {
        !host.is_empty()
            && !host.bytes().any(|byte| byte.is_ascii_uppercase() || byte.is_ascii_whitespace() || b"/*,@".contains(&byte))
            && host.is_ascii()
    })
}

fn is_host(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
}

/// Checks `[http]`.
///
/// # Errors
/// A sentence that names the key.
pub(super) fn check(raw: raw::Http) -> Result<HttpSettings, String> {
    let defaults = HttpSettings::default();
    let written = match raw.listen {
        None => Vec::new(),
        Some(raw::OneOrMany::One(one)) => vec![one],
        Some(raw::OneOrMany::Many(many)) => many,
    };
    if written.len() > MAX_LISTEN {
        return Err(format!("http.listen has {} addresses; at most {MAX_LISTEN} are taken", written.len()));
    }
    let is_off = written.iter().any(|address| address == "off");
    if is_off && written.len() > 1 {
        return Err("http.listen: \"off\" stands alone".to_owned());
    }
    let listen = if is_off {
        Vec::new()
    } else {
        written.iter().map(|text| address(text)).collect::<Result<Vec<_>, _>>().map_err(|why| format!("http.listen: {why}"))?
    };
    let key_required = match raw.key.as_deref() {
        None | Some("required") => true,
        Some("none") => false,
        Some(other) => return Err(format!("http.key is {}; it is \"required\" or \"none\"", shown(other))),
    };
    let max_connections = raw.max_connections.unwrap_or(64);
    if !(1..=MAX_CONNECTIONS).contains(&max_connections) {
        return Err(format!("http.max_connections is {max_connections}; it is between 1 and {MAX_CONNECTIONS}"));
    }
    let hosts = names("http.hosts", raw.hosts, is_host, "\"gateway.example.org\", a name without a port")?;
    let settings = HttpSettings {
        listen,
        key_required,
        allow_remote: raw.allow_remote.unwrap_or(defaults.allow_remote),
        max_connections: usize::try_from(max_connections).unwrap_or(64),
        hosts: hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
        origins: names("http.origins", raw.origins, is_origin, "\"https://app.example.org\"; \"*\" is never taken")?,
    };
    for address in &settings.listen {
        if let HttpAddress::Tcp(tcp) = address
            && let Some(why) = refuses(tcp.ip(), &settings)
        {
            return Err(format!("http.listen: {tcp}: {why}"));
        }
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(text: &str) -> Result<HttpSettings, String> {
        check(toml::from_str(text).map_err(|error: toml::de::Error| error.to_string())?)
    }

    #[test]
    fn nothing_written_is_off_and_wants_keys() {
        assert_eq!(http("").unwrap(), HttpSettings::default());
        assert_eq!(http("listen = \"off\"").unwrap(), HttpSettings::default());
        assert_eq!(http("listen = []").unwrap().listen, []);
    }

    #[test]
    fn one_address_or_several_are_taken() {
        let one = http("listen = \"127.0.0.1:11480\"").unwrap().listen;
        assert_eq!(one, [HttpAddress::Tcp("127.0.0.1:11480".parse().unwrap())]);
        let several = http("listen = [\"[::1]:0\", \"unix:/run/opengateway-http.sock\"]").unwrap().listen;
        assert_eq!(several.iter().map(ToString::to_string).collect::<Vec<_>>(), ["[::1]:0", "unix:/run/opengateway-http.sock"]);
        assert!(http("listen = [\"off\", \"127.0.0.1:1\"]").unwrap_err().contains("alone"));
    }

    #[test]
    fn what_other_machines_reach_needs_two_words() {
        for address in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1"] {
            let listen = format!("listen = {address:?}\n");
            assert!(http(&listen).unwrap_err().contains("allow_remote"), "{address}");
            assert!(http(&format!("{listen}allow_remote = true\nkey = \"none\"")).unwrap_err().contains("http.key"));
            assert!(http(&format!("{listen}allow_remote = true")).is_ok());
        }
        assert!(http("listen = \"127.1.2.3:1\"\nkey = \"none\"").is_ok());
        assert!(http("listen = \"[::ffff:127.0.0.1]:1\"").is_ok());
        assert!(http("listen = \"[::ffff:192.0.2.1]:1\"").is_err());
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (text, key) in [
            ("listen = \"localhost:1\"", "http.listen"),
            ("listen = \"127.0.0.1\"", "http.listen"),
            ("listen = \"unix:http.sock\"", "http.listen"),
            ("key = \"maybe\"", "http.key"),
            ("max_connections = 0", "http.max_connections"),
            ("max_connections = 4097", "http.max_connections"),
            ("hosts = [\"a:1\"]", "http.hosts"),
            ("origins = [\"*\"]", "http.origins"),
            ("origins = [\"https://a/b\"]", "http.origins"),
            ("origins = [\"HTTPS://a\"]", "http.origins"),
            ("origins = [\"null\"]", "http.origins"),
        ] {
            let error = http(text).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
        assert!(http("max_connections = 4096").is_ok() && http("max_connections = 1").is_ok());
        let path = |length: usize| http(&format!("listen = \"unix:/{}\"", "p".repeat(length - 1)));
        assert!(path(MAX_SOCKET_PATH_BYTES).is_ok() && path(MAX_SOCKET_PATH_BYTES + 1).is_err());
        let many = |count: usize| http(&format!("listen = {:?}", vec!["127.0.0.1:1"; count]));
        assert!(many(16).is_ok() && many(17).is_err());
        let named = |count: usize| http(&format!("hosts = {:?}", vec!["a"; count]));
        assert!(named(64).is_ok() && named(65).is_err());
    }
}
