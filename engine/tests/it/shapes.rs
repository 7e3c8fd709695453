//! With a model of a real size, where there is one: `OPENGATEWAY_LARGE_MODEL` names the file. `models/demo/random_gguf.py` makes
//! one (smollm360m); its answers mean nothing, but it takes its time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use opengateway_engine_protocol::{Down, Finish, Generate, Load, Up};

use crate::client::{Engine, Outcome, load, raw, skipped};

fn large() -> Option<PathBuf> {
    let path = std::env::var_os("OPENGATEWAY_LARGE_MODEL").map(PathBuf::from).filter(|path| path.exists());
    if path.is_none() {
        // No build server has one unless it is told to.
        println!("SKIPPED: OPENGATEWAY_LARGE_MODEL names no file");
    }
    path
}

fn long_prompt() -> String {
    "the quick brown fox and 12 dogs ".repeat(60)
}

#[test]
fn a_prompt_that_takes_long_is_cancelled_within_a_second_and_pings_go_on() {
    let Some(path) = large() else { return };
    let (mut engine, ready) = Engine::loaded(&Load { threads: 1, ..load(&path, 2) });
    if ready.parameters < 100_000_000 {
        return skipped("OPENGATEWAY_LARGE_MODEL is small");
    }
    engine.send(&Down::Generate(raw(1, &long_prompt())));
    let mut outcomes = [(1, Outcome::default())].into();
    engine.take(&mut outcomes);
    assert!(outcomes[&1].started.is_some());
    let before = Instant::now();
    engine.send(&Down::Ping { nonce: 1 });
    assert_eq!(engine.next(), Up::Pong { nonce: 1, running: 1 });
    assert!(before.elapsed() < Duration::from_secs(1));
    let before = Instant::now();
    engine.send(&Down::Cancel { id: 1 });
    while outcomes[&1].finish.is_none() {
        engine.take(&mut outcomes);
    }
    assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    assert_eq!(outcomes[&1].finish, Some(Finish::Cancelled));
    // And an answer that is under way goes on beside a long prompt.
    engine.send(&Down::Generate(Generate { max_tokens: Some(12), ..raw(2, "a b c") }));
    let mut outcomes = BTreeMap::from([(2, Outcome::default()), (3, Outcome::default())]);
    engine.take(&mut outcomes);
    engine.send(&Down::Generate(Generate { max_tokens: Some(1), ..raw(3, &long_prompt()) }));
    while outcomes[&2].finish.is_none() {
        engine.take(&mut outcomes);
    }
    assert_eq!(outcomes[&3].finish, None, "the long prompt came first");
    // A cancel of one of two prompts is as quick, and the other one is still answered.
    engine.send(&Down::Generate(Generate { max_tokens: Some(1), ..raw(4, &long_prompt()) }));
    outcomes.insert(4, Outcome::default());
    while outcomes[&4].started.is_none() {
        engine.take(&mut outcomes);
    }
    let before = Instant::now();
    engine.send(&Down::Cancel { id: 3 });
    while outcomes[&3].finish.is_none() {
        engine.take(&mut outcomes);
    }
    assert!(before.elapsed() < Duration::from_secs(1), "{:?}", before.elapsed());
    assert_eq!(outcomes[&3].finish, Some(Finish::Cancelled));
    while outcomes[&4].finish.is_none() {
        engine.take(&mut outcomes);
    }
    assert_eq!(outcomes[&4].completion_tokens, 1);
}
