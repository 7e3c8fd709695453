//! The bus objects: translate, authorise, delegate. Knows nothing of libp2p.

mod access;
mod catalogue;
mod cluster;
pub mod control;
mod details;
mod errors;
mod facts;
mod guard;
mod http;
mod job;
mod log_control;
mod manager;
mod members;
mod models;
mod network;
mod options;
mod polkit;
mod prompts;
mod publish;
mod shared;
mod stream;
mod transfer;
mod turns;
mod watchers;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, mpsc, watch};
use zbus::Connection;
use zbus::connection::Builder;
use zbus::fdo::{ObjectManager, RequestNameFlags, RequestNameReply};
use zbus::object_server::SignalEmitter;

pub use access::{Access, Action, Mode};
pub use errors::Error;
pub use guard::{Guarded, Readers};

use crate::api::names::{BUS_NAME, MANAGER_INTERFACE, ROOT_PATH};
use crate::logging::Log;
use crate::{dispatch, gauge, net, serve};
use control::Control;
use http::Http;
use job::Jobs;
use log_control::LogControl;
use manager::Manager;
use publish::Publisher;
use shared::Shared;

/// What the objects speak for.
#[derive(Debug)]
pub struct Node {
    /// The network.
    pub net: net::Handle,
    /// Who explains the network.
    pub doctor: crate::diagnosis::Doctor,
    /// This machine's own backends.
    pub serve: serve::Handle,
    /// Prompts of this machine's users.
    pub dispatch: dispatch::Handle,
    /// The models on this machine.
    pub models: crate::models::Handle,
    /// How models are computed here.
    pub engine: watch::Receiver<crate::models::Settings>,
    /// What this machine has.
    pub gauge: gauge::Handle,
    /// The OpenAI endpoint.
    pub http: crate::http::Handle,
    /// The daemon.
    pub control: Control,
    /// Version of the daemon.
    pub version: String,
    /// Name of the node.
    pub node_name: String,
    /// What this build can do beyond the first release.
    pub features: Vec<String>,
    /// When the daemon started.
    pub started_at: SystemTime,
    /// What the daemon logs.
    pub log: Log,
}

/// Why the bus cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No connection.
    #[error("cannot connect to the bus: {0}")]
    Connect(#[source] zbus::Error),
    /// There is a connection, and no answer.
    #[error("the bus did not answer within {} s", START.as_secs())]
    Silent,
    /// Somebody else has the name.
    #[error("another opengatewayd has the name {BUS_NAME} on this bus")]
    NameTaken,
    /// The bus refuses the name.
    #[error("the bus does not let this user have the name {BUS_NAME}: {0}")]
    NameRefused(#[source] zbus::Error),
    /// Anything else.
    #[error("the bus objects cannot be registered: {0}")]
    Register(#[source] zbus::Error),
}

/// Why the bus is served no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// The connection is gone.
    BusLost,
    /// The task that announces changes ended, which it never should.
    Mute,
}

/// The bus may take so long until this daemon is on it.
const START: Duration = Duration::from_secs(30);
/// Prompts that are read from descriptors of callers at once.
const MAX_READING: usize = 8;
/// Models that are being added or verified at once.
const MAX_TRANSFERS: usize = 4;
/// Callers get so long to be told that their prompts end with the daemon.
const FAREWELL: Duration = Duration::from_secs(1);

/// The served bus.
#[derive(Debug)]
pub struct Service {
    connection: Connection,
    shared: Arc<Shared>,
    publisher: tokio::task::JoinHandle<()>,
    doctor: tokio::task::JoinHandle<()>,
}

/// Registers the objects on `builder`'s connection, and asks for the name last: who sees the name finds all of them.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(builder: Builder<'_>, node: Node, mode: Mode) -> Result<Service, ServeError> {
    tokio::time::timeout(START, register(builder, node, mode)).await.map_err(|_| ServeError::Silent)?
}

async fn register(builder: Builder<'_>, node: Node, mode: Mode) -> Result<Service, ServeError> {
    let Node {
        net,
        doctor,
        serve,
        dispatch,
        models,
        engine,
        gauge,
        http,
        control,
        version,
        node_name,
        features,
        started_at,
        log,
    } = node;
    let (announce, requests) = mpsc::channel(16);
    let shared = Arc::new(Shared {
        net,
        doctor,
        serve,
        dispatch,
        models,
        engine,
        gauge,
        http,
        control,
        access: Arc::new(Access::new(mode)),
        jobs: Jobs::default(),
        version,
        node_name,
        features,
        started_at,
        stopping: AtomicBool::new(false),
        announce,
        reading: Arc::new(Semaphore::new(MAX_READING)),
        transfers: Arc::new(Semaphore::new(MAX_TRANSFERS)),
        looks: network::Looks::default(),
        watchers: turns::Turns::new(watchers::MAX_PER_UID, watchers::MAX_IN_ALL),
    });
    let log_control = LogControl { log, access: Arc::clone(&shared.access) };
    let connection = builder
        .serve_at(ROOT_PATH, ObjectManager)
        .serve_at(ROOT_PATH, Guarded(Manager(Arc::clone(&shared))))
        .serve_at(ROOT_PATH, Guarded(models::Models(Arc::clone(&shared))))
        .serve_at(ROOT_PATH, Guarded(Http(Arc::clone(&shared))))
        .serve_at(ROOT_PATH, Guarded(network::Network(Arc::clone(&shared))))
        .serve_at(log_control::PATH, Guarded(log_control))
        .build()
        .await
        .map_err(ServeError::Connect)?;
    let mut publisher = Publisher::new(Arc::clone(&shared), connection.clone());
    publisher.prime().await;
    if !matches!(mode, Mode::PeerToPeer(_)) {
        match connection.request_name_with_flags(BUS_NAME, RequestNameFlags::DO_NOT_QUEUE).await {
            Ok(RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner) => {}
            Ok(RequestNameReply::Exists | RequestNameReply::InQueue) | Err(zbus::Error::NameTaken) => {
                return Err(ServeError::NameTaken);
            }
            Err(error) => return Err(ServeError::NameRefused(error)),
        }
    }
    let publisher = tokio::spawn(publisher.run(requests));
    let doctor = tokio::spawn(network::follow(Arc::clone(&shared), connection.clone()));
    Ok(Service { connection, shared, publisher, doctor })
}

impl Service {
    /// Resolves when the bus is lost, or nobody announces changes on it any more. Cancel-safe.
    pub async fn closed(&mut self) -> Closed {
        tokio::select! {
            () = self.connection.closed() => Closed::BusLost,
            _ = &mut self.publisher => Closed::Mute,
        }
    }

    /// Tells clients that a planned stop begins; new prompts are refused from now on.
    pub async fn prepare_for_shutdown(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Ok(emitter) = SignalEmitter::new(&self.connection, ROOT_PATH) {
            let _ = Manager::prepare_for_shutdown(&emitter, true).await;
        }
    }

    /// Prompts of this machine's users that are in progress.
    pub fn active_jobs(&self) -> usize {
        self.shared.jobs.active()
    }

    /// Ends what is still in progress, and gives the name back.
    pub async fn stop(self) {
        self.shared.jobs.cancel_all();
        let told = async {
            while self.shared.jobs.active() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // Over is not yet told: the last line is written right after.
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let _ = tokio::time::timeout(FAREWELL, told).await;
        self.publisher.abort();
        self.doctor.abort();
        let _ = self.connection.release_name(BUS_NAME).await;
        let _ = self.connection.close().await;
    }

    /// For the watchdog.
    pub fn pinger(&self) -> Pinger {
        Pinger(self.connection.clone())
    }

    /// The connection, for tests.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// Proves that the bus reaches this service's objects.
#[derive(Debug, Clone)]
pub struct Pinger(Connection);

impl Pinger {
    /// Asks our own node for its status by way of the bus, as any client does; true when it answered.
    pub async fn ping(&self) -> bool {
        self.0.call_method(Some(BUS_NAME), ROOT_PATH, Some(MANAGER_INTERFACE), "GetStatus", &()).await.is_ok()
    }
}
