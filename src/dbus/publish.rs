//! Turns differences between snapshots into signals and objects: the one task that announces changes on the bus.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, Variant, fdo};

use super::catalogue;
use super::cluster::{self, Cluster};
use super::details;
use super::guard::Guarded;
use super::manager::Manager;
use super::members::Seen;
use super::models::{self, Models};
use super::shared::{Shared, object_path};
use crate::api::names::{CLUSTER_INTERFACE, MANAGER_INTERFACE, MODELS_INTERFACE, ROOT_PATH};
use crate::api::path;
use crate::domain::cluster::ClusterId;
use crate::domain::node::Member;
use crate::domain::resources::{self, Lent, Resources};
use crate::models::Local;
use crate::net::{Event, Snapshot};

/// Signals of coming and going peers per cluster and second; then one `PeersChanged` instead.
const MAX_PEER_SIGNALS: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);
/// Between two `ResourcesChanged`.
const RESOURCES: Duration = Duration::from_secs(5);

/// What the bus was last told of one cluster.
#[derive(Debug, Clone, PartialEq, Default)]
struct Told {
    state: String,
    peer_count: u32,
    models: Vec<String>,
    discovery: Vec<&'static str>,
    serving: bool,
    connected_at: u64,
    auto_connect: bool,
}

/// What was told of one cluster's peers within the current second.
struct Burst {
    second: Instant,
    /// Signals about peers.
    sent: u32,
    /// `PeerCount` was told.
    counted: bool,
    /// A peer came or went without a signal: `PeersChanged` is due when the second is over.
    owed: bool,
    /// `PeerCount` moved without a signal: due then too.
    stale: bool,
}

impl Burst {
    fn new(second: Instant) -> Self {
        Self { second, sent: 0, counted: false, owed: false, stale: false }
    }

    fn is_due(&self, now: Instant) -> bool {
        (self.owed || self.stale) && now.duration_since(self.second) >= SECOND
    }
}

pub(super) struct Publisher {
    shared: Arc<Shared>,
    connection: Connection,
    clusters: BTreeMap<ClusterId, Told>,
    bursts: BTreeMap<ClusterId, Burst>,
    seen: Seen,
    node_state: String,
    sharing: bool,
    addresses: Vec<String>,
    /// Without their counters.
    models: Vec<Local>,
    /// As they were last told.
    resources: Arc<Resources>,
    lent: Lent,
    resources_told: Option<Instant>,
    /// They moved too soon after that: to be looked at again then.
    resources_owed: bool,
}

/// Registers the object of a cluster, unless it is there.
pub(super) async fn ensure_cluster(connection: &Connection, shared: &Shared, id: &ClusterId) {
    if let Ok(object) = object_path(path::cluster_path(id.key())) {
        let cluster = Cluster { id: id.clone(), net: shared.net.clone(), control: shared.control.clone() };
        // An object that is there already stays; `at` says so and changes nothing.
        let _ = connection.object_server().at(object, Guarded(cluster)).await;
    }
}

impl Publisher {
    pub(super) fn new(shared: Arc<Shared>, connection: Connection) -> Self {
        let (resources, lent) = (shared.gauge.latest(), shared.control.state().lent);
        Self {
            shared,
            connection,
            clusters: BTreeMap::new(),
            bursts: BTreeMap::new(),
            seen: Seen::default(),
            node_state: String::new(),
            sharing: false,
            addresses: Vec::new(),
            models: Vec::new(),
            resources,
            lent,
            resources_told: None,
            resources_owed: false,
        }
    }

    /// Takes the present state as told: nobody listens yet.
    pub(super) async fn prime(&mut self) {
        for id in self.known() {
            ensure_cluster(&self.connection, &self.shared, &id).await;
            let told = self.told(&id, &self.shared.net.snapshot());
            self.clusters.insert(id, told);
        }
        self.models = self.shared.models.list().iter().map(catalogue::without_counters).collect();
        self.node_state = self.shared.state().to_owned();
        self.sharing = self.shared.control.state().sharing;
        self.addresses = self.shared.net.snapshot().listen_addresses.clone();
    }

    /// Never ends by itself: who ends the daemon has other ways to know when it is time.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<oneshot::Sender<()>>) {
        let mut snapshots = self.shared.net.watch();
        let mut control = self.shared.control.watch();
        let mut gauge = self.shared.gauge.watch();
        let mut models = self.shared.models.watch();
        let mut events = self.shared.net.events();
        loop {
            let wake = self.wake_at();
            tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => self.on_event(event).await,
                    Err(broadcast::error::RecvError::Lagged(_)) => self.owe_all(),
                    Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
                },
                changed = snapshots.changed() => if changed.is_err() { std::future::pending().await } else { self.sync().await },
                changed = control.changed() => if changed.is_err() { std::future::pending().await } else {
                    self.sync().await;
                    self.on_resources().await;
                },
                Ok(()) = gauge.changed() => self.on_resources().await,
                Ok(()) = models.changed() => self.on_models().await,
                Some(reply) = requests.recv() => {
                    self.sync().await;
                    let _ = reply.send(());
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => self.settle_debts().await,
            }
        }
    }

    fn known(&self) -> Vec<ClusterId> {
        let snapshot = self.shared.net.snapshot();
        let mut ids: Vec<ClusterId> = snapshot.clusters.keys().cloned().collect();
        ids.extend(self.shared.control.state().saved.into_iter().map(|saved| saved.id));
        ids.sort();
        ids.dedup();
        ids
    }

    fn told(&self, id: &ClusterId, snapshot: &Snapshot) -> Told {
        let view = snapshot.clusters.get(id);
        Told {
            state: cluster::state(view.map(AsRef::as_ref)).to_owned(),
            peer_count: view.map_or(0, |view| details::counts(view).0),
            models: view.map(|view| details::models(view)).unwrap_or_default(),
            discovery: view.map(|view| view.discovery.clone()).unwrap_or_default(),
            serving: view.is_some_and(|view| view.serving),
            connected_at: view.map_or(0, |view| details::micros(view.joined_at)),
            auto_connect: self.shared.control.state().saved.iter().any(|saved| saved.id == *id && saved.auto_connect),
        }
    }

    async fn sync(&mut self) {
        let snapshot = self.shared.net.snapshot();
        let known = self.known();
        let gone: Vec<ClusterId> = self.clusters.keys().filter(|id| !known.contains(id)).cloned().collect();
        for id in gone {
            let before = self.clusters.remove(&id).unwrap_or_default();
            self.bursts.remove(&id);
            self.seen.forget(&id);
            if before.state != "disconnected" {
                self.state_changed(&id, "disconnected", &before.state).await;
            }
            if let Ok(object) = object_path(path::cluster_path(id.key())) {
                let _ = self.connection.object_server().remove::<Guarded<Cluster>, _>(object).await;
            }
        }
        for id in known {
            let mut now = self.told(&id, &snapshot);
            match self.clusters.get(&id).cloned() {
                None => {
                    ensure_cluster(&self.connection, &self.shared, &id).await;
                    self.state_changed(&id, &now.state, "").await;
                    self.clusters.insert(id, now);
                }
                Some(before) if before != now => {
                    // The count moves often when many join: at most once a second.
                    if before.peer_count != now.peer_count && !self.may_count(&id) {
                        now.peer_count = before.peer_count;
                    }
                    self.cluster_changed(&id, &before, &now).await;
                    self.clusters.insert(id, now);
                }
                Some(_) => {}
            }
        }
        for view in snapshot.clusters.values() {
            for (member, changed) in self.seen.changes(&view.id, &view.members) {
                self.member_changed(&view.id, &member, changed).await;
            }
        }
        self.node_changed(&snapshot).await;
    }

    fn burst(&mut self, id: &ClusterId) -> &mut Burst {
        let now = Instant::now();
        let burst = self.bursts.entry(id.clone()).or_insert_with(|| Burst::new(now));
        // What is due is told first, in `settle_debts`: it counts in the second that it falls in.
        if now.duration_since(burst.second) >= SECOND && !burst.is_due(now) {
            *burst = Burst::new(now);
        }
        burst
    }

    /// Whether the count may be told now; else it is owed.
    fn may_count(&mut self, id: &ClusterId) -> bool {
        let burst = self.burst(id);
        let may = !burst.counted;
        burst.counted = true;
        burst.stale |= !may;
        may
    }

    async fn on_event(&mut self, event: Event) {
        let (id, peer) = match &event {
            Event::MemberUp { cluster, member } => (cluster.clone(), member.id.clone()),
            Event::MemberDown { cluster, id, .. } => (cluster.clone(), id.clone()),
        };
        // Of a cluster that was left meanwhile: its object is gone, or about to go, and must not come back.
        if !self.known().contains(&id) {
            return;
        }
        if !self.may_signal(&id) {
            return;
        }
        let Ok(object) = object_path(path::cluster_path(id.key())) else { return };
        ensure_cluster(&self.connection, &self.shared, &id).await;
        let Ok(emitter) = SignalEmitter::new(&self.connection, object) else { return };
        let _ = match event {
            Event::MemberUp { member, .. } => Cluster::peer_connected(&emitter, peer.as_str(), details::member(&member)).await,
            Event::MemberDown { reason, .. } => Cluster::peer_disconnected(&emitter, peer.as_str(), reason.as_str()).await,
        };
    }

    /// Whether one more signal about a peer may go out in this second; else one about all is owed.
    fn may_signal(&mut self, id: &ClusterId) -> bool {
        let burst = self.burst(id);
        let may = burst.sent < MAX_PEER_SIGNALS;
        burst.sent += u32::from(may);
        burst.owed |= !may;
        may
    }

    async fn member_changed(&mut self, id: &ClusterId, member: &Member, changed: Vec<&'static str>) {
        if !self.may_signal(id) {
            return;
        }
        if let Ok(object) = object_path(path::cluster_path(id.key()))
            && let Ok(emitter) = SignalEmitter::new(&self.connection, object)
        {
            let _ = Cluster::peer_changed(&emitter, member.id.as_str(), changed, details::member(member)).await;
        }
    }

    fn owe_all(&mut self) {
        for id in self.known() {
            self.burst(&id).owed = true;
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let debts = self.bursts.values().filter(|burst| burst.owed || burst.stale).map(|burst| burst.second + SECOND);
        let resources = self.resources_told.filter(|_| self.resources_owed).map(|told| told + RESOURCES);
        debts.chain(resources).min()
    }

    /// The second is over: one signal for all that could not be told one by one.
    async fn settle_debts(&mut self) {
        let now = Instant::now();
        let due: Vec<ClusterId> = self.bursts.iter().filter(|(_, burst)| burst.is_due(now)).map(|(id, _)| id.clone()).collect();
        for id in due {
            let before = self.bursts.insert(id.clone(), Burst::new(now));
            if !before.is_some_and(|before| before.owed) {
                continue;
            }
            self.burst(&id).sent = 1;
            let count = self.told(&id, &self.shared.net.snapshot()).peer_count;
            if let Ok(object) = object_path(path::cluster_path(id.key()))
                && let Ok(emitter) = SignalEmitter::new(&self.connection, object)
            {
                let _ = Cluster::peers_changed(&emitter, count).await;
            }
        }
        self.sync().await;
        self.on_resources().await;
    }

    async fn cluster_changed(&self, id: &ClusterId, before: &Told, now: &Told) {
        let mut changed: HashMap<&str, Variant<'_>> = HashMap::new();
        if before.state != now.state {
            changed.insert("State", now.state.clone().into());
        }
        if before.peer_count != now.peer_count {
            changed.insert("PeerCount", now.peer_count.into());
        }
        if before.models != now.models {
            changed.insert("Models", now.models.clone().into());
        }
        if before.discovery != now.discovery {
            let ways: Vec<String> = now.discovery.iter().map(|&way| way.to_owned()).collect();
            changed.insert("Discovery", ways.into());
        }
        if before.serving != now.serving {
            changed.insert("Serving", now.serving.into());
        }
        if before.connected_at != now.connected_at {
            changed.insert("ConnectedAt", now.connected_at.into());
        }
        if before.auto_connect != now.auto_connect {
            changed.insert("AutoConnect", now.auto_connect.into());
        }
        if changed.is_empty() {
            return;
        }
        self.properties_changed(path::cluster_path(id.key()), CLUSTER_INTERFACE, changed, &[]).await;
        if before.state != now.state {
            self.state_changed(id, &now.state, &before.state).await;
        }
    }

    async fn state_changed(&self, id: &ClusterId, state: &str, previous: &str) {
        let (Ok(object), Ok(emitter)) =
            (object_path(path::cluster_path(id.key())), SignalEmitter::new(&self.connection, ROOT_PATH))
        else {
            return;
        };
        let details =
            details::Details::from([("Previous", previous.to_owned().into()), ("Reason", "".into()), ("Error", "".into())]);
        let _ = Manager::cluster_state_changed(&emitter, id.as_str(), object, state, details).await;
    }

    async fn node_changed(&mut self, snapshot: &Snapshot) {
        let mut changed: HashMap<&str, Variant<'_>> = HashMap::new();
        let state = self.shared.state();
        if self.node_state != state {
            state.clone_into(&mut self.node_state);
            changed.insert("State", state.into());
        }
        let sharing = self.shared.control.state().sharing;
        if self.sharing != sharing {
            self.sharing = sharing;
            changed.insert("Sharing", sharing.into());
        }
        let mut invalidated: &[&str] = &[];
        if self.addresses != snapshot.listen_addresses {
            self.addresses.clone_from(&snapshot.listen_addresses);
            invalidated = &["ListenAddresses"];
        }
        if !changed.is_empty() || !invalidated.is_empty() {
            self.properties_changed(ROOT_PATH.to_owned(), MANAGER_INTERFACE, changed, invalidated).await;
        }
    }

    async fn properties_changed(
        &self,
        path: String,
        interface: &'static str,
        changed: HashMap<&str, Variant<'_>>,
        invalidated: &[&str],
    ) {
        let (Ok(object), Ok(interface)) = (object_path(path), InterfaceName::try_from(interface)) else { return };
        if let Ok(emitter) = SignalEmitter::new(&self.connection, object) {
            let _ = fdo::Properties::properties_changed(&emitter, interface, changed, Cow::Borrowed(invalidated)).await;
        }
    }

    async fn on_models(&mut self) {
        let list = self.shared.models.list();
        let now: Vec<Local> = list.iter().map(catalogue::without_counters).collect();
        let before = std::mem::replace(&mut self.models, now);
        let Ok(emitter) = SignalEmitter::new(&self.connection, ROOT_PATH) else { return };
        for gone in before.iter().filter(|model| list.iter().all(|other| other.name != model.name)) {
            let _ = Models::model_removed(&emitter, &super::errors::without_nul(gone.name.clone())).await;
        }
        for (model, shown) in list.iter().zip(&self.models) {
            if !before.contains(shown) {
                let name = super::errors::without_nul(model.name.clone());
                let _ = Models::model_changed(&emitter, &name, catalogue::local(model)).await;
            }
        }
        let mut changed: HashMap<&str, Variant<'_>> = HashMap::new();
        for (property, count) in [("Count", models::count as fn(&[Local]) -> u32), ("Loaded", models::loaded)] {
            if count(&before) != count(&self.models) {
                changed.insert(property, count(&self.models).into());
            }
        }
        if !changed.is_empty() {
            self.properties_changed(ROOT_PATH.to_owned(), MODELS_INTERFACE, changed, &[]).await;
        }
    }

    async fn on_resources(&mut self) {
        let now = Instant::now();
        let (measured, lent) = (self.shared.gauge.latest(), self.shared.control.state().lent);
        let mut changed = resources::moved(&self.resources, &measured);
        if self.lent != lent {
            changed.push("Lent");
        }
        // Not lost when it comes too soon: what differs then is told when the time is over.
        let too_soon = self.resources_told.is_some_and(|told| now.duration_since(told) < RESOURCES);
        self.resources_owed = too_soon && !changed.is_empty();
        if changed.is_empty() || too_soon {
            return;
        }
        (self.resources, self.lent) = (measured, lent);
        if let Ok(emitter) = SignalEmitter::new(&self.connection, ROOT_PATH) {
            self.resources_told = Some(now);
            let _ = Manager::resources_changed(&emitter, changed).await;
        }
    }
}
