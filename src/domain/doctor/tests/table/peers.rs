//! Rows of clusters and of peers.

use super::*;

pub(super) fn of_clusters() -> Vec<Row> {
    let refused = || greeted(GreetOutcome::Refused);
    vec![
        row("no cluster", but(alone(), |facts| facts.clusters.clear()), &["no-cluster"]).says(&["ogctl connect"]),
        row(
            "nobody serves",
            but(well(), |facts| {
                facts.clusters[0].serving = 0;
                facts.clusters[0].serves = false;
            }),
            &["no-serving-member"],
        )
        .says(&["--serve"]),
        row("all is well", well(), &[]).also(&["cluster"]).says(&["2 nodes take prompts"]),
        row("a cluster that is not joined", well(), &["cluster-not-joined"]).cluster("other").says(&["ogctl connect other"]),
        row("one cluster: who is there", well(), &[]).cluster("home").also(&["cluster", "peer-member"]),
        row(
            "one cluster: who is missing",
            but(with(refused()), |facts| facts.bootstrap = vec![bootstrap(TCP, Some(DialOutcome::Refused))]),
            &["bootstrap-refused", "alone", "peer-other-cluster"],
        )
        .cluster("home"),
    ]
}

pub(super) fn of_peers() -> Vec<Row> {
    let version = |versions| PeerFacts {
        greetings: vec![Greeting { versions, ..greeting(GreetOutcome::VersionMismatch) }],
        ..greeted(GreetOutcome::Failed)
    };
    let relayed = || {
        let relay = Some(Relay { id: NodeId::new(OTHER), name: Some("Relay".to_owned()) });
        PeerFacts { links: vec![Link { relay, ..link(true, "quic") }], ..member() }
    };
    vec![
        row("never heard of", well(), &["peer-unknown"]).peer("NodeX").says(&[
            "mDNS on eth0",
            "what members tell",
            "on that node: ogctl doctor",
        ]),
        row(
            "never heard of, nothing to look with",
            but(alone(), |facts| facts.mdns_enabled = false),
            &["peer-unknown", "no-bootstrap-no-mdns"],
        )
        .peer("NodeX")
        .says(&["no way to look for it"]),
        row("this node", well(), &[]).peer(OURS).also(&["peer-self"]),
        row("a member", well(), &[])
            .peer("NodeB")
            .also(&["peer-member", "peer-heard", "peer-address"])
            .says(&["it dialled this node", "a member"]),
        row("a member by id", well(), &[]).peer(THEIRS).also(&["peer-member"]),
        row("a member that is only known", but(well(), |facts| facts.peers[0].links.clear()), &[])
            .peer("NodeB")
            .also(&["peer-known"]),
        row("a member through a relay", but(well(), |facts| facts.peers = vec![relayed()]), &[])
            .also(&["peer-relayed"])
            .says(&["relay Relay"]),
        row("a silent member", but(well(), |facts| facts.peers[0].suspect = true), &["peer-suspect"]).says(&["ogctl ping NodeB"]),
        row(
            "a member that we cannot dial",
            but(well(), |facts| {
                facts.peers[0].attempts = vec![attempt(QUIC, 9, DialOutcome::TimedOut)];
            }),
            &["peer-one-way"],
        )
        .says(&["NodeB reaches this node", "sudo ufw allow 4001/udp"]),
        row(
            "a member without QUIC",
            but(well(), |facts| {
                facts.peers[0].links = vec![link(true, "tcp")];
                facts.peers[0].attempts =
                    vec![attempt(TCP, 60, DialOutcome::Connected), attempt(QUIC, 61, DialOutcome::TimedOut)];
            }),
            &["peer-no-quic"],
        ),
        row("banned", with(PeerFacts { banned: true, ..greeted(GreetOutcome::Violation) }), &["alone", "peer-banned"]),
        row("refused", not_reached(DialOutcome::Refused), &["alone", "peer-refused"]).says(&["TCP port 4001 of 10.0.0.2"]),
        row("refused, asked about", not_reached(DialOutcome::Refused), &["peer-refused"])
            .peer("NodeB")
            .also(&["peer-next-dial", "peer-address"]),
        row("no answer", not_reached(DialOutcome::TimedOut), &["alone", "peer-timeout"]),
        row(
            "no answer, and it is awake",
            but(not_reached(DialOutcome::TimedOut), |facts| facts.peers[0].mdns_ago = Some(seconds(3))),
            &["alone", "peer-one-way"],
        )
        .says(&["heard by mDNS 3 s ago"]),
        row("no way", not_reached(DialOutcome::Unreachable), &["alone", "peer-unreachable"]),
        row("another node", not_reached(DialOutcome::WrongPeer(NodeId::new(OTHER))), &["alone", "peer-wrong-id"]).says(&[OTHER]),
        row("this node at its address", not_reached(DialOutcome::Ourselves), &["alone"]).also(&["peer-wrong-id"]),
        row("it hangs up", not_reached(DialOutcome::Denied("it let go".to_owned())), &["alone", "peer-denied"])
            .says(&["max_connections"]),
        row("anything else", not_reached(DialOutcome::Other("odd".to_owned())), &["alone", "peer-failed"]),
        row("in another cluster", with(greeted(GreetOutcome::Refused)), &["alone", "peer-other-cluster"])
            .says(&["is not in cluster home", "ogctl clusters"]),
        row(
            "in another cluster, where others are here",
            but(well(), |facts| facts.peers.push(PeerFacts { id: NodeId::new(OTHER), ..greeted(GreetOutcome::Refused) })),
            &[],
        )
        .also(&["peer-other-cluster"]),
        row(
            "in another cluster, and let go since",
            with(PeerFacts {
                links: Vec::new(),
                attempts: vec![attempt(QUIC, 40, DialOutcome::Connected)],
                ..greeted(GreetOutcome::Refused)
            }),
            &["alone", "peer-other-cluster"],
        ),
        row(
            "in another cluster once, switched off since",
            with(PeerFacts {
                links: Vec::new(),
                attempts: vec![attempt(QUIC, 1, DialOutcome::TimedOut)],
                ..greeted(GreetOutcome::Refused)
            }),
            &["alone", "peer-timeout"],
        ),
        row("an older version", with(version(Some((0, 0)))), &["alone", "peer-version"]).says(&["version 0", "versions 1 to 2"]),
        row("a newer version", with(version(Some((7, 9)))), &["alone", "peer-version"])
            .says(&["versions 7 to 9", "update OpenGateway on this machine"]),
        row("some other version", with(version(None)), &["alone", "peer-version"]).says(&["another version"]),
        row("it broke the protocol", with(greeted(GreetOutcome::Violation)), &["alone", "peer-violation"]),
        row("it did not finish", with(greeted(GreetOutcome::Failed)), &["alone", "peer-no-greeting"]),
        row(
            "a bootstrap node that is in no cluster",
            with(PeerFacts { bootstrap: true, ..greeted(GreetOutcome::Failed) }),
            &["alone"],
        )
        .also(&["peer-no-greeting"]),
        row(
            "a stranger that came and went",
            with(PeerFacts { links: Vec::new(), addresses: Vec::new(), ..greeted(GreetOutcome::Failed) }),
            &["alone"],
        )
        .also(&["peer-no-greeting"]),
        row("it left", with(PeerFacts { links: Vec::new(), ..greeted(GreetOutcome::Left) }), &["alone"]).also(&["peer-left"]),
        row("its identity twice", with(greeted(GreetOutcome::SameIdentity)), &["alone", "duplicate-identity"]),
        row("connected, not greeted", with(PeerFacts { links: vec![link(true, "quic")], ..stranger() }), &["alone"])
            .also(&["peer-connected"]),
        row("heard of", with(stranger()), &["alone"]).also(&["peer-seen"]).says(&["is dialled within 4 s"]),
        row("heard of without an address", with(PeerFacts { addresses: Vec::new(), next_dial: None, ..stranger() }), &["alone"])
            .also(&["peer-no-address"]),
        row(
            "too many to tell",
            but(with(stranger()), |facts| {
                facts.peers = (0..30).map(|number| PeerFacts { id: NodeId::new(format!("p{number}")), ..stranger() }).collect();
            }),
            &["alone"],
        )
        .also(&["more-peers"]),
    ]
}
