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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_ports_are_those_of_the_servers() {
        let config = Config::usual(Vec::new());
        let ports: Vec<u16> = config.places.iter().map(|place| place.port).collect();
        assert_eq!(ports, [11434, 8080, 8000, 1234, 52415, 9337]);
        assert!(config.places.iter().all(|place| !place.candidates.is_empty() && !place.candidates.contains(&Api::OpenAi)));
    }
}
