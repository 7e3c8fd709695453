//! Keeps the network task alive: a panic in the swarm or in one of its connections ends that swarm, not the service.

use std::collections::{BTreeMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::config::Config;
use super::handle::{Direct, Directory, Event, Handle, Service, Snapshot};
use super::identity::Identity;
use super::lanes::Pool;
use super::remember::Recollection;
use super::task::{self, Ended, Lasting, StartError};
use crate::domain::node::{ClusterState, ClusterView, GoneReason, Liveness};

/// This many panics within [`WINDOW`] end the daemon: systemd starts it afresh.
const MAX_PANICS: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);
/// Between a panic and the next swarm: lets the sockets of the old one go.
const PAUSE: Duration = Duration::from_millis(200);

/// How the network ended.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// It panicked too often.
    #[error("the network task panicked {MAX_PANICS} times within {WINDOW:?}")]
    Panicked,
    /// It could not be started again after a panic.
    #[error("the network could not be started again")]
    Restart(#[source] StartError),
}

/// The swarm is gone, and with it every membership: whoever listens is told, as if each member had left.
fn forget_members(lasting: &Lasting) {
    lasting.pool.forget_all();
    lasting.directory.send_replace(Arc::default());
    let last = lasting.publish.borrow().clone();
    let mut clusters = BTreeMap::new();
    for (cluster, view) in &last.clusters {
        // Who was only known has not come, and does not go.
        for member in view.members.iter().filter(|member| member.liveness != Liveness::Known) {
            let (id, name) = (member.id.clone(), member.name.clone());
            let _ = lasting.events.send(Event::MemberDown { cluster: cluster.clone(), id, name, reason: GoneReason::Error });
        }
        let view = ClusterView { members: Vec::new(), state: ClusterState::Discovering, ..ClusterView::clone(view) };
        clusters.insert(cluster.clone(), Arc::new(view));
    }
    lasting.publish.send_replace(Arc::new(Snapshot { clusters, connected_peers: 0, connections: 0, ..Snapshot::clone(&last) }));
}

/// Starts the network. The handle works at once; the join handle resolves when the network ends.
///
/// # Errors
/// [`StartError`]: an address cannot be listened on.
pub async fn start(
    config: Config,
    identity: &Identity,
    service: Arc<dyn Service>,
) -> Result<(Handle, JoinHandle<Result<(), Stopped>>), StartError> {
    let (handle, scripted) = Handle::scripted();
    let (pool, mut wanted) = Pool::new();
    let (publish_directory, directory) = watch::channel(Arc::<Directory>::default());
    let mut lasting = Lasting {
        keypair: identity.0.clone(),
        recollection: Recollection::of(&config.remembered),
        remembered: scripted.remembered,
        config,
        joined: BTreeMap::new(),
        publish: scripted.state,
        events: scripted.events,
        pool: pool.clone(),
        directory: publish_directory,
        service,
        next_generation: 0,
        run: super::random_u64(),
    };
    let mut commands = scripted.commands;
    let (started, is_started) = oneshot::channel();
    let running = tokio::spawn(async move {
        let mut started = Some(started);
        let mut panics: VecDeque<Instant> = VecDeque::new();
        loop {
            let tell = &mut started;
            let run = task::run(&mut lasting, &mut commands, &mut wanted, || {
                if let Some(started) = tell.take() {
                    let _ = started.send(Ok(()));
                }
            });
            match AssertUnwindSafe(run).catch_unwind().await {
                Ok(Ok(Ended::Stopped)) => return Ok(()),
                Ok(Err(error)) => match started.take() {
                    Some(started) => {
                        let _ = started.send(Err(error));
                        return Ok(());
                    }
                    None if panics.len() >= MAX_PANICS => return Err(Stopped::Restart(error)),
                    None => tracing::error!(%error, "the network could not be started again, trying once more: {error}"),
                },
                Ok(Ok(Ended::Panicked)) | Err(_) => tracing::error!("the network task panicked: it is started again"),
            }
            forget_members(&lasting);
            let now = Instant::now();
            panics.push_back(now);
            panics.retain(|&panic| now.duration_since(panic) < WINDOW);
            if panics.len() >= MAX_PANICS {
                return Err(Stopped::Panicked);
            }
            // The old swarm may have held the configured port a moment longer than itself.
            tokio::time::sleep(PAUSE).await;
        }
    });
    match is_started.await {
        Ok(Ok(())) => Ok((handle.with_direct(Direct { pool, directory }), running)),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            Err(StartError::Listen { address: String::new(), reason: "the network task ended before it started".to_owned() })
        }
    }
}
