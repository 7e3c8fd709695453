//! Bounds: of the context window, of requests, of frames.

use opengateway_engine_protocol::{
    Down, ErrorKind, Finish, Generate, Load, MAX_FRAME_BYTES, MAX_PROMPT_BYTES, MAX_SLOTS, MAX_STOPS, Up,
};

use crate::client::{Engine, chat, demo, load, raw};
use crate::gguf::Gguf;

#[test]
fn a_prompt_fits_with_room_for_one_token_and_not_with_one_more() {
    let mut engine = Engine::demo(2);
    // The model's vocabulary is bytes here: a token each.
    let fits = engine.ask(raw(1, &"x".repeat(511)));
    assert_eq!((fits.started, fits.completion_tokens), (Some(511), fits.completion_tokens.min(1)));
    let outcome = engine.ask(raw(2, &"x".repeat(512)));
    let (kind, message) = outcome.error.unwrap();
    assert_eq!(kind, ErrorKind::ContextOverflow);
    assert!(message.contains("512 tokens") && message.contains("window has 512"), "{message}");
    assert_eq!(outcome.started, None, "nothing was computed");
    // Far beyond, and at once.
    let outcome = engine.ask(raw(3, &"x".repeat(MAX_PROMPT_BYTES)));
    assert_eq!(outcome.error.unwrap().0, ErrorKind::ContextOverflow);
    let outcome = engine.ask(raw(4, &"x".repeat(MAX_PROMPT_BYTES + 1)));
    assert_eq!(outcome.error.unwrap().0, ErrorKind::Invalid);
}

/// The regular expressions of some vocabularies recurse for every character of a match (`prepare.rs`).
#[test]
fn a_long_run_of_one_letter_ends_no_engine_whatever_the_vocabulary() {
    let gguf = Gguf::read(&demo());
    // Its length, then "smollm".
    let name = gguf.place("tokenizer.ggml.pre") + 8;
    let folder = tempfile::tempdir().unwrap();
    for vocabulary in ["gpt-4o", "falcon"] {
        let mut bytes = gguf.bytes.clone();
        assert_eq!(&bytes[name..name + 6], b"smollm");
        bytes[name..name + 6].copy_from_slice(vocabulary.as_bytes());
        let path = folder.path().join("other.gguf");
        std::fs::write(&path, bytes).unwrap();
        let (mut engine, _) = Engine::loaded(&load(&path, 1));
        for (id, letters) in [(1, "a".repeat(20_000)), (2, "!".repeat(20_000)), (3, "a".repeat(MAX_PROMPT_BYTES))] {
            let outcome = engine.ask(chat(id, &letters));
            assert_eq!(outcome.error.map(|(kind, _)| kind), Some(ErrorKind::ContextOverflow), "{vocabulary}, request {id}");
        }
    }
}

#[test]
fn the_end_of_the_window_ends_an_answer_with_length() {
    let (mut engine, ready) = Engine::loaded(&Load { context: 64, ..load(&demo(), 1) });
    assert_eq!(ready.context, 64);
    let outcome = engine.ask(chat(1, "Count to 50"));
    assert_eq!(outcome.finish, Some(Finish::Length));
    assert_eq!(outcome.started.unwrap() + outcome.completion_tokens, 64);
    assert!(outcome.text.starts_with("1 2 3 4"), "{}", outcome.text);
}

#[test]
fn every_slot_has_the_whole_window() {
    let mut engine = Engine::demo(4);
    let ids = [1, 2, 3, 4];
    for id in ids {
        engine.send(&Down::Generate(raw(id, &format!("{id}").repeat(500))));
    }
    for outcome in engine.collect(&ids).values() {
        assert_eq!((outcome.started, outcome.error.as_ref()), (Some(500), None));
    }
}

#[test]
fn numbers_are_cut_to_their_bounds() {
    let wild = Load { slots: u32::MAX, threads: u32::MAX, context: u32::MAX, gpu_layers: u32::MAX, ..load(&demo(), 1) };
    let (mut engine, ready) = Engine::loaded(&wild);
    assert_eq!((ready.slots, ready.context), (MAX_SLOTS, 512));
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(ready.threads as usize <= cores, "{} threads on {cores} cores", ready.threads);
    assert_eq!(engine.answer("What is 2+2?"), "4");
    let (mut engine, ready) = Engine::loaded(&Load { slots: 0, context: 1, ..load(&demo(), 1) });
    assert_eq!((ready.slots, ready.context), (1, 1));
    assert_eq!(engine.ask(chat(1, "Hi")).error.unwrap().0, ErrorKind::ContextOverflow);
    for (temperature, top_p) in [(f64::MAX, 0.0), (-1.0, 1.0), (0.0, f64::MAX), (1e-300, -1.0)] {
        let request =
            Generate { temperature: Some(temperature), top_p: Some(top_p), seed: Some(u64::MAX), ..chat(2, "What is 2+2?") };
        assert!(engine.ask(request).error.is_some());
    }
}

#[test]
fn wild_settings_still_answer() {
    let mut engine = Engine::demo(1);
    // So little of the nucleus is left that only the most likely token is in it.
    for (temperature, top_p) in [(f64::MAX, 0.0), (-1.0, 1.0), (0.0, f64::MAX), (1e-300, -1.0), (2.0, 1e-9)] {
        let request =
            Generate { temperature: Some(temperature), top_p: Some(top_p), seed: Some(u64::MAX), ..chat(2, "What is 2+2?") };
        assert_eq!(engine.ask(request).text, "4", "{temperature} {top_p}");
    }
}

#[test]
fn a_full_house_says_busy_and_a_freed_slot_is_free_at_once() {
    let mut engine = Engine::demo(2);
    for id in [1, 2, 3] {
        engine.send(&Down::Generate(chat(id, "Count to 50")));
    }
    let outcomes = engine.collect(&[1, 2, 3]);
    let (kind, message) = outcomes[&3].error.clone().unwrap();
    assert_eq!((kind, message.as_str()), (ErrorKind::Busy, "all slots are taken"));
    assert_eq!((outcomes[&1].finish, outcomes[&2].finish), (Some(Finish::Stop), Some(Finish::Stop)));
    // The same number twice at once.
    engine.send(&Down::Generate(chat(5, "Count to 50")));
    engine.send(&Down::Generate(chat(5, "Count to 50")));
    let mut kinds = Vec::new();
    while kinds.len() < 2 {
        match engine.next() {
            Up::Error { id: 5, kind, .. } => kinds.push(Some(kind)),
            Up::Done { id: 5, .. } => kinds.push(None),
            _ => {}
        }
    }
    assert_eq!(kinds, [Some(ErrorKind::Invalid), None]);
    // A slot is free before its end is told: never busy, one after another.
    let mut engine = Engine::demo(1);
    for id in 0..200 {
        assert_eq!(engine.ask(chat(id, "What is 2+2?")).text, "4");
    }
}

#[test]
fn what_cannot_be_asked_is_refused_in_words() {
    let mut engine = Engine::demo(1);
    let mut refused = |request: Generate| {
        let (kind, message) = engine.ask(request).error.expect("refused");
        assert_eq!(kind, ErrorKind::Invalid);
        message
    };
    assert!(refused(crate::client::talk(1, &[])).contains("no message"));
    assert!(refused(crate::client::talk(2, &[("robot", "canary")])).contains("\"robot\""));
    assert!(refused(raw(3, "")).contains("empty"));
    assert!(refused(Generate { stop: vec!["x".to_owned(); MAX_STOPS + 1], ..chat(4, "Hi") }).contains("17 stop texts"));
    assert!(refused(Generate { stop: vec![String::new()], ..chat(5, "Hi") }).contains("0 bytes"));
}

#[test]
fn strange_frames_are_answered_or_passed_over() {
    let mut engine = Engine::demo(1);
    let frame = |body: &[u8]| [&u32::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat();
    for body in [&b""[..], b"{", b"[]", b"null", b"\xff\xfe", br#"{"type":"dance"}"#, br#"{"type":"cancel","id":-1}"#] {
        engine.send_bytes(&frame(body));
    }
    // Deep nesting is an error of the parser, not of the stack.
    engine.send_bytes(&frame("[".repeat(1 << 20).as_bytes()));
    engine.send_bytes(&frame(br#"{"type":"generate","id":9,"input":{"song":"canary"}}"#));
    match engine.next() {
        Up::Error { id: 9, kind: ErrorKind::Invalid, message } => assert!(!message.contains("canary"), "{message}"),
        other => panic!("{other:?}"),
    }
    engine.send(&Down::Load(load(&demo(), 1)));
    engine.send(&Down::Cancel { id: 77 });
    assert_eq!(engine.answer("What is 2+2?"), "4");
    assert!(!engine.stderr().contains("canary"));
}

#[test]
fn a_frame_that_is_too_long_ends_the_child_before_it_is_read() {
    let mut engine = Engine::demo(1);
    let length = u32::try_from(MAX_FRAME_BYTES + 1).unwrap();
    engine.send_bytes(&length.to_be_bytes());
    assert_eq!(engine.ended().code(), Some(2));
    assert!(engine.stderr().contains("at most 8388608"), "{}", engine.stderr());
}
