//! Clusters that share a network and nothing else.

use super::*;
use crate::lab::Family;
use crate::liar::VICTIMS;
use crate::roles::Role;

#[tokio::test]
async fn clusters_on_one_lan_never_mix() {
    let Some(lab) = Lab::one_lan(4, Family::Both) else { return };
    let red: &[&str] = &["--serve", "--connect", "red", "--log", "debug"];
    let blue: &[&str] = &["--serve", "--connect", "blue", "--log", "debug"];
    let nodes = [("a1", "RedA", red), ("a2", "RedB", red), ("a3", "BlueA", blue), ("a4", "BlueB", blue)];
    let [red_a, red_b, blue_a, blue_b] = cast(&lab, nodes).await;
    for (node, cluster, other) in
        [(&red_a, "red", "RedB"), (&red_b, "red", "RedA"), (&blue_a, "blue", "BlueB"), (&blue_b, "blue", "BlueA")]
    {
        node.sees_in(cluster, &[other], DEADLINE).await;
    }
    // They do meet: each has been connected to the three others.
    let deadline = Instant::now() + DEADLINE;
    for node in [&red_a, &red_b, &blue_a, &blue_b] {
        while connections(&node.log()).len() < 3 {
            assert!(Instant::now() < deadline, "{} does not meet the others: {}", node.name(), node.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    for _ in 0..20 {
        for (node, other, stranger) in [(&red_a, "RedB", "BlueA"), (&blue_a, "BlueB", "RedA")] {
            let said = node.ogctl(&["prompt", "x", "--no-local"]).await;
            assert!(said.code == 0 && said.stderr.contains(&format!("served by {other}")), "{said:?}");
            let said = node.ogctl(&["prompt", "x", "--node", stranger]).await;
            assert_eq!(said.code, 5, "{said:?}");
        }
        for (node, cluster, other) in
            [(&red_a, "red", "RedB"), (&red_b, "red", "RedA"), (&blue_a, "blue", "BlueB"), (&blue_b, "blue", "BlueA")]
        {
            node.sees_in(cluster, &[other], Duration::ZERO).await;
        }
    }
    // Nor did they at any time before.
    for (node, strangers) in [(&red_a, "Blue"), (&red_b, "Blue"), (&blue_a, "Red"), (&blue_b, "Red")] {
        let log = node.log();
        assert!(!log.lines().any(|line| line.contains("peers: ") && line.contains(strangers)), "{log}");
    }
}

#[tokio::test]
async fn a_member_of_red_that_asks_for_blue_gets_not_a_byte() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let (mut at_both, mut at_blue) = (ModelServer::start(&lab, "a1").await, ModelServer::start(&lab, "a2").await);
    let debug = ["--log", "debug", "--connect", "blue"];
    let both = with_models(&lab, "a1", "Both", &at_both, "good", &[&debug[..], &["--connect", "red"]].concat()).await;
    let blue = with_models(&lab, "a2", "Blue", &at_blue, "good", &debug).await;
    both.sees_in("blue", &["Blue"], DEADLINE).await;
    for node in [&both, &blue] {
        node.until(&["status"], |status| status["backend"].as_str().is_some_and(|name| name.starts_with("openai"))).await;
    }
    let victims =
        [("Both", address_with(&both, "/ip4/10.71.0.11/tcp").await), ("Blue", address_with(&blue, "/ip4/10.71.0.12/tcp").await)];
    let victims: Vec<String> = victims.iter().map(|(name, at)| format!("{name}={at}")).collect();
    let mut liar = Role::start(&lab, "a3", "liar", &[(VICTIMS, &victims.join(" "))]);
    both.sees_in("red", &["Liar"], DEADLINE).await;
    let mut told = Vec::new();
    loop {
        match liar.told().await.as_str() {
            "done" => break,
            line => told.push(line.to_owned()),
        }
    }
    // In its own cluster it is answered: the lie is all that is wrong with the others.
    let answered =
        told.iter().filter(|line| !line.ends_with(" 0")).map(|line| line.rsplit_once(' ').unwrap().0).collect::<Vec<_>>();
    assert_eq!((answered, told.len()), (vec!["Both red"], 4), "{told:?}\n{}", both.log());
    assert_eq!(at_both.role.told_already().as_deref(), Some("asked"));
    assert_eq!((at_both.role.told_already(), at_blue.role.told_already()), (None, None), "nothing was asked of a model");
    assert!(both.log().contains("prompt from a stranger refused"), "{}", both.log());
    assert!(blue.log().contains("inference stream of a stranger refused"), "{}", blue.log());
    blue.sees_in("blue", &["Both"], Duration::ZERO).await;
}

#[tokio::test]
async fn a_node_in_two_clusters_is_listed_in_both_and_lists_each_ones_own_members() {
    let Some(lab) = Lab::one_lan(3, Family::Both) else { return };
    let both: &[&str] = &["--serve", "--connect", "red", "--connect", "blue"];
    let nodes: [(&str, &str, &[&str]); 3] = [
        ("a1", "Red", &["--serve", "--connect", "red"]),
        ("a2", "Blue", &["--serve", "--connect", "blue"]),
        ("a3", "Both", both),
    ];
    let [red, blue, both] = cast(&lab, nodes).await;
    both.sees_in("red", &["Red"], DEADLINE).await;
    both.sees_in("blue", &["Blue"], DEADLINE).await;
    red.sees_in("red", &["Both"], DEADLINE).await;
    blue.sees_in("blue", &["Both"], DEADLINE).await;
    for (cluster, server) in [("red", "Red"), ("blue", "Blue")] {
        for _ in 0..10 {
            let said = both.ogctl(&["prompt", "x", "--cluster", cluster, "--no-local"]).await;
            assert!(said.code == 0 && said.stderr.contains(&format!("served by {server}")), "{said:?}");
        }
    }
    // What the one in both tells of one cluster does not reach the other, and leaving one leaves the other as it is.
    assert_eq!(both.ogctl(&["disconnect", "red"]).await.code, 0);
    red.sees_in("red", &[], DEADLINE).await;
    blue.sees_in("blue", &["Both"], Duration::ZERO).await;
    both.sees_in("blue", &["Blue"], Duration::ZERO).await;
}
