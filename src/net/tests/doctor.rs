//! What the doctor is told by real swarms over loopback: dials and greetings that come to nothing, and why.

use std::net::{TcpListener, UdpSocket};

use super::rogue::Rogue;
use super::*;
use crate::diagnosis::{Diagnosis, Doctor};
use crate::domain::doctor::{Severity, Subject};
use crate::domain::network::{DialOutcome, Facts, GreetOutcome, PeerFacts};
use crate::domain::node::FoundBy;
use crate::wire::version::MEMBER_PROTOCOL;

impl Node {
    /// Waits until the facts are as wanted.
    async fn facts(&self, what: &str, wanted: impl Fn(&Facts) -> bool) -> Facts {
        let until = async {
            loop {
                let facts = self.handle.facts(None).await.expect("the network runs");
                if wanted(&facts) {
                    return facts;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match timeout(DEADLINE, until).await {
            Ok(facts) => facts,
            Err(_) => panic!("{what}: not within {DEADLINE:?}; they are {:#?}", self.handle.facts(None).await),
        }
    }

    async fn examine(&self, subject: Subject) -> Diagnosis {
        Doctor::new(self.handle.clone()).examine(&subject).await.expect("the network runs")
    }
}

fn peer<'a>(facts: &'a Facts, id: &NodeId) -> Option<&'a PeerFacts> {
    facts.peers.iter().find(|peer| peer.id == *id)
}

/// Whether the last greeting of a peer came to this.
fn greeted(facts: &Facts, id: &NodeId, outcome: GreetOutcome) -> bool {
    peer(facts, id).is_some_and(|peer| peer.greetings.iter().any(|greeting| greeting.outcome == outcome))
}

fn said(facts: &Facts) -> Vec<DialOutcome> {
    facts.bootstrap.iter().flat_map(|bootstrap| &bootstrap.attempts).map(|attempt| attempt.outcome.clone()).collect()
}

/// Codes of errors and warnings.
fn codes(diagnosis: &Diagnosis) -> Vec<&'static str> {
    diagnosis.findings.iter().filter(|finding| finding.severity > Severity::Info).map(|finding| finding.code).collect()
}

fn has(diagnosis: &Diagnosis, code: &str) -> bool {
    diagnosis.findings.iter().any(|finding| finding.code == code)
}

#[tokio::test]
async fn a_port_that_is_closed_is_refused_over_tcp_and_found_out_over_quic() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = format!("/ip4/127.0.0.1/tcp/{}", closed.local_addr().unwrap().port());
    let closed_too = UdpSocket::bind("127.0.0.1:0").unwrap();
    let quic = format!("/ip4/127.0.0.1/udp/{}/quic-v1", closed_too.local_addr().unwrap().port());
    drop((closed, closed_too));
    let node = Plan { bootstrap: vec![tcp.clone()], ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    node.facts("a refusal", |facts| said(facts) == [DialOutcome::Refused]).await;
    let diagnosis = node.examine(Subject::Node).await;
    assert!(has(&diagnosis, "bootstrap-refused"), "{:#?}", diagnosis.findings);
    let snapshot = node.until("a problem", |snapshot| !snapshot.problems.is_empty()).await;
    assert!(snapshot.problems[0].contains(&tcp) && snapshot.problems[0].contains("refused"), "{:?}", snapshot.problems);
    // QUIC gives up after its patience, and does not know why.
    let node = Plan { bootstrap: vec![quic], ..plan("b") }.start().await;
    node.join("home", true, &[]).await;
    node.facts("no answer", |facts| said(facts) == [DialOutcome::TimedOut]).await;
    let diagnosis = node.examine(Subject::Node).await;
    assert!(has(&diagnosis, "bootstrap-refused"), "{:#?}", diagnosis.findings);
}

#[tokio::test]
async fn a_machine_that_drops_what_is_sent_is_told_from_one_that_refuses() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/udp/{}/quic-v1", silent.local_addr().unwrap().port());
    let node = Plan { bootstrap: vec![address], ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    node.facts("no answer", |facts| said(facts) == [DialOutcome::TimedOut]).await;
    let diagnosis = node.examine(Subject::Node).await;
    assert!(has(&diagnosis, "bootstrap-timeout"), "{:#?}", diagnosis.findings);
}

#[tokio::test]
async fn another_node_at_the_address_is_named_with_and_without_a_name_that_cannot_be_resolved() {
    let right = plan("right").start().await;
    let stranger = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
    let wrong = format!("{}/p2p/{stranger}", right.bare_address().await);
    let node = Plan { bootstrap: vec![wrong, "/dns4/no.such.invalid/tcp/1".to_owned()], ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    node.facts("another node", |facts| {
        said(facts) == [DialOutcome::WrongPeer(right.id())] && facts.bootstrap[1].problem.is_some()
    })
    .await;
    let diagnosis = node.examine(Subject::Node).await;
    assert!(has(&diagnosis, "bootstrap-wrong-peer") && has(&diagnosis, "bootstrap-unresolved"), "{:#?}", diagnosis.findings);
    let found = diagnosis.findings.iter().find(|finding| finding.code == "bootstrap-wrong-peer").unwrap();
    assert!(found.remedy.as_ref().unwrap().ends_with(&format!("/p2p/{}", right.id())), "{found:?}");
}

#[tokio::test]
async fn a_node_that_dials_itself_is_told_so() {
    // Which port is free is known before the node listens on it.
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let own = format!("/ip4/127.0.0.1/udp/{port}/quic-v1");
    let node = Plan { listen: own.clone(), bootstrap: vec![own], ..plan("a") }.start().await;
    node.join("home", true, &[]).await;
    node.facts("itself", |facts| said(facts) == [DialOutcome::Ourselves]).await;
    assert!(has(&node.examine(Subject::Node).await, "bootstrap-self"));
}

#[tokio::test]
async fn a_node_in_another_cluster_is_told_on_both_sides() {
    let (one, other) = (plan("one").start().await, plan("other").start().await);
    one.join("home", true, &[]).await;
    other.join("hoem", true, &[one.address().await]).await;
    for (node, there, cluster) in [(&one, &other, "home"), (&other, &one, "hoem")] {
        let facts = node.facts("a refusal", |facts| greeted(facts, &there.id(), GreetOutcome::Refused)).await;
        let seen = peer(&facts, &there.id()).unwrap();
        assert_eq!((seen.greetings[0].cluster.to_string().as_str(), seen.member_of.len(), seen.links.len()), (cluster, 0, 1));
        let diagnosis = node.examine(Subject::Peer(there.id().to_string())).await;
        assert_eq!(codes(&diagnosis)[0], "peer-other-cluster", "{:#?}", diagnosis.findings);
        assert_eq!(diagnosis.findings[0].severity, Severity::Error);
    }
}

#[tokio::test]
async fn a_node_of_another_version_is_told_with_the_versions_that_it_speaks() {
    let new = plan("new").start().await;
    let old = Plan { versions: Versions::only(9), ..plan("old") }.start().await;
    new.join("home", true, &[]).await;
    old.join("home", true, &[new.address().await]).await;
    for (node, there, theirs) in [(&new, &old, (9, 9)), (&old, &new, (Versions::OURS.min, Versions::OURS.max))] {
        let facts = node
            .facts("the versions", |facts| {
                let greetings = peer(facts, &there.id()).map(|peer| peer.greetings.clone()).unwrap_or_default();
                greetings.iter().any(|greeting| greeting.versions == Some(theirs))
            })
            .await;
        assert!(greeted(&facts, &there.id(), GreetOutcome::VersionMismatch), "{facts:#?}");
        let diagnosis = node.examine(Subject::Node).await;
        assert!(codes(&diagnosis).contains(&"peer-version"), "{:#?}", diagnosis.findings);
    }
}

#[tokio::test]
async fn a_peer_that_broke_the_protocol_is_told_as_banned() {
    let node = plan("a").start().await;
    node.join("home", true, &[]).await;
    let mut rogue = Rogue::beside(&node, true).await;
    let (address, id) = (node.address().await, NodeId::new(rogue.peer.to_string()));
    for _ in 0..3 {
        let connection = rogue.connect(&address).await;
        let mut stream = rogue.open(&node, connection, MEMBER_PROTOCOL).await;
        // A hello of no length is nonsense whoever says it.
        let _ = futures::AsyncWriteExt::write_all(&mut stream, &[0; 8]).await;
        let _ = super::rogue::rest(&mut stream).await;
    }
    let facts = node.facts("a ban", |facts| peer(facts, &id).is_some_and(|peer| peer.banned)).await;
    assert!(peer(&facts, &id).unwrap().member_of.is_empty());
    let diagnosis = node.examine(Subject::Peer(id.to_string())).await;
    assert_eq!(codes(&diagnosis)[0], "peer-banned", "{:#?}", diagnosis.findings);
}

#[tokio::test]
async fn a_node_at_its_limit_says_so_and_who_is_turned_away_knows_that_it_was() {
    let caps = ConnectionCaps { established_incoming: 0, ..plan("caps").caps };
    let full = Plan { caps, ..plan("full") }.start().await;
    full.join("home", true, &[]).await;
    for listen in [QUIC, TCP] {
        let node = Plan { listen: listen.to_owned(), ..plan("a") }.start().await;
        node.join("home", true, &[full.address().await]).await;
        node.facts("a denial", |facts| matches!(said(facts).as_slice(), [DialOutcome::Denied(_)])).await;
        let diagnosis = node.examine(Subject::Node).await;
        assert!(has(&diagnosis, "bootstrap-denied"), "{:#?}", diagnosis.findings);
    }
    let facts = full.facts("the refused", |facts| facts.refused.is_some()).await;
    assert!(facts.refused.as_ref().unwrap().reason.contains("limit"), "{facts:#?}");
    assert!(codes(&full.examine(Subject::Node).await).contains(&"at-connection-limit"));
}

#[tokio::test]
async fn a_member_is_told_with_its_path_and_a_name_that_nobody_has_as_unknown() {
    let (a, b) = (plan("a").start().await, plan("b").start().await);
    a.join("home", true, &[]).await;
    b.join("home", true, &[a.address().await]).await;
    a.sees("home", &["b"]).await;
    b.sees("home", &["a"]).await;
    let facts = b.handle.facts(Some("a".to_owned())).await.unwrap();
    let seen = peer(&facts, &a.id()).unwrap();
    assert_eq!((seen.name.as_deref(), seen.bootstrap, seen.links[0].dialed), (Some("a"), true, true));
    assert!(seen.sources.contains(&FoundBy::Bootstrap) && seen.member_of == [id("home")], "{seen:#?}");
    assert_eq!(seen.attempts[0].outcome, DialOutcome::Connected);
    assert_eq!(
        (facts.clusters[0].members, facts.clusters[0].serving, facts.versions),
        (1, 1, (Versions::OURS.min, Versions::OURS.max))
    );
    assert!(has(&b.examine(Subject::Peer("a".to_owned())).await, "peer-member"));
    assert_eq!(codes(&b.examine(Subject::Peer("nobody".to_owned())).await)[0], "peer-unknown");
    assert!(b.handle.snapshot().problems.is_empty(), "{:?}", b.handle.snapshot().problems);
}

#[tokio::test]
async fn the_doctor_of_a_stopped_network_says_nothing() {
    let node = plan("a").start().await;
    node.handle.shutdown().await;
    assert!(Doctor::new(node.handle.clone()).examine(&Subject::Node).await.is_none());
}
