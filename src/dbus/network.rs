//! `org.opengateway.Gateway1.Network`: why this node finds the others, or does not; and signs of life of a peer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use zbus::Connection;
use zbus::message::Header;

use super::details::Details;
use super::errors::{Error, without_nul};
use super::facts;
use super::guard::Readers;
use super::options::{self, Raw};
use super::shared::Shared;
use super::turns::Turns;
use crate::api::names::ErrorName;
use crate::domain::doctor::{self, Finding, Host, Severity, Subject};
use crate::domain::network::{Facts, PeerFacts, PingError};
use crate::domain::node::NodeId;

/// Diagnoses of one user that run or wait, and those of all users. One look serves all who ask within [`FRESH`].
const DIAGNOSES: (usize, usize) = (4, 16);
/// Pings that run: each dials at most one peer, and sends at most 100 small messages one after the other.
const PINGS: (usize, usize) = (2, 8);
/// A look at the network is good for this long, so that a loop of questions costs one look a second.
const FRESH: Duration = Duration::from_secs(1);

/// What one look at the network found.
#[derive(Debug)]
pub(super) struct Look {
    facts: Facts,
    host: Host,
}

/// Who looks at the network and asks peers for signs of life, and how much of it at once.
#[derive(Debug)]
pub(super) struct Looks {
    last: Mutex<Option<(Instant, Arc<Look>)>>,
    diagnoses: Turns,
    pings: Turns,
    /// The worst finding, as the publisher last saw it.
    pub worst: watch::Sender<Worst>,
}

/// Code, severity, sentence; empty when all is well.
pub(super) type Worst = (String, String, String);

impl Default for Looks {
    fn default() -> Self {
        let (diagnoses, pings) = (Turns::new(DIAGNOSES.0, DIAGNOSES.1), Turns::new(PINGS.0, PINGS.1));
        Self { last: Mutex::default(), diagnoses, pings, worst: watch::channel(Worst::default()).0 }
    }
}

impl Shared {
    /// A look at the network that is at most [`FRESH`] old.
    async fn look(&self) -> Result<Arc<Look>, Error> {
        // Held while somebody looks: whoever comes meanwhile takes what he finds.
        let mut last = self.looks.last.lock().await;
        if let Some((at, look)) = &*last
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(look));
        }
        let facts = self.net.facts().await.ok_or_else(|| Error::new(ErrorName::Busy, "the network task does not answer"))?;
        let look = Arc::new(Look { facts, host: Host::default() });
        *last = Some((Instant::now(), Arc::clone(&look)));
        Ok(look)
    }

    /// The worst finding that is more than good to know.
    pub(super) async fn worst_finding(&self) -> Option<Worst> {
        let look = self.look().await.ok()?;
        let findings = doctor::examine(&look.facts, &look.host, &Subject::Node);
        Some(worst(&findings))
    }

    /// Distinct members that go by this name.
    fn named(&self, name: &str) -> Vec<NodeId> {
        let snapshot = self.net.snapshot();
        let members = snapshot.clusters.values().flat_map(|view| &view.members);
        let mut ids: Vec<NodeId> = members.filter(|member| member.name == name).map(|member| member.id.clone()).collect();
        ids.sort();
        ids.dedup();
        ids
    }
}

fn worst(findings: &[Finding]) -> Worst {
    let worst = findings.iter().filter(|finding| finding.severity > Severity::Info).max_by_key(|finding| finding.severity);
    worst.map_or_else(Worst::default, |finding| {
        (finding.code.to_owned(), finding.severity.as_str().to_owned(), without_nul(finding.sentence.clone()))
    })
}

/// The peers that belong to what was asked about.
fn about<'a>(facts: &'a Facts, subject: &Subject) -> Vec<&'a PeerFacts> {
    let wanted = |peer: &&PeerFacts| match subject {
        Subject::Node => true,
        Subject::Peer(wanted) => peer.id.as_str() == wanted || peer.name.as_ref() == Some(wanted),
        Subject::Cluster(cluster) => {
            peer.member_of.contains(cluster) || peer.greetings.iter().any(|greeting| greeting.cluster == *cluster)
        }
    };
    facts.peers.iter().filter(wanted).collect()
}

impl From<PingError> for Error {
    fn from(error: PingError) -> Self {
        let message = error.to_string();
        let name = match error {
            PingError::NoSuchPeer(_) => ErrorName::NoSuchPeer,
            PingError::NotConnected(..) => ErrorName::PeerUnreachable,
            PingError::NoAnswer(_) => ErrorName::NoAnswer,
            PingError::Busy => ErrorName::Busy,
            PingError::Stopped => ErrorName::ShuttingDown,
        };
        Self::new(name, message)
    }
}

/// The interface on the root object.
#[derive(Debug)]
pub(super) struct Network(pub Arc<Shared>);

impl Readers for Network {}

#[zbus::interface(name = "org.opengateway.Gateway1.Network", introspection_docs = false)]
impl Network {
    #[zbus(out_args("findings", "facts"))]
    async fn diagnose(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Raw,
    ) -> Result<(Vec<Details>, Details), Error> {
        let subject = match options::diagnose(options)? {
            (Some(peer), _) => Subject::Peer(peer),
            (None, Some(cluster)) => Subject::Cluster(self.0.joined(&cluster)?),
            (None, None) => Subject::Node,
        };
        let uid = self.0.access.caller(connection, &header).await?.uid;
        let _turn = self.0.looks.diagnoses.take(uid).map_err(|full| {
            Error::new(ErrorName::Busy, full.sentence("questions", uid, "wait for a look at the network"))
        })?;
        let look = self.0.look().await?;
        let findings = doctor::examine(&look.facts, &look.host, &subject);
        let facts = facts::facts(&look.facts, &look.host, &about(&look.facts, &subject));
        Ok((findings.iter().map(facts::finding).collect(), facts))
    }

    #[zbus(out_args("result"))]
    async fn ping(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        peer: String,
        options: Raw,
    ) -> Result<Details, Error> {
        let (peer, count) = options::ping(peer, options)?;
        let uid = self.0.access.caller(connection, &header).await?.uid;
        let namesakes = self.0.named(&peer);
        if namesakes.len() > 1 {
            let ids = namesakes.iter().map(NodeId::as_str).collect::<Vec<_>>().join(", ");
            return Err(Error::invalid(format!("{} members are named {peer:?}; use a peer id: {ids}", namesakes.len())));
        }
        let turn = self.0.looks.pings.take(uid);
        let _turn = turn.map_err(|full| Error::new(ErrorName::Busy, full.sentence("pings", uid, "are running")))?;
        Ok(facts::pinged(&self.0.net.ping(peer, count).await?))
    }

    #[zbus(property)]
    fn worst_finding(&self) -> Worst {
        self.0.looks.worst.borrow().clone()
    }
}
