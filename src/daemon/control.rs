//! What the bus asks of the daemon: joins and leaves that are remembered, sharing, reload.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::config::{self, Environment, Overrides, Roots, Settings, needs_restart};
use crate::dbus::control::{ConnectOptions, ControlError, ControlState, Request, SavedCluster};
use crate::domain::cluster::ClusterId;
use crate::domain::node::ClusterState;
use crate::domain::resources::{Lent, lendable};
use crate::domain::tier;
use crate::net::{self, JoinError, JoinOptions, LeaveError};
use crate::state::{self, Memory, StorageError};
use crate::gauge;

/// Keeps what is configured, what is remembered, and what is joined in step.
#[derive(Debug)]
pub(super) struct Keeper {
    pub settings: Settings,
    pub roots: Roots,
    pub environment: Environment,
    pub overrides: Overrides,
    pub memory: Memory,
    pub directory: PathBuf,
    pub net: net::Handle,
    pub gauge: gauge::Handle,
    pub publish: watch::Sender<ControlState>,
    pub lent: watch::Sender<Lent>,
}

/// Saved clusters as the bus shows them.
pub(super) fn shown(memory: &Memory) -> Vec<SavedCluster> {
    memory.clusters.iter().map(|saved| SavedCluster { id: saved.id.clone(), auto_connect: saved.auto_connect }).collect()
}

fn storage(error: &StorageError) -> ControlError {
    let what = if error.is_full() { "no space is left" } else { "the state directory cannot be written" };
    ControlError::Storage(format!("{what}; nothing was changed: {error}"))
}

fn joined(error: JoinError) -> ControlError {
    match error {
        JoinError::TooMany(_) => ControlError::TooManyClusters(error.to_string()),
        JoinError::BadAddress { .. } => ControlError::InvalidArgument(error.to_string()),
        JoinError::Busy => ControlError::Busy(error.to_string()),
        JoinError::Stopped => ControlError::ShuttingDown,
    }
}

impl Keeper {
    fn sharing(&self) -> bool {
        self.publish.borrow().sharing
    }

    fn change(&self, change: impl FnOnce(&mut ControlState)) {
        self.publish.send_modify(change);
    }

    pub(super) fn stopping(&self) {
        self.change(|state| state.stopping = true);
    }

    /// Joins what is configured and what is remembered. A cluster that cannot be joined is a problem to show, not to stop for.
    pub(super) async fn join_all(&mut self) {
        let mut wanted: Vec<(ClusterId, bool, Vec<String>)> = self
            .settings
            .clusters
            .iter()
            .map(|cluster| (cluster.id.clone(), cluster.serve, cluster.bootstrap.clone()))
            .collect();
        for saved in self.memory.clusters.iter().filter(|saved| saved.auto_connect) {
            if !wanted.iter().any(|(id, _, _)| *id == saved.id) {
                wanted.push((saved.id.clone(), saved.serve.unwrap_or(self.sharing()), saved.bootstrap.clone()));
            }
        }
        if wanted.iter().any(|(id, serve, _)| *serve && tier::find(id.as_str()).is_some()) {
            // Eligibility needs a whole measurement; at this point there may be none yet.
            self.gauge.recent().await;
        }
        for (id, serve, bootstrap) in wanted {
            let serve = serve && self.eligible(&id).is_ok();
            if let Err(error) = self.net.join(id.clone(), JoinOptions { bootstrap, serve }).await {
                tracing::error!(cluster = %id, %error, "cluster not joined");
                self.change(|state| state.problems.push(format!("cluster {id} is not joined: {error}")));
            }
        }
    }

    /// Whether this machine may serve a cluster: one that is named like a tier needs that tier.
    fn eligible(&self, id: &ClusterId) -> Result<(), ControlError> {
        let Some(tier) = tier::find(id.as_str()) else { return Ok(()) };
        let resources = lendable(&self.gauge.latest(), &self.lent.borrow());
        let verdict = tier::assess(tier, &resources);
        match verdict.unmet.first() {
            None => Ok(()),
            Some(unmet) => Err(ControlError::NotEligible(format!("cluster {} {}", tier.name, unmet.sentence))),
        }
    }

    pub(super) async fn on_request(&mut self, request: Request) {
        match request {
            Request::Connect(id, options, reply) => drop(reply.send(self.connect(id, options).await)),
            Request::Disconnect(id, forget, drain, reply) => self.disconnect(id, forget, drain, reply).await,
            Request::SetSharing(enabled, lent, runtime, reply) => drop(reply.send(self.set_sharing(enabled, lent, runtime).await)),
            Request::Reload(reply) => drop(reply.send(self.reload().await)),
        }
    }

    /// Makes `memory` durable and only then ours.
    async fn remember(&mut self, memory: Memory) -> Result<(), ControlError> {
        let (directory, saving) = (self.directory.clone(), memory.clone());
        let saved = tokio::task::spawn_blocking(move || saving.save(&directory)).await;
        match saved {
            Ok(Ok(())) => {
                self.memory = memory;
                let saved = shown(&self.memory);
                self.change(|state| state.saved = saved);
                Ok(())
            }
            Ok(Err(error)) => Err(storage(&error)),
            Err(error) => Err(ControlError::Storage(error.to_string())),
        }
    }

    async fn connect(&mut self, id: ClusterId, options: ConnectOptions) -> Result<(), ControlError> {
        let known = self.memory.clusters.iter().find(|saved| saved.id == id).cloned();
        let is_new = known.is_none();
        // What is not said stays as it is: joining again is no way to lose the addresses or the role of before.
        let mut saved = known.unwrap_or(state::SavedCluster { id: id.clone(), serve: None, auto_connect: true, bootstrap: Vec::new() });
        saved.serve = options.serve.or(saved.serve);
        saved.auto_connect = options.auto_connect.unwrap_or(true);
        if !options.bootstrap.is_empty() {
            saved.bootstrap = options.bootstrap;
        }
        let role = || {
            let snapshot = self.net.snapshot();
            // One that is being left serves nobody already; that says nothing about before.
            let view = snapshot.clusters.get(&id).filter(|view| view.state != ClusterState::Disconnecting);
            view.map(|view| view.serving)
        };
        let serve = saved.serve.or_else(role).unwrap_or(self.sharing());
        let bootstrap = saved.bootstrap.clone();
        if serve && (options.serve == Some(true) || role() != Some(true)) {
            if tier::find(id.as_str()).is_some() {
                self.gauge.recent().await;
            }
            self.eligible(&id)?;
        }
        let before = self.memory.clone();
        // One that is not to be joined again needs no memory, unless it has one.
        if saved.auto_connect || !is_new {
            if is_new && self.memory.clusters.len() >= state::MAX_SAVED {
                return Err(ControlError::TooManyClusters(format!(
                    "{} clusters are remembered, which is the limit; drop one with: ogctl disconnect --forget CLUSTER",
                    state::MAX_SAVED
                )));
            }
            let mut memory = self.memory.clone();
            memory.clusters.retain(|other| other.id != id);
            memory.clusters.push(saved);
            memory.clusters.sort_by(|a, b| a.id.cmp(&b.id));
            if memory != before {
                self.remember(memory).await?;
            }
        }
        match self.net.join(id, JoinOptions { bootstrap, serve }).await {
            Ok(()) => Ok(()),
            Err(error) => {
                if self.memory != before {
                    self.remember(before).await?;
                }
                Err(joined(error))
            }
        }
    }

    async fn disconnect(&mut self, id: ClusterId, forget: bool, drain: Duration, reply: oneshot::Sender<Result<(), ControlError>>) {
        let is_joined = self.net.snapshot().clusters.contains_key(&id);
        let is_saved = self.memory.clusters.iter().any(|saved| saved.id == id);
        let refused = match (is_joined, is_saved) {
            (false, false) => Some(ControlError::NoSuchCluster(id.clone())),
            (false, true) if !forget => Some(ControlError::NotConnected(id.clone())),
            _ => None,
        };
        if let Some(error) = refused {
            let _ = reply.send(Err(error));
            return;
        }
        let mut memory = self.memory.clone();
        if forget {
            memory.clusters.retain(|saved| saved.id != id);
        } else if let Some(saved) = memory.clusters.iter_mut().find(|saved| saved.id == id) {
            saved.auto_connect = false;
        }
        if memory != self.memory
            && let Err(error) = self.remember(memory).await
        {
            let _ = reply.send(Err(error));
            return;
        }
        if !is_joined {
            let _ = reply.send(Ok(()));
            return;
        }
        // Draining may take its time; other requests go on meanwhile.
        let net = self.net.clone();
        tokio::spawn(async move {
            let left = net.leave(id, drain).await.map_err(|error| match error {
                LeaveError::NotJoined(id) => ControlError::NotConnected(id),
                LeaveError::Busy => ControlError::Busy(error.to_string()),
                LeaveError::Stopped => ControlError::ShuttingDown,
            });
            let _ = reply.send(left);
        });
    }

    async fn set_sharing(&mut self, enabled: bool, lent: Lent, runtime: bool) -> Result<(), ControlError> {
        if !runtime {
            let memory = Memory { sharing: Some((enabled, lent.clone())), ..self.memory.clone() };
            self.remember(memory).await?;
        }
        self.lent.send_replace(lent.clone());
        self.change(|state| {
            state.sharing = enabled;
            state.lent = lent;
        });
        self.share_everywhere(enabled).await;
        Ok(())
    }

    /// Serves, or stops serving, in every joined cluster that this machine may serve.
    async fn share_everywhere(&self, enabled: bool) {
        let joined: Vec<ClusterId> = self.net.snapshot().clusters.keys().cloned().collect();
        for id in joined {
            let serve = enabled && self.eligible(&id).is_ok();
            if let Err(error) = self.net.join(id.clone(), JoinOptions { bootstrap: Vec::new(), serve }).await {
                tracing::warn!(cluster = %id, %error, "sharing not changed here");
            }
        }
    }

    /// Reads the configuration again and applies what needs no restart.
    pub(super) async fn reload(&mut self) -> Result<(), ControlError> {
        let (roots, environment, overrides) = (self.roots.clone(), self.environment.clone(), self.overrides.clone());
        let read = tokio::task::spawn_blocking(move || config::load(&roots, &environment, &overrides)).await;
        let new = match read {
            Ok(Ok(new)) => new,
            Ok(Err(error)) => return Err(ControlError::InvalidConfiguration(error.to_string())),
            Err(error) => return Err(ControlError::InvalidConfiguration(error.to_string())),
        };
        let restart = needs_restart(&self.settings, &new);
        let note = (!restart.is_empty())
            .then(|| format!("changes in {} take effect after: systemctl restart opengatewayd", restart.join(", ")));
        if self.memory.sharing.is_none() && (new.serve, &new.lent) != (self.settings.serve, &self.settings.lent) {
            self.lent.send_replace(new.lent.clone());
            self.change(|state| {
                state.sharing = new.serve;
                state.lent = new.lent.clone();
            });
            self.share_everywhere(new.serve).await;
        }
        self.change(|state| {
            state.problems.retain(|problem| !problem.contains("take effect after"));
            state.problems.extend(note);
        });
        let joined: Vec<ClusterId> = self.net.snapshot().clusters.keys().cloned().collect();
        self.settings = new;
        let added = self.settings.clusters.iter().any(|cluster| !joined.contains(&cluster.id));
        if added {
            self.join_all().await;
        }
        Ok(())
    }
}
