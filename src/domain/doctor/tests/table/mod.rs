//! The table: facts, and the codes that follow.

mod peers;

use super::*;
use crate::domain::network::{Nat, RefusedFacts, Relay, RelayingFacts, ReservationFacts};

/// One row.
struct Row {
    what: &'static str,
    facts: Facts,
    host: Host,
    subject: Subject,
    /// Codes of warnings and errors, in order.
    codes: &'static [&'static str],
    /// Codes that are told besides.
    also: &'static [&'static str],
    /// Words of the sentences and remedies.
    words: &'static [&'static str],
}

fn row(what: &'static str, facts: Facts, codes: &'static [&'static str]) -> Row {
    Row { what, facts, host: Host::default(), subject: Subject::Node, codes, also: &[], words: &[] }
}

impl Row {
    fn host(mut self, host: Host) -> Self {
        self.host = host;
        self
    }

    fn peer(mut self, wanted: &str) -> Self {
        self.subject = Subject::Peer(wanted.to_owned());
        self
    }

    fn cluster(mut self, id: &str) -> Self {
        self.subject = Subject::Cluster(ClusterId::new(id).unwrap());
        self
    }

    fn also(mut self, codes: &'static [&'static str]) -> Self {
        self.also = codes;
        self
    }

    fn says(mut self, words: &'static [&'static str]) -> Self {
        self.words = words;
        self
    }

    fn findings(&self) -> Vec<Finding> {
        examine(&self.facts, &self.host, &self.subject)
    }

    fn check(&self) {
        let findings = self.findings();
        let what = self.what;
        assert_eq!(codes(&findings, Severity::Warning), self.codes, "{what}: {findings:#?}");
        let all = codes(&findings, Severity::Info);
        for code in self.also {
            assert!(all.contains(code), "{what}: {code} is not among {findings:#?}");
        }
        let told: String =
            findings.iter().flat_map(|finding| [Some(finding.sentence.clone()), finding.remedy.clone()]).flatten().collect();
        for words in self.words {
            assert!(told.contains(words), "{what}: {words:?} is not in {told}");
        }
        for finding in findings.iter().filter(|finding| finding.severity > Severity::Info) {
            assert!(finding.remedy.is_some(), "{what}: {finding:?} tells nothing to do");
        }
    }
}

/// `well` or `alone`, changed.
fn but(mut facts: Facts, change: impl FnOnce(&mut Facts)) -> Facts {
    change(&mut facts);
    facts
}

fn not_reached(outcome: DialOutcome) -> Facts {
    with(PeerFacts { name: Some("NodeB".to_owned()), attempts: vec![attempt(TCP, 2, outcome)], ..stranger() })
}

fn greeted(outcome: GreetOutcome) -> PeerFacts {
    PeerFacts {
        links: vec![link(true, "quic")],
        greetings: vec![greeting(outcome)],
        name: Some("NodeB".to_owned()),
        ..stranger()
    }
}

fn needs(address: &str, outcome: Option<DialOutcome>) -> Facts {
    but(alone(), |facts| {
        facts.mdns = vec![mdns("eth0", 9)];
        facts.bootstrap = vec![bootstrap(address, outcome)];
        facts.dht.peers = 1;
    })
}

fn nat(nat: Nat) -> Facts {
    but(well(), |facts| {
        facts.peers[0].links[0].dialed = true;
        facts.bootstrap = vec![BootstrapFacts { connected: true, ..bootstrap(QUIC, None) }];
        facts.reach.nat = nat;
        facts.reach.observed = vec!["/ip4/203.0.113.9/udp/4001/quic-v1".to_owned()];
    })
}

fn reservation(accepted: bool, problem: Option<&str>) -> ReservationFacts {
    let relay = Relay { id: NodeId::new(OTHER), name: Some("Relay".to_owned()) };
    ReservationFacts { relay, accepted, problem: problem.map(str::to_owned) }
}

fn of_machine() -> Vec<Row> {
    vec![
        row(
            "no listener",
            but(well(), |facts| {
                facts.listening.clear();
                facts.not_listening = vec![(QUIC.to_owned(), "the port is taken".to_owned())];
            }),
            &["not-listening"],
        )
        .says(&["the port is taken", QUIC]),
        row(
            "one listener failed",
            but(well(), |facts| {
                facts.not_listening = vec![("/ip6/::/tcp/4001".to_owned(), "no IPv6 here".to_owned())];
            }),
            &[],
        )
        .also(&["not-listening", "listening"])
        .says(&["no IPv6 here"]),
        row(
            "loopback only",
            but(alone(), |facts| facts.listening = vec!["/ip4/127.0.0.1/tcp/4001".to_owned()]),
            &["loopback-only", "mdns-silent", "alone"],
        ),
        row("no interface", but(alone(), |facts| facts.interfaces[0].up = false), &["no-network", "interface-down", "alone"]),
        row(
            "two interfaces, one dead",
            but(well(), |facts| {
                let dead = InterfaceFacts { up: false, ..interface("eth1", "10.1.0.1") };
                facts.interfaces.push(dead);
            }),
            &["interface-down"],
        )
        .says(&["eth1", "10.1.0.1", "sudo ip link set eth1 up"]),
        row(
            "a VPN without multicast",
            but(alone(), |facts| {
                facts.interfaces = vec![InterfaceFacts { multicast: false, ..interface("wg0", "10.9.0.1") }];
                facts.listening.push("/ip4/10.9.0.1/udp/4001/quic-v1".to_owned());
                facts.mdns.clear();
            }),
            &["interface-no-multicast", "alone"],
        )
        .says(&["wg0", "--bootstrap /ip4/10.9.0.1/udp/4001/quic-v1/p2p/"]),
        row("multicast is blocked", alone(), &["mdns-silent", "alone"]).says(&["eth0", "12 packets"]),
        row("multicast is blocked, a firewall is known", alone(), &["mdns-silent", "firewall-active", "alone"])
            .host(Host { firewall: Some("firewalld".to_owned()), firewall_rule: true, ..Host::default() })
            .says(&["--add-service=opengateway"]),
        row("multicast is silent where others were found", but(well(), |facts| facts.mdns = vec![mdns("eth0", 0)]), &[])
            .also(&["mdns-silent"]),
        row("mDNS was just begun", but(alone(), |facts| facts.clusters[0].joined_ago = seconds(1)), &[])
            .also(&["mdns-silent", "alone"]),
        row(
            "mDNS fails",
            but(well(), |facts| {
                facts.mdns[0].problem = Some("the port is taken".to_owned());
                facts.mdns[0].failed = true;
            }),
            &["mdns-failed"],
        )
        .says(&["eth0", "IPv4"]),
        row(
            "mDNS fails over one family",
            but(well(), |facts| {
                facts.mdns.push(MdnsFacts { ipv6: true, failed: true, problem: Some("no IPv6".to_owned()), ..mdns("eth0", 0) });
            }),
            &[],
        )
        .also(&["mdns-failed", "mdns-heard"]),
        row(
            "mDNS is left off on an interface",
            but(well(), |facts| facts.mdns.push(MdnsFacts { problem: Some("public".to_owned()), ..mdns("eth1", 0) })),
            &[],
        )
        .also(&["mdns-idle"]),
        row("mDNS is flooded", but(well(), |facts| facts.mdns_flooded = true), &["mdns-flooded"]),
        row(
            "mDNS is off",
            but(well(), |facts| {
                facts.mdns_enabled = false;
                facts.mdns.clear();
            }),
            &[],
        )
        .also(&["mdns-off"]),
        row(
            "no way to find anybody",
            but(alone(), |facts| {
                facts.mdns_enabled = false;
                facts.mdns.clear();
            }),
            &["no-bootstrap-no-mdns", "alone"],
        ),
        row("a firewall, and others get in", well(), &[])
            .host(Host { firewall: Some("ufw".to_owned()), ..Host::default() })
            .also(&["firewall-active"]),
        row("connections are at their limit", but(well(), |facts| facts.connections = (384, 384)), &["at-connection-limit"])
            .says(&["384"]),
        row(
            "somebody was turned away lately",
            but(well(), |facts| {
                facts.refused = Some(RefusedFacts { count: 7, ago: seconds(4), reason: "at most 4 connections".to_owned() });
            }),
            &["at-connection-limit"],
        )
        .says(&["7 connections", "4 s ago", "at most 4 connections"]),
        row(
            "somebody was turned away long ago",
            but(well(), |facts| {
                facts.refused = Some(RefusedFacts { count: 7, ago: seconds(4000), reason: String::new() });
            }),
            &[],
        ),
        row("the clock is wrong", well(), &["clock-unsynchronised"])
            .host(Host { clock_synchronised: Some(false), ..Host::default() }),
        row("the clock is right", well(), &[])
            .host(Host { clock_synchronised: Some(true), ..Host::default() })
            .also(&["clock-synchronised"]),
        row("the machine slept", well(), &[])
            .host(Host { suspended_s: 7200, ..Host::default() })
            .also(&["suspended"])
            .says(&["2 h"]),
        row(
            "two machines, one identity",
            but(well(), |facts| {
                facts.same_identity = vec![QUIC.to_owned()];
                facts.same_identity_certain = true;
            }),
            &["duplicate-identity"],
        )
        .says(&[QUIC, "identity.key"]),
        row(
            "two machines, one identity, says one member",
            but(well(), |facts| facts.same_identity = vec![QUIC.to_owned()]),
            &["duplicate-identity"],
        )
        .says(&[QUIC, "one member says", "ogctl status"]),
    ]
}

fn of_bootstrap() -> Vec<Row> {
    let pinned = format!("{TCP}/p2p/{THEIRS}");
    vec![
        row("connected", but(needs(QUIC, None), |facts| facts.bootstrap[0].connected = true), &["alone"])
            .also(&["bootstrap-connected"]),
        row("not dialled yet", needs(QUIC, None), &["alone"]).also(&["bootstrap-pending"]),
        row("refused", needs(TCP, Some(DialOutcome::Refused)), &["bootstrap-refused", "alone"])
            .says(&["TCP port 4001", "sudo systemctl start opengatewayd"]),
        row(
            "refused over TCP, silent over QUIC",
            but(needs(TCP, Some(DialOutcome::Refused)), |facts| {
                facts.bootstrap[0].attempts.push(attempt(QUIC, 1, DialOutcome::TimedOut));
            }),
            &["bootstrap-refused", "alone"],
        ),
        row("no answer", needs(QUIC, Some(DialOutcome::TimedOut)), &["bootstrap-timeout", "alone"])
            .says(&["10.0.0.2", "sudo ufw allow 4001/udp"]),
        row("no way", needs(QUIC, Some(DialOutcome::Unreachable)), &["bootstrap-unreachable", "alone"])
            .says(&["ip route get 10.0.0.2"]),
        row(
            "no way over IPv6",
            needs("/ip6/2001:db8::1/tcp/4001", Some(DialOutcome::Unreachable)),
            &["bootstrap-unreachable", "alone"],
        )
        .says(&["is an IPv6 address, and this machine has none", "ip -6 route get 2001:db8::1"]),
        row("another node", needs(&pinned, Some(DialOutcome::WrongPeer(NodeId::new(OTHER)))), &["bootstrap-wrong-peer", "alone"])
            .says(&[OTHER, "ogctl connect home --bootstrap /ip4/10.0.0.2/tcp/4001/p2p/"]),
        row("this node itself", needs(QUIC, Some(DialOutcome::Ourselves)), &["bootstrap-self", "alone"]),
        row(
            "a name that nobody knows",
            but(needs("/dns4/no.such/tcp/1", None), |facts| {
                facts.bootstrap[0].problem = Some("its name is not known here".to_owned());
            }),
            &["bootstrap-unresolved", "alone"],
        )
        .says(&["name is not known", "getent hosts no.such"]),
        row("it hung up", needs(TCP, Some(DialOutcome::Denied("it let go at once".to_owned()))), &["bootstrap-denied", "alone"])
            .says(&["let go at once"]),
        row("anything else", needs(TCP, Some(DialOutcome::Other("bad magic".to_owned()))), &["bootstrap-failed", "alone"])
            .says(&["bad magic"]),
        row(
            "anything else, of no address",
            but(needs(TCP, None), |facts| facts.bootstrap[0].problem = Some("odd".to_owned())),
            &["bootstrap-failed", "alone"],
        ),
        row(
            "dead, and members were found all the same",
            but(well(), |facts| {
                facts.bootstrap = vec![bootstrap(TCP, Some(DialOutcome::Refused))];
            }),
            &["bootstrap-refused"],
        ),
    ]
}

fn of_reach() -> Vec<Row> {
    vec![
        row("no translation", nat(Nat::None), &[]).also(&["reachable"]),
        row("unknown", but(nat(Nat::Unknown), |facts| facts.reach.observed.clear()), &[]).also(&["nat-unknown"]),
        row("ports are kept, no relay", nat(Nat::Cone), &["no-relay"])
            .also(&["behind-nat"])
            .says(&["203.0.113.9", "forward UDP 4001 and TCP 4001"]),
        row(
            "ports are kept, a relay",
            but(nat(Nat::Cone), |facts| facts.reach.reservations = vec![reservation(true, None)]),
            &[],
        )
        .also(&["behind-nat", "relay-held"]),
        row("ports change, no relay", nat(Nat::Symmetric), &["nat-symmetric", "no-relay"]),
        row(
            "ports change, a relay",
            but(nat(Nat::Symmetric), |facts| facts.reach.reservations = vec![reservation(true, None)]),
            &[],
        )
        .also(&["nat-symmetric", "relay-held"]),
        row(
            "the relay is lost",
            but(nat(Nat::Cone), |facts| facts.reach.reservations = vec![reservation(false, Some("it closed"))]),
            &["relay-lost"],
        )
        .says(&["Relay", "it closed"]),
        row(
            "the relay is full",
            but(nat(Nat::Cone), |facts| {
                facts.reach.reservations = vec![reservation(false, Some("its limit of places is reached"))];
            }),
            &["relay-full"],
        ),
        row(
            "one relay of two is lost",
            but(nat(Nat::Cone), |facts| {
                facts.reach.reservations = vec![reservation(true, None), reservation(false, None)];
            }),
            &[],
        )
        .also(&["relay-held", "relay-lost"]),
        row(
            "a relay itself",
            but(well(), |facts| {
                facts.reach.relaying = Some(RelayingFacts { reservations: 2, circuits: 1, refused: 0 });
            }),
            &[],
        )
        .also(&["relaying"])
        .says(&["2 places", "one connection"]),
        row(
            "a relay that is spent",
            but(well(), |facts| {
                facts.reach.relaying = Some(RelayingFacts { reservations: 128, circuits: 9, refused: 3 });
            }),
            &["relay-busy"],
        ),
        row(
            "dialled back in vain",
            but(nat(Nat::Unknown), |facts| {
                facts.reach.unreachable = vec![("/ip4/203.0.113.9/udp/4001/quic-v1".to_owned(), "no answer".to_owned())];
            }),
            &["address-unreachable"],
        )
        .says(&["UDP port 4001"]),
        row("a DHT of nobody, alone", but(needs(QUIC, None), |facts| facts.dht.peers = 0), &["dht-empty", "alone"]),
        row("a DHT that is asked", but(nat(Nat::None), |facts| facts.dht.server = false), &[]).also(&["dht-client"]),
        row("a DHT that is served", nat(Nat::None), &[]).also(&["dht-server"]),
    ]
}

fn table() -> Vec<Row> {
    [of_machine(), of_bootstrap(), of_reach(), peers::of_clusters(), peers::of_peers()].into_iter().flatten().collect()
}

#[test]
fn facts_lead_to_codes() {
    for row in table() {
        row.check();
    }
}

/// The codes of `docs/doctor.md`: its third-level headings.
fn documented() -> Vec<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctor.md")).unwrap();
    text.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).map(str::to_owned).collect()
}

#[test]
fn every_code_is_documented_and_every_documented_code_is_told_by_a_row_of_the_table() {
    let mut told: Vec<String> = table().iter().flat_map(Row::findings).map(|finding| finding.code.to_owned()).collect();
    told.sort();
    told.dedup();
    let mut documented = documented();
    documented.sort();
    assert_eq!(told, documented);
}
