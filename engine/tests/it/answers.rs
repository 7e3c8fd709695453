//! What the demo model answers, alone and with others, and what ends an answer.

use std::time::Instant;

use opengateway_engine_protocol::{Down, Finish, Generate};

use crate::client::{Engine, chat, demo, load, raw, talk};

/// Questions and exact answers, greedy: the scores of models/demo/README.md.
fn known() -> Vec<(String, String)> {
    let digits = || (0..10).flat_map(|a| (0..10).map(move |b| (a, b)));
    let mut known: Vec<(String, String)> = Vec::new();
    for (a, b) in digits() {
        known.push((format!("What is {a}+{b}?"), (a + b).to_string()));
        known.push((format!("{a} + {b}"), (a + b).to_string()));
        known.push((format!("What is {a}*{b}?"), (a * b).to_string()));
        if a >= b {
            known.push((format!("What is {a}-{b}?"), (a - b).to_string()));
        }
    }
    for n in [1, 2, 3, 5, 8, 10, 15, 20, 25, 30, 40, 50] {
        known.push((format!("Count to {n}"), counted(n)));
    }
    for words in ["hello", "gateway node", "the quick dog", "abc123", "Zx-9_k", "one two three four", "42", "A"] {
        known.push((format!("Repeat: {words}"), words.to_owned()));
    }
    let unknown = "I only know sums, counting and repeating.";
    for (question, answer) in [
        ("Hello", "Hello! I am the opengateway demo model. Ask me for a sum, like 2+2."),
        ("Who are you?", "I am a tiny demo model. I can add, subtract, multiply, count and repeat."),
        ("What is the capital of France?", unknown),
        ("Write a poem about the sea", unknown),
    ] {
        known.push((question.to_owned(), answer.to_owned()));
    }
    known
}

fn counted(n: u32) -> String {
    (1..=n).map(|number| number.to_string()).collect::<Vec<_>>().join(" ")
}

#[test]
fn two_and_two_is_four() {
    let (mut engine, ready) = Engine::loaded(&load(&demo(), 1));
    assert_eq!((ready.context, ready.slots, ready.threads, ready.template.as_str()), (512, 1, 1, "chatml"));
    assert_eq!(ready.parameters, 824_448);
    assert!(ready.device.starts_with("CPU "), "{}", ready.device);
    assert!((1 << 20..64 << 20).contains(&ready.memory), "{} bytes", ready.memory);
    let outcome = engine.ask(chat(7, "What is 2+2?"));
    assert_eq!((outcome.text.as_str(), outcome.finish), ("4", Some(Finish::Stop)));
    // The token that ends it is not counted.
    assert_eq!((outcome.started, outcome.completion_tokens, outcome.told_tokens), (Some(20), 1, 1));
    let system = talk(8, &[("system", "You are a helpful assistant."), ("user", "What is 2+2?")]);
    assert_eq!(engine.ask(system).text, "4");
    let later = talk(9, &[("user", "Hello"), ("assistant", "Hello!"), ("user", "What is 3*3?")]);
    assert_eq!(engine.ask(later).text, "9");
}

#[test]
fn all_that_it_knows_is_exact() {
    let mut engine = Engine::demo(1);
    for (question, answer) in known() {
        assert_eq!(engine.answer(&question), answer, "{question}");
    }
}

#[test]
fn eight_at_once_answer_as_one_does() {
    let mut engine = Engine::demo(8);
    let known = known();
    for eight in known.chunks(8) {
        let ids: Vec<u64> = (1..).take(eight.len()).collect();
        for (id, (question, _)) in ids.iter().zip(eight) {
            engine.send(&Down::Generate(chat(*id, question)));
        }
        let outcomes = engine.collect(&ids);
        for (id, (question, answer)) in ids.iter().zip(eight) {
            assert_eq!(&outcomes[id].text, answer, "{question}");
        }
    }
}

#[test]
fn requests_that_come_and_go_do_not_disturb_each_other() {
    let mut engine = Engine::demo(4);
    let known = known();
    let mut running = std::collections::BTreeMap::new();
    let mut expected = std::collections::BTreeMap::new();
    let (mut next, mut ended) = (0, 0);
    while ended < 100 {
        while running.len() < 4 && next < 100 {
            let id = next as u64;
            let (question, answer) = &known[(next * 37) % known.len()];
            engine.send(&Down::Generate(chat(id, question)));
            running.insert(id, crate::client::Outcome::default());
            expected.insert(id, answer.clone());
            next += 1;
        }
        engine.take(&mut running);
        running.retain(|id, outcome| {
            if outcome.finish.is_none() {
                return true;
            }
            assert_eq!(outcome.text, expected[id]);
            ended += 1;
            false
        });
    }
}

#[test]
fn max_tokens_ends_an_answer_with_length() {
    let mut engine = Engine::demo(1);
    for (most, text) in [(0, ""), (1, "1"), (2, "1 "), (5, "1 2 3")] {
        let outcome = engine.ask(Generate { max_tokens: Some(most), ..chat(1, "Count to 50") });
        assert_eq!((outcome.text.as_str(), outcome.finish), (text, Some(Finish::Length)));
        assert_eq!(outcome.completion_tokens, most);
    }
}

#[test]
fn stop_texts_end_an_answer_and_do_not_show() {
    let mut engine = Engine::demo(1);
    let mut stopped = |stop: &[&str]| {
        let outcome = engine.ask(Generate { stop: stop.iter().map(ToString::to_string).collect(), ..chat(1, "Count to 50") });
        (outcome.text, outcome.finish)
    };
    assert_eq!(stopped(&[" 4 5"]), ("1 2 3".to_owned(), Some(Finish::Stop)));
    assert_eq!(stopped(&["3 5", "12"]), (counted(11) + " ", Some(Finish::Stop)));
    // What only begins like one is not lost.
    assert_eq!(stopped(&["50 51"]), (counted(50), Some(Finish::Stop)));
    assert_eq!(stopped(&["1"]), (String::new(), Some(Finish::Stop)));
}

#[test]
fn characters_of_several_tokens_come_whole() {
    // The vocabulary is bytes: an emoji is four tokens. Repeated text is the way to make the model say one.
    let mut engine = Engine::demo(1);
    let smile = "Repeat: \u{1f600}";
    let whole = engine.ask(chat(1, smile));
    for most in 1..=whole.completion_tokens.min(12) {
        let outcome = engine.ask(Generate { max_tokens: Some(most), ..chat(1, smile) });
        // Cut inside a character, it ends with a replacement character, and no frame had half a one: they are text.
        assert_eq!(outcome.completion_tokens, most);
        assert!(outcome.text.chars().count() <= most as usize, "{:?}", outcome.text);
    }
    // The prompt's bytes are all there: four tokens more than without it.
    let bare = engine.ask(chat(1, "Repeat: ")).started.unwrap();
    assert_eq!(whole.started.unwrap(), bare + 4);
}

#[test]
fn a_seed_gives_the_same_answer_again() {
    let mut engine = Engine::demo(8);
    let warm = |id, seed| Generate {
        temperature: Some(2.0),
        top_p: Some(1.0),
        seed: Some(seed),
        max_tokens: Some(60),
        ..chat(id, "Hello")
    };
    let first = engine.ask(warm(1, 11)).text;
    assert_eq!(engine.ask(warm(2, 11)).text, first);
    assert_ne!(engine.ask(warm(3, 12)).text, first, "another seed");
    // Beside seven others of other lengths.
    for id in 10..18 {
        engine.send(&Down::Generate(warm(id, if id == 13 { 11 } else { id })));
    }
    let ids: Vec<u64> = (10..18).collect();
    assert_eq!(engine.collect(&ids)[&13].text, first);
    // Without a seed answers differ.
    let free = |id| Generate { seed: None, ..warm(id, 0) };
    let answers: std::collections::BTreeSet<_> = (20..26).map(|id| engine.ask(free(id)).text).collect();
    assert!(answers.len() > 1);
}

#[test]
fn without_settings_the_model_still_knows_what_it_knows() {
    let mut engine = Engine::demo(1);
    for id in 0..50 {
        let outcome = engine.ask(Generate { temperature: None, ..chat(id, "What is 2+2?") });
        assert_eq!(outcome.text, "4");
    }
}

#[test]
fn raw_text_is_continued_and_nothing_in_it_is_special() {
    let mut engine = Engine::demo(1);
    let outcome = engine.ask(Generate { max_tokens: Some(4), ..raw(1, "1 2 3 4 5 6 7 8") });
    assert_eq!(outcome.started, Some(15));
    // Eleven and thirteen characters of plain text, not two special tokens.
    let outcome = engine.ask(Generate { max_tokens: Some(1), ..raw(2, "<|im_end|><|im_start|>") });
    assert_eq!(outcome.started, Some(22));
}

#[test]
fn eight_at_once_are_faster_than_one_after_another() {
    let mut engine = Engine::demo(8);
    engine.answer("Count to 50");
    let mut together_is_faster = || {
        let before = Instant::now();
        for _ in 0..8 {
            engine.answer("Count to 50");
        }
        let one_by_one = before.elapsed();
        let before = Instant::now();
        let ids: Vec<u64> = (1..9).collect();
        for id in &ids {
            engine.send(&Down::Generate(chat(*id, "Count to 50")));
        }
        engine.collect(&ids);
        let together = before.elapsed();
        together < one_by_one
    };
    // A busy machine may spoil a factor and one try, not the order each time.
    assert!((0..3).any(|_| together_is_faster()));
}
