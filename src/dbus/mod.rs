//! The bus objects: translate, authorise, delegate. Knows nothing of libp2p.

mod access;
mod cluster;
pub mod control;
mod details;
mod errors;
mod job;
mod manager;
mod options;
mod publish;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use zbus::Connection;
use zbus::connection::Builder;
use zbus::fdo::{ObjectManager, RequestNameFlags, RequestNameReply};
use zbus::object_server::SignalEmitter;

pub use access::{Access, Action, Mode};
pub use errors::Error;

use crate::api::names::{BUS_NAME, ROOT_PATH};
use crate::{dispatch, gauge, net, serve};
use control::Control;
use job::Jobs;
use manager::{Manager, Shared};
use publish::Publisher;

/// What the objects speak for.
#[derive(Debug)]
pub struct Node {
    /// The network.
    pub net: net::Handle,
    /// This machine's own backends.
    pub serve: serve::Handle,
    /// Prompts of this machine's users.
    pub dispatch: dispatch::Handle,
    /// What this machine has.
    pub gauge: gauge::Handle,
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
}

/// Why the bus cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No connection.
    #[error("cannot connect to the bus: {0}")]
    Connect(#[source] zbus::Error),
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

/// The served bus.
#[derive(Debug)]
pub struct Service {
    connection: Connection,
    shared: Arc<Shared>,
    publisher: tokio::task::JoinHandle<()>,
}

/// Registers the objects on `builder`'s connection, and asks for the name last: who sees the name finds all of them.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(builder: Builder<'_>, node: Node, mode: Mode) -> Result<Service, ServeError> {
    let Node { net, serve, dispatch, gauge, control, version, node_name, features, started_at } = node;
    let shared = Arc::new(Shared {
        net,
        serve,
        dispatch,
        gauge,
        control,
        access: Arc::new(Access::new(mode)),
        jobs: Jobs::default(),
        version,
        node_name,
        features,
        started_at,
        stopping: AtomicBool::new(false),
    });
    let connection = builder
        .serve_at(ROOT_PATH, ObjectManager)
        .serve_at(ROOT_PATH, Manager(Arc::clone(&shared)))
        .build()
        .await
        .map_err(ServeError::Connect)?;
    let mut publisher = Publisher::new(Arc::clone(&shared), connection.clone());
    publisher.prime().await;
    if !matches!(mode, Mode::PeerToPeer(_)) {
        match connection.request_name_with_flags(BUS_NAME, RequestNameFlags::DO_NOT_QUEUE).await {
            Ok(RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner) => {}
            Ok(RequestNameReply::Exists | RequestNameReply::InQueue) | Err(zbus::Error::NameTaken) => return Err(ServeError::NameTaken),
            Err(error) => return Err(ServeError::NameRefused(error)),
        }
    }
    let publisher = tokio::spawn(publisher.run());
    Ok(Service { connection, shared, publisher })
}

impl Service {
    /// Resolves when the bus is lost. Cancel-safe.
    pub async fn closed(&self) {
        self.connection.closed().await;
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
        self.publisher.abort();
        let _ = self.connection.release_name(BUS_NAME).await;
        let _ = self.connection.close().await;
    }

    /// The connection, for tests.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}
