//! What happens when processes and cables fail.

use super::*;
use crate::lab::Family;
use rustix::process::Signal;
use tokio::io::AsyncReadExt as _;

const SERVE: &[&str] = &["--serve", "--connect", CLUSTER];
const CONSUME: &[&str] = &["--consume", "--connect", CLUSTER];

/// NodeA and NodeB, which serve, and NodeC, which asks, when they see each other.
async fn trio(lab: &Lab, more: &[&str]) -> [Node; 3] {
    let (serve, consume) = ([SERVE, more].concat(), [CONSUME, more].concat());
    let nodes = cast(lab, [("a1", "NodeA", &serve[..]), ("a2", "NodeB", &serve), ("a3", "NodeC", &consume)]).await;
    let [a, b, c] = &nodes;
    all_see_each_other(&[a, b, c], Instant::now(), DEADLINE).await;
    nodes
}

/// The same with the model "slow" behind NodeA and NodeB.
async fn slow_trio(lab: &Lab, how: &str) -> ([ModelServer; 2], [Node; 3]) {
    let servers = [ModelServer::start(lab, "a1").await, ModelServer::start(lab, "a2").await];
    let join = ["--connect", CLUSTER];
    let a = with_models(lab, "a1", "NodeA", &servers[0], how, &join).await;
    let b = with_models(lab, "a2", "NodeB", &servers[1], how, &join).await;
    let [c] = cast(lab, [("a3", "NodeC", CONSUME)]).await;
    c.until(&["models", CLUSTER], |models| {
        models["models"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|model| model["model"] == "slow" && model["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2))
    })
    .await;
    (servers, [a, b, c])
}

async fn wait(child: tokio::process::Child) -> Said {
    let out = tokio::time::timeout(LIMIT, child.wait_with_output()).await.expect("ogctl ends").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: out.status.code().unwrap().try_into().unwrap(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

#[tokio::test]
async fn a_prompt_whose_server_dies_before_the_first_token_is_answered_by_another() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let (mut servers, [a, b, c]) = slow_trio(&lab, "before").await;
    let child = ogctl_on(&c.bus, &["prompt", "What is 2+2?", "--model", "slow", "--json"]).spawn().unwrap();
    let deadline = Instant::now() + DEADLINE;
    let asked = loop {
        if let Some(asked) = (0..2).find(|&at| servers[at].role.told_already().is_some_and(|told| told == "asked")) {
            break asked;
        }
        assert!(Instant::now() < deadline, "nobody is asked: {}", c.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let (dies, lives) = if asked == 0 { (&a, &b) } else { (&b, &a) };
    let begun = Instant::now();
    dies.signal(Signal::KILL);
    assert_eq!(servers[1 - asked].role.told().await, "asked");
    measured("a prompt of a killed server is asked of another after", begun.elapsed());
    servers[1 - asked].role.say("go");
    let said = wait(child).await;
    assert_eq!(said.code, 0, "{said:?}");
    let answer: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(
        (answer["text"].as_str(), answer["served_by"]["name"].as_str()),
        (Some("The answer is 4"), Some(lives.name())),
        "{answer}"
    );
}

#[tokio::test]
async fn a_prompt_whose_server_dies_after_the_first_token_is_interrupted_with_its_partial_text() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let (_servers, [a, _b, c]) = slow_trio(&lab, "after").await;
    let args = ["prompt", "What is 2+2?", "--model", "slow", "--node", "NodeA"];
    let mut text = ogctl_on(&c.bus, &args).spawn().unwrap();
    let mut lines = ogctl_on(&c.bus, &[&args[..], &["--json", "--stream"]].concat()).spawn().unwrap();
    let mut first = [0; 11];
    tokio::time::timeout(DEADLINE, text.stdout.as_mut().unwrap().read_exact(&mut first)).await.expect("a first token").unwrap();
    assert_eq!(&first, b"The answer ");
    let mut line = [0; 1];
    tokio::time::timeout(DEADLINE, lines.stdout.as_mut().unwrap().read_exact(&mut line)).await.expect("a first token").unwrap();
    let begun = Instant::now();
    a.signal(Signal::KILL);
    let said = wait(text).await;
    measured("a prompt of a killed server is interrupted after", begun.elapsed());
    assert_eq!(said.code, 1, "{said:?}");
    assert!(!said.stdout.contains("is 4") && !said.stderr.contains("served by"), "{said:?}");
    let said = wait(lines).await;
    assert_eq!(said.code, 1, "{said:?}");
    let last: serde_json::Value = serde_json::from_str(said.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["error"]["name"], "Interrupted", "{said:?}");
    assert!(said.stdout.contains("The answer "), "{said:?}");
}

#[tokio::test]
async fn a_killed_member_is_gone_within_fifteen_seconds() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, _b, c] = trio(&lab, &[]).await;
    let begun = Instant::now();
    a.signal(Signal::KILL);
    c.sees_in(CLUSTER, &["NodeB"], DEADLINE).await;
    let gone = begun.elapsed();
    measured("a killed member is gone after", gone);
    assert!(gone < DEAD + TOLERANCE, "{gone:?}");
    assert_eq!(echoed(&c, "x").await, "NodeB");
}

#[tokio::test]
async fn a_stopped_member_is_gone_at_once() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [mut a, b, c] = trio(&lab, &[]).await;
    let begun = Instant::now();
    a.signal(Signal::TERM);
    c.sees_in(CLUSTER, &["NodeB"], DEADLINE).await;
    let gone = begun.elapsed();
    measured("a stopped member is gone after", gone);
    assert!(gone < Duration::from_secs(2), "{gone:?}");
    b.sees_in(CLUSTER, &["NodeC"], TOLERANCE).await;
    assert_eq!(a.ended().await, Some(0));
    // Started again it is back, as the same node.
    let begun = Instant::now();
    a.restart().await;
    measured("started again it is back after", all_see_each_other(&[&a, &b, &c], begun, DEAD).await);
}

/// Waits until NodeC and the two others have lost each other.
async fn lost([a, b, c]: [&Node; 3], begun: Instant) -> Duration {
    a.sees_in(CLUSTER, &["NodeB"], DEADLINE).await;
    b.sees_in(CLUSTER, &["NodeA"], DEADLINE).await;
    let noticed = begun.elapsed();
    c.sees_in(CLUSTER, &[], DEADLINE).await;
    noticed.max(begun.elapsed())
}

#[tokio::test]
async fn a_member_whose_cable_is_pulled_is_gone_within_fifteen_seconds_and_back_within_fifteen() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, b, c] = trio(&lab, &[]).await;
    for round in 1..=2 {
        let begun = Instant::now();
        lab.cut("a3");
        let gone = lost([&a, &b, &c], begun).await;
        measured("a member whose cable was pulled is gone after", gone);
        assert!(gone < DEAD + TOLERANCE, "{gone:?}");
        // Both sides are whole in themselves.
        assert_eq!(echoed(&a, "x").await, "NodeB");
        assert_eq!(c.ogctl(&["prompt", "x"]).await.code, 5);
        let begun = Instant::now();
        lab.heal("a3");
        let back = all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await;
        measured(&format!("round {round}: with the cable in again all see each other after"), back);
        assert!(back < DEAD + TOLERANCE, "{back:?}");
        echoed(&c, "What is 2+2?").await;
    }
}

#[tokio::test]
async fn a_long_cut_is_healed_as_fast_as_a_short_one() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, b, c] = trio(&lab, &[]).await;
    let begun = Instant::now();
    // No carrier is lost: nothing tells the nodes that it is worth trying again.
    lab.split(&["a1", "a2"], &["a3"]);
    lost([&a, &b, &c], begun).await;
    // Long enough for a back-off without a bound to have grown beyond what is promised.
    tokio::time::sleep_until((begun + Duration::from_secs(100)).into()).await;
    let begun = Instant::now();
    lab.unsplit();
    let back = all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await;
    measured("after a cut of 100 s all see each other after", back);
    assert!(back < DEAD + TOLERANCE, "{back:?}");
    echoed(&c, "What is 2+2?").await;
}

#[tokio::test]
async fn a_member_that_loses_its_addresses_and_gets_them_again_is_back() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, b, c] = trio(&lab, &[]).await;
    let begun = Instant::now();
    lab.cut("a3");
    lab.address("a3", false);
    let gone = lost([&a, &b, &c], begun).await;
    measured("a member without addresses is gone after", gone);
    assert!(gone < DEAD + TOLERANCE, "{gone:?}");
    let begun = Instant::now();
    lab.heal("a3");
    lab.address("a3", true);
    let back = all_see_each_other(&[&a, &b, &c], begun, DEADLINE).await;
    measured("with its addresses again all see each other after", back);
    assert!(back < DEAD + TOLERANCE, "{back:?}");
    echoed(&c, "What is 2+2?").await;
}

/// Freezes NodeA, watches it from NodeC, and thaws it. Tells whether it was seen as a suspect.
async fn frozen([a, b, c]: [&Node; 3], transport: &str) -> bool {
    let begun = Instant::now();
    a.signal(Signal::STOP);
    let state = |peers: &serde_json::Value| {
        let found = peers["peers"].as_array().into_iter().flatten().find(|peer| peer["name"] == "NodeA");
        found.map(|peer| peer["liveness"].as_str().unwrap_or_default().to_owned())
    };
    let peers = c.until(&["peers", CLUSTER], |peers| state(peers).is_none_or(|liveness| liveness != "alive")).await;
    let suspected = state(&peers).is_some_and(|liveness| liveness == "suspect");
    measured(&format!("{transport}: a frozen member is {} after", if suspected { "suspect" } else { "gone" }), begun.elapsed());
    for _ in 0..5 {
        let asked = Instant::now();
        assert_eq!(echoed(c, "x").await, "NodeB");
        assert!(asked.elapsed() < Duration::from_secs(5), "a prompt was sent to a suspect");
    }
    c.sees_in(CLUSTER, &["NodeB"], DEADLINE).await;
    let gone = begun.elapsed();
    measured(&format!("{transport}: a frozen member is gone after"), gone);
    assert!(gone < Duration::from_millis(15_500), "{gone:?}");
    let begun = Instant::now();
    a.signal(Signal::CONT);
    let back = all_see_each_other(&[a, b, c], begun, DEADLINE).await;
    measured(&format!("{transport}: thawed it is back after"), back);
    assert!(back < DEAD + TOLERANCE, "{back:?}");
    suspected
}

#[tokio::test]
async fn a_frozen_member_gets_no_prompts_is_gone_within_fifteen_seconds_and_comes_back() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, b, c] = trio(&lab, &[]).await;
    frozen([&a, &b, &c], "quic").await;
}

#[tokio::test]
async fn a_frozen_member_is_a_suspect_over_tcp_where_the_kernel_still_answers_for_it() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let [a, b, c] = trio(&lab, &["--listen", "/ip4/0.0.0.0/tcp/4001"]).await;
    assert!(frozen([&a, &b, &c], "tcp").await, "it was gone before it was a suspect");
}
