//! The part of the network task that tells what it knows: facts for the doctor.

use std::time::SystemTime;

use super::task::Task;
use crate::domain::network::{DhtFacts, Facts};
use crate::domain::node::NodeId;

impl Task<'_> {
    /// Everything that is known of the network at this moment.
    pub(super) fn facts(&self) -> Facts {
        Facts {
            at: SystemTime::now(),
            id: NodeId::new(self.local.to_string()),
            listening: self.own_listeners().map(ToString::to_string).collect(),
            not_listening: Vec::new(),
            interfaces: Vec::new(),
            mdns_enabled: self.lasting.config.mdns,
            mdns_flooded: false,
            mdns: Vec::new(),
            bootstrap: Vec::new(),
            reach: self.reach_facts(),
            dht: DhtFacts { server: self.serves_dht(), ..DhtFacts::default() },
            clusters: self.clusters.keys().map(|id| (id.clone(), self.members.count(id))).collect(),
            peers: Vec::new(),
            same_identity: Vec::new(),
            connections: (self.swarm.behaviour().streams.all().count(), self.lasting.config.caps.established as usize),
        }
    }
}
