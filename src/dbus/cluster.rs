//! `org.opengateway.Gateway1.Cluster`: one cluster that this node knows. Read only.

use std::sync::Arc;

use zbus::object_server::SignalEmitter;

use super::control::Control;
use super::details::{self, Details};
use super::guard::Readers;
use crate::domain::cluster::ClusterId;
use crate::domain::node::{ClusterState, ClusterView};
use crate::net;

/// The object of one cluster. All it shows comes from the snapshots at the moment of asking.
#[derive(Debug)]
pub(super) struct Cluster {
    pub id: ClusterId,
    pub net: net::Handle,
    pub control: Control,
}

impl Readers for Cluster {}

impl Cluster {
    fn view(&self) -> Option<Arc<ClusterView>> {
        self.net.snapshot().clusters.get(&self.id).cloned()
    }
}

/// The word for the state of a cluster that may not be joined.
pub(super) fn state(view: Option<&ClusterView>) -> &'static str {
    view.map_or(ClusterState::Disconnected, |view| view.state).as_str()
}

#[zbus::interface(name = "org.opengateway.Gateway1.Cluster", introspection_docs = false)]
impl Cluster {
    #[zbus(signal)]
    pub(super) async fn peer_connected(emitter: &SignalEmitter<'_>, peer_id: &str, details: Details) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn peer_disconnected(emitter: &SignalEmitter<'_>, peer_id: &str, reason: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn peer_changed(
        emitter: &SignalEmitter<'_>,
        peer_id: &str,
        changed: Vec<&str>,
        details: Details,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn peers_changed(emitter: &SignalEmitter<'_>, count: u32) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.id.as_str().to_owned()
    }

    #[zbus(property)]
    fn name(&self) -> String {
        self.id.as_str().to_owned()
    }

    #[zbus(property)]
    fn state(&self) -> String {
        state(self.view().as_deref()).to_owned()
    }

    #[zbus(property)]
    fn last_error(&self) -> (String, String) {
        (String::new(), String::new())
    }

    #[zbus(property)]
    fn peer_count(&self) -> u32 {
        self.view().map_or(0, |view| details::counts(&view).0)
    }

    #[zbus(property)]
    fn models(&self) -> Vec<String> {
        self.view().map(|view| details::models(&view)).unwrap_or_default()
    }

    #[zbus(property)]
    fn discovery(&self) -> Vec<String> {
        self.view().map(|view| view.discovery.iter().map(|&way| way.to_owned()).collect()).unwrap_or_default()
    }

    #[zbus(property)]
    fn auto_connect(&self) -> bool {
        self.control.state().saved.iter().any(|saved| saved.id == self.id && saved.auto_connect)
    }

    #[zbus(property)]
    fn private(&self) -> bool {
        false
    }

    #[zbus(property)]
    fn serving(&self) -> bool {
        self.view().is_some_and(|view| view.serving)
    }

    #[zbus(property)]
    fn connected_at(&self) -> u64 {
        self.view().map_or(0, |view| details::micros(view.joined_at))
    }
}
