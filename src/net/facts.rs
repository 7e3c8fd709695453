//! The part of the network task that tells what it knows: facts for the doctor.

use std::time::SystemTime;

use super::mdns::Mdns;
use super::task::Task;
use crate::domain::network::{DhtFacts, Facts, ReachFacts};
use crate::domain::node::NodeId;

impl Task<'_> {
    /// Everything that is known of the network at this moment.
    pub(super) fn facts(&self) -> Facts {
        Facts {
            at: SystemTime::now(),
            id: NodeId::new(self.local.to_string()),
            listening: self.swarm.listeners().map(ToString::to_string).collect(),
            not_listening: Vec::new(),
            interfaces: self.mdns.as_ref().map(Mdns::interfaces).unwrap_or_default(),
            mdns_enabled: self.lasting.config.mdns,
            mdns_flooded: self.mdns.as_ref().is_some_and(Mdns::is_flooded),
            mdns: self.mdns_facts(),
            bootstrap: Vec::new(),
            reach: ReachFacts::default(),
            dht: DhtFacts::default(),
            clusters: self.clusters.keys().map(|id| (id.clone(), self.members.count(id))).collect(),
            peers: Vec::new(),
            same_identity: self.twins.keys().map(ToString::to_string).collect(),
            connections: (self.swarm.behaviour().streams.all().count(), self.lasting.config.caps.established as usize),
        }
    }
}
