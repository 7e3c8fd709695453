//! Prompts that only a member without a connection can answer.

use super::*;

/// A member that is only known.
fn known(name: &str, model: &str) -> Arc<Member> {
    let models = vec![ModelOffer::named(model)];
    Arc::new(Member { models, protocol: 0, liveness: Liveness::Known, ..Member::clone(&member(name)) })
}

impl Stage {
    fn start_for(&self, model: &str, node: Option<&str>) -> Job {
        let ask = Ask { prompt: Text::new("x"), model: Some(model.to_owned()), ..Ask::default() };
        let options = Options { timeout: Duration::from_secs(20), node: node.map(str::to_owned), ..Options::default() };
        self.handle.start(0, cluster(), ask, options).unwrap()
    }

    /// The next member that is to be connected, and the way to say how that went.
    async fn reached(&mut self) -> (String, tokio::sync::oneshot::Sender<bool>) {
        match self.scripted.commands.recv().await.unwrap() {
            Command::Reach { member, reply, .. } => (member.as_str().to_owned(), reply),
            other => panic!("{other:?}"),
        }
    }

    /// The member is connected now.
    fn connect(&self, name: &str) {
        self.scripted.state.send_modify(|snapshot| {
            let mut changed = Snapshot::clone(snapshot);
            let view = changed.clusters.get_mut(&cluster()).unwrap();
            let mut connected = ClusterView::clone(view);
            for member in connected.members.iter_mut().filter(|member| member.name == name) {
                *member = Arc::new(Member { liveness: Liveness::Alive, protocol: 3, ..Member::clone(member) });
            }
            *view = Arc::new(connected);
            *snapshot = Arc::new(changed);
        });
    }
}

async fn end(job: &mut Job) -> Result<Done, Failure> {
    loop {
        if let Some(JobEvent::End(outcome)) = job.next().await {
            return outcome;
        }
    }
}

#[tokio::test]
async fn a_known_member_is_connected_when_nobody_else_has_the_model_and_then_asked() {
    let mut stage = Stage::of(vec![member("near"), known("far", "rare"), known("other", "m")]);
    let mut job = stage.start_for("rare", None);
    let play = async {
        let (name, reply) = stage.reached().await;
        assert_eq!(name, "id-far");
        stage.connect("far");
        reply.send(true).unwrap();
        let (asked, events) = stage.asked().await;
        assert_eq!(asked, "id-far");
        events.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    };
    let (outcome, ()) = tokio::join!(end(&mut job), play);
    assert_eq!(outcome, Ok(done()));
}

#[tokio::test]
async fn whoever_is_connected_is_asked_before_anybody_is_reached() {
    let mut stage = Stage::of(vec![member("near"), known("far", "m")]);
    let mut job = stage.start_for("m", None);
    let play = async {
        let (asked, events) = stage.asked().await;
        assert_eq!(asked, "id-near");
        events.send(AnswerEvent::End(Ok(done()))).await.unwrap();
    };
    assert_eq!(tokio::join!(end(&mut job), play).0, Ok(done()));
}

#[tokio::test]
async fn a_known_member_with_a_model_is_reached_before_the_echo_of_a_near_one_is_asked() {
    for far_comes in [true, false] {
        let near = Arc::new(Member { models: vec![ModelOffer::named("echo")], ..Member::clone(&member("near")) });
        let mut stage = Stage::of(vec![near, known("far", "m")]);
        let ask = Ask { prompt: Text::new("x"), ..Ask::default() };
        let options = Options { timeout: Duration::from_secs(20), ..Options::default() };
        let mut job = stage.handle.start(0, cluster(), ask, options).unwrap();
        let play = async {
            let (name, reply) = stage.reached().await;
            assert_eq!(name, "id-far");
            if far_comes {
                stage.connect("far");
                reply.send(true).unwrap();
                let (asked, events) = stage.asked().await;
                assert_eq!(asked, "id-far");
                events.send(AnswerEvent::End(Ok(done()))).await.unwrap();
            } else {
                reply.send(false).unwrap();
                let (asked, events) = stage.asked().await;
                assert_eq!(asked, "id-near", "better than nothing");
                events.send(AnswerEvent::End(Ok(done()))).await.unwrap();
            }
        };
        assert_eq!(tokio::join!(end(&mut job), play).0, Ok(done()));
    }
}

#[tokio::test]
async fn at_most_three_are_tried_and_then_the_prompt_ends_with_the_reason() {
    let names = ["a", "b", "c", "d", "e"];
    let mut stage = Stage::of(names.iter().map(|name| known(name, "rare")).collect());
    let mut job = stage.start_for("rare", None);
    let play = async {
        let mut tried = Vec::new();
        for _ in 0..3 {
            let (name, reply) = stage.reached().await;
            reply.send(false).unwrap();
            tried.push(name);
        }
        tried.sort();
        tried.dedup();
        assert_eq!(tried.len(), 3);
    };
    let (outcome, ()) = tokio::join!(end(&mut job), play);
    assert!(matches!(outcome.unwrap_err().kind, FailureKind::ModelUnavailable | FailureKind::NoEligiblePeer));
    assert!(stage.scripted.commands.try_recv().is_err());
}

#[tokio::test]
async fn a_known_member_that_is_meant_by_name_is_reached_and_no_other() {
    let mut stage = Stage::of(vec![member("near"), known("far", "m"), known("other", "m")]);
    let mut job = stage.start_for("m", Some("far"));
    let play = async {
        let (name, reply) = stage.reached().await;
        assert_eq!(name, "id-far");
        reply.send(false).unwrap();
    };
    let (outcome, ()) = tokio::join!(end(&mut job), play);
    let failure = outcome.unwrap_err();
    assert!(failure.kind == FailureKind::NoEligiblePeer && failure.detail.contains("was not reached"), "{failure:?}");
}

#[tokio::test(start_paused = true)]
async fn who_cannot_be_reached_costs_three_seconds_and_who_is_meant_by_name_fifteen() {
    for (node, seconds) in [(None, 3), (Some("far"), 15)] {
        let mut stage = Stage::of(vec![known("far", "rare")]);
        let mut job = stage.start_for("rare", node);
        let begun = tokio::time::Instant::now();
        let play = async {
            let (_, reply) = stage.reached().await;
            tokio::time::sleep(Duration::from_secs(18)).await;
            drop(reply);
        };
        let ended = async {
            let outcome = end(&mut job).await;
            (outcome, begun.elapsed())
        };
        let ((outcome, took), ()) = tokio::join!(ended, play);
        assert!(outcome.is_err());
        assert_eq!(took.as_secs(), seconds, "{took:?}");
    }
}
