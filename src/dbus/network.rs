//! `org.opengateway.Gateway1.Network`: why this node finds the others, or does not; and signs of life of a peer.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use zbus::message::Header;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, fdo};

use super::details::Details;
use super::errors::{Error, without_nul};
use super::facts;
use super::guard::Readers;
use super::options::{self, Raw};
use super::shared::Shared;
use super::turns::Turns;
use crate::api::names::{ErrorName, NETWORK_INTERFACE, ROOT_PATH};
use crate::diagnosis::Diagnosis;
use crate::domain::doctor::{Finding, Severity, Subject};
use crate::domain::network::{Facts, PeerFacts, PingError};

/// Diagnoses of one user that run or wait, and those of all users. One look serves all who ask within [`FRESH`].
const DIAGNOSES: (usize, usize) = (4, 16);
/// Pings that run: each dials at most one peer, and sends at most 100 small messages one after the other.
const PINGS: (usize, usize) = (2, 8);
/// A look at the network is good for this long, so that a loop of questions costs one look a second.
const FRESH: Duration = Duration::from_secs(1);

/// Who looks at the network and asks peers for signs of life, and how much of it at once.
#[derive(Debug)]
pub(super) struct Looks {
    last: Mutex<Option<(Instant, Subject, Arc<Diagnosis>)>>,
    diagnoses: Turns,
    pings: Turns,
    /// The worst finding, as the publisher last saw it.
    pub worst: watch::Sender<Worst>,
}

/// A network task that does not answer for so long has other troubles: nobody waits longer for it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks that nobody asked for, when something has changed meanwhile.
const LOOK: Duration = Duration::from_secs(10);
/// And when nothing has: a dial may fail without changing anything that is published.
const LOOK_AT_REST: Duration = Duration::from_secs(30);

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
    async fn diagnosis(&self, subject: &Subject) -> Result<Arc<Diagnosis>, Error> {
        // Held while somebody looks: one at a time, and whoever asks the same meanwhile takes what was found.
        let mut last = self.looks.last.lock().await;
        if let Some((at, about, found)) = &*last
            && at.elapsed() < FRESH
            && about == subject
        {
            return Ok(Arc::clone(found));
        }
        let silent = || Error::new(ErrorName::Busy, "the network task does not answer; try again in a moment");
        let found = tokio::time::timeout(PATIENCE, self.doctor.examine(subject)).await.map_err(|_| silent())?;
        let found = Arc::new(found.ok_or_else(silent)?);
        *last = Some((Instant::now(), subject.clone(), Arc::clone(&found)));
        Ok(found)
    }

    /// The worst finding that is more than good to know.
    pub(super) async fn worst_finding(&self) -> Option<Worst> {
        // Not what `Diagnose` does: nobody asked, so nobody is asked either.
        let found = tokio::time::timeout(PATIENCE, self.doctor.glance()).await.ok()??;
        Some(worst(&found))
    }
}

/// Tells when the worst finding is another one than before. Never ends.
pub(super) async fn follow(shared: Arc<Shared>, connection: Connection) {
    let (Ok(emitter), Ok(interface)) = (SignalEmitter::new(&connection, ROOT_PATH), InterfaceName::try_from(NETWORK_INTERFACE))
    else {
        return;
    };
    let mut snapshots = shared.net.watch();
    loop {
        tokio::time::sleep(LOOK).await;
        let _ = tokio::time::timeout(LOOK_AT_REST - LOOK, snapshots.changed()).await;
        snapshots.mark_unchanged();
        let Some(now) = shared.worst_finding().await else { continue };
        let differs = shared.looks.worst.send_if_modified(|told| {
            let differs = *told != now;
            told.clone_from(&now);
            differs
        });
        if differs {
            let changed = HashMap::from([("WorstFinding", now.into())]);
            let _ = fdo::Properties::properties_changed(&emitter, interface.clone(), changed, Cow::Borrowed(&[])).await;
        }
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
            PingError::Ambiguous(..) | PingError::Ourselves => ErrorName::InvalidArgs,
            PingError::NotConnected(..) => ErrorName::PeerUnreachable,
            PingError::NoAnswer(_) | PingError::Unsupported(_) => ErrorName::NoAnswer,
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
        let _turn = self
            .0
            .looks
            .diagnoses
            .take(uid)
            .map_err(|full| Error::new(ErrorName::Busy, full.sentence("questions", uid, "wait for a look at the network")))?;
        let found = self.0.diagnosis(&subject).await?;
        let facts = facts::facts(&found.facts, &found.host, &about(&found.facts, &subject));
        Ok((found.findings.iter().map(facts::finding).collect(), facts))
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
        let turn = self.0.looks.pings.take(uid);
        let _turn = turn.map_err(|full| Error::new(ErrorName::Busy, full.sentence("pings", uid, "are running")))?;
        Ok(facts::pinged(&self.0.net.ping(peer, count).await?))
    }

    #[zbus(property)]
    fn worst_finding(&self) -> Worst {
        self.0.looks.worst.borrow().clone()
    }
}
