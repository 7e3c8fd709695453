//! What the doctor is told: the facts of the network task and those of this machine, joined, and what it says to them.
//!
//! `net` tells what it knows without I/O; what has to be read from files is read here, beside it.

use crate::domain::doctor::{Finding, Host, Subject, examine};
use crate::domain::network::Facts;
use crate::{gauge, net};

/// An answer of the doctor.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// What `net` knows, with the interfaces of this machine.
    pub facts: Facts,
    /// What is known of this machine besides.
    pub host: Host,
    /// What follows, the worst first.
    pub findings: Vec<Finding>,
}

/// A cheap clone that examines.
#[derive(Debug, Clone)]
pub struct Doctor {
    net: net::Handle,
    probe: gauge::HostProbe,
}

impl Doctor {
    /// To be made at the start of the daemon: suspends are counted from here.
    pub fn new(net: net::Handle) -> Self {
        Self { net, probe: gauge::HostProbe::of_machine() }
    }

    /// What there is to say about `subject`; `None` when the network task has stopped or is busy beyond measure.
    ///
    /// Cancel-safe.
    pub async fn examine(&self, subject: &Subject) -> Option<Diagnosis> {
        let about = match subject {
            Subject::Peer(peer) => Some(peer.clone()),
            Subject::Node | Subject::Cluster(_) => None,
        };
        let probe = self.probe.clone();
        let reading = tokio::task::spawn_blocking(move || probe.read());
        let mut facts = self.net.facts(about).await?;
        let (interfaces, host) = reading.await.unwrap_or_default();
        facts.interfaces = interfaces;
        let findings = examine(&facts, &host, subject);
        Some(Diagnosis { facts, host, findings })
    }
}
