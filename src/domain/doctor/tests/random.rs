//! Whatever the facts are: no panic, no control character, the worst first.

use proptest::prelude::*;

use super::*;
use crate::domain::network::{Nat, RefusedFacts, Relay, RelayingFacts, ReservationFacts};

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(QUIC.to_owned()),
        Just("/ip6/2001:db8::1/tcp/4001".to_owned()),
        Just("/dns4/node.example/udp/4001/quic-v1".to_owned()),
        Just("/ip4/10.0.0.3/udp/99999/quic-v1".to_owned()),
        Just("NodeB".to_owned()),
        Just("\u{1b}[31m\u{202e}\0\n".to_owned()),
        any::<String>(),
        "[/a-z0-9.:]{0,40}",
        Just("x".repeat(5000)),
    ]
}

fn span() -> impl Strategy<Value = Duration> {
    prop_oneof![Just(Duration::ZERO), Just(Duration::MAX), (0_u64..100_000).prop_map(Duration::from_secs)]
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    proptest::collection::vec(text(), 0..4)
}

fn outcome() -> impl Strategy<Value = DialOutcome> {
    prop_oneof![
        Just(DialOutcome::Connected),
        Just(DialOutcome::Refused),
        Just(DialOutcome::TimedOut),
        Just(DialOutcome::Unreachable),
        Just(DialOutcome::Ourselves),
        text().prop_map(|text| DialOutcome::WrongPeer(NodeId::new(text))),
        text().prop_map(DialOutcome::Denied),
        text().prop_map(DialOutcome::Other),
    ]
}

fn attempts() -> impl Strategy<Value = Vec<Attempt>> {
    let one = (text(), span(), outcome()).prop_map(|(address, ago, outcome)| Attempt { address, ago, outcome });
    proptest::collection::vec(one, 0..5)
}

fn greetings() -> impl Strategy<Value = Vec<Greeting>> {
    let outcomes = [
        GreetOutcome::Member,
        GreetOutcome::Refused,
        GreetOutcome::VersionMismatch,
        GreetOutcome::Violation,
        GreetOutcome::Failed,
        GreetOutcome::Left,
        GreetOutcome::SameIdentity,
    ];
    let one = (any::<bool>(), span(), proptest::sample::select(outcomes.to_vec()), any::<Option<(u16, u16)>>()).prop_map(
        |(here, ago, outcome, versions)| Greeting {
            cluster: ClusterId::new(if here { "home" } else { "elsewhere" }).unwrap(),
            ago,
            outcome,
            versions,
        },
    );
    proptest::collection::vec(one, 0..3)
}

fn links() -> impl Strategy<Value = Vec<Link>> {
    let relay = proptest::option::of((text(), proptest::option::of(text())));
    let one = (text(), any::<bool>(), relay, span()).prop_map(|(address, dialed, relay, age)| Link {
        address,
        dialed,
        transport: if dialed { "quic" } else { "tcp" },
        relay: relay.map(|(id, name)| Relay { id: NodeId::new(id), name }),
        age,
    });
    proptest::collection::vec(one, 0..3)
}

fn peer() -> impl Strategy<Value = PeerFacts> {
    let whom = (text(), proptest::option::of(text()), proptest::option::of(span()), proptest::option::of(span()));
    let what = (texts(), attempts(), proptest::option::of(span()), links(), greetings());
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (whom, what, flags).prop_map(
        |((id, name, heard_ago, mdns_ago), (addresses, attempts, next_dial, links, greetings), flags)| PeerFacts {
            id: NodeId::new(id),
            name,
            heard_ago,
            mdns_ago,
            addresses,
            attempts,
            next_dial,
            links,
            greetings,
            member_of: if flags.0 { vec![home()] } else { Vec::new() },
            suspect: flags.1,
            banned: flags.2,
            bootstrap: flags.3,
            ..stranger()
        },
    )
}

fn interfaces() -> impl Strategy<Value = Vec<InterfaceFacts>> {
    let one = (text(), any::<bool>(), any::<bool>(), texts()).prop_map(|(name, up, multicast, addresses)| InterfaceFacts {
        name,
        up,
        multicast,
        addresses,
    });
    proptest::collection::vec(one, 0..3)
}

fn mdns_facts() -> impl Strategy<Value = Vec<MdnsFacts>> {
    let counts = (prop_oneof![Just(0), any::<u64>()], prop_oneof![Just(0), any::<u64>()], any::<u32>());
    let one = (text(), any::<bool>(), counts, proptest::option::of(span()), proptest::option::of(text())).prop_map(
        |(interface, ipv6, (sent, heard, nodes), heard_ago, problem)| MdnsFacts {
            interface,
            ipv6,
            sent,
            heard,
            nodes,
            heard_ago,
            failed: ipv6,
            problem,
        },
    );
    proptest::collection::vec(one, 0..3)
}

fn reach() -> impl Strategy<Value = ReachFacts> {
    let nat = proptest::sample::select(vec![Nat::Unknown, Nat::None, Nat::Cone, Nat::Symmetric]);
    let unreachable = proptest::collection::vec((text(), text()), 0..2);
    let reservations = proptest::collection::vec((text(), any::<bool>(), proptest::option::of(text())), 0..2);
    let relaying = proptest::option::of((any::<u32>(), any::<u32>(), any::<u64>()));
    (nat, texts(), texts(), unreachable, reservations, relaying).prop_map(
        |(nat, observed, announced, unreachable, reservations, relaying)| ReachFacts {
            nat,
            observed,
            announced,
            unreachable,
            reservations: reservations
                .into_iter()
                .map(|(id, accepted, problem)| ReservationFacts {
                    relay: Relay { id: NodeId::new(id), name: None },
                    accepted,
                    problem,
                })
                .collect(),
            relaying: relaying.map(|(reservations, circuits, refused)| RelayingFacts { reservations, circuits, refused }),
        },
    )
}

fn bootstraps() -> impl Strategy<Value = Vec<BootstrapFacts>> {
    let one = (text(), proptest::option::of(text()), any::<bool>(), attempts(), proptest::option::of(text())).prop_map(
        |(address, peer, connected, attempts, problem)| BootstrapFacts {
            address,
            peer: peer.map(NodeId::new),
            connected,
            attempts,
            problem,
        },
    );
    proptest::collection::vec(one, 0..3)
}

fn clusters() -> impl Strategy<Value = Vec<ClusterFacts>> {
    let one = (span(), any::<usize>(), any::<usize>(), any::<usize>(), any::<bool>()).prop_map(
        |(joined_ago, members, known, serving, serves)| ClusterFacts {
            id: home(),
            joined_ago,
            members,
            known,
            serving,
            serves,
            announced: false,
        },
    );
    proptest::collection::vec(one, 0..2)
}

fn facts() -> impl Strategy<Value = Facts> {
    let here =
        (texts(), proptest::collection::vec((text(), text()), 0..2), interfaces(), any::<bool>(), any::<bool>(), mdns_facts());
    let there = (bootstraps(), reach(), clusters(), proptest::collection::vec(peer(), 0..4), texts());
    let counts =
        (any::<bool>(), any::<usize>(), (any::<usize>(), any::<usize>()), proptest::option::of((any::<u64>(), span(), text())));
    (here, there, counts).prop_map(|(here, there, (server, known, connections, refused))| Facts {
        listening: here.0,
        not_listening: here.1,
        interfaces: here.2,
        mdns_enabled: here.3,
        mdns_flooded: here.4,
        mdns: here.5,
        bootstrap: there.0,
        reach: there.1,
        clusters: there.2,
        peers: there.3,
        same_identity: there.4,
        same_identity_certain: here.3,
        dht: DhtFacts { server, peers: known, answered_ago: None },
        connections,
        refused: refused.map(|(count, ago, reason)| RefusedFacts { count, ago, reason }),
        ..well()
    })
}

proptest! {
    #[test]
    fn no_facts_lead_to_a_panic_or_to_a_sentence_that_moves_the_cursor(
        facts in facts(),
        firewall in proptest::option::of(text()),
        clock in any::<Option<bool>>(),
        suspended_s in any::<u64>(),
        wanted in text(),
    ) {
        let host = Host { firewall, firewall_rule: clock.is_some(), clock_synchronised: clock, suspended_s };
        for subject in [Subject::Node, Subject::Peer(wanted), Subject::Cluster(home())] {
            let findings = examine(&facts, &host, &subject);
            prop_assert!(findings.is_sorted_by_key(|finding| std::cmp::Reverse(finding.severity)));
            for finding in findings {
                for told in [Some(finding.sentence), finding.remedy].into_iter().flatten() {
                    prop_assert!(!told.is_empty() && !told.contains(char::is_control), "{}: {told:?}", finding.code);
                    prop_assert!(told.chars().count() <= 601, "{}: {told:?}", finding.code);
                }
            }
        }
        prop_assert!(problems(&facts).iter().all(|told| !told.contains(char::is_control)));
    }
}
