//! The OpenAI endpoint: any program that speaks that API uses the cluster through it.
//!
//! hyper serves HTTP/1.1; a request is answered in its connection's own task, polling the [`dispatch::Job`] from the
//! body of the response: no channel and no other task between them, and dropping the connection drops the job, which
//! cancels the work at every hop. What is asked and answered is never logged.

mod accept;
mod activation;
mod answer;
mod ask;
mod body;
mod connections;
mod errors;
mod keys;
mod listen;
mod models;
mod origin;
mod request;
mod service;
mod shape;
mod stream;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

pub use activation::passed_sockets;
pub use keys::KeyError;

use crate::config::HttpSettings;
use crate::{dispatch, net, serve};
use connections::Connections;
use keys::Keys;

/// What the endpoint speaks for.
#[derive(Debug)]
pub struct Parts {
    /// Who is in the clusters.
    pub net: net::Handle,
    /// This machine's own models.
    pub serve: serve::Handle,
    /// Where prompts are asked.
    pub dispatch: dispatch::Handle,
    /// Name of this node.
    pub node_name: String,
    /// Where the secret of the keys is kept.
    pub state_dir: PathBuf,
    /// How it is configured.
    pub settings: HttpSettings,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    net: net::Handle,
    serve: serve::Handle,
    dispatch: dispatch::Handle,
    node_name: String,
    settings: HttpSettings,
    keys: Keys,
    connections: Connections,
    /// Where it listens now, as clients are told.
    addresses: Mutex<Vec<String>>,
    /// What keeps it from listening, a sentence each.
    problems: Mutex<Vec<String>>,
    /// No new connections; those that are there end with their request.
    stop: CancellationToken,
    stopping: AtomicBool,
}

/// A cheap clone that looks at the endpoint, and ends it.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

/// Starts to listen where the settings say, and on `sockets`, which the service manager opened. An address that cannot be
/// had is tried again and again, and is a problem in the status meanwhile: a node without its endpoint is still a node.
pub fn start(parts: Parts, sockets: Vec<OwnedFd>) -> Handle {
    let Parts { net, serve, dispatch, node_name, state_dir, settings } = parts;
    let shared = Arc::new(Shared {
        net,
        serve,
        dispatch,
        node_name,
        keys: Keys::new(state_dir),
        connections: Connections::new(settings.max_connections),
        settings,
        addresses: Mutex::default(),
        problems: Mutex::default(),
        stop: CancellationToken::new(),
        stopping: AtomicBool::new(false),
    });
    if !sockets.is_empty() || !shared.settings.listen.is_empty() {
        accept::start(&shared, sockets);
    }
    Handle(shared)
}

impl Handle {
    /// Where it listens now: `http://127.0.0.1:11480/v1`, `unix:/run/opengateway-http.sock`. Empty when it is off.
    pub fn addresses(&self) -> Vec<String> {
        self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether whoever comes by TCP shows a key.
    pub fn key_required(&self) -> bool {
        self.0.settings.key_required
    }

    /// What is wrong now, a sentence each.
    pub fn problems(&self) -> Vec<String> {
        self.0.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key of a user; with `renew` another one, and the old one is worth nothing from then on.
    ///
    /// # Errors
    /// [`KeyError`]: nothing was changed.
    pub async fn key(&self, uid: u32, renew: bool) -> Result<String, KeyError> {
        let shared = Arc::clone(&self.0);
        let made = tokio::task::spawn_blocking(move || if renew { shared.keys.renew(uid) } else { shared.keys.of(uid) });
        made.await.unwrap_or_else(|error| Err(KeyError::Failed(error.to_string())))
    }

    /// Requests that are being answered.
    pub fn active(&self) -> usize {
        self.0.connections.busy()
    }

    /// Takes no new connections and no new requests; those that are being answered may end.
    pub fn stop(&self) {
        self.0.stopping.store(true, Ordering::Relaxed);
        self.0.stop.cancel();
    }
}
