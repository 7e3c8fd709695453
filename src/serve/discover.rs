//! Servers of models that a user runs beside this node: found on their usual ports of this machine, offered while they are
//! there, dropped when they are gone. Nothing but loopback is ever asked, and nothing that does not prove what it is.
//!
//! A port where nobody listens costs one refused connect a look. One where something else listens is left alone for a while,
//! because its owner reads its log.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::backend::Backend;
use super::openai::{self, OpenAi};
use super::{BackendId, Handle};
use crate::domain::upstream::{Api, Location};

/// Where a server may listen, and what it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// On loopback.
    pub port: u16,
    /// Asked in this order.
    pub candidates: Vec<Api>,
}

/// How often it is looked, and for how long something else is left alone.
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    /// Between two looks.
    pub look: Duration,
    /// The same after [`Timings::patience`] looks that found nothing new.
    pub seldom: Duration,
    /// Looks until it is looked seldom.
    pub patience: u32,
    /// A port where something else listens.
    pub stranger: Duration,
    /// A server that was found and is away.
    pub gone: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            look: Duration::from_secs(30),
            seldom: Duration::from_secs(60),
            patience: 10,
            stranger: Duration::from_secs(600),
            gone: Duration::from_secs(60),
        }
    }
}

/// What to look for.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where.
    pub places: Vec<Place>,
    /// URLs that the configuration names: they are backends already.
    pub configured: Vec<String>,
    /// How often.
    pub timings: Timings,
}

impl Config {
    /// The usual ports, less what the configuration names.
    pub fn usual(configured: Vec<String>) -> Self {
        let place = |port, candidates: &[Api]| Place { port, candidates: candidates.to_vec() };
        let mut places: Vec<Place> = Api::ALL.iter().filter_map(|&api| Some(place(api.usual_port()?, &[api]))).collect();
        // These two ports are used for each other.
        for (port, other) in [(8080, Api::Vllm), (8000, Api::LlamaServer)] {
            places.iter_mut().filter(|place| place.port == port).for_each(|place| place.candidates.push(other));
        }
        Self { places, configured, timings: Timings::default() }
    }
}

/// A port, and what is known of it.
struct Spot {
    place: Place,
    found: Option<Found>,
    /// Something else listens: not asked before.
    stranger_until: Option<Instant>,
}

struct Found {
    id: BackendId,
    api: Api,
    origin: String,
    backend: Arc<OpenAi>,
    away_since: Option<Instant>,
}

/// Looks until it is aborted. What it found stays with `serve`.
pub fn start(serve: Handle, config: Config) -> JoinHandle<()> {
    tokio::spawn(run(serve, config))
}

async fn run(serve: Handle, config: Config) {
    let timings = config.timings;
    let named: Vec<u16> = config
        .configured
        .iter()
        .filter_map(|url| Location::parse(url).ok())
        .filter(Location::is_loopback)
        .map(|place| place.port)
        .collect();
    let free = config.places.into_iter().filter(|place| !named.contains(&place.port));
    let mut spots: Vec<Spot> = free.map(|place| Spot { place, found: None, stranger_until: None }).collect();
    let mut quiet = 0_u32;
    loop {
        let mut changed = false;
        for spot in &mut spots {
            changed |= spot.look(&serve, timings).await;
        }
        quiet = if changed { 0 } else { quiet.saturating_add(1) };
        sleep(if quiet >= timings.patience { timings.seldom } else { timings.look }).await;
    }
}

impl Spot {
    /// True when a server came or went.
    async fn look(&mut self, serve: &Handle, timings: Timings) -> bool {
        if let Some(found) = &mut self.found {
            // Its backend looks after it: nothing more is asked here.
            if found.backend.availability().borrow().problem.is_none() {
                found.away_since = None;
                return false;
            }
            if found.away_since.get_or_insert_with(Instant::now).elapsed() < timings.gone {
                return false;
            }
            // It may be loading for minutes: what still answers as it did is not gone.
            if openai::identify(&found.origin, &[found.api]).await.is_some() {
                found.away_since = None;
                return false;
            }
            serve.remove(found.id).await;
            let backend = found.backend.name();
            tracing::info!(backend, "{backend} is gone");
            self.found = None;
            return true;
        }
        let Some(address) = self.listener().await else {
            self.stranger_until = None;
            return false;
        };
        if self.stranger_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        if !trusted(address) {
            tracing::info!(
                %address,
                "somebody's own server listens at {address}: it is not taken by itself, since its user would read what others ask; \
                 to use it, name it in a [[backend]]"
            );
            self.stranger_until = Some(Instant::now() + timings.stranger);
            return false;
        }
        let origin = format!("http://{address}");
        let Some(api) = openai::identify(&origin, &self.place.candidates).await else {
            tracing::debug!(%address, "something else listens at {address}");
            self.stranger_until = Some(Instant::now() + timings.stranger);
            return false;
        };
        let backend = match OpenAi::found(api, &origin) {
            Ok(backend) => Arc::new(backend),
            Err(error) => {
                tracing::warn!(%error, "{} at {origin} cannot be used: {error}", api.as_str());
                return false;
            }
        };
        let name = backend.name().to_owned();
        tracing::info!(backend = name, "found {name}; to leave it alone: [upstreams] discover = false");
        let id = serve.add(Arc::clone(&backend) as Arc<dyn Backend>).await;
        self.found = Some(Found { id, api, origin, backend, away_since: None });
        true
    }

    /// The first address of the port where somebody listens.
    async fn listener(&self) -> Option<SocketAddr> {
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let address = SocketAddr::new(ip, self.place.port);
            if timeout(Duration::from_millis(500), TcpStream::connect(address)).await.is_ok_and(|connected| connected.is_ok()) {
                return Some(address);
            }
        }
        None
    }
}

/// Uids from here on are people's (Debian, Fedora: `UID_MIN` of login.defs).
const FIRST_PERSON: u32 = 1000;

/// Whether the user who listens there may be given what others ask: root, a user of the system, or this daemon's own. Any other
/// user of this machine could sit on the port and read prompts.
fn trusted(address: SocketAddr) -> bool {
    let own = rustix::process::getuid().as_raw();
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .find_map(|table| listener_of(&table, address))
        .is_some_and(|uid| uid < FIRST_PERSON || uid == own)
}

/// Whose socket listens at `address`, by a table of the kernel (proc(5)): the local address and port in hex, `0A` for listening,
/// the uid in the eighth column. A socket on all addresses counts for each of them.
fn listener_of(table: &str, address: SocketAddr) -> Option<u32> {
    let port = format!("{:04X}", address.port());
    let words = |bytes: &[u8]| {
        let word = |four: &[u8]| format!("{:08X}", u32::from_ne_bytes([four[0], four[1], four[2], four[3]]));
        bytes.chunks_exact(4).map(word).collect::<String>()
    };
    let ours = match address.ip() {
        IpAddr::V4(ip) => vec![words(&ip.octets()), words(&ip.to_ipv6_mapped().octets()), "0".repeat(8), "0".repeat(32)],
        IpAddr::V6(ip) => vec![words(&ip.octets()), "0".repeat(32)],
    };
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (local, local_port) = fields.get(1)?.split_once(':')?;
        let listens = fields.get(3) == Some(&"0A") && local_port == port && ours.iter().any(|ours| ours == local);
        if listens { fields.get(7)?.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_kernel_tells_who_listens() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:2CAA 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 100 0 0 10 0\n\
            1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000   118        0 2 1 0 100 0 0 10 0\n\
            2: 0100007F:1F40 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0\n";
        let at = |port: u16| listener_of(table, SocketAddr::from(([127, 0, 0, 1], port)));
        assert_eq!((at(11434), at(8080), at(8000)), (Some(1000), Some(118), None));
        assert_eq!(listener_of("nonsense\nmore of it : :", SocketAddr::from(([127, 0, 0, 1], 1))), None);
    }

    #[tokio::test]
    async fn the_own_listener_is_trusted_and_a_port_where_nobody_listens_is_not() {
        let own = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = own.local_addr().unwrap();
        assert!(trusted(address));
        drop(own);
        assert!(!trusted(address));
    }

    #[test]
    fn the_usual_ports_are_those_of_the_servers() {
        let config = Config::usual(Vec::new());
        let ports: Vec<u16> = config.places.iter().map(|place| place.port).collect();
        assert_eq!(ports, [11434, 8080, 8000, 1234, 52415, 9337]);
        assert!(config.places.iter().all(|place| !place.candidates.is_empty() && !place.candidates.contains(&Api::OpenAi)));
    }
}
