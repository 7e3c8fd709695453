//! Networks that lose, delay, double, reorder, split or choke what is sent.

use futures::StreamExt as _;

use super::*;
use crate::eye::{Eye, until};
use crate::history::{Figures, History, Record};
use crate::lab::{Family, Weather};
use crate::report::{Table, long};

const SERVE: &[&str] = &["--serve", "--connect", CLUSTER];
const TCP: &[&str] = &["--serve", "--connect", CLUSTER, "--listen", "/ip4/0.0.0.0/tcp/4001"];
/// What a user waits for a short answer.
const LIMIT: Duration = Duration::from_secs(30);
const SHORT: usize = 64;

const TABLE: Table = Table {
    title: "Prompts through bad networks",
    head: &["network", "transport", "prompts", "answered", "errors", "p50", "p95", "longest"],
};

fn tell(network: &str, transport: &str, figures: &Figures) {
    let cells = [network, transport].map(str::to_owned).into_iter().chain(figures.cells());
    TABLE.row(cells.collect());
}

/// A prompt of so many bytes that is not like the others.
fn prompt(number: usize, bytes: usize) -> String {
    let mut text = format!("{number}: What is 2+2? ");
    while text.len() < bytes {
        text.push(char::from(b'a' + u8::try_from(text.len() % 26).unwrap()));
    }
    text
}

/// Asks `count` prompts, a few at a time.
async fn ask_many(eye: &Eye, count: usize, at_once: usize, bytes: usize) -> Vec<Record> {
    let asked = (0..count).map(|number| async move { eye.ask(&prompt(number, bytes), None, LIMIT).await });
    futures::stream::iter(asked).buffer_unordered(at_once).collect().await
}

/// NodeA and NodeB, when they see each other, and eyes on both.
async fn pair(lab: &Lab, args: &[&str]) -> ([Node; 2], [Eye; 2]) {
    let nodes = cast(lab, [("a1", "NodeA", args), ("a2", "NodeB", args)]).await;
    let [a, b] = &nodes;
    all_see_each_other(&[a, b], Instant::now(), DEADLINE).await;
    let eyes = [Eye::on(a).await, Eye::on(b).await];
    (nodes, eyes)
}

/// The transport that NodeA has to NodeB.
async fn transport(eye: &Eye) -> String {
    eye.peers().await.first().map(|peer| peer.transport.clone()).unwrap_or_default()
}

/// Prompts over connections that were there before the weather changed.
async fn established(
    name: &str,
    args: &[&str],
    (count, at_once, bytes): (usize, usize, usize),
    change: impl FnOnce(&Lab),
) -> Option<Figures> {
    let lab = Lab::one_lan(2, Family::Both)?;
    let (_nodes, eyes) = pair(&lab, args).await;
    let by = transport(&eyes[0]).await;
    change(&lab);
    let mut history = History::default();
    history.extend(ask_many(&eyes[0], count, at_once, bytes).await);
    let figures = history.judge();
    tell(name, &by, &figures);
    History::rests(&eyes).await;
    Some(figures)
}

#[tokio::test]
async fn through_30_percent_loss_99_of_100_prompts_are_answered_on_connections_that_are_there() {
    for args in [SERVE, TCP] {
        let name = "30 % lost each way, connected before";
        let Some(figures) = established(name, args, (200, 4, SHORT), |lab| lab.loss("a1", 30)).await else { return };
        assert!(figures.at_least(99), "{figures:?}");
    }
}

#[tokio::test]
async fn through_10_percent_loss_all_prompts_are_answered() {
    let name = "10 % lost each way, connected before";
    let Some(figures) = established(name, SERVE, (200, 4, SHORT), |lab| lab.loss("a1", 10)).await else { return };
    assert!(figures.at_least(100), "{figures:?}");
}

#[tokio::test]
async fn over_a_far_way_that_doubles_and_reorders_all_prompts_are_answered() {
    let far = Weather { delay_ms: 100, jitter_ms: 50, reorder: true, duplicate_percent: 5 };
    for args in [SERVE, TCP] {
        let name = "100 ± 50 ms each way, reordered, 5 % doubled";
        let Some(figures) = established(name, args, (100, 8, SHORT), |lab| lab.weather("a1", Some(far))).await else { return };
        assert!(figures.at_least(100), "{figures:?}");
    }
}

#[tokio::test]
async fn with_packets_of_1280_bytes_at_most_large_prompts_are_answered() {
    for args in [SERVE, TCP] {
        let name = "MTU 1280, 100 kB each way";
        let Some(figures) = established(name, args, (50, 4, 100_000), |lab| lab.mtu("a2", 1280)).await else { return };
        assert!(figures.at_least(100), "{figures:?}");
    }
}

#[tokio::test]
async fn over_one_megabit_a_second_large_prompts_are_answered() {
    for args in [SERVE, TCP] {
        let name = "1 Mbit/s each way, 10 kB each way";
        let Some(figures) = established(name, args, (40, 4, 10_000), |lab| lab.rate("a1", 1000)).await else { return };
        assert!(figures.at_least(100), "{figures:?}");
    }
}

/// Takes NodeA from a network, lets it meet NodeB again as a new process, and asks.
async fn fresh(node: &mut Node, rounds: usize) -> Vec<Record> {
    let mut records = Vec::new();
    for round in 0..rounds {
        node.kill().await;
        node.launch();
        node.ready().await;
        let eye = Eye::on(node).await;
        let begun = Instant::now();
        let met =
            until(std::slice::from_ref(&eye), LIMIT, |_, peers| peers.iter().any(|peer| peer.name == "Server" && peer.usable()))
                .await;
        let text = prompt(round, SHORT);
        let mut record = eye.ask(&text, Some("Server"), LIMIT.saturating_sub(begun.elapsed())).await;
        if met.is_ok() {
            // What counts is the time from the start of the process.
            (record.took, record.limit) = (begun.elapsed(), LIMIT);
        }
        if let Ok(history::Outcome::Error(name)) = record.outcome() {
            eprintln!("{} round {round}: {name}; last of its log:", node.name());
            let log = node.log();
            log.lines().skip(log.lines().count().saturating_sub(30)).for_each(|line| eprintln!("  {line}"));
        }
        records.push(record);
    }
    records
}

#[tokio::test]
async fn through_30_percent_loss_95_of_100_prompts_are_answered_by_processes_that_begin_with_it() {
    let rounds = if std::env::var_os("OPENGATEWAY_LAB").is_some() { 50 } else { 5 };
    let Some(lab) = Lab::one_lan(5, Family::Both) else { return };
    let [server] = cast(&lab, [("a5", "Server", SERVE)]).await;
    let at = address_with(&server, "/ip4/10.71.0.15/udp").await;
    let args = ["--connect", CLUSTER, "--bootstrap", &at, "--log", "debug"];
    for host in ["a1", "a2", "a3", "a4"] {
        lab.loss(host, 30);
    }
    let mut nodes =
        cast(&lab, [("a1", "NodeA", &args[..]), ("a2", "NodeB", &args), ("a3", "NodeC", &args), ("a4", "NodeD", &args)]).await;
    let asked = futures::future::join_all(nodes.iter_mut().map(|node| fresh(node, rounds))).await;
    let mut history = History::default();
    history.extend(asked.into_iter().flatten());
    let figures = history.judge();
    tell("30 % lost each way, from the start of a process", "either", &figures);
    assert!(figures.at_least(95), "{figures:?}");
}

#[tokio::test]
async fn where_udp_is_blocked_tcp_takes_over() {
    let Some(lab) = Lab::one_lan(2, Family::Both) else { return };
    let (nodes, eyes) = pair(&lab, SERVE).await;
    let [a, b] = &nodes;
    assert_eq!(transport(&eyes[0]).await, "quic");
    // While they are connected.
    lab.no_udp("a2", true);
    let begun = Instant::now();
    let by_tcp = |_: &str, peers: &[eye::Seen]| peers.iter().any(|peer| peer.usable() && peer.transport == "tcp");
    let over = until(&eyes, DEADLINE, by_tcp).await.unwrap_or_else(|lists| panic!("{lists:?}\n{}\n{}", a.log(), b.log()));
    measured("UDP is blocked between two that are connected by QUIC: TCP has taken over after", over);
    let mut history = History::default();
    history.extend(ask_many(&eyes[0], 50, 4, SHORT).await);
    tell("UDP blocked, connected by QUIC before", "tcp", &history.judge());
    assert!(history.judge().at_least(100));
    assert!(begun.elapsed() < 4 * DEADLINE);
}

#[tokio::test]
async fn where_udp_was_always_blocked_nodes_meet_by_tcp() {
    let Some(lab) = Lab::routed([1, 1, 1]) else { return };
    lab.no_udp("b1", true);
    let [bootstrap] = cast(&lab, [("a1", "Bootstrap", &["--no-mdns"])]).await;
    let at = address_with(&bootstrap, "/ip4/10.71.0.11/udp").await;
    // The address is of QUIC alone, as somebody pastes it; both are given, as the documentation says.
    let over_tcp = address_with(&bootstrap, "/ip4/10.71.0.11/tcp").await;
    let args = ["--serve", "--connect", CLUSTER, "--bootstrap", &at, "--bootstrap", &over_tcp];
    let begun = Instant::now();
    let [a, b] = cast(&lab, [("b1", "NodeA", &args[..]), ("c1", "NodeB", &args)]).await;
    let met = all_see_each_other(&[&a, &b], begun, DEADLINE).await;
    measured("two nodes, UDP blocked at one of them: they see each other after", met);
    assert!(met < Duration::from_secs(5), "a handshake over QUIC that times out holds up TCP: {met:?}");
    let eyes = [Eye::on(&a).await, Eye::on(&b).await];
    let mut history = History::default();
    history.extend(ask_many(&eyes[0], 50, 4, SHORT).await);
    let figures = history.judge();
    tell("UDP blocked from the start", &transport(&eyes[0]).await, &figures);
    assert!(figures.at_least(100), "{figures:?}");
}

#[tokio::test]
async fn while_a_cable_flaps_every_prompt_ends_once_and_after_it_all_is_well() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let nodes = daemons(&lab, &[("a1", "NodeA", SERVE), ("a2", "NodeB", SERVE), ("a3", "NodeC", SERVE)]).await;
    all_see_each_other(&nodes.iter().collect::<Vec<_>>(), Instant::now(), DEADLINE).await;
    let eyes = eye::eyes(&nodes).await;
    let flaps = if long() { 40 } else { 5 };
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let asking = async {
        let mut history = History::default();
        let mut number = 0;
        while !*stopped.borrow() {
            number += 1;
            history.add(eyes[0].ask(&prompt(number, SHORT), None, LIMIT).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        history
    };
    let flapping = async {
        for _ in 0..flaps {
            lab.cut("a2");
            tokio::time::sleep(Duration::from_secs(3)).await;
            lab.heal("a2");
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        stop.send_replace(true);
    };
    let (history, ()) = tokio::join!(asking, flapping);
    let figures = history.judge();
    tell("one of two servers: cable out 3 s, in 3 s, and so on", "quic", &figures);
    assert!(figures.at_least(99), "{figures:?}");
    let healed = until(&eyes, DEADLINE, |_, peers| peers.iter().filter(|peer| peer.usable()).count() == 2).await;
    let healed = healed.unwrap_or_else(|lists| panic!("{lists:?}"));
    measured("after the last flap all see each other after", healed);
    assert!(healed < DEAD + TOLERANCE, "{healed:?}");
    History::rests(&eyes).await;
}
