//! How an engine comes, serves and goes.

use std::time::{Duration, Instant};

use opengateway::domain::node::{ModelSource, ModelState};
use opengateway::domain::prompt::{FailureKind, FinishReason};
use opengateway::models::ModelError;

use super::lab::{DEADLINE, Lab, MEMORY, collect, first_text, until_ended, write_program};

#[tokio::test]
async fn a_model_is_loaded_when_somebody_asks_and_counts_what_it_does() {
    let lab = Lab::with(&["m"], |_| {}).await;
    assert_eq!(lab.until_state("m", ModelState::Available).await.engine_pid, None);
    let answer = lab.answer("m", "words 5").await;
    let done = answer.outcome.unwrap();
    assert_eq!(answer.text, "word word word word word ");
    assert_eq!((done.finish, done.usage.prompt_tokens, done.usage.completion_tokens), (FinishReason::Stop, 3, 5));
    let local = lab.until("m", |local| local.answered == 1 && local.digest.is_some()).await;
    assert_eq!((local.state, local.context, local.memory), (ModelState::Ready, Some(512), Some(1 << 20)));
    assert_eq!((local.prompt_tokens, local.completion_tokens, local.tokens_per_second), (3, 5, Some(1000.0)));
    assert_eq!(
        (local.device.as_deref(), local.architecture.as_deref(), local.parameters),
        (Some("mock"), Some("llama"), Some(88))
    );
    let mut offers = lab.serve.offer();
    let offer = offers.wait_for(|offer| offer.models.first().is_some_and(|model| model.digest.is_some())).await.unwrap();
    let offer = offer.models[0].clone();
    assert_eq!((offer.name.as_str(), offer.state, offer.source, offer.slots), ("m", ModelState::Ready, ModelSource::Engine, 4));
    assert_eq!((offer.size, offer.digest, offer.quantisation.as_deref()), (Some(local.size), local.digest, Some("F32")));
}

#[tokio::test]
async fn a_conversation_arrives_as_it_was_said_and_length_is_told() {
    use opengateway::domain::prompt::{Ask, Role, Text, Turn};
    use opengateway::serve::{Requester, Served};
    let lab = Lab::with(&["m"], |_| {}).await;
    let (events, receiver) = tokio::sync::mpsc::channel(64);
    let ask = Ask {
        prompt: Text::new("conversation"),
        system: Some(Text::new("be brief")),
        history: vec![Turn { role: Role::Assistant, text: Text::new("hi") }],
        ..Ask::default()
    };
    lab.serve.submit(Served { requester: Requester::Local(0), ask, timeout: DEADLINE, events }).unwrap();
    let answer = collect(receiver).await;
    assert_eq!(answer.text, "system:be brief;assistant:hi;user:conversation;");
    assert_eq!(answer.outcome.unwrap().finish, FinishReason::Length);
    let overflow = lab.answer("m", "overflow").await.outcome.unwrap_err();
    assert_eq!(
        (overflow.kind, overflow.detail.as_str()),
        (FailureKind::ContextOverflow, "the prompt has 900 tokens, and 512 fit")
    );
}

#[tokio::test]
async fn an_idle_model_is_unloaded_and_a_kept_one_is_not() {
    let lab = Lab::with(&["kept", "m"], |settings| {
        settings.idle = Some(Duration::from_secs(1));
        settings.keep = vec!["kept".to_owned()];
    })
    .await;
    let kept = lab.until_state("kept", ModelState::Ready).await.engine_pid;
    lab.answer("m", "words 1").await.outcome.unwrap();
    let pid = lab.until("m", |local| local.engine_pid.is_some()).await.engine_pid.unwrap();
    lab.until_state("m", ModelState::Available).await;
    until_ended(pid, DEADLINE).await;
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
    assert_eq!(lab.local("kept").unwrap().engine_pid, kept, "it stayed");
    // A reload keeps other models.
    lab.settings.send_modify(|settings| settings.keep = vec!["m".to_owned()]);
    lab.until_state("kept", ModelState::Available).await;
    lab.until_state("m", ModelState::Ready).await;
}

#[tokio::test]
async fn without_memory_a_model_is_refused_with_what_is_missing() {
    let lab = Lab::with(&["m"], |_| {}).await;
    lab.available(1_000_000);
    let refused = lab.answer("m", "words 1").await.outcome.unwrap_err();
    assert_eq!(refused.kind, FailureKind::ModelUnavailable);
    assert!(refused.detail.contains("it needs about 0.01 GB of memory and 0.00 GB are free"), "{refused}");
    assert!(lab.until("m", |local| local.problem.is_some()).await.engine_pid.is_none());
    lab.until_state("m", ModelState::Failed).await;
    lab.available(MEMORY);
    // It is told of the memory, and asked again.
    lab.until_state("m", ModelState::Available).await;
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
    lab.until("m", |local| local.problem.is_none()).await;
}

#[tokio::test]
async fn a_kept_model_without_memory_says_so_and_is_loaded_when_there_is_some() {
    let lab = Lab::with(&["m"], |_| {}).await;
    lab.available(1_000_000);
    lab.settings.send_modify(|settings| settings.keep = vec!["m".to_owned()]);
    let short = lab.until("m", |local| local.problem.is_some()).await;
    assert_eq!((short.state, short.progress), (ModelState::Available, None));
    // A prompt is refused at once, not when the pause is over.
    let begun = Instant::now();
    assert_eq!(lab.answer("m", "words 1").await.kind(), Some(FailureKind::ModelUnavailable));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    lab.available(MEMORY);
    lab.until_state("m", ModelState::Ready).await;
}

#[tokio::test]
async fn a_load_during_an_unload_is_not_lost() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let handle = &lab.models().handle;
    for _ in 0..5 {
        handle.load("m".to_owned()).await.unwrap();
        lab.until_state("m", ModelState::Ready).await;
        let (unloaded, loaded) = tokio::join!(handle.unload("m".to_owned()), async {
            lab.until("m", |local| local.state != ModelState::Ready).await;
            handle.load("m".to_owned()).await
        });
        unloaded.and(loaded).unwrap();
        lab.until_state("m", ModelState::Ready).await;
    }
}

#[tokio::test]
async fn the_model_that_was_idle_for_longest_makes_room() {
    let mut lab = Lab::with(&["first", "second", "busy"], |_| {}).await;
    let mut running = lab.ask("busy", "drip 1000 20");
    first_text(&mut running).await;
    for name in ["first", "second"] {
        lab.answer(name, "words 1").await.outcome.unwrap();
        lab.until_state(name, ModelState::Ready).await;
    }
    // Not enough as long as anything is loaded; each measurement after the first unloading finds all of it.
    let (first, second) = (lab.local("first").unwrap(), lab.local("second").unwrap());
    lab.available(10_000_000);
    lab.put("third");
    lab.until("third", |_| true).await;
    lab.models().handle.load("third".to_owned()).await.unwrap();
    until_ended(first.engine_pid.unwrap(), DEADLINE).await;
    until_ended(second.engine_pid.unwrap(), DEADLINE).await;
    lab.until("third", |local| local.problem.is_some()).await;
    assert_eq!(lab.local("busy").unwrap().state, ModelState::Ready, "one that answers is left alone");
}

#[tokio::test]
async fn a_prompt_whose_deadline_comes_first_is_told_that_the_model_loads() {
    let lab = Lab::with(&["slow"], |_| {}).await;
    let begun = Instant::now();
    let late = collect(lab.ask_within("slow", "words 1", Duration::from_secs(2))).await;
    assert_eq!(late.kind(), Some(FailureKind::ModelLoading), "{late:?}");
    assert!(begun.elapsed() <= Duration::from_secs(3));
    assert!(lab.until("slow", |local| local.progress.is_some_and(|progress| progress > 0.1)).await.state == ModelState::Loading);
    // Whoever has the time waits for it.
    assert_eq!(lab.answer("slow", "words 2").await.text, "word word ");
}

#[tokio::test]
async fn load_and_unload_do_what_they_say() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let handle = &lab.models().handle;
    handle.load("m".to_owned()).await.unwrap();
    let pid = lab.until_state("m", ModelState::Ready).await.engine_pid.unwrap();
    let mut running = lab.ask("m", "drip 10 50");
    first_text(&mut running).await;
    let unloading = tokio::spawn({
        let handle = handle.clone();
        async move { handle.unload("m".to_owned()).await }
    });
    assert!(collect(running).await.outcome.is_ok(), "a prompt in progress ends first");
    unloading.await.unwrap().unwrap();
    until_ended(pid, DEADLINE).await;
    assert_eq!(lab.until_state("m", ModelState::Available).await.crashes, 0);
    handle.unload("m".to_owned()).await.unwrap();
    assert_eq!(handle.load("none".to_owned()).await, Err(ModelError::NoSuchModel("none".to_owned())));
}

#[tokio::test]
async fn engines_end_with_the_daemon_also_one_that_does_not_want_to() {
    let mut lab = Lab::with(&["m", "stubborn"], |settings| settings.keep = vec!["m".to_owned(), "stubborn".to_owned()]).await;
    let pids = [lab.until_state("m", ModelState::Ready).await, lab.until_state("stubborn", ModelState::Ready).await];
    let begun = Instant::now();
    lab.models.take().unwrap().stop().await;
    assert!(begun.elapsed() < Duration::from_secs(4));
    for local in pids {
        until_ended(local.engine_pid.unwrap(), Duration::from_secs(1)).await;
    }
}

#[tokio::test]
async fn without_the_program_models_are_listed_and_the_next_step_is_named() {
    let lab = Lab::with(&["m"], |settings| settings.program = settings.program.with_file_name("absent")).await;
    let local = lab.until("m", |local| local.problem.is_some()).await;
    assert!(local.problem.unwrap().contains("not installed"));
    let mut problems = lab.models().problems.clone();
    assert!(problems.wait_for(|list| !list.is_empty()).await.unwrap()[0].contains("1 model cannot be used"));
    assert!(matches!(lab.models().handle.load("m".to_owned()).await, Err(ModelError::NoEngine(_))));
    assert!(lab.serve.offer().borrow().models.is_empty(), "what cannot be computed is not offered");
    // It is installed while the daemon runs.
    write_program(&lab.path("libexec/absent"));
    lab.until_state("m", ModelState::Available).await;
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
    problems.wait_for(Vec::is_empty).await.unwrap();
}

#[tokio::test]
async fn the_child_has_its_socket_and_nothing_else_of_the_daemon() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let answer = lab.answer("m", "descriptors").await;
    let sockets: Vec<&str> = answer.text.split(' ').filter(|target| target.starts_with("socket:")).collect();
    // The mock holds its own socket more than once.
    assert!(sockets.windows(2).all(|pair| pair[0] == pair[1]), "{sockets:?}");
    let other = |target: &&str| ["anon_inode", "inotify", ".gguf", "models"].iter().any(|kind| target.contains(kind));
    assert_eq!(answer.text.split(' ').find(other), None, "{}", answer.text);
    let environment = lab.answer("m", "environment").await.text;
    // Those that the shell of the lab sets by itself.
    let foreign: Vec<&str> =
        environment.split(' ').filter(|name| !["GGML_NO_BACKTRACE", "PWD", "SHLVL", "_", "OLDPWD"].contains(name)).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}
