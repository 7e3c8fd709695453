//! The table of topologies: whether two nodes come together there, how fast, by which path, and what the doctor says on
//! both. Each test is a row, or two where the remedy that the doctor names is tried.

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt as _;

use super::*;
use crate::eye::{Eye, Seen};
use crate::lab::{Family, Nat};
use crate::report::Table;
use crate::roles::Role;

const SERVE: &[&str] = &["--serve", "--connect", CLUSTER];
/// What a user waits before looking for the fault: most rows take a second.
const SOON: Duration = Duration::from_secs(15);

const TABLE: Table =
    Table { title: "Topologies", head: &["topology", "works", "after", "path", "doctor on NodeA", "doctor on NodeB"] };

/// What the doctor says of a node: code and severity.
async fn findings(node: &Node) -> Vec<(String, String)> {
    let said = node.json(&["doctor"]).await;
    let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let findings = said["findings"].as_array().unwrap_or_else(|| panic!("no findings: {said}"));
    findings.iter().map(|finding| (text(finding, "code"), text(finding, "severity"))).collect()
}

/// Waits until the doctor on `node` says all that is `expected`; gives that and every warning and error.
async fn doctor(node: &Node, expected: &[&str]) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = findings(node).await;
        let codes: BTreeSet<&str> = found.iter().map(|(code, _)| code.as_str()).collect();
        if expected.iter().all(|code| codes.contains(code)) {
            let told = found.iter().filter(|(code, severity)| severity != "info" || expected.contains(&code.as_str()));
            let told: BTreeSet<String> = told.map(|(code, _)| code.clone()).collect();
            return if told.is_empty() { "nothing".to_owned() } else { told.into_iter().collect::<Vec<_>>().join(", ") };
        }
        assert!(Instant::now() < deadline, "{}: {expected:?} is not all in {found:?}\n{}", node.name(), node.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// No node that works is told that something is broken.
async fn no_errors(node: &Node) {
    let errors: Vec<_> = findings(node).await.into_iter().filter(|(_, severity)| severity == "error").collect();
    assert!(errors.is_empty(), "{}: {errors:?}", node.name());
}

/// By which path a node has another.
async fn path(node: &Node, other: &str) -> Seen {
    let peers = Eye::on(node).await.peers().await;
    peers.into_iter().find(|peer| peer.name == other).unwrap_or_else(|| panic!("{other} is no member of {}", node.name()))
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// The two ends of a row.
struct Row<'a> {
    topology: &'a str,
    a: &'a Node,
    b: &'a Node,
    /// Codes that the doctor must say on each.
    expected: [&'a [&'a str]; 2],
}

impl Row<'_> {
    /// They come together and answer each other. Gives the path.
    async fn works(&self, begun: Instant, limit: Duration) -> Seen {
        let met = all_see_each_other(&[self.a, self.b], begun, DEADLINE).await;
        for (node, other) in [(self.a, self.b), (self.b, self.a)] {
            let said = node.ogctl(&["prompt", "What is 2+2?", "--no-local", "--node", other.name()]).await;
            assert!(said.code == 0 && said.stdout == "What is 2+2?\n", "{}: {said:?}\n{}", node.name(), node.log());
        }
        let path = path(self.a, self.b.name()).await;
        let told = [doctor(self.a, self.expected[0]).await, doctor(self.b, self.expected[1]).await];
        self.tell("yes", seconds(met), path.path(), told);
        for node in [self.a, self.b] {
            no_errors(node).await;
        }
        assert!(met < limit, "{}: after {met:?}", self.topology);
        path
    }

    /// They do not come together, and the doctor says why.
    async fn fails(&self) {
        let told = [doctor(self.a, self.expected[0]).await, doctor(self.b, self.expected[1]).await];
        for node in [self.a, self.b] {
            node.sees_in(CLUSTER, &[], Duration::ZERO).await;
        }
        self.tell("no", "–".to_owned(), "–".to_owned(), told);
    }

    fn tell(&self, works: &str, after: String, path: String, [a, b]: [String; 2]) {
        TABLE.row(vec![self.topology.to_owned(), works.to_owned(), after, path, a, b]);
    }
}

/// NodeA and NodeB on these hosts, both serving.
async fn ends(lab: &Lab, hosts: [&str; 2], more: &[&str]) -> [Node; 2] {
    let args = [SERVE, more].concat();
    cast(lab, [(hosts[0], "NodeA", &args[..]), (hosts[1], "NodeB", &args)]).await
}

#[tokio::test]
async fn on_one_lan_they_find_each_other() {
    for (family, topology) in
        [(Family::Both, "one LAN"), (Family::Ipv4, "one LAN, IPv4 only"), (Family::Ipv6, "one LAN, IPv6 only")]
    {
        let Some(lab) = Lab::one_lan(2, family) else { return };
        let begun = Instant::now();
        let [a, b] = ends(&lab, ["a1", "a2"], &[]).await;
        let path = Row { topology, a: &a, b: &b, expected: [&["mdns-heard"]; 2] }.works(begun, SOON).await;
        assert!(path.direct && path.transport == "quic", "{path:?}");
    }
}

#[tokio::test]
async fn in_two_lans_with_a_router_they_find_each_other_through_a_bootstrap_node() {
    let Some(lab) = Lab::routed([1, 1, 1]) else { return };
    let [bootstrap] = cast(&lab, [("c1", "Bootstrap", &[])]).await;
    let at = address_with(&bootstrap, "/ip4/10.73.0.11/udp").await;
    let begun = Instant::now();
    let [a, b] = ends(&lab, ["a1", "b1"], &["--bootstrap", &at]).await;
    let row = Row { topology: "two LANs, routed, a bootstrap node", a: &a, b: &b, expected: [&["bootstrap-connected"]; 2] };
    assert!(row.works(begun, SOON).await.direct);
}

#[tokio::test]
async fn where_multicast_is_blocked_the_doctor_says_so_and_its_remedy_works() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    lab.no_multicast('a');
    let [a, b] = ends(&lab, ["a1", "a2"], &[]).await;
    let row = Row { topology: "one LAN, multicast blocked", a: &a, b: &b, expected: [&["alone", "mdns-silent"]; 2] };
    row.fails().await;
    let at = address_with(&b, "/ip4/10.71.0.12/udp").await;
    let begun = Instant::now();
    assert_eq!(a.ogctl(&["connect", CLUSTER, "--serve", "--bootstrap", &at]).await.code, 0);
    let row = Row { topology: "… with one named to the other", expected: [&[]; 2], ..row };
    assert!(row.works(begun, SOON).await.direct);
}

#[tokio::test]
async fn a_firewall_at_one_end_keeps_nobody_out_who_is_dialled_from_inside() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    lab.firewall("a2");
    let begun = Instant::now();
    let [a, b] = ends(&lab, ["a1", "a2"], &[]).await;
    let row = Row { topology: "one LAN, NodeB's firewall drops what it did not ask for", a: &a, b: &b, expected: [&[]; 2] };
    assert!(row.works(begun, SOON).await.direct);
}

#[tokio::test]
async fn firewalls_at_both_ends_keep_nobody_out_who_dial_each_other_from_one_port() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    lab.firewall("a1");
    lab.firewall("a2");
    let begun = Instant::now();
    let [a, b] = ends(&lab, ["a1", "a2"], &[]).await;
    // The one that dials second, a second later, makes the way for what the first one still repeats.
    let row = Row { topology: "one LAN, both firewalls drop what they did not ask for", a: &a, b: &b, expected: [&[]; 2] };
    let path = row.works(begun, DEADLINE).await;
    assert!(path.direct && path.transport == "quic", "{path:?}");
}

#[tokio::test]
async fn where_frames_pass_in_one_direction_only_the_doctor_says_so() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    lab.one_way("a1", "a2");
    let [a, b] = ends(&lab, ["a1", "a2"], &[]).await;
    let expected: [&[&str]; 2] = [&["alone", "peer-one-way"], &["alone", "mdns-silent"]];
    Row { topology: "one LAN, nothing passes from NodeA to NodeB", a: &a, b: &b, expected }.fails().await;
}

#[tokio::test]
async fn of_two_interfaces_the_one_that_lives_is_enough() {
    for (down, topology) in
        [(false, "two interfaces each, NodeA's first is silent"), (true, "two interfaces each, NodeA's first has no cable")]
    {
        let Some(lab) = Lab::two_islands([2, 0]) else { return };
        for host in ["a1", "a2"] {
            lab.second_interface(host, 'b');
        }
        if down {
            lab.cut("a1");
        } else {
            lab.dead("a1");
        }
        let begun = Instant::now();
        let [a, b] = ends(&lab, ["a1", "a2"], &[]).await;
        let expected: [&[&str]; 2] = [if down { &["interface-down"] } else { &[] }, &[]];
        assert!(Row { topology, a: &a, b: &b, expected }.works(begun, SOON).await.direct);
    }
}

#[tokio::test]
async fn in_different_clusters_they_are_told_apart() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let other = ["--serve", "--connect", "gatewayai-poc2"];
    let [a, b] = cast(&lab, [("a1", "NodeA", SERVE), ("a2", "NodeB", &other)]).await;
    let told = [doctor(&a, &["alone", "peer-other-cluster"]).await, doctor(&b, &["alone", "peer-other-cluster"]).await];
    a.sees_in(CLUSTER, &[], Duration::ZERO).await;
    b.sees_in("gatewayai-poc2", &[], Duration::ZERO).await;
    Row { topology: "one LAN, the cluster misspelt", a: &a, b: &b, expected: [&[]; 2] }.tell("no", "–".into(), "–".into(), told);
}

#[tokio::test]
async fn a_node_of_another_version_is_named() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let [a] = cast(&lab, [("a1", "NodeA", SERVE)]).await;
    let mut old = Role::start(&lab, "a2", "old-node", &[]);
    assert_eq!(old.told().await, "joined");
    let told = [doctor(&a, &["peer-version"]).await, "(an old program)".to_owned()];
    a.sees_in(CLUSTER, &[], Duration::ZERO).await;
    Row { topology: "one LAN, NodeB speaks an old protocol", a: &a, b: &a, expected: [&[]; 2] }.tell(
        "no",
        "–".into(),
        "–".into(),
        told,
    );
}

#[tokio::test]
async fn two_machines_with_one_identity_both_say_so_and_neither_comes_and_goes() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, c] = cast(&lab, [("a1", "NodeA", SERVE), ("a3", "NodeC", SERVE)]).await;
    all_see_each_other(&[&a, &c], Instant::now(), DEADLINE).await;
    let bus = bus_or_skip().expect("the lab has seen dbus-daemon");
    let state = bus.dir().join("state");
    std::fs::DirBuilder::new().mode(0o700).create(&state).unwrap();
    for file in ["identity.key", "identity.pub"] {
        std::fs::copy(a.state_dir().join(file), state.join(file)).unwrap();
    }
    let mut b = Node::on(bus, Plan::within(&lab.namespace("a2"), "NodeB", SERVE));
    b.ready().await;
    let told = [doctor(&a, &["duplicate-identity"]).await, doctor(&b, &["duplicate-identity"]).await];
    let topology = "one LAN, NodeB is a copy of NodeA with its identity, and a third node";
    Row { topology, a: &a, b: &b, expected: [&[]; 2] }.tell("one of them", "–".into(), "–".into(), told);
    // The third one has one of them as a member, and does not change its mind.
    let changes = |node: &Node| node.log().lines().filter(|line| line.contains(" peers: ")).count();
    let before = changes(&c);
    let until = Instant::now() + DEAD;
    while Instant::now() < until {
        assert_eq!(c.json(&["peers", CLUSTER]).await["peers"].as_array().map(Vec::len), Some(1), "{}", c.log());
        echoed(&c, "still there?").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(changes(&c), before, "a member came and went: {}", c.log());
}

#[tokio::test]
async fn over_a_private_network_without_multicast_the_remedy_of_the_doctor_works() {
    let Some(lab) = Lab::homes([Nat::Symmetric; 2], [1, 1], 1) else { return };
    lab.vpn(&["a1", "b1"]);
    let [a, b] = ends(&lab, ["a1", "b1"], &[]).await;
    let expected: [&[&str]; 2] = [&["alone", "interface-no-multicast"]; 2];
    let row = Row { topology: "two homes and a VPN (point-to-point, no multicast)", a: &a, b: &b, expected };
    row.fails().await;
    let at = address_with(&a, "/ip4/10.80.0.1/udp").await;
    let begun = Instant::now();
    assert_eq!(b.ogctl(&["connect", CLUSTER, "--serve", "--bootstrap", &at]).await.code, 0);
    let row = Row { topology: "… with one named to the other", expected: [&["interface-no-multicast"]; 2], ..row };
    assert!(row.works(begun, SOON).await.direct);
}

/// A bootstrap node and relay at w1, in no cluster.
async fn relay(lab: &Lab) -> (Node, String) {
    let relay = configured(lab, "w1", "Relay", "[relay]\nenabled = true\n", &["--no-mdns"]).await;
    let at = address_with(&relay, "/ip4/198.51.100.11/udp").await;
    (relay, at)
}

/// A daemon with a configuration of its own.
async fn configured(lab: &Lab, host: &str, name: &str, config: &str, args: &[&str]) -> Node {
    let bus = bus_or_skip().expect("the lab has seen dbus-daemon");
    let file = bus.dir().join("opengatewayd.toml");
    std::fs::write(&file, config).unwrap();
    let mut node =
        Node::on(bus, Plan::within(&lab.namespace(host), name, &[&["--config", file.to_str().unwrap()], args].concat()));
    node.ready().await;
    node
}

#[tokio::test]
async fn two_homes_come_together_through_a_relay_and_go_direct_where_routers_let_them() {
    let rows = [
        (Nat::KeepsPorts, "two homes, routers keep ports", false),
        (Nat::Rejects, "two homes, routers keep ports and answer strangers with a reset", false),
        (Nat::Symmetric, "two homes, routers give each flow a random port", true),
    ];
    for (kind, topology, relayed) in rows {
        let Some(lab) = Lab::homes([kind; 2], [1, 1], 2) else { return };
        let (_relay, at) = relay(&lab).await;
        // Two who look from outside: only then it shows that each sees another port.
        let [second] = cast(&lab, [("w2", "Bootstrap", &["--no-mdns"])]).await;
        let also = address_with(&second, "/ip4/198.51.100.12/udp").await;
        let begun = Instant::now();
        let [a, b] = ends(&lab, ["a1", "b1"], &["--bootstrap", &at, "--bootstrap", &also]).await;
        let expected: [&[&str]; 2] =
            if relayed { [&["nat-symmetric", "peer-relayed", "relay-held"]; 2] } else { [&["behind-nat"]; 2] };
        let first = Row { topology, a: &a, b: &b, expected }.works(begun, SOON).await;
        if relayed {
            assert!(!first.direct, "{first:?}");
            continue;
        }
        // Punching is counted elsewhere, not promised: the row says what came of it.
        let deadline = Instant::now() + DEADLINE;
        while !path(&a, "NodeB").await.direct && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let now = path(&a, "NodeB").await.path();
        measured(&format!("{topology}: {} at first, {now} at the end, after", first.path()), begun.elapsed());
    }
}

#[tokio::test]
async fn one_home_with_a_forwarded_port_needs_no_relay() {
    let Some(lab) = Lab::homes([Nat::Forwards, Nat::Symmetric], [1, 1], 1) else { return };
    let announce = "[network]\nannounce = [\"/ip4/198.51.100.1/udp/4001/quic-v1\", \"/ip4/198.51.100.1/tcp/4001\"]\n";
    let a = configured(&lab, "a1", "NodeA", announce, SERVE).await;
    let at = address_with(&a, "/ip4/198.51.100.1/udp").await;
    let begun = Instant::now();
    let [b] = cast(&lab, [("b1", "NodeB", &[SERVE, &["--bootstrap", &at]].concat()[..])]).await;
    let topology = "two homes, port 4001 forwarded at NodeA's, no other node";
    let row = Row { topology, a: &a, b: &b, expected: [&[], &["bootstrap-connected"]] };
    assert!(row.works(begun, SOON).await.direct);
}
