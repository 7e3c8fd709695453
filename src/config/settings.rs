//! The configuration as checked: nothing optional that has a default, every value in range.

use std::path::{Path, PathBuf};

use super::engine::{self, EngineSettings};
use super::http::HttpSettings;
use super::raw::{self, Raw};
use super::relay::RelaySettings;
use crate::domain::cluster::ClusterId;
use crate::domain::node::MAX_NODE_NAME_BYTES;
use crate::domain::resources::Lent;
use crate::domain::upstream::{Api, Location};

/// The port that other nodes expect; taken by another program, any free one will do.
pub const DEFAULT_PORT: u16 = 4001;
const MAX_CLUSTERS: usize = 16;
const MAX_BACKENDS: usize = 16;
/// Addresses in one list.
pub const MAX_ADDRESSES: usize = 64;
/// Bytes of one address.
pub const MAX_ADDRESS_BYTES: usize = 256;
/// Bytes of the name of a credential.
const MAX_CREDENTIAL_BYTES: usize = 64;
/// Where systemd puts the credentials of the unit; `$CREDENTIALS_DIRECTORY` says so to the daemon, and to nobody else.
const CREDENTIALS: &str = "/run/credentials/opengatewayd.service";
const GB: f64 = 1e9;

/// A cluster that is joined at the start.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterSettings {
    /// Its id.
    pub id: ClusterId,
    /// Take prompts of it; `None` is what [`Settings::serve`] says.
    pub serve: Option<bool>,
    /// Multiaddrs to dial for it.
    pub bootstrap: Vec<String>,
}

/// What a backend is.
#[derive(Debug, Clone, PartialEq)]
pub enum BackendKind {
    /// The echo.
    Echo,
    /// An OpenAI-compatible server.
    OpenAi {
        /// Its URL.
        url: String,
        /// File with its key.
        api_key_file: Option<PathBuf>,
        /// Only these models; empty is all.
        models: Vec<String>,
        /// Which server it is; `None` finds out.
        api: Option<Api>,
        /// Text may go there in clear, though it is another machine.
        allow_http: bool,
        /// `slots` was not written: what the server says of itself counts.
        learns_slots: bool,
    },
}

/// One source of answers.
#[derive(Debug, Clone, PartialEq)]
pub struct BackendSettings {
    /// What it is.
    pub kind: BackendKind,
    /// Prompts running at once.
    pub slots: usize,
    /// Prompts waiting.
    pub queue: usize,
    /// Prompts of one peer running at once, while others wait.
    pub running_per_peer: usize,
    /// Prompts of one peer waiting.
    pub queued_per_peer: usize,
}

/// Everything that the daemon is configured to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Shown to other members.
    pub node_name: String,
    /// Where identity, clusters and `resources.json` are kept.
    pub state_dir: PathBuf,
    /// Where models are kept.
    pub models_dir: PathBuf,
    /// Where models are found besides.
    pub models_also: Vec<PathBuf>,
    /// How models are computed here.
    pub engine: EngineSettings,
    /// Multiaddrs to listen on.
    pub listen: Vec<String>,
    /// The addresses are the default ones: a port that is taken is replaced by a free one.
    pub any_port: bool,
    /// Multiaddrs of nodes to dial at the start.
    pub bootstrap: Vec<String>,
    /// Multiaddrs at which others reach this node though it does not listen on them.
    pub announce: Vec<String>,
    /// What this node carries for others.
    pub relay: RelaySettings,
    /// Look for members on the local network.
    pub mdns: bool,
    /// Remember members on disk and dial them first at the next start.
    pub remember: bool,
    /// Connections in all.
    pub max_connections: u32,
    /// Answer prompts of other members.
    pub serve: bool,
    /// Most that is lent.
    pub lent: Lent,
    /// Clusters to join at the start.
    pub clusters: Vec<ClusterSettings>,
    /// Sources of answers, best first; the echo is always among them.
    pub backends: Vec<BackendSettings>,
    /// Look for servers of models on their usual ports of this machine.
    pub discover: bool,
    /// The OpenAI endpoint.
    pub http: HttpSettings,
    /// Filter for log lines.
    pub log: String,
}

fn default_listen() -> Vec<String> {
    ["/ip4/0.0.0.0", "/ip6/::"]
        .iter()
        .flat_map(|ip| [format!("{ip}/udp/{DEFAULT_PORT}/quic-v1"), format!("{ip}/tcp/{DEFAULT_PORT}")])
        .collect()
}

fn name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_NODE_NAME_BYTES {
        return Err(format!("node.name is {} bytes long; it has 1 to {MAX_NODE_NAME_BYTES}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err("node.name contains a control character".to_owned());
    }
    Ok(text.to_owned())
}

/// The syntax of a multiaddr is checked where it is used; here only what no multiaddr can be.
fn addresses(key: &str, list: Option<Vec<String>>) -> Result<Vec<String>, String> {
    let list = list.unwrap_or_default();
    if list.len() > MAX_ADDRESSES {
        return Err(format!("{key} has {} addresses; at most {MAX_ADDRESSES} are taken", list.len()));
    }
    match list.iter().find(|address| !address.starts_with('/') || address.len() > MAX_ADDRESS_BYTES) {
        Some(bad) => Err(format!(
            "{key}: {:?} is no multiaddr such as \"/ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3…\"",
            bad.chars().take(80).collect::<String>()
        )),
        None => Ok(list),
    }
}

fn amount(key: &str, value: Option<f64>) -> Result<Option<f64>, String> {
    match value {
        Some(value) if !value.is_finite() || value <= 0.0 => Err(format!("{key} is {value}; it is a number above 0")),
        value => Ok(value),
    }
}

#[allow(clippy::cast_possible_truncation)] // a lent amount is far below 2^53 bytes, so nothing is lost
fn bytes(key: &str, value: Option<f64>) -> Result<Option<u64>, String> {
    Ok(amount(key, value)?.map(|value| (value * GB) as u64))
}

/// The file that holds a secret which the service manager passes: `LoadCredential=secret:DIRECTORY` in the unit gives each
/// file NAME of that directory the name `secret_NAME`.
fn credential(name: &str, directory: Option<&Path>) -> Result<PathBuf, String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > MAX_CREDENTIAL_BYTES || name.starts_with('.') || !name.bytes().all(allowed) {
        return Err(format!(
            "{:?} is no name of a credential: 1 to {MAX_CREDENTIAL_BYTES} of A-Z a-z 0-9 . _ -, not beginning with a dot",
            name.chars().take(80).collect::<String>()
        ));
    }
    Ok(directory.unwrap_or(Path::new(CREDENTIALS)).join(format!("secret_{name}")))
}

fn api(key: &str, name: &str) -> Result<Api, String> {
    Api::from_name(name).ok_or_else(|| {
        let known: Vec<&str> = Api::ALL.iter().map(|api| api.as_str()).collect();
        format!("{key}: api {:?} is not known; known are {}", name.chars().take(80).collect::<String>(), known.join(", "))
    })
}

fn backend(at: usize, raw: raw::Backend, credentials: Option<&Path>) -> Result<BackendSettings, String> {
    let key = format!("backend number {}", at + 1);
    let (kind, slots, queue, running, queued) = match raw.kind.as_str() {
        "echo" => {
            let secret = raw.api_key_file.is_some() || raw.api_key_credential.is_some();
            if raw.url.is_some() || secret || raw.models.is_some() || raw.api.is_some() || raw.allow_http.is_some() {
                return Err(format!("{key}: an echo has no url, api, allow_http, api_key_file, api_key_credential or models"));
            }
            (BackendKind::Echo, 64, 256, 64, 256)
        }
        "openai" => {
            let url = raw.url.ok_or_else(|| format!("{key}: an openai backend needs url"))?;
            let allow_http = raw.allow_http.unwrap_or(false);
            let shown: String = url.chars().take(80).collect();
            Location::parse(&url)
                .and_then(|place| place.check(allow_http))
                .map_err(|why| format!("{key}: url is {shown:?}: {why}"))?;
            let api = raw.api.as_deref().map(|name| api(&key, name)).transpose()?;
            let api_key_file = match (raw.api_key_file, raw.api_key_credential) {
                (Some(_), Some(_)) => return Err(format!("{key}: api_key_file and api_key_credential exclude each other")),
                (file, None) => file,
                (None, Some(name)) => {
                    Some(credential(&name, credentials).map_err(|why| format!("{key}: api_key_credential {why}"))?)
                }
            };
            let (models, learns_slots) = (raw.models.unwrap_or_default(), raw.slots.is_none());
            let slots = api.map_or(4, Api::usual_slots);
            let kind = BackendKind::OpenAi { url, api_key_file, models, api, allow_http, learns_slots };
            (kind, slots, 32, slots / 2, 8)
        }
        other => return Err(format!("{key}: kind {other:?} is not known; known are echo and openai")),
    };
    let bounded = |name: &str, value: Option<usize>, default: usize, least: usize| match value {
        Some(value) if value < least || value > 4096 => Err(format!("{key}: {name} is {value}; it is between {least} and 4096")),
        value => Ok(value.unwrap_or(default)),
    };
    let slots = bounded("slots", raw.slots, slots, 1)?;
    Ok(BackendSettings {
        kind,
        slots,
        queue: bounded("queue", raw.queue, queue, 0)?,
        running_per_peer: bounded("running_per_peer", raw.running_per_peer, running.min(slots), 1)?,
        queued_per_peer: bounded("queued_per_peer", raw.queued_per_peer, queued, 0)?,
    })
}

impl Settings {
    /// Checks `raw`. `hostname` is the name of a node that has none; the directories are those of the installation.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn check(raw: Raw, hostname: &str, state_dir: PathBuf) -> Result<Self, String> {
        let node = raw.node.unwrap_or_default();
        let network = raw.network.unwrap_or_default();
        let serve = raw.serve.unwrap_or_default();
        let state_dir = node.state_dir.unwrap_or(state_dir);
        let enabled = serve.enabled.unwrap_or(true);
        let listen = addresses("network.listen", network.listen)?;
        let relay = RelaySettings::check(&raw.relay.unwrap_or_default())?;
        let max_connections = network.max_connections.unwrap_or(relay.usual_connections());
        if !(8..=4608).contains(&max_connections) {
            return Err(format!("network.max_connections is {max_connections}; it is between 8 and 4608"));
        }
        let mut clusters = Vec::new();
        for cluster in raw.cluster.unwrap_or_default() {
            let id = ClusterId::new(&cluster.id)
                .map_err(|error| format!("cluster.id {:?}: {error}", cluster.id.chars().take(80).collect::<String>()))?;
            if clusters.iter().any(|known: &ClusterSettings| known.id == id) {
                return Err(format!("cluster {id} is named twice"));
            }
            let bootstrap = addresses(&format!("bootstrap of cluster {id}"), cluster.bootstrap)?;
            clusters.push(ClusterSettings { id, serve: cluster.serve, bootstrap });
        }
        if clusters.len() > MAX_CLUSTERS {
            return Err(format!("{} clusters are named; a node is in at most {MAX_CLUSTERS}", clusters.len()));
        }
        let models = raw.models.unwrap_or_default();
        let credentials = raw.credentials.as_deref();
        let raw_backends = raw.backend.unwrap_or_default();
        if raw_backends.len() > MAX_BACKENDS {
            return Err(format!("{} backends are named; at most {MAX_BACKENDS} are taken", raw_backends.len()));
        }
        let mut backends: Vec<BackendSettings> =
            raw_backends.into_iter().enumerate().map(|(at, raw)| backend(at, raw, credentials)).collect::<Result<_, _>>()?;
        match backends.iter().filter(|backend| backend.kind == BackendKind::Echo).count() {
            0 => {
                let echo = raw::Backend { kind: "echo".to_owned(), ..raw::Backend::default() };
                backends.push(backend(backends.len(), echo, None)?);
            }
            1 => {}
            _ => return Err("there is one echo; it is named twice".to_owned()),
        }
        let http = super::http::check(raw.http.unwrap_or_default())?;
        let log = raw.log.and_then(|log| log.level).unwrap_or_else(|| "info".to_owned());
        if log.parse::<tracing_subscriber::EnvFilter>().is_err() {
            return Err(format!("log.level {log:?} is no level (error, warn, info, debug, trace) and no filter"));
        }
        Ok(Self {
            node_name: node.name.as_deref().map(name).transpose()?.unwrap_or_else(|| {
                let host: String = hostname.chars().filter(|c| !c.is_control()).collect();
                let host = &host[..host.floor_char_boundary(MAX_NODE_NAME_BYTES)];
                if host.is_empty() { "node".to_owned() } else { host.to_owned() }
            }),
            models_dir: engine::absolute("models.directory", models.directory)?.unwrap_or_else(|| state_dir.join("models")),
            models_also: engine::directories(models.also.unwrap_or_default())?,
            engine: EngineSettings::check(raw.engine.unwrap_or_default())?,
            state_dir,
            any_port: listen.is_empty(),
            listen: if listen.is_empty() { default_listen() } else { listen },
            bootstrap: addresses("network.bootstrap", network.bootstrap)?,
            announce: addresses("network.announce", network.announce)?,
            relay,
            mdns: network.mdns.unwrap_or(true),
            remember: network.remember.unwrap_or(true),
            max_connections,
            serve: enabled,
            lent: Lent {
                cores: amount("serve.cores", serve.cores)?,
                memory: bytes("serve.memory_gb", serve.memory_gb)?,
                storage: bytes("serve.storage_gb", serve.storage_gb)?,
                vram: bytes("serve.vram_gb", serve.vram_gb)?,
            },
            clusters,
            backends,
            discover: raw.upstreams.and_then(|upstreams| upstreams.discover).unwrap_or(true),
            http,
            log,
        })
    }
}

/// What differs and takes effect only after a restart, by the names of the sections; the rest is applied by a reload.
pub fn needs_restart(old: &Settings, new: &Settings) -> Vec<&'static str> {
    let mut sections = Vec::new();
    if (&old.node_name, &old.state_dir) != (&new.node_name, &new.state_dir) {
        sections.push("[node]");
    }
    let addresses = |settings: &Settings| (settings.listen.clone(), settings.bootstrap.clone(), settings.announce.clone());
    let others = |settings: &Settings| (settings.mdns, settings.remember, settings.max_connections);
    if addresses(old) != addresses(new) || (others(old) != others(new) && old.relay.enabled == new.relay.enabled) {
        sections.push("[network]");
    }
    if old.relay != new.relay {
        sections.push("[relay]");
    }
    if old.backends != new.backends {
        sections.push("[[backend]]");
    }
    if old.discover != new.discover {
        sections.push("[upstreams]");
    }
    if old.models_dir != new.models_dir {
        sections.push("[models] directory");
    }
    if old.engine.fixed() != new.engine.fixed() {
        sections.push("[engine]");
    }
    if old.http != new.http {
        sections.push("[http]");
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<Settings, String> {
        Settings::check(toml::from_str(text).map_err(|error: toml::de::Error| error.to_string())?, "host", "/state".into())
    }

    #[test]
    fn nothing_written_is_a_whole_configuration() {
        let settings = settings("").unwrap();
        assert_eq!(settings.node_name, "host");
        assert!(settings.mdns && settings.remember && settings.serve && settings.any_port);
        assert_eq!(settings.listen.len(), 4);
        assert_eq!(settings.backends.len(), 1);
        assert!(settings.clusters.is_empty(), "a machine lends nothing before its owner says so");
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (text, key) in [
            ("[node]\nname = \"\"", "node.name"),
            ("[node]\nname = \"a\\u0007\"", "node.name"),
            ("[network]\nlisten = [\"1.2.3.4:5\"]", "network.listen"),
            ("[network]\nmax_connections = 7", "max_connections"),
            ("[network]\nannounce = [\"1.2.3.4:5\"]", "network.announce"),
            ("[relay]\ncircuit_bytes = 0", "relay.circuit_bytes"),
            ("[serve]\ncores = 0.0", "serve.cores"),
            ("[serve]\nmemory_gb = nan", "serve.memory_gb"),
            ("[[cluster]]\nid = \"../x\"", "cluster.id"),
            ("[[cluster]]\nid = \"a\"\n[[cluster]]\nid = \"A\"", "twice"),
            ("[[backend]]\nkind = \"openai\"", "url"),
            ("[[backend]]\nkind = \"openai\"\nurl = \"http://10.0.0.5:11434/v1\"", "allow_http"),
            ("[[backend]]\nkind = \"openai\"\nurl = \"http://169.254.169.254/v1\"\nallow_http = true", "clouds"),
            ("[[backend]]\nkind = \"openai\"\nurl = \"https://x/v1\"\napi = \"lmstudio\"", "lm-studio"),
            ("[[backend]]\nkind = \"echo\"\napi = \"exo\"", "echo"),
            ("[[backend]]\nkind = \"llama\"", "llama"),
            ("[[backend]]\nkind = \"echo\"\nslots = 0", "slots"),
            ("[[backend]]\nkind = \"echo\"\nurl = \"http://x\"", "echo"),
            ("[http]\nlisten = \"0.0.0.0:1\"", "http.listen"),
            ("[log]\nlevel = \"a=b=c\"", "log.level"),
        ] {
            let error = settings(text).unwrap_err();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn limits_hold_at_the_limit_and_one_past_it() {
        let clusters = |count: usize| (0..count).map(|at| format!("[[cluster]]\nid = \"c{at}\"\n")).collect::<String>();
        assert!(settings(&clusters(16)).is_ok());
        assert!(settings(&clusters(17)).is_err());
        let named = |length: usize| settings(&format!("[node]\nname = \"{}\"", "n".repeat(length)));
        assert!(named(64).is_ok());
        assert!(named(65).is_err());
    }

    #[test]
    fn a_credential_is_a_file_of_the_service_manager_and_never_a_path() {
        let key_file = |credential: &str, directory: Option<&str>| {
            let text = format!("[[backend]]\nkind = \"openai\"\nurl = \"https://x\"\napi_key_credential = {credential:?}");
            let raw = Raw { credentials: directory.map(PathBuf::from), ..toml::from_str(&text).unwrap() };
            Settings::check(raw, "host", "/state".into()).map(|settings| match settings.backends[0].kind.clone() {
                BackendKind::OpenAi { api_key_file, .. } => api_key_file.unwrap(),
                BackendKind::Echo => unreachable!(),
            })
        };
        assert_eq!(key_file("groq", Some("/run/c")).unwrap(), Path::new("/run/c/secret_groq"));
        assert_eq!(key_file("groq", None).unwrap(), Path::new("/run/credentials/opengatewayd.service/secret_groq"));
        assert!(key_file(&"n".repeat(64), None).is_ok() && key_file(&"n".repeat(65), None).is_err());
        for bad in ["", "../x", "a/b", ".x", "a b", "ä"] {
            assert!(key_file(bad, None).unwrap_err().contains("api_key_credential"), "{bad}");
        }
        let both = "[[backend]]\nkind = \"openai\"\nurl = \"https://x\"\napi_key_file = \"/k\"\napi_key_credential = \"k\"";
        assert!(settings(both).unwrap_err().contains("exclude each other"));
    }

    #[test]
    fn a_long_host_name_is_cut_between_characters() {
        let settings = Settings::check(Raw::default(), &"ä".repeat(60), "/state".into()).unwrap();
        assert_eq!(settings.node_name, "ä".repeat(32));
    }

    #[test]
    fn what_needs_a_restart_is_named() {
        let old = settings("").unwrap();
        let new = settings("[node]\nname = \"x\"\n[serve]\nenabled = false\n[[cluster]]\nid = \"a\"").unwrap();
        assert_eq!(needs_restart(&old, &new), ["[node]"]);
        let new = settings("[relay]\nenabled = true").unwrap();
        assert_eq!(needs_restart(&old, &new), ["[relay]"]);
        let new = settings("[network]\nannounce = [\"/ip4/192.0.2.1/tcp/4001\"]").unwrap();
        assert_eq!(needs_restart(&old, &new), ["[network]"]);
        let new = settings("[http]\nkey = \"none\"").unwrap();
        assert_eq!(needs_restart(&old, &new), ["[http]"]);
    }
}
