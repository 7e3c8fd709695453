//! Engines that die, lie and hang: the prompt ends with a name, the daemon is unmoved, the engine is back.

use std::time::{Duration, Instant};

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::{FailureKind, MAX_ANSWER_BYTES};

use super::lab::{DEADLINE, Lab, collect, first_text, until_ended};

/// Of `security.md`: the prompt ends within 1 s, the engine is back within 5.
const ENDS: Duration = Duration::from_secs(1);
const BACK: Duration = Duration::from_secs(5);

async fn dies(lab: &Lab, prompt: &str) {
    let before = lab.local("m").unwrap().crashes;
    let answer = lab.answer("m", prompt).await;
    let ended = Instant::now();
    assert_eq!(answer.kind(), Some(FailureKind::EngineCrashed), "{prompt}: {answer:?}");
    lab.until("m", |local| local.crashes == before + 1).await;
    let back = lab.answer("m", "words 1").await;
    assert_eq!(back.text, "word ", "{prompt}: {back:?}");
    assert!(ended.elapsed() <= BACK, "{prompt}: back after {:?}", ended.elapsed());
}

#[tokio::test]
async fn a_death_before_and_after_the_first_token_ends_the_prompt_and_the_engine_is_back() {
    let lab = Lab::with(&["m"], |_| {}).await;
    dies(&lab, "crash").await;
    dies(&lab, "crash-after 3").await;
    dies(&lab, "closes").await;
}

#[tokio::test]
async fn a_child_that_breaks_the_protocol_is_ended() {
    let lab = Lab::with(&["m"], |_| {}).await;
    for prompt in ["garbage", "huge", "stranger", "starts-twice"] {
        dies(&lab, prompt).await;
    }
    // The first end counts; the second one is that of a prompt that is not there any more.
    assert!(lab.answer("m", "twice").await.outcome.is_ok());
    lab.until("m", |local| local.crashes == 5).await;
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
}

#[tokio::test]
async fn kill_9_ends_all_prompts_in_flight_within_a_second() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let mut running: Vec<_> = (0..4).map(|at| lab.ask("m", &format!("drip 10{at} 50"))).collect();
    for events in &mut running {
        first_text(events).await;
    }
    let pid = lab.until("m", |local| local.engine_pid.is_some()).await.engine_pid.unwrap();
    let killed = Instant::now();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    for events in running {
        assert_eq!(collect(events).await.kind(), Some(FailureKind::EngineCrashed));
    }
    assert!(killed.elapsed() <= ENDS, "{:?}", killed.elapsed());
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
    assert!(killed.elapsed() <= BACK, "{:?}", killed.elapsed());
}

#[tokio::test]
async fn a_prompt_that_killed_twice_is_refused_and_the_others_are_not() {
    let lab = Lab::with(&["m"], |_| {}).await;
    for _ in 0..2 {
        assert_eq!(lab.answer("m", "crash").await.kind(), Some(FailureKind::EngineCrashed));
    }
    let refused = Instant::now();
    assert_eq!(lab.answer("m", "crash").await.kind(), Some(FailureKind::PromptQuarantined));
    assert!(refused.elapsed() < ENDS);
    assert_eq!(lab.answer("m", "words 2").await.text, "word word ");
    assert_eq!(lab.local("m").unwrap().crashes, 2);
}

#[tokio::test]
async fn bystanders_of_a_death_run_alone_and_are_cleared() {
    let lab = Lab::with(&["m"], |_| {}).await;
    lab.answer("m", "words 1").await.outcome.unwrap();
    let mut bystander = lab.ask("m", "drip 20 30");
    first_text(&mut bystander).await;
    let poison = lab.ask("m", "crash-slowly 100");
    assert_eq!(collect(bystander).await.kind(), Some(FailureKind::EngineCrashed));
    assert_eq!(collect(poison).await.kind(), Some(FailureKind::EngineCrashed));
    // Both at once again: each runs alone, so the bystander lives.
    let bystander = lab.ask("m", "drip 20 30");
    let poison = lab.ask("m", "crash-slowly 100");
    assert!(collect(bystander).await.outcome.is_ok());
    assert_eq!(collect(poison).await.kind(), Some(FailureKind::EngineCrashed));
    assert_eq!(lab.answer("m", "crash-slowly 100").await.kind(), Some(FailureKind::PromptQuarantined));
    assert_eq!(lab.answer("m", "drip 20 30").await.outcome.unwrap().usage.completion_tokens, 20);
}

#[tokio::test]
async fn three_deaths_while_loading_are_a_failure_until_somebody_asks_to_load_or_the_file_changes() {
    let mut lab = Lab::with(&["dies-loading"], |_| {}).await;
    let answer = lab.answer("dies-loading", "words 1").await;
    assert_eq!(answer.kind(), Some(FailureKind::ModelUnavailable), "{answer:?}");
    let failed = lab.until_state("dies-loading", ModelState::Failed).await;
    assert_eq!(failed.crashes, 3);
    assert!(failed.problem.unwrap().contains("3 times while loading"));
    let mut offers = lab.serve.offer();
    offers.wait_for(|offer| offer.models.iter().any(|model| model.state == ModelState::Failed)).await.unwrap();
    assert_eq!(lab.answer("dies-loading", "words 1").await.kind(), Some(FailureKind::ModelUnavailable));
    assert_eq!(lab.local("dies-loading").unwrap().crashes, 3, "it is not tried again");
    lab.models().handle.load("dies-loading".to_owned()).await.unwrap();
    lab.until("dies-loading", |local| local.crashes == 6 && local.state == ModelState::Failed).await;
    lab.put("dies-loading");
    lab.until("dies-loading", |local| local.crashes == 0 && local.state == ModelState::Available).await;
}

#[tokio::test]
async fn a_child_that_says_that_it_cannot_load_is_believed_at_once() {
    let lab = Lab::with(&["refuses", "babbles", "out-of-place"], |_| {}).await;
    let answer = lab.answer("refuses", "words 1").await;
    assert_eq!(answer.kind(), Some(FailureKind::ModelUnavailable));
    let problem = lab.until_state("refuses", ModelState::Failed).await.problem.unwrap();
    assert_eq!(problem, "tensor 'x' has  [31ma wrong shape", "no control characters");
    for name in ["babbles", "out-of-place"] {
        assert_eq!(lab.answer(name, "words 1").await.kind(), Some(FailureKind::ModelUnavailable));
        assert_eq!(lab.until_state(name, ModelState::Failed).await.crashes, 3);
    }
}

#[tokio::test]
async fn a_cancelled_prompt_frees_its_slot_within_a_second() {
    let lab = Lab::with(&["m"], |settings| settings.slots = Some(1)).await;
    let mut running = lab.ask("m", "drip 1000 20");
    first_text(&mut running).await;
    let cancelled = Instant::now();
    drop(running);
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
    assert!(cancelled.elapsed() <= ENDS, "{:?}", cancelled.elapsed());
    assert_eq!(lab.local("m").unwrap().crashes, 0);
}

#[tokio::test]
async fn a_child_that_does_not_let_go_of_a_cancelled_prompt_is_killed() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let mut running = lab.ask("m", "deaf");
    first_text(&mut running).await;
    let pid = lab.until("m", |local| local.engine_pid.is_some()).await.engine_pid.unwrap();
    let cancelled = Instant::now();
    drop(running);
    until_ended(pid, Duration::from_secs(7)).await;
    assert!(cancelled.elapsed() >= Duration::from_secs(4), "it had its time");
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
}

#[tokio::test]
async fn a_child_that_answers_no_ping_is_killed() {
    let lab = Lab::with(&["mute"], |_| {}).await;
    let begun = Instant::now();
    let answer = lab.answer("mute", "silent").await;
    assert_eq!(answer.kind(), Some(FailureKind::EngineCrashed), "{answer:?}");
    assert!(begun.elapsed() >= Duration::from_secs(9) && begun.elapsed() <= Duration::from_secs(14), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_reader_who_does_not_read_holds_up_nobody_but_himself() {
    let lab = Lab::with(&["m"], |_| {}).await;
    // 2 MiB for somebody who reads nothing.
    let slow = lab.ask("m", "flood 32");
    for _ in 0..3 {
        assert_eq!(lab.answer("m", "words 3").await.text, "word word word ");
    }
    assert_eq!(lab.answer("m", "settled").await.text, "settled");
    let answer = collect(slow).await;
    assert_eq!(answer.kind(), Some(FailureKind::SlowConsumer), "{:?}", answer.outcome);
    assert_eq!(lab.answer("m", "words 1").await.text, "word ");
    assert_eq!(lab.local("m").unwrap().crashes, 0);
}

#[tokio::test]
async fn an_answer_without_end_is_cut_at_its_limit() {
    let lab = Lab::with(&["m"], |_| {}).await;
    let answer = lab.answer("m", "flood 100000").await;
    assert!(matches!(answer.kind(), Some(FailureKind::AnswerTooLarge | FailureKind::SlowConsumer)), "{:?}", answer.outcome);
    assert!(answer.text.len() <= MAX_ANSWER_BYTES);
    // It says so much that the cancel is late; it is killed or ends, and serves again.
    let again = tokio::time::timeout(DEADLINE, async { while lab.answer("m", "words 1").await.text != "word " {} });
    again.await.unwrap();
}
