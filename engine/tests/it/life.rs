//! Beginning and end of the child: whatever it does, it hears.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use opengateway_engine_protocol::{Down, ErrorKind, Finish, Generate, Up};

use crate::client::{Engine, Outcome, chat, demo, load, raw};

/// A prompt of one megabyte in a vocabulary of bytes, and an answer as long as the window: the child is busy.
fn busy(engine: &mut Engine, id: u64) {
    engine.send(&Down::Generate(Generate { temperature: Some(2.0), top_p: Some(1.0), seed: Some(1), ..raw(id, "a") }));
}

#[test]
fn the_end_of_the_stream_ends_the_child() {
    // Before the model, after it, and while it computes.
    let (mut engine, _) = Engine::start();
    engine.stream.shutdown(Shutdown::Both).unwrap();
    assert_eq!(engine.ended().code(), Some(0));
    let mut engine = Engine::demo(1);
    engine.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(engine.ended().code(), Some(0));
    let mut engine = Engine::demo(8);
    for id in 0..8 {
        busy(&mut engine, id);
    }
    engine.stream.shutdown(Shutdown::Both).unwrap();
    assert_eq!(engine.ended().code(), Some(0));
    assert_eq!(engine.stderr(), "");
}

#[test]
fn shutdown_ends_it_at_once() {
    let mut engine = Engine::demo(1);
    busy(&mut engine, 1);
    engine.send(&Down::Shutdown);
    assert_eq!(engine.ended().code(), Some(0));
    let (mut engine, _) = Engine::start();
    engine.send(&Down::Shutdown);
    assert_eq!(engine.ended().code(), Some(0));
}

#[test]
fn started_by_hand_it_says_who_starts_it() {
    for arguments in [&[][..], &["--help"], &["model.gguf"]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_opengateway-engine")).args(arguments).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains("opengatewayd starts it by itself"), "{told}");
    }
}

#[test]
fn the_hello_says_what_it_computes_with() {
    let (_engine, build) = Engine::start();
    assert!(build.starts_with("llama.cpp ") && build.contains(", ggml ") && build.contains(", CPU "), "{build}");
}

#[test]
fn a_model_that_is_none_is_told_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gguf");
    std::fs::write(&path, "no model at all, but long enough to look at").unwrap();
    let failed = |path: &std::path::Path| {
        let (mut engine, _) = Engine::start();
        engine.send(&Down::Load(load(path, 1)));
        let reason = engine.ready().unwrap_err();
        assert_eq!(engine.ended().code(), Some(3));
        reason
    };
    assert!(failed(&path).starts_with("llama.cpp does not take a.gguf: "), "{}", failed(&path));
    assert!(failed(&folder.path().join("none.gguf")).contains("No such file"));
    assert!(failed(folder.path()).contains("is no file"));
    assert!(failed(std::path::Path::new("models/x.gguf")).contains("no absolute path"));
}

#[test]
fn before_the_model_it_answers_pings_and_refuses_requests() {
    let (mut engine, _) = Engine::start();
    engine.send(&Down::Ping { nonce: 4 });
    assert_eq!(engine.next(), Up::Pong { nonce: 4, running: 0 });
    engine.send(&Down::Generate(chat(1, "Hi")));
    assert!(matches!(engine.next(), Up::Error { id: 1, kind: ErrorKind::Busy, .. }));
    engine.send(&Down::Load(load(&demo(), 1)));
    engine.ready().unwrap();
    assert_eq!(engine.answer("What is 2+2?"), "4");
}

#[test]
fn a_ping_is_answered_while_it_computes() {
    let mut engine = Engine::demo(8);
    for id in 0..8 {
        busy(&mut engine, id);
    }
    for nonce in 0..20 {
        let before = Instant::now();
        engine.send(&Down::Ping { nonce });
        // Frames of answers come between.
        loop {
            match engine.next() {
                Up::Pong { nonce: answered, .. } if answered == nonce => break,
                Up::Started { .. } | Up::Delta { .. } | Up::Done { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    }
}

#[test]
fn a_cancelled_answer_ends_and_its_slot_is_free() {
    let mut engine = Engine::demo(2);
    for round in 0..20 {
        let (stopped, kept) = (round * 2, round * 2 + 1);
        engine.send(&Down::Generate(chat(stopped, "Count to 50")));
        engine.send(&Down::Generate(chat(kept, "Count to 20")));
        let mut outcomes = [(stopped, Outcome::default()), (kept, Outcome::default())].into();
        // After some frames more or less.
        for _ in 0..round {
            engine.take(&mut outcomes);
        }
        let before = Instant::now();
        engine.send(&Down::Cancel { id: stopped });
        while outcomes[&stopped].finish.is_none() {
            engine.take(&mut outcomes);
        }
        assert!(before.elapsed() < Duration::from_secs(1));
        while outcomes[&kept].finish.is_none() {
            engine.take(&mut outcomes);
        }
        assert_eq!(outcomes[&kept].text.split(' ').count(), 20, "the other one is not disturbed");
        assert!(matches!(outcomes[&stopped].finish, Some(Finish::Cancelled | Finish::Stop)));
        engine.send(&Down::Ping { nonce: round });
        assert_eq!(engine.next(), Up::Pong { nonce: round, running: 0 });
    }
    // Cancelled before it begins: it still ends, once.
    engine.send(&Down::Generate(chat(100, "Count to 50")));
    engine.send(&Down::Cancel { id: 100 });
    assert!(engine.collect(&[100])[&100].finish.is_some());
}

#[test]
fn prompts_that_come_and_go_do_not_disturb_an_answer() {
    let mut engine = Engine::demo(3);
    let (question, prompt) = (chat(1, "Count to 50"), "What is 2+2? ".repeat(30));
    let expected = engine.ask(question.clone()).text;
    for round in 0..4 {
        engine.send(&Down::Generate(question.clone()));
        let mut outcomes = BTreeMap::from([(1, Outcome::default())]);
        let (mut id, mut gone) = (round * 1000 + 2, 0);
        while outcomes[&1].finish.is_none() {
            // Two long prompts, one of which is given up a little later each time: in its batch, or between two.
            for id in [id, id + 1] {
                outcomes.insert(id, Outcome::default());
                engine.send(&Down::Generate(Generate { max_tokens: Some(1), ..raw(id, &prompt) }));
            }
            while [id, id + 1].iter().any(|id| outcomes[id].started.is_none()) {
                engine.take(&mut outcomes);
            }
            std::thread::sleep(Duration::from_micros(gone * 500));
            engine.send(&Down::Cancel { id });
            while [id, id + 1].iter().any(|id| outcomes[id].finish.is_none()) {
                engine.take(&mut outcomes);
            }
            assert_eq!(outcomes[&(id + 1)].finish, Some(Finish::Length));
            (id, gone) = (id + 2, gone + 1);
        }
        assert_eq!(outcomes[&1].text, expected);
    }
    assert_eq!(engine.stderr(), "");
}

#[test]
fn nothing_of_a_prompt_or_an_answer_reaches_stderr() {
    let mut engine = Engine::demo(1);
    engine.ask(chat(1, "Repeat: canary"));
    engine.ask(raw(2, &"canary".repeat(1000)));
    engine.ask(crate::client::talk(3, &[("canary", "canary")]));
    engine.send(&Down::Shutdown);
    engine.ended();
    assert_eq!(engine.stderr(), "");
}

#[test]
fn the_child_is_the_first_to_go_and_leaves_no_core() {
    let mut engine = Engine::demo(1);
    let pid = engine.child.id();
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    assert!(read("oom_score_adj").trim().parse::<i32>().unwrap() >= 800);
    let limits = read("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    let status = read("status");
    let fact = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((fact("NoNewPrivs:").as_str(), fact("Seccomp:").as_str()), ("1", "2"));
    // Only root may look at the environment of a process that is not dumpable.
    if let Ok(environment) = std::fs::read_to_string(format!("/proc/{pid}/environ")) {
        assert!(!environment.contains("OPENGATEWAY_CANARY") && environment.contains("GGML_NO_BACKTRACE=1"), "{environment}");
    }
    // A crash is a plain signal, and quick.
    rustix::process::kill_process(rustix::process::Pid::from_child(&engine.child), rustix::process::Signal::ABORT).unwrap();
    assert_eq!(engine.ended().signal(), Some(6));
}
