//! What the bus objects are made of, and what several of them tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use zbus::OwnedObjectPath;

use super::access::Access;
use super::control::Control;
use super::errors::{Error, without_nul};
use super::job::Jobs;
use super::network::Looks;
use super::turns::Turns;
use crate::api::names::ErrorName;
use crate::diagnosis::Doctor;
use crate::dispatch;
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterState, ModelState};
use crate::{gauge, http, net, serve};

/// What the objects are made of.
#[derive(Debug)]
pub(super) struct Shared {
    pub net: net::Handle,
    pub serve: serve::Handle,
    pub doctor: Doctor,
    pub dispatch: dispatch::Handle,
    pub models: crate::models::Handle,
    pub engine: watch::Receiver<crate::models::Settings>,
    pub gauge: gauge::Handle,
    pub http: http::Handle,
    pub control: Control,
    pub access: Arc<Access>,
    pub jobs: Jobs,
    pub version: String,
    pub node_name: String,
    pub features: Vec<String>,
    pub started_at: SystemTime,
    pub stopping: AtomicBool,
    /// Asks the publisher to tell at once what has changed.
    pub announce: mpsc::Sender<oneshot::Sender<()>>,
    /// Prompts that are being read from descriptors of callers.
    pub reading: Arc<Semaphore>,
    /// Models that are being added or verified.
    pub transfers: Arc<Semaphore>,
    /// Looks at the network, and pings.
    pub looks: Looks,
    /// Those who watch jobs.
    pub watchers: Turns,
}

impl Shared {
    /// The state of the node in one word.
    pub(super) fn state(&self) -> &'static str {
        if self.stopping.load(Ordering::Relaxed) || self.control.state().stopping {
            return "stopping";
        }
        let snapshot = self.net.snapshot();
        let mut states = snapshot.clusters.values().map(|view| view.state).peekable();
        if snapshot.peer_id.is_none() {
            "starting"
        } else if states.peek().is_none() {
            "idle"
        } else {
            let states: Vec<ClusterState> = states.collect();
            if states.contains(&ClusterState::Connected) {
                "online"
            } else if states.contains(&ClusterState::Degraded) {
                "degraded"
            } else {
                "joining"
            }
        }
    }

    /// The joined cluster that is meant; "" means the only one, or the default one.
    pub(super) fn joined(&self, text: &str) -> Result<ClusterId, Error> {
        let snapshot = self.net.snapshot();
        if text.is_empty() {
            return dispatch::default_cluster(snapshot.clusters.keys()).cloned().ok_or_else(|| {
                let what = if snapshot.clusters.is_empty() {
                    "this node is in no cluster"
                } else {
                    "this node is in several clusters: name one"
                };
                Error::new(ErrorName::NotConnected, what)
            });
        }
        let id = ClusterId::new(text)?;
        if snapshot.clusters.contains_key(&id) {
            return Ok(id);
        }
        if self.control.state().saved.iter().any(|saved| saved.id == id) {
            return Err(Error::new(ErrorName::NotConnected, format!("this node is not in cluster {id}")));
        }
        Err(Error::new(ErrorName::NoSuchCluster, format!("no cluster {id} is known")))
    }

    /// Where a prompt goes: a joined cluster, or to this machine alone when it is in none, none is named, and it has more
    /// than the echo.
    pub(super) fn asked_in(&self, text: &str) -> Result<Option<ClusterId>, Error> {
        let alone = text.is_empty() && self.net.snapshot().clusters.is_empty();
        if alone && self.serve.offer().borrow().models.iter().any(|model| model.rank().0 > 0) {
            return Ok(None);
        }
        self.joined(text).map(Some)
    }

    /// Resolves when every change so far is announced: what is read right after the reply, from a cache too, is fresh.
    pub(super) async fn announced(&self) {
        let (reply, told) = oneshot::channel();
        if self.announce.send(reply).await.is_ok() {
            let _ = told.await;
        }
    }

    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = self.control.state().problems;
        problems.extend(self.net.snapshot().problems.iter().cloned());
        problems.extend(self.serve.backends().1.into_iter().map(without_nul));
        let failed = self.models.list().into_iter().filter(|model| model.state == ModelState::Failed);
        for model in failed {
            let why = model.problem.unwrap_or_else(|| "it cannot be loaded".to_owned());
            // A missing engine is the trouble of all models, and told once for all of them.
            if !problems.iter().any(|told| told.ends_with(&why)) {
                problems.push(without_nul(format!("model {}: {why}; see: ogctl models --local", model.name)));
            }
        }
        problems.extend(self.http.problems().into_iter().map(without_nul));
        for view in self.net.snapshot().clusters.values() {
            if view.state == ClusterState::Degraded {
                problems.push(format!("no member of cluster {} can serve; see: ogctl peers {}", view.id, view.id));
            }
        }
        problems
    }
}

pub(super) fn object_path(path: String) -> Result<OwnedObjectPath, Error> {
    OwnedObjectPath::try_from(path).map_err(|error| Error::invalid(error.to_string()))
}
