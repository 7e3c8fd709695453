//! Nodes behind home routers: through them where a hole can be punched, round them through a relay where it cannot.

use std::process::{Command, Stdio};

use rustix::process::Signal;
use tokio::io::AsyncReadExt as _;

use super::*;
use crate::eye::{Eye, Seen};
use crate::history::Outcome;
use crate::lab::Nat;
use crate::report::long;

/// A hole is punched within this, or not at all that anybody would wait for.
pub const PUNCHED: Duration = Duration::from_secs(20);

/// Both nodes and the relay between them listen over one transport alone, so that it is known what was punched.
#[derive(Debug, Clone, Copy)]
pub struct Over(pub &'static str, &'static str);

pub const QUIC: Over = Over("QUIC", "/ip4/0.0.0.0/udp/4001/quic-v1");
pub const TCP: Over = Over("TCP", "/ip4/0.0.0.0/tcp/4001");

/// A relay on w1 that is a member, so that its name is known.
pub async fn relay(lab: &Lab, over: Over) -> (Node, String) {
    let bus = bus_or_skip().expect("the lab has seen dbus-daemon");
    let config = bus.dir().join("opengatewayd.toml");
    std::fs::write(&config, "[relay]\nenabled = true\n").unwrap();
    let args = ["--config", config.to_str().unwrap(), "--consume", "--connect", CLUSTER, "--no-mdns", "--listen", over.1];
    let mut node = Node::on(bus, Plan::within(&lab.namespace("w1"), "Relay", &args));
    node.ready().await;
    let at = address_with(&node, "/ip4/198.51.100.11/").await;
    (node, at)
}

pub fn args<'a>(role: &'a str, over: Over, at: &'a str) -> [&'a str; 8] {
    [role, "--connect", CLUSTER, "--no-mdns", "--listen", over.1, "--bootstrap", at]
}

/// NodeA in LAN a and NodeB in LAN b, who see each other and the relay.
async fn ends(lab: &Lab, over: Over, at: &str) -> [Node; 2] {
    let begun = Instant::now();
    let ends = cast(lab, [("a1", "NodeA", &args("--serve", over, at)[..]), ("b1", "NodeB", &args("--serve", over, at))]).await;
    met(&Eye::on(&ends[0]).await, "NodeB").await;
    met(&Eye::on(&ends[1]).await, "NodeA").await;
    measured(&format!("two homes meet over {}", over.0), begun.elapsed());
    ends
}

/// How `eye` reaches `name`.
async fn way(eye: &Eye, name: &str) -> Option<Seen> {
    eye.peers().await.into_iter().find(|peer| peer.name == name && peer.usable())
}

/// Waits until `eye` is connected to `name`, by whatever way: members are listed before that, as known.
async fn met(eye: &Eye, name: &str) -> Seen {
    let begun = Instant::now();
    loop {
        if let Some(seen) = way(eye, name).await {
            return seen;
        }
        assert!(begun.elapsed() < DEADLINE, "{} does not meet {name}", eye.name());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the way is direct; gives how long that took.
pub async fn direct(eye: &Eye, name: &str, limit: Duration) -> Option<Duration> {
    let begun = Instant::now();
    while begun.elapsed() < limit {
        if way(eye, name).await.is_some_and(|seen| seen.direct) {
            return Some(begun.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    None
}

/// A rule of the router between LAN a and the rest: nothing passes between the two homes but through the relay.
fn wall(lab: &Lab, there: bool) {
    let table = "table inet wall";
    let rules = if there {
        format!(
            "{table} {{ chain f {{ type filter hook forward priority -300; ip daddr 198.51.100.2 drop; ip saddr 198.51.100.2 drop; }}; chain i {{ type filter hook input priority -300; ip saddr 198.51.100.2 drop; }}; }}"
        )
    } else {
        format!("delete {table}")
    };
    let done = Command::new("ip").args(["netns", "exec", &lab.namespace("ra"), "nft", &rules]).status().unwrap();
    assert!(done.success(), "{rules}");
}

#[tokio::test]
async fn two_homes_whose_routers_keep_ports_reach_each_other_directly_or_at_least_through_the_relay() {
    for over in [QUIC, TCP] {
        let Some(lab) = Lab::homes([Nat::KeepsPorts; 2], [1, 1], 1) else { return };
        let (_relay, at) = relay(&lab, over).await;
        let [a, b] = ends(&lab, over, &at).await;
        let eye = Eye::on(&a).await;
        match direct(&eye, "NodeB", PUNCHED).await {
            Some(time) => measured(&format!("a hole over {} is punched", over.0), time),
            None => eprintln!("MEASURED over {}: no hole in {PUNCHED:?}", over.0),
        }
        eprintln!("MEASURED the way over {}: {}", over.0, way(&eye, "NodeB").await.unwrap().path());
        for node in [&a, &b] {
            echoed(node, "What is 2+2?").await;
        }
    }
}

#[tokio::test]
async fn where_every_flow_gets_a_port_of_its_own_the_relay_carries_and_is_named() {
    for over in [QUIC, TCP] {
        let Some(lab) = Lab::homes([Nat::Symmetric; 2], [1, 1], 1) else { return };
        let (_relay, at) = relay(&lab, over).await;
        let [a, b] = ends(&lab, over, &at).await;
        for (node, other) in [(&a, "NodeB"), (&b, "NodeA")] {
            let said = node.ogctl(&["prompt", "hello", "--cluster", CLUSTER, "--node", other]).await;
            assert_eq!((said.code, said.stdout.as_str()), (0, "hello\n"), "{said:?}");
            let seen = way(&Eye::on(node).await, other).await.unwrap();
            assert!(seen.path().starts_with("relayed"), "{}", node.log());
        }
        let said = a.ogctl(&["peers", CLUSTER]).await;
        assert!(said.stdout.contains("relayed via Relay"), "{said:?}");
    }
}

/// Bytes that a relay carries on one circuit, both directions together, unless it is told otherwise.
const CIRCUIT: usize = 1 << 30;

#[tokio::test]
async fn a_relay_carries_its_gibibyte_and_its_cut_is_named() {
    if !long() {
        return;
    }
    let Some(lab) = Lab::homes([Nat::Symmetric; 2], [1, 1], 1) else { return };
    let (_relay, at) = relay(&lab, QUIC).await;
    let [a, _b] = ends(&lab, QUIC, &at).await;
    let eye = Eye::on(&a).await;
    let prompt = "x".repeat((1 << 20) - 1024);
    let (begun, mut carried) = (Instant::now(), 0);
    let error = loop {
        match eye.ask(&prompt, Some("NodeB"), DEADLINE).await.outcome().unwrap() {
            Outcome::Answer(_) => carried += 2 * prompt.len(),
            Outcome::Error(name) => break name,
        }
        // Where the cut comes before the answer has begun, the prompt is sent once more, on the next circuit.
        assert!(carried < 5 * CIRCUIT, "five circuits, and no prompt was cut");
    };
    measured(&format!("{} MiB went over the relay before {error}", carried >> 20), begun.elapsed());
    assert_eq!(error, "RelayLimit");
    assert!(carried > CIRCUIT / 10 * 9, "cut after {carried} bytes");
    met(&eye, "NodeB").await;
    echoed(&a, "What is 2+2?").await;
}

#[tokio::test]
async fn a_home_with_a_forwarded_port_is_reached_directly_from_any_other() {
    let Some(lab) = Lab::homes([Nat::Symmetric, Nat::Forwards], [1, 1], 1) else { return };
    let (_relay, at) = relay(&lab, QUIC).await;
    let [a, b] = ends(&lab, QUIC, &at).await;
    let time = direct(&Eye::on(&a).await, "NodeB", PUNCHED).await.unwrap_or_else(|| panic!("{}\n\n{}", a.log(), b.log()));
    measured("a forwarded port is found", time);
    echoed(&a, "What is 2+2?").await;
}

#[tokio::test]
async fn a_relay_that_dies_in_the_middle_of_an_answer_ends_it_by_name_and_is_used_again_when_it_is_back() {
    let Some(lab) = Lab::homes([Nat::Symmetric; 2], [1, 1], 1) else { return };
    let (mut relay, at) = relay(&lab, QUIC).await;
    let server = ModelServer::start(&lab, "a1").await;
    let a = with_models(&lab, "a1", "NodeA", &server, "after", &args("--serve", QUIC, &at)[1..]).await;
    let [b] = cast(&lab, [("b1", "NodeB", &args("--consume", QUIC, &at)[..])]).await;
    b.sees_in(CLUSTER, &["NodeA", "Relay"], DEADLINE).await;
    b.until(&["models"], |models| models.to_string().contains("slow")).await;
    let asked = ["prompt", "What is 2+2?", "--model", "slow", "--node", "NodeA", "--json", "--stream"];
    let mut child = ogctl_on(&b.bus, &asked).stdout(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 1];
    tokio::time::timeout(DEADLINE, child.stdout.as_mut().unwrap().read_exact(&mut some)).await.expect("a first token").unwrap();
    let begun = Instant::now();
    relay.signal(Signal::KILL);
    let said = tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("an end in time").unwrap();
    measured("an answer through a killed relay ends after", begun.elapsed());
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(text.lines().last().unwrap().contains("Interrupted") && !text.contains("is 4"), "{text}");
    relay.ended().await;
    let eye = Eye::on(&b).await;
    while way(&eye, "NodeA").await.is_some() {
        assert!(begun.elapsed() < DEAD + TOLERANCE, "NodeA is gone");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    relay.restart().await;
    let begun = Instant::now();
    met(&Eye::on(&b).await, "NodeA").await;
    measured("two homes meet again after their relay is back", begun.elapsed());
    drop(a);
}

#[tokio::test]
async fn an_answer_that_began_on_the_relay_ends_there_and_the_next_prompt_goes_directly() {
    let Some(lab) = Lab::homes([Nat::KeepsPorts; 2], [1, 1], 1) else { return };
    let (_relay, at) = relay(&lab, QUIC).await;
    wall(&lab, true);
    let mut server = ModelServer::start(&lab, "a1").await;
    let a = with_models(&lab, "a1", "NodeA", &server, "after", &args("--serve", QUIC, &at)[1..]).await;
    let [b] = cast(&lab, [("b1", "NodeB", &args("--consume", QUIC, &at)[..])]).await;
    b.sees_in(CLUSTER, &["NodeA", "Relay"], DEADLINE).await;
    b.until(&["models"], |models| models.to_string().contains("slow")).await;
    let eye = Eye::on(&b).await;
    assert!(met(&eye, "NodeA").await.path().starts_with("relayed"));
    let asked = ["prompt", "What is 2+2?", "--model", "slow", "--node", "NodeA"];
    let mut child = ogctl_on(&b.bus, &asked).stdout(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 11];
    tokio::time::timeout(DEADLINE, child.stdout.as_mut().unwrap().read_exact(&mut some)).await.expect("a first token").unwrap();
    wall(&lab, false);
    // Three attempts of fifteen seconds each are made.
    let time = direct(&eye, "NodeA", 2 * DEADLINE).await.unwrap_or_else(|| panic!("{}\n\n{}", a.log(), b.log()));
    measured("a hole is punched after a wall has gone", time);
    // Longer than a second connection is tolerated: the one with the answer on it stays.
    tokio::time::sleep(Duration::from_secs(13)).await;
    server.role.say("go");
    let said = tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("an end in time").unwrap();
    assert!(said.status.success(), "{said:?}\n{}", b.log());
    assert!(String::from_utf8_lossy(&said.stdout).contains("is 4"), "{said:?}");
    let said = b.ogctl(&["prompt", "directly", "--model", "echo", "--node", "NodeA"]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "directly\n"), "{said:?}");
    assert!(way(&eye, "NodeA").await.unwrap().direct);
}
