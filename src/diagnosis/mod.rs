//! What the doctor is told: the facts of the network task and those of this machine, joined, and what it says to them.
//!
//! `net` tells what it knows without I/O; what has to be read or asked is read and asked here, beside it.

mod clock;
mod knock;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::domain::doctor::{Finding, Host, Subject, examine};
use crate::domain::network::{Attempt, DialOutcome, Facts};
use crate::{gauge, net};
use knock::Found;

/// Addresses that are asked once more for one diagnosis.
const MAX_KNOCKS: usize = 16;
/// Only of a dial that failed so lately is it asked again: what an address said before that is no answer to why it fails now.
const LATELY: Duration = Duration::from_secs(60);

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

    /// What there is to say about `subject`, within two seconds; `None` when the network task has stopped or is busy beyond
    /// measure.
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
        let (interfaces, mut host) = reading.await.unwrap_or_default();
        facts.interfaces = interfaces;
        let (clock, ()) = tokio::join!(clock::synchronised(host.clock_synchronised), ask_again(&mut facts, subject));
        host.clock_synchronised = clock;
        let findings = examine(&facts, &host, subject);
        Some(Diagnosis { facts, host, findings })
    }

    /// What the network task and the interfaces say of the node by themselves. For looks that nobody asked for: no packet goes
    /// out for them, no service is asked, and nothing is read of the firewall or the clock.
    ///
    /// Cancel-safe.
    pub async fn glance(&self) -> Option<Vec<Finding>> {
        let probe = self.probe.clone();
        let reading = tokio::task::spawn_blocking(move || probe.interfaces_now());
        let mut facts = self.net.facts(None).await?;
        facts.interfaces = reading.await.unwrap_or_default();
        Some(examine(&facts, &Host::default(), &Subject::Node))
    }
}

/// Where a QUIC address leads, if it names an IP address.
fn quic(address: &str) -> Option<SocketAddr> {
    let parts: Vec<&str> = address.split('/').collect();
    match parts.as_slice() {
        ["", "ip4" | "ip6", ip, "udp", port, "quic-v1"] => Some((ip.parse::<IpAddr>().ok()?, port.parse().ok()?).into()),
        _ => None,
    }
}

/// The dials that matter to `subject`: those of bootstrap nodes, and of peers that are not connected.
fn attempts<'a>(facts: &'a mut Facts, subject: &'a Subject) -> impl Iterator<Item = &'a mut Attempt> {
    let matters = move |id: &str, name: Option<&str>, bootstrap: bool| match subject {
        Subject::Peer(wanted) => id == wanted || name == Some(wanted.as_str()),
        Subject::Node | Subject::Cluster(_) => !bootstrap,
    };
    let bootstrap = facts.bootstrap.iter_mut().filter(|bootstrap| !bootstrap.connected).flat_map(|it| &mut it.attempts);
    let peers = facts
        .peers
        .iter_mut()
        .filter(move |peer| peer.links.is_empty() && matters(peer.id.as_str(), peer.name.as_deref(), peer.bootstrap));
    bootstrap.chain(peers.flat_map(|peer| &mut peer.attempts)).filter(is_to_be_asked)
}

fn is_to_be_asked(attempt: &&mut Attempt) -> bool {
    attempt.outcome == DialOutcome::TimedOut && attempt.ago <= LATELY
}

/// Of a QUIC address that did not answer a socket of our own may hear more.
async fn ask_again(facts: &mut Facts, subject: &Subject) {
    let mut places: Vec<SocketAddr> = attempts(facts, subject).filter_map(|attempt| quic(&attempt.address)).collect();
    places.sort();
    places.dedup();
    places.truncate(MAX_KNOCKS);
    let asked = places.into_iter().map(|place| async move { (place, knock::knock(place).await) });
    let found: HashMap<SocketAddr, Found> = futures::future::join_all(asked).await.into_iter().collect();
    for attempt in attempts(facts, subject) {
        match quic(&attempt.address).and_then(|place| found.get(&place)) {
            Some(Found::Outcome(outcome)) => attempt.outcome = outcome.clone(),
            Some(Found::Answered) => attempt.outcome = DialOutcome::Other(ANSWERS.to_owned()),
            Some(Found::Silent) | None => {}
        }
    }
}

const ANSWERS: &str = "the handshake was not done in time, though a QUIC server answers there now";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_did_not_answer_lately_are_asked_again() {
        for (ago, outcome, expected) in [
            (LATELY, DialOutcome::TimedOut, true),
            (LATELY + Duration::from_millis(1), DialOutcome::TimedOut, false),
            (Duration::ZERO, DialOutcome::Refused, false),
        ] {
            let mut attempt = Attempt { address: "/ip4/192.0.2.1/udp/4001/quic-v1".to_owned(), ago, outcome };
            assert_eq!(is_to_be_asked(&&mut attempt), expected, "{attempt:?}");
        }
    }

    #[test]
    fn only_plain_quic_addresses_are_asked_again() {
        assert_eq!(quic("/ip4/192.0.2.1/udp/4001/quic-v1"), Some("192.0.2.1:4001".parse().unwrap()));
        assert_eq!(quic("/ip6/2001:db8::1/udp/4001/quic-v1"), Some("[2001:db8::1]:4001".parse().unwrap()));
        for other in
            ["/ip4/192.0.2.1/tcp/4001", "/dns4/node.example/udp/4001/quic-v1", "/ip4/192.0.2.1/udp/4001/quic-v1/p2p-circuit", ""]
        {
            assert_eq!(quic(other), None, "{other}");
        }
    }
}
