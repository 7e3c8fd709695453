//! From facts to codes, row by row; every code that there is; and whatever a stranger may write into the facts.

mod random;
mod table;

use std::time::{Duration, SystemTime};

use super::*;
use crate::domain::network::{
    Attempt, BootstrapFacts, ClusterFacts, DhtFacts, DialOutcome, GreetOutcome, Greeting, InterfaceFacts, Link, MdnsFacts,
    PeerFacts, ReachFacts,
};
use crate::domain::node::FoundBy;

const OURS: &str = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
const THEIRS: &str = "12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq";
const OTHER: &str = "12D3KooWRBhwfeP2Y4TCx1SM6s9rUoHhR5STiGwxBhgFRcw3UERE";
const QUIC: &str = "/ip4/10.0.0.2/udp/4001/quic-v1";
const TCP: &str = "/ip4/10.0.0.2/tcp/4001";

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn home() -> ClusterId {
    ClusterId::new("home").unwrap()
}

fn attempt(address: &str, ago: u64, outcome: DialOutcome) -> Attempt {
    Attempt { address: address.to_owned(), ago: seconds(ago), outcome }
}

fn link(dialed: bool, transport: &'static str) -> Link {
    Link { address: QUIC.to_owned(), dialed, transport, relay: None, age: seconds(60) }
}

/// A peer that was heard of on the local network and nothing else.
fn stranger() -> PeerFacts {
    PeerFacts {
        id: NodeId::new(THEIRS),
        name: None,
        sources: vec![FoundBy::View],
        heard_ago: Some(seconds(3)),
        mdns_ago: None,
        addresses: vec![QUIC.to_owned(), TCP.to_owned()],
        attempts: Vec::new(),
        next_dial: Some(seconds(4)),
        links: Vec::new(),
        greetings: Vec::new(),
        member_of: Vec::new(),
        suspect: false,
        banned: false,
        bootstrap: false,
    }
}

/// A member, directly connected.
fn member() -> PeerFacts {
    PeerFacts {
        name: Some("NodeB".to_owned()),
        attempts: vec![attempt(QUIC, 60, DialOutcome::Connected)],
        links: vec![link(false, "quic")],
        member_of: vec![home()],
        greetings: vec![greeting(GreetOutcome::Member)],
        next_dial: None,
        ..stranger()
    }
}

fn greeting(outcome: GreetOutcome) -> Greeting {
    Greeting { cluster: home(), ago: seconds(5), outcome, versions: None }
}

fn mdns(interface: &str, heard: u64) -> MdnsFacts {
    MdnsFacts {
        interface: interface.to_owned(),
        ipv6: false,
        sent: 12,
        heard,
        nodes: u32::from(heard > 0),
        heard_ago: (heard > 0).then(|| seconds(2)),
        problem: None,
        failed: false,
    }
}

fn interface(name: &str, address: &str) -> InterfaceFacts {
    InterfaceFacts { name: name.to_owned(), up: true, multicast: true, addresses: vec![address.to_owned()] }
}

fn bootstrap(address: &str, outcome: Option<DialOutcome>) -> BootstrapFacts {
    let bare = address.split("/p2p/").next().unwrap();
    BootstrapFacts {
        address: address.to_owned(),
        peer: None,
        connected: false,
        attempts: outcome.into_iter().map(|outcome| attempt(bare, 1, outcome)).collect(),
        problem: None,
    }
}

/// A node that is well: one LAN, one cluster, one member that serves.
fn well() -> Facts {
    Facts {
        at: SystemTime::UNIX_EPOCH,
        id: NodeId::new(OURS),
        listening: [QUIC, TCP, "/ip4/127.0.0.1/tcp/4001"].map(|address| address.replace("10.0.0.2", "10.0.0.1")).to_vec(),
        not_listening: Vec::new(),
        interfaces: vec![interface("eth0", "10.0.0.1")],
        mdns_enabled: true,
        mdns_flooded: false,
        mdns: vec![mdns("eth0", 9)],
        bootstrap: Vec::new(),
        reach: ReachFacts::default(),
        dht: DhtFacts { server: true, peers: 1, answered_ago: None },
        clusters: vec![ClusterFacts {
            id: home(),
            joined_ago: seconds(600),
            members: 1,
            known: 0,
            serving: 1,
            serves: true,
            announced: true,
        }],
        peers: vec![member()],
        same_identity: Vec::new(),
        same_identity_certain: false,
        connections: (1, 384),
        refused: None,
        versions: (1, 2),
    }
}

/// The same node before it found anybody.
fn alone() -> Facts {
    let mut facts = well();
    facts.peers.clear();
    facts.clusters[0].members = 0;
    facts.clusters[0].serving = 0;
    facts.mdns = vec![mdns("eth0", 0)];
    facts.connections = (0, 384);
    facts
}

/// Alone, and one peer is known.
fn with(peer: PeerFacts) -> Facts {
    Facts { peers: vec![peer], mdns: vec![mdns("eth0", 9)], ..alone() }
}

fn codes(findings: &[Finding], least: Severity) -> Vec<&'static str> {
    findings.iter().filter(|finding| finding.severity >= least).map(|finding| finding.code).collect()
}

#[test]
fn a_node_that_is_well_says_what_was_looked_at_and_nothing_else() {
    let host = Host { clock_synchronised: Some(true), ..Host::default() };
    let findings = examine(&well(), &host, &Subject::Node);
    assert_eq!(codes(&findings, Severity::Warning), Vec::<&str>::new());
    assert_eq!(codes(&findings, Severity::Info), ["listening", "network", "mdns-heard", "clock-synchronised", "cluster"]);
    assert_eq!(problems(&well()), Vec::<String>::new());
}

#[test]
fn the_worst_comes_first_and_equals_keep_their_order() {
    let mut facts = alone();
    facts.same_identity = vec![QUIC.to_owned()];
    facts.same_identity_certain = true;
    facts.bootstrap = vec![bootstrap(TCP, Some(DialOutcome::Refused))];
    let findings = examine(&facts, &Host::default(), &Subject::Node);
    assert!(findings.is_sorted_by_key(|finding| std::cmp::Reverse(finding.severity)), "{findings:?}");
    assert_eq!(codes(&findings, Severity::Error), ["duplicate-identity", "bootstrap-refused"]);
}

#[test]
fn problems_are_sentences_with_remedies_that_do_not_age_or_count() {
    let mut facts = alone();
    facts.bootstrap = vec![bootstrap(TCP, Some(DialOutcome::Refused))];
    let told = problems(&facts);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].contains(TCP) && told[0].contains("refused") && told[0].contains("; there: sudo systemctl start"),
        "{told:?}"
    );
    facts.bootstrap[0].attempts[0].ago = seconds(1000);
    facts.clusters[0].joined_ago = seconds(10_000);
    facts.mdns[0].sent = 99;
    assert_eq!(problems(&facts), told);
    assert!(problems(&alone()).is_empty(), "being alone is no fault of this node");
}

#[test]
fn a_remedy_names_the_address_of_this_node_that_others_can_dial() {
    let findings = examine(&alone(), &Host::default(), &Subject::Node);
    let alone = findings.iter().find(|finding| finding.code == "alone").unwrap();
    let paste = format!("ogctl connect home --bootstrap /ip4/10.0.0.1/udp/4001/quic-v1/p2p/{OURS}");
    assert!(alone.remedy.as_ref().unwrap().contains(&paste), "{alone:?}");
}

#[test]
fn a_remedy_speaks_the_language_of_the_firewall_that_is_there() {
    let remedy = |firewall: &str, rule: bool| {
        let host = Host { firewall: Some(firewall.to_owned()), firewall_rule: rule, ..Host::default() };
        let findings = examine(&alone(), &host, &Subject::Node);
        findings.into_iter().find(|finding| finding.code == "firewall-active").unwrap().remedy.unwrap()
    };
    assert_eq!(
        remedy("firewalld", false),
        "sudo firewall-cmd --permanent --add-service=mdns --add-port=4001/udp --add-port=4001/tcp && sudo firewall-cmd --reload"
    );
    assert_eq!(
        remedy("firewalld", true),
        "sudo firewall-cmd --permanent --add-service=opengateway && sudo firewall-cmd --reload"
    );
    assert_eq!(remedy("ufw", false), "sudo ufw allow 4001/udp && sudo ufw allow 4001/tcp && sudo ufw allow 5353/udp");
    assert_eq!(remedy("ufw", true), "sudo ufw allow OpenGateway");
    assert_eq!(remedy("nftables", false), "let UDP 4001, TCP 4001 and UDP 5353 in; the rules show: sudo nft list ruleset");
}

#[test]
fn strangers_with_trouble_are_told_of_up_to_a_limit() {
    let mut facts = alone();
    for number in 0..100 {
        let id = NodeId::new(format!("peer-{number}"));
        facts.peers.push(PeerFacts { id, attempts: vec![attempt(TCP, 1, DialOutcome::Refused)], ..stranger() });
    }
    let findings = examine(&facts, &Host::default(), &Subject::Node);
    assert_eq!(findings.iter().filter(|finding| finding.code == "peer-refused").count(), 20);
    let more = findings.iter().find(|finding| finding.code == "more-peers").unwrap();
    assert!(more.sentence.contains("80 peers"), "{more:?}");
}

#[test]
fn what_a_stranger_calls_itself_moves_no_cursor() {
    let name = "\u{1b}[2Jevil\u{202e}\r\n".repeat(50);
    let peer = PeerFacts { name: Some(name), attempts: vec![attempt(TCP, 1, DialOutcome::Refused)], ..stranger() };
    for finding in examine(&with(peer), &Host::default(), &Subject::Node) {
        let told = format!("{}{}", finding.sentence, finding.remedy.unwrap_or_default());
        assert!(!told.contains(|c: char| c.is_control() || c == '\u{202e}'), "{told:?}");
        assert!(finding.sentence.chars().count() <= 601);
    }
}
