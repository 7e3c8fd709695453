//! The models on the bus, with the members, the files and the engine played by the test.

use std::io::Write as _;

use futures::StreamExt as _;
use opengateway::api::stream::Step;
use opengateway::domain::node::{ModelSource, ModelState};
use opengateway::domain::prompt::{Done, FinishReason, Usage};
use opengateway::models::{Local, ModelError, Progress, Request as Asked, Verified};
use zbus::{MatchRule, MessageStream};

use super::*;
use crate::daemon::ERROR;

const MODELS: &str = "org.opengateway.Gateway1.Models";
const INVALID: &str = "org.freedesktop.DBus.Error.InvalidArgs";

/// A backend with a model.
#[derive(Debug)]
struct Named;

impl opengateway::serve::backend::Backend for Named {
    fn name(&self) -> &str {
        "named"
    }
    fn availability(&self) -> watch::Receiver<opengateway::serve::backend::Availability> {
        let models = vec![ModelOffer::named("demo")];
        watch::channel(opengateway::serve::backend::Availability { models, problem: None }).1
    }
    fn limits(&self) -> opengateway::serve::backend::Limits {
        Echo::default_limits()
    }
    fn answer(
        &self,
        _: String,
        _: opengateway::domain::prompt::Ask,
        _: mpsc::Sender<opengateway::domain::prompt::Text>,
    ) -> opengateway::serve::backend::Answering<'_> {
        Box::pin(std::future::pending())
    }
}

type Details = HashMap<String, OwnedVariant>;

fn file(name: &str) -> Local {
    Local {
        name: name.to_owned(),
        path: format!("/models/{name}.gguf").into(),
        size: 900_000,
        digest: Some([0xab; 32]),
        architecture: Some("llama".to_owned()),
        parameters: Some(850_000),
        quantisation: Some("Q8_0".to_owned()),
        trained_context: Some(512),
        context: Some(256),
        slots: 8,
        state: ModelState::Available,
        progress: None,
        problem: None,
        memory: Some(6_000_000),
        device: None,
        engine_pid: None,
        removable: true,
        answered: 3,
        prompt_tokens: 30,
        completion_tokens: 6,
        tokens_per_second: Some(900.5),
        crashes: 1,
    }
}

fn of_member(node: &str, number: usize, model: ModelOffer) -> Arc<Member> {
    Arc::new(Member { models: vec![model, ModelOffer::named("echo")], ..(*member(number, node)).clone() })
}

async fn ask<B>(connection: &Connection, method: &str, body: &B) -> Result<Message, String>
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    match connection.call_method(Some(NAME), ROOT, Some(MODELS), method, body).await {
        Ok(reply) => Ok(reply),
        Err(zbus::Error::MethodError(name, ..)) => Err(name.to_string()),
        Err(zbus::Error::FDO(error)) => Err(zbus::DBusError::name(&*error).to_string()),
        Err(error) => panic!("{method}: {error}"),
    }
}

async fn list(connection: &Connection, cluster: &str, options: Options<'_>) -> Vec<(String, Details)> {
    ask(connection, "ListModels", &(cluster, options)).await.unwrap().body().deserialize().unwrap()
}

fn details(value: &OwnedVariant) -> Details {
    value.try_clone().unwrap().try_into().unwrap()
}

fn nodes(model: &Details) -> Vec<HashMap<String, OwnedVariant>> {
    model["Nodes"].try_clone().unwrap().try_into().unwrap()
}

#[tokio::test]
async fn the_models_of_a_cluster_are_those_of_its_members_and_our_own() {
    let Some(played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    let large = ModelOffer {
        context_tokens: 4096,
        size: Some(2_000_000_000),
        parameters: Some(3_000_000_000),
        quantisation: Some("Q4_K_M".to_owned()),
        digest: Some([1; 32]),
        state: ModelState::Ready,
        source: ModelSource::Engine,
        slots: 4,
        ..ModelOffer::named("large")
    };
    let other = ModelOffer { digest: Some([2; 32]), state: ModelState::Loading, ..large.clone() };
    let members =
        [of_member("NodeA", 1, large), of_member("NodeB", 2, other), of_member("No\0d\u{1b}e", 3, ModelOffer::named("a\0b"))];
    played.net.state.send_replace(snapshot(&[("gatewayai-poc", &members)]));
    played.models.1.send_replace(vec![Local {
        state: ModelState::Failed,
        problem: Some("it is cut off".to_owned()),
        ..file("own")
    }]);

    let models = list(&connection, "", Options::new()).await;
    let names: Vec<&str> = models.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["a\u{fffd}b", "echo", "large", "own"]);
    let large = &models[2].1;
    assert_eq!((&*large["State"], &*large["Variants"]), (&Variant::from("ready"), &Variant::from(2_u32)));
    assert_eq!((&*large["Default"], &*large["Slots"]), (&Variant::from(true), &Variant::from(8_u32)));
    assert!(large.contains_key("Problem") && !large.contains_key("Digest") && !large.contains_key("TokensPerSecond"));
    let (first, second) = (&nodes(large)[0], &nodes(large)[1]);
    assert_eq!((&*first["Name"], &*first["Digest"]), (&Variant::from("NodeA"), &Variant::from("01".repeat(32))));
    assert_eq!((&*second["State"], &*second["Local"]), (&Variant::from("loading"), &Variant::from(false)));
    // Four nodes have the echo: three members and this one.
    assert_eq!(nodes(&models[1].1).len(), 4);
    let own = &nodes(&models[3].1)[0];
    assert_eq!((&*own["Local"], &*own["State"]), (&Variant::from(true), &Variant::from("failed")));
    assert_eq!((&*own["Problem"], &*own["TokensPerSecond"]), (&Variant::from("it is cut off"), &Variant::from(900.5)));
    assert_eq!(list(&connection, "", Options::from([("Model", Variant::from("own"))])).await.len(), 1);
    // Nothing is said that is not known.
    let unknown = &models[0].1;
    for key in ["Size", "Parameters", "Quantisation", "Digest", "Context", "Slots", "TokensPerSecond"] {
        assert!(!unknown.contains_key(key), "{key}");
    }

    assert_eq!(ask(&connection, "ListModels", &("nowhere", Options::new())).await.unwrap_err(), format!("{ERROR}NoSuchCluster"));
    let typo = Options::from([("Modell", Variant::from("x"))]);
    assert_eq!(ask(&connection, "ListModels", &("", typo)).await.unwrap_err(), INVALID);
    // In no cluster: what is here.
    played.net.state.send_replace(snapshot(&[]));
    let alone = list(&connection, "", Options::new()).await;
    assert_eq!(alone.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["echo", "own"]);
}

#[tokio::test]
async fn files_are_listed_with_what_is_known_and_their_changes_are_told_but_not_their_counters() {
    let Some(played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    let rule = MatchRule::builder().msg_type(zbus::message::Type::Signal).sender(NAME).interface(MODELS).build().unwrap();
    let mut signals = MessageStream::for_match_rule(rule, &connection, None).await.unwrap();
    let mut signal = async || within(signals.next()).await.unwrap().unwrap();
    played.models.1.send_replace(vec![file("demo")]);
    let (name, told): (String, Details) = signal().await.body().deserialize().unwrap();
    assert_eq!((name.as_str(), &*told["State"]), ("demo", &Variant::from("available")));
    let listed: Vec<(String, Details)> = ask(&connection, "ListLocal", &()).await.unwrap().body().deserialize().unwrap();
    let demo = &listed[0].1;
    assert_eq!((&*demo["Path"], &*demo["Digest"]), (&Variant::from("/models/demo.gguf"), &Variant::from("ab".repeat(32))));
    assert_eq!((&*demo["Removable"], &*demo["Context"]), (&Variant::from(true), &Variant::from(256_u32)));
    assert!(!demo.contains_key("Progress") && !demo.contains_key("EnginePid"));
    assert_eq!(*property(&connection, ROOT, MODELS, "Count").await.unwrap(), Variant::from(1_u32));
    assert_eq!(*property(&connection, ROOT, MODELS, "EngineInstalled").await.unwrap(), Variant::from(false));

    // A prompt was answered: no signal. Then it is loaded: a signal.
    played.models.1.send_replace(vec![Local { answered: 4, tokens_per_second: Some(1.0), ..file("demo") }]);
    let loading = Local { state: ModelState::Loading, progress: Some(0.5), ..file("demo") };
    played.models.1.send_replace(vec![loading]);
    let (_, told): (String, Details) = signal().await.body().deserialize().unwrap();
    assert_eq!((&*told["State"], &*told["Progress"]), (&Variant::from("loading"), &Variant::from(0.5)));
    played.models.1.send_replace(Vec::new());
    let gone = signal().await;
    assert_eq!(member_of(&gone), "ModelRemoved");
    assert_eq!(gone.body().deserialize::<String>().unwrap(), "demo");
}

#[tokio::test]
async fn usage_counts_what_was_answered_here_and_what_was_asked_here() {
    let Some(mut played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    played.models.1.send_replace(vec![file("demo"), Local { answered: 0, crashes: 0, ..file("idle") }]);
    let body = ("", "x", Options::new());
    let call = connection.call_method(Some(NAME), ROOT, Some(MANAGER), "Prompt", &body);
    let answering = async {
        let start = played.started().await;
        start.events.send(taken()).await.unwrap();
        let usage = Usage { prompt_tokens: 5, completion_tokens: 2 };
        start.events.send(JobEvent::End(Ok(Done { finish: FinishReason::Stop, usage }))).await.unwrap();
    };
    let (reply, ()) = tokio::join!(call, answering);
    reply.unwrap();
    let usage: Details = ask(&connection, "GetUsage", &()).await.unwrap().body().deserialize().unwrap();
    assert_eq!((&*usage["PromptTokens"], &*usage["CompletionTokens"]), (&Variant::from(60_u64), &Variant::from(12_u64)));
    let asked = details(&usage["Asked"]);
    assert_eq!((&*asked["Prompts"], &*asked["Failed"]), (&Variant::from(1_u64), &Variant::from(0_u64)));
    assert_eq!((&*asked["PromptTokens"], &*asked["CompletionTokens"]), (&Variant::from(5_u64), &Variant::from(2_u64)));
    let models: Vec<Details> = usage["Models"].try_clone().unwrap().try_into().unwrap();
    assert_eq!(models.len(), 1, "one that answered nothing has no usage");
}

/// All lines of a pipe.
async fn steps(pipe: zbus::OwnedFd) -> Vec<Step> {
    let reading = tokio::task::spawn_blocking(move || {
        let text = std::io::read_to_string(std::fs::File::from(OwnedFd::from(pipe))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    });
    within(reading).await.unwrap()
}

fn gguf() -> std::fs::File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"GGUF").unwrap();
    file
}

#[tokio::test]
async fn adding_tells_how_far_it_is_and_a_closed_pipe_cancels_it() {
    let Some(mut played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    let add = async |name: &str, options: Options<'_>| -> Result<zbus::OwnedFd, String> {
        let reply = ask(&connection, "Add", &(name, zbus::Fd::from(OwnedFd::from(gguf())), options)).await?;
        Ok(reply.body().deserialize().unwrap())
    };
    let pipe = add("demo", Options::from([("Digest", Variant::from("AB".repeat(32)))])).await.unwrap();
    let Some(Asked::Add { name, digest, progress, reply, .. }) = within(played.models.0.recv()).await else { panic!() };
    assert_eq!((name.as_str(), digest), ("demo", Some([0xab; 32])));
    // More than a pipe that nobody reads would take: the copy never waits for its reader.
    for done in 0..10_000 {
        within(progress.send(Progress { done, total: 10_000 })).await.unwrap();
    }
    reply.send(Ok(file("demo"))).unwrap();
    let told = steps(pipe).await;
    assert!(matches!(told[0], Step::Progress { total: 10_000, .. }), "{told:?}");
    let Some(Step::End { name, size: Some(900_000), digest: Some(digest), .. }) = told.last() else { panic!("{told:?}") };
    assert_eq!((name.as_str(), digest.as_str()), ("demo", "ab".repeat(32).as_str()));

    for (error, name) in [
        (ModelError::Exists("there".to_owned()), "ModelExists"),
        (ModelError::Invalid("no GGUF".to_owned()), "InvalidModel"),
        (ModelError::Storage("full".to_owned()), "StorageFull"),
    ] {
        let pipe = add("demo", Options::new()).await.unwrap();
        let Some(Asked::Add { reply, .. }) = within(played.models.0.recv()).await else { panic!() };
        reply.send(Err(error)).unwrap();
        let told = steps(pipe).await;
        assert!(matches!(told.last(), Some(Step::Error { name: said, .. }) if *said == format!("{ERROR}{name}")), "{told:?}");
    }

    drop(add("demo", Options::new()).await.unwrap());
    let Some(Asked::Add { progress, reply, .. }) = within(played.models.0.recv()).await else { panic!() };
    within(progress.closed()).await;
    let _ = reply.send(Err(ModelError::Busy));

    // Names and digests at their limits, and what is no file.
    for bad in ["", &"x".repeat(129)] {
        assert_eq!(add(bad, Options::new()).await.unwrap_err(), INVALID, "{} bytes", bad.len());
    }
    for bad in ["ab".repeat(33), "g".repeat(64), "é".repeat(32)] {
        assert_eq!(add("demo", Options::from([("Digest", Variant::from(bad.as_str()))])).await.unwrap_err(), INVALID, "{bad}");
    }
    let (read, _write) = std::io::pipe().unwrap();
    let body = ("demo", zbus::Fd::from(OwnedFd::from(read)), Options::new());
    assert_eq!(ask(&connection, "Add", &body).await.unwrap_err(), INVALID, "a pipe may have no end");
    // Four at once, and no more.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(add(&"x".repeat(128), Options::new()).await.unwrap());
    }
    assert_eq!(add("demo", Options::new()).await.unwrap_err(), format!("{ERROR}Busy"));
}

#[tokio::test]
async fn the_other_wishes_reach_the_models_and_come_back_by_name() {
    let Some(mut played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    let reply = ask(&connection, "Verify", &("demo", Options::new())).await.unwrap();
    let pipe: zbus::OwnedFd = reply.body().deserialize().unwrap();
    let Some(Asked::Verify { reply, .. }) = within(played.models.0.recv()).await else { panic!() };
    reply.send(Ok(Verified { digest: [1; 32], expected: Some([2; 32]) })).unwrap();
    let told = steps(pipe).await;
    assert!(matches!(told.last(), Some(Step::End { intact: Some(false), .. })), "{told:?}");

    let refusals = [
        ("Remove", ModelError::Refused("it belongs to a package".to_owned()), "ModelRefused"),
        ("Load", ModelError::NoEngine("there is none".to_owned()), "NoEngine"),
        ("Unload", ModelError::NoSuchModel("demo".to_owned()), "NoSuchModel"),
    ];
    for (method, refusal, name) in refusals {
        let body = ("demo",);
        let answering = async {
            let asked = within(played.models.0.recv()).await;
            let reply = match asked {
                Some(Asked::Remove(name, reply) | Asked::Load(name, reply) | Asked::Unload(name, reply)) if name == "demo" => {
                    reply
                }
                other => panic!("{other:?}"),
            };
            reply.send(Err(refusal)).unwrap();
        };
        let (said, ()) = tokio::join!(ask(&connection, method, &body), answering);
        assert_eq!(said.unwrap_err(), format!("{ERROR}{name}"), "{method}");
        assert_eq!(ask(&connection, method, &("",)).await.unwrap_err(), INVALID, "{method}");
    }
}

#[tokio::test]
async fn a_conversation_reaches_the_dispatcher_as_it_was_and_a_job_tells_its_place_and_model() {
    let Some(mut played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    let options = Options::from([
        ("Messages", Variant::from(vec![("user", "one"), ("assistant", "two")])),
        ("TopP", Variant::from(0.5)),
        ("Stop", Variant::from(vec!["END"])),
    ]);
    let reply = call(&connection, "StartPrompt", &("", "three", options)).await.unwrap();
    let (_job, _stream): (OwnedObjectPath, zbus::OwnedFd) = reply.body().deserialize().unwrap();
    let start = played.started().await;
    let turns: Vec<(&str, &str)> = start.ask.history.iter().map(|turn| (turn.role.as_str(), turn.text.as_str())).collect();
    assert_eq!(turns, [("user", "one"), ("assistant", "two")]);
    assert_eq!((start.ask.top_p, start.ask.stop[0].as_str(), start.ask.prompt.as_str()), (Some(0.5), "END", "three"));
    let jobs = async || -> Vec<(u64, OwnedObjectPath, Details)> {
        call(&connection, "ListJobs", &()).await.unwrap().body().deserialize().unwrap()
    };
    let until = async |key: &str, wanted: Variant<'static>| {
        within(async {
            while jobs().await[0].2.get(key).map(|value| &**value) != Some(&wanted) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    assert!(!jobs().await[0].2.contains_key("Position"), "nobody said so yet");
    start.events.send(JobEvent::Queued { position: 3 }).await.unwrap();
    until("Position", Variant::from(3_u32)).await;
    start.events.send(taken()).await.unwrap();
    until("Model", Variant::from("echo")).await;
    let job = &jobs().await[0].2;
    assert!(!job.contains_key("Position") && *job["ServedByName"] == Variant::from("NodeA"), "{job:?}");
}

#[tokio::test]
async fn a_node_without_a_cluster_answers_itself_when_it_has_a_model() {
    let Some(mut played) = Played::start().await else { return };
    let connection = played.bus.connect().await;
    played.net.state.send_replace(snapshot(&[]));
    let refused = call(&connection, "StartPrompt", &("", "x", Options::new())).await.unwrap_err().0;
    assert_eq!(refused, format!("{ERROR}NotConnected"), "the echo alone is no reason");
    played.serve.add(Arc::new(Named)).await;
    let reply = call(&connection, "StartPrompt", &("", "x", Options::new())).await.unwrap();
    let start = played.started().await;
    assert_eq!(start.cluster, None);
    drop(reply);
    let named = call(&connection, "StartPrompt", &("elsewhere", "x", Options::new())).await.unwrap_err().0;
    assert_eq!(named, format!("{ERROR}NoSuchCluster"), "who names a cluster means it");
}
