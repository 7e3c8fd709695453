//! A cluster that is too large for everybody to be connected to everybody: who is not connected is known, and reached when
//! needed.

use super::*;
use crate::domain::node::Liveness;

const SMALL: Mesh = Mesh { full: 4, random: 2, near: 1 };
const NAMES: [&str; 12] = ["n01", "n02", "n03", "n04", "n05", "n06", "n07", "n08", "n09", "n10", "n11", "n12"];

async fn crowd(first: Plan) -> Vec<Node> {
    let mut nodes = vec![first.start().await];
    nodes[0].join("home", true, &[]).await;
    let bootstrap = [nodes[0].address().await];
    for name in &NAMES[1..] {
        let node = Plan { mesh: SMALL, ..plan(name) }.start().await;
        node.join("home", true, &bootstrap).await;
        nodes.push(node);
    }
    nodes
}

fn with(snapshot: &Snapshot, liveness: Liveness) -> Vec<Arc<Member>> {
    snapshot.clusters[&id("home")].members.iter().filter(|member| member.liveness == liveness).cloned().collect()
}

#[tokio::test]
async fn everybody_lists_everybody_with_few_connections_and_reaches_whom_it_only_knows() {
    let nodes = crowd(Plan { mesh: SMALL, ..plan(NAMES[0]) }).await;
    let (mut known, mut asker) = (0, 0);
    for (at, node) in nodes.iter().enumerate() {
        let others: Vec<&str> = NAMES.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, name)| *name).collect();
        let members = node.sees("home", &others).await;
        let only_known = members.iter().filter(|member| member.liveness == Liveness::Known).count();
        known += only_known;
        // Whom the others choose is chance, and one may well be chosen by all of them.
        asker = if only_known > 0 { at } else { asker };
    }
    assert!(known > NAMES.len(), "{known} of {} are only known", NAMES.len() * (NAMES.len() - 1));
    let asker = &nodes[asker];
    let snapshot = asker.until("somebody that is only known", |snapshot| !with(snapshot, Liveness::Known).is_empty()).await;
    let other = with(&snapshot, Liveness::Known)[0].clone();
    assert!(other.serving && other.models == [ModelOffer::named("echo")] && !other.addresses.is_empty(), "{other:?}");
    assert!(asker.ask("home", &other.id, "hello").is_err(), "nobody is asked without a connection");
    // The doctor knows whom the list shows, by name.
    let facts = asker.handle.facts(Some(other.name.clone())).await.unwrap();
    let told = facts.peers.iter().find(|peer| peer.id == other.id).unwrap();
    assert_eq!(told.name.as_ref(), Some(&other.name));
    // Whom it has met since, or failed to dial, it judges by that.
    let met = !told.links.is_empty() || !told.attempts.is_empty() || !told.greetings.is_empty();
    assert!(met || told.member_of == [id("home")], "{told:?}");
    assert!(!told.addresses.is_empty() && told.heard_ago.is_some(), "{told:?}");
    assert!(
        timeout(DEADLINE, asker.handle.reach(id("home"), other.id.clone(), tokio::time::Instant::now() + DEADLINE))
            .await
            .unwrap()
    );
    assert_eq!(whole(&mut asker.ask("home", &other.id, "hello").unwrap()).await, Ok("hello".to_owned()));
    // Nobody is reached who is not there, nor in a cluster where it is not known.
    assert!(!asker.handle.reach(id("home"), NodeId::new("12D3KooWNobody"), tokio::time::Instant::now() + DEADLINE).await);
    assert!(!asker.handle.reach(id("other"), other.id.clone(), tokio::time::Instant::now() + DEADLINE).await);
}

#[tokio::test]
async fn a_member_of_version_two_lives_among_them_and_hears_nothing_that_it_does_not_know() {
    let nodes = crowd(Plan { versions: Versions { min: 1, max: 2 }, ..plan(NAMES[0]) }).await;
    let mut events = nodes[0].handle.events();
    let all: Vec<&str> = NAMES[1..].to_vec();
    let members = nodes[0].sees("home", &all).await;
    assert!(members.iter().all(|member| member.liveness == Liveness::Alive && member.protocol == 2));
    for node in &nodes[1..] {
        node.until("the old one", |snapshot| listed(snapshot, "home").contains(&NAMES[0].to_owned())).await;
    }
    let gone = drained(&mut events).into_iter().find(|event| matches!(event, Event::MemberDown { .. }));
    assert!(gone.is_none(), "{gone:?}");
}

#[tokio::test]
async fn who_leaves_is_soon_listed_by_nobody() {
    let mut nodes = crowd(Plan { mesh: SMALL, ..plan(NAMES[0]) }).await;
    for node in &nodes {
        node.until("everybody", |snapshot| listed(snapshot, "home").len() == NAMES.len() - 1).await;
    }
    let leaving = nodes.pop().unwrap();
    leaving.handle.shutdown().await;
    for node in &nodes {
        node.until("one less", |snapshot| !listed(snapshot, "home").contains(&NAMES[NAMES.len() - 1].to_owned())).await;
    }
}
