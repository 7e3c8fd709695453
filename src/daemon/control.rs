//! What the bus asks of the daemon: joins and leaves that are remembered, sharing, reload.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::config::{self, Environment, Overrides, Roots, Settings, needs_restart};
use crate::dbus::control::{ConnectOptions, ControlError, ControlState, Request, SavedCluster};
use crate::domain::cluster::ClusterId;
use crate::domain::node::ClusterState;
use crate::domain::resources::{Lent, lendable};
use crate::domain::tier;
use crate::logging::Log;
use crate::net::{self, JoinError, JoinOptions, LeaveError};
use crate::state::{self, Memory, StorageError};
use crate::{gauge, models};

/// Prompts of a cluster that is no longer in the configuration may end within this: the default of `Disconnect`.
const DRAIN_REMOVED: Duration = Duration::from_secs(10);

/// Keeps what is configured, what is remembered, and what is joined in step.
#[derive(Debug)]
pub(super) struct Keeper {
    /// In force as far as a reload can apply it.
    pub settings: Settings,
    /// What needs a restart is compared with these.
    pub started_with: Settings,
    /// Who said what about serving a joined cluster: the configuration, or the caller of `Connect`. `None` is nothing:
    /// such a cluster follows the machine's setting. Nothing but its owner's word makes a consumer serve.
    pub wishes: BTreeMap<ClusterId, Option<bool>>,
    /// Clusters that could not be joined, with what was said about it: the next reload may mend it.
    pub unjoined: BTreeMap<ClusterId, String>,
    /// What was last said about changes that need a restart.
    pub restart_note: Option<String>,
    pub log: Log,
    pub roots: Roots,
    pub environment: Environment,
    pub overrides: Overrides,
    pub memory: Memory,
    pub directory: PathBuf,
    pub net: net::Handle,
    pub gauge: gauge::Handle,
    pub publish: watch::Sender<ControlState>,
    pub lent: watch::Sender<Lent>,
    pub models: watch::Sender<models::Settings>,
    /// What was last said about models.
    pub model_problems: Vec<String>,
}

/// Remembered and configured clusters as the bus shows them.
pub(super) fn shown(memory: &Memory, settings: &Settings) -> Vec<SavedCluster> {
    let configured = |id: &ClusterId| settings.clusters.iter().any(|cluster| cluster.id == *id);
    let remembered = memory
        .clusters
        .iter()
        .map(|saved| SavedCluster { id: saved.id.clone(), auto_connect: saved.auto_connect || configured(&saved.id) });
    let remembers = |id: &ClusterId| memory.clusters.iter().any(|saved| saved.id == *id);
    let others = settings.clusters.iter().filter(|cluster| !remembers(&cluster.id));
    let mut shown: Vec<SavedCluster> =
        remembered.chain(others.map(|cluster| SavedCluster { id: cluster.id.clone(), auto_connect: true })).collect();
    shown.sort_by(|a, b| a.id.cmp(&b.id));
    shown
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

    /// What is wrong with the models now.
    pub(super) fn note_models(&mut self, problems: Vec<String>) {
        let old = std::mem::replace(&mut self.model_problems, problems.clone());
        self.change(|state| {
            state.problems.retain(|problem| !old.contains(problem));
            state.problems.extend(problems);
        });
    }

    /// Whether this machine is to serve a joined cluster, and may.
    fn serves(&self, id: &ClusterId) -> bool {
        self.wishes.get(id).copied().flatten().unwrap_or(self.sharing()) && self.eligible(id).is_ok()
    }

    /// Joins what is configured and what is remembered. A cluster that cannot be joined is a problem to show, not to stop for.
    pub(super) async fn join_at_start(&mut self) {
        // Who said that this machine shares nothing meant all of it, until somebody says otherwise of one cluster.
        let shares_nothing = self.memory.sharing.as_ref().is_some_and(|(enabled, _)| !enabled);
        let configured = self.settings.clusters.iter().map(|cluster| {
            (cluster.id.clone(), cluster.serve.filter(|serve| !(*serve && shares_nothing)), cluster.bootstrap.clone())
        });
        let mut wanted: Vec<(ClusterId, Option<bool>, Vec<String>)> = configured.collect();
        for saved in self.memory.clusters.iter().filter(|saved| saved.auto_connect) {
            if !wanted.iter().any(|(id, _, _)| *id == saved.id) {
                wanted.push((saved.id.clone(), saved.serve, saved.bootstrap.clone()));
            }
        }
        for (id, wish, bootstrap) in wanted {
            self.join(id, wish, bootstrap).await;
        }
    }

    /// Joins a cluster of the configuration or of the memory, or joins it again with another role or more addresses.
    async fn join(&mut self, id: ClusterId, wish: Option<bool>, bootstrap: Vec<String>) {
        self.wishes.insert(id.clone(), wish);
        if wish.unwrap_or(self.sharing()) && tier::find(id.as_str()).is_some() {
            // Eligibility needs a whole measurement; at this point there may be none yet.
            self.gauge.recent().await;
        }
        let serve = self.serves(&id);
        match self.net.join(id.clone(), JoinOptions { bootstrap, serve }).await {
            Ok(()) => self.note_joined(&id),
            Err(error) => {
                tracing::error!(cluster = %id, %error, "cluster {id} not joined: {error}");
                if !self.net.snapshot().clusters.contains_key(&id) {
                    self.wishes.remove(&id);
                }
                self.note_joined(&id);
                let problem = format!("cluster {id} is not joined: {error}");
                self.change(|state| state.problems.push(problem.clone()));
                self.unjoined.insert(id, problem);
            }
        }
    }

    /// What was said about a failed try is over.
    fn note_joined(&mut self, id: &ClusterId) {
        if let Some(old) = self.unjoined.remove(id) {
            self.change(|state| state.problems.retain(|problem| *problem != old));
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
            Request::SetSharing(enabled, lent, runtime, reply) => {
                drop(reply.send(self.set_sharing(enabled, lent, runtime).await));
            }
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
                let saved = shown(&self.memory, &self.settings);
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
        let mut saved =
            known.unwrap_or(state::SavedCluster { id: id.clone(), serve: None, auto_connect: true, bootstrap: Vec::new() });
        saved.serve = options.serve.or(saved.serve);
        saved.auto_connect = options.auto_connect.unwrap_or(true);
        if !options.bootstrap.is_empty() {
            saved.bootstrap = options.bootstrap;
        }
        let wish = saved.serve.or(self.wishes.get(&id).copied().flatten());
        let serve = wish.unwrap_or(self.sharing());
        let bootstrap = saved.bootstrap.clone();
        let serves_now = self.net.snapshot().clusters.get(&id).is_some_and(|view| view.serving);
        if serve && (options.serve == Some(true) || !serves_now) {
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
        match self.net.join(id.clone(), JoinOptions { bootstrap, serve }).await {
            Ok(()) => {
                self.note_joined(&id);
                self.wishes.insert(id, wish);
                Ok(())
            }
            Err(error) => {
                if self.memory != before
                    && let Err(kept) = self.remember(before).await
                {
                    let error = joined(error);
                    return Err(ControlError::Storage(format!("not joined ({error}), but still remembered as joined: {kept}")));
                }
                Err(joined(error))
            }
        }
    }

    async fn disconnect(
        &mut self,
        id: ClusterId,
        forget: bool,
        drain: Duration,
        reply: oneshot::Sender<Result<(), ControlError>>,
    ) {
        let is_joined = self.net.snapshot().clusters.contains_key(&id);
        let is_saved = self.publish.borrow().saved.iter().any(|saved| saved.id == id);
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
        self.leave(id, drain, Some(reply));
    }

    /// Leaves beside everything else: draining may take its time.
    fn leave(&mut self, id: ClusterId, drain: Duration, reply: Option<oneshot::Sender<Result<(), ControlError>>>) {
        self.wishes.remove(&id);
        let net = self.net.clone();
        tokio::spawn(async move {
            let left = net.leave(id, drain).await.map_err(|error| match error {
                LeaveError::NotJoined(id) => ControlError::NotConnected(id),
                LeaveError::Busy => ControlError::Busy(error.to_string()),
                LeaveError::Stopped => ControlError::ShuttingDown,
            });
            if let Some(reply) = reply {
                let _ = reply.send(left);
            }
        });
    }

    async fn set_sharing(&mut self, enabled: bool, lent: Lent, runtime: bool) -> Result<(), ControlError> {
        // To share nothing takes back what was said of single clusters; to share again makes no consumer serve.
        let withdrawn = |serve: Option<bool>| serve.filter(|&serve| enabled || !serve);
        if !runtime {
            let mut memory = Memory { sharing: Some((enabled, lent.clone())), ..self.memory.clone() };
            for saved in &mut memory.clusters {
                saved.serve = withdrawn(saved.serve);
            }
            self.remember(memory).await?;
        }
        for wish in self.wishes.values_mut() {
            *wish = withdrawn(*wish);
        }
        self.lent.send_replace(lent.clone());
        self.change(|state| {
            state.sharing = enabled;
            state.lent = lent;
        });
        self.apply_roles().await;
        Ok(())
    }

    /// Tells the network where this machine serves now.
    async fn apply_roles(&self) {
        let snapshot = self.net.snapshot();
        for (id, view) in &snapshot.clusters {
            // Joining one that is being left would bring it back.
            if view.state == ClusterState::Disconnecting || view.serving == self.serves(id) {
                continue;
            }
            let options = JoinOptions { bootstrap: Vec::new(), serve: self.serves(id) };
            if let Err(error) = self.net.join(id.clone(), options).await {
                tracing::warn!(cluster = %id, %error, "sharing not changed in cluster {id}: {error}");
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
        let restart = needs_restart(&self.started_with, &new);
        let note = (!restart.is_empty())
            .then(|| format!("changes in {} take effect after: systemctl restart opengatewayd", restart.join(", ")));
        let old_note = std::mem::replace(&mut self.restart_note, note.clone());
        self.change(|state| {
            state.problems.retain(|problem| Some(problem) != old_note.as_ref());
            state.problems.extend(note);
        });
        if self.memory.sharing.is_none() && (new.serve, &new.lent) != (self.settings.serve, &self.settings.lent) {
            self.lent.send_replace(new.lent.clone());
            self.change(|state| {
                state.sharing = new.serve;
                state.lent = new.lent.clone();
            });
        }
        if new.log != self.settings.log
            && let Err(error) = self.log.set(&new.log)
        {
            tracing::error!(%error, "the log stays as it is: {error}");
        }
        // The directory and the way of computing stay as they were at the start.
        self.models.send_modify(|models| {
            models.also = new.models_also.iter().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone())).collect();
            models.keep.clone_from(&new.engine.keep);
            models.idle = new.engine.idle;
        });
        let old = std::mem::replace(&mut self.settings, new);
        let saved = shown(&self.memory, &self.settings);
        self.change(|state| state.saved = saved);
        self.apply_clusters(&old).await;
        self.apply_roles().await;
        Ok(())
    }

    /// Joins what is new in the configuration, changes what changed, leaves what is gone. What did not change there is left
    /// as it is, a cluster that was left by hand too.
    async fn apply_clusters(&mut self, old: &Settings) {
        for cluster in self.settings.clusters.clone() {
            let before = old.clusters.iter().find(|known| known.id == cluster.id);
            let wanted = before.is_none() || self.wishes.contains_key(&cluster.id) || self.unjoined.contains_key(&cluster.id);
            if before != Some(&cluster) && wanted {
                self.join(cluster.id, cluster.serve, cluster.bootstrap).await;
            }
        }
        for gone in &old.clusters {
            let configured = self.settings.clusters.iter().any(|cluster| cluster.id == gone.id);
            let remembered = self.memory.clusters.iter().any(|saved| saved.id == gone.id && saved.auto_connect);
            if !configured && !remembered && self.wishes.contains_key(&gone.id) {
                self.leave(gone.id.clone(), DRAIN_REMOVED, None);
            }
        }
    }
}
