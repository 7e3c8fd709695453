//! Nodes of two versions in one cluster, and what only the newer one says.

use super::*;
use crate::domain::node::{ModelSource, ModelState};

fn model(name: &str, state: ModelState) -> ModelOffer {
    ModelOffer {
        state,
        source: ModelSource::Engine,
        size: Some(386_000_000),
        parameters: Some(362_000_000),
        quantisation: Some("Q8_0".to_owned()),
        digest: Some([7; 32]),
        slots: 4,
        context_tokens: 4096,
        ..ModelOffer::named(name)
    }
}

fn models_of(snapshot: &Snapshot, name: &str) -> Vec<ModelOffer> {
    let members = snapshot.clusters.get(&id("home")).map(|view| view.members.as_slice()).unwrap_or_default();
    members.iter().find(|member| member.name == name).map(|member| member.models.clone()).unwrap_or_default()
}

#[tokio::test]
async fn an_old_and_a_new_node_are_members_to_each_other_and_the_old_one_hears_nothing_that_it_does_not_know() {
    let offered = vec![model("big", ModelState::Available), model("bad", ModelState::Failed)];
    let new = Plan { models: offered.clone(), ..plan("new") }.start().await;
    let other = plan("other").start().await;
    let old = Plan { versions: Versions::only(1), ..plan("old") }.start().await;
    let bootstrap = [new.address().await];
    new.join("home", true, &[]).await;
    other.join("home", true, &bootstrap).await;
    old.join("home", true, &bootstrap).await;
    let seen = new.sees("home", &["old", "other"]).await;
    let protocol = |name: &str| seen.iter().find(|member| member.name == name).unwrap().protocol;
    assert_eq!((protocol("old"), protocol("other")), (1, 3));
    let mut events = old.handle.events();
    // The new one knows it all, the old one a name that can be asked for.
    other.until("the models in detail", |snapshot| models_of(snapshot, "new") == offered).await;
    let bare = ModelOffer { context_tokens: 4096, ..ModelOffer::named("big") };
    old.until("the name", |snapshot| models_of(snapshot, "new") == [bare.clone()]).await;
    // What changes in detail is told; to the old one only what it can hear of.
    for state in [ModelState::Loading, ModelState::Ready] {
        new.offer.send_modify(|offer| offer.models[0].state = state);
        other.until("the state", |snapshot| models_of(snapshot, "new").first().is_some_and(|first| first.state == state)).await;
    }
    new.offer.send_modify(|offer| offer.models[1].state = ModelState::Ready);
    other
        .until("the second model", |snapshot| {
            models_of(snapshot, "new").last().is_some_and(|last| last.state == ModelState::Ready)
        })
        .await;
    old.until("the second name", |snapshot| models_of(snapshot, "new").len() == 2).await;
    // Prompts go both ways, and nobody took anything for nonsense.
    for (from, to) in [(&old, &new), (&new, &old)] {
        assert_eq!(whole(&mut from.ask("home", &to.id(), "hello").unwrap()).await, Ok("hello".to_owned()));
    }
    let gone = std::iter::from_fn(|| events.try_recv().ok()).find(|event| matches!(event, Event::MemberDown { .. }));
    assert!(gone.is_none(), "{gone:?}");
}

#[tokio::test]
async fn a_place_in_the_queue_is_told_to_the_asker_and_again_with_the_keep_alives() {
    let mut node = Plan { interactive: true, ..plan("serving") }.start().await;
    let asker = plan("asker").start().await;
    node.join("home", true, &[]).await;
    asker.join("home", false, &[node.address().await]).await;
    asker.sees("home", &["serving"]).await;
    node.sees("home", &["asker"]).await;
    let mut answer = asker.ask("home", &node.id(), "x").unwrap();
    // Polling it drives it.
    let mut told = Vec::new();
    let asking = tokio::spawn(async move {
        loop {
            match timeout(DEADLINE, answer.next()).await.expect("an event").expect("an end first") {
                AnswerEvent::Queued { position } => told.push(position),
                AnswerEvent::Started { .. } | AnswerEvent::Text(_) => {}
                AnswerEvent::End(outcome) => return (told, outcome),
            }
        }
    });
    let prompt = node.prompt().await;
    prompt.reply.send(AnswerEvent::Queued { position: 3 }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Of places that change faster than anybody can read the last one is told with the next keep-alive.
    for position in [2, 1, 0] {
        prompt.reply.send(AnswerEvent::Queued { position }).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(2500)).await;
    prompt.reply.send(AnswerEvent::Started { model: "m".to_owned() }).await.unwrap();
    prompt.reply.send(AnswerEvent::Text("y".to_owned())).await.unwrap();
    prompt.reply.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    let (told, outcome) = asking.await.unwrap();
    assert!(outcome.is_ok());
    assert_eq!((told.first(), told.last()), (Some(&3), Some(&0)), "{told:?}");
    assert!(told.is_sorted_by(|a, b| a > b), "{told:?}");
}
