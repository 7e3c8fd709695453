//! The real engine and the model that every installation brings.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use opengateway::domain::node::ModelState;
use opengateway::domain::prompt::FailureKind;

use super::lab::{Lab, collect};
use crate::common::node::skipped;

/// The engine's program: named by the environment, or built in this repository.
pub fn program() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("OPENGATEWAY_ENGINE") {
        return Some(named.into());
    }
    let target = Path::new(env!("CARGO_BIN_EXE_opengatewayd")).ancestors().nth(2)?;
    let triples = fs::read_dir(target).ok()?.flatten().map(|entry| entry.path().join("release"));
    triples.chain([target.join("release")]).map(|release| release.join("opengateway-engine")).find(|path| path.is_file())
}

pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/opengateway-demo.gguf")
}

async fn lab() -> Option<Lab> {
    let Some(program) = program() else {
        skipped("the engine is not built here: scripts/engine.sh, or name it in OPENGATEWAY_ENGINE");
        return None;
    };
    if !demo().is_file() {
        skipped("there is no models/opengateway-demo.gguf");
        return None;
    }
    let lab = Lab::with(&[], |settings| (settings.program, settings.slots) = (program, None)).await;
    fs::copy(demo(), lab.path("copy")).unwrap();
    fs::rename(lab.path("copy"), lab.path("models/demo.gguf")).unwrap();
    lab.until_state("demo", ModelState::Available).await;
    Some(lab)
}

const SUMS: [(&str, &str); 8] = [
    ("What is 2+2?", "4"),
    ("3 + 4", "7"),
    ("What is 9-5?", "4"),
    ("What is 3*3?", "9"),
    ("What is 8+1?", "9"),
    ("What is 0+0?", "0"),
    ("What is 7*8?", "56"),
    ("Count to 5", "1 2 3 4 5"),
];

#[tokio::test]
async fn the_answers_are_exact_alone_and_over_eight_streams_at_once() {
    let Some(lab) = lab().await else { return };
    for (question, answer) in SUMS {
        assert_eq!(lab.answer("demo", question).await.text, answer, "{question}");
    }
    let asked: Vec<_> = SUMS.iter().map(|(question, _)| lab.ask("demo", question)).collect();
    for (events, (question, answer)) in asked.into_iter().zip(SUMS) {
        assert_eq!(collect(events).await.text, answer, "{question}");
    }
    let local = lab.until("demo", |local| local.answered == 16).await;
    assert_eq!((local.crashes, local.slots, local.context), (0, 8, Some(512)));
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_says_so() {
    let Some(lab) = lab().await else { return };
    let long = "2+2 ".repeat(2000);
    assert_eq!(lab.answer("demo", &long).await.kind(), Some(FailureKind::ContextOverflow));
    assert_eq!(lab.answer("demo", "What is 2+2?").await.text, "4");
}

/// Bytes at places that the reader of headers does not judge: the engine refuses the file or dies, and the daemon serves on.
#[tokio::test]
async fn hostile_files_end_their_engine_alone() {
    let Some(lab) = lab().await else { return };
    let whole = fs::read(demo()).unwrap();
    let patched = |key: &str, value: u32| {
        let at = whole.windows(key.len()).position(|window| window == key.as_bytes()).unwrap() + key.len() + 4;
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let files = [
        ("layers", patched("llama.block_count", 1000)),
        ("heads", patched("llama.attention.head_count", 3)),
        ("width", patched("llama.embedding_length", 7)),
        ("feed", patched("llama.feed_forward_length", u32::MAX)),
        ("rope", patched("llama.rope.dimension_count", 1 << 30)),
    ];
    for (name, bytes) in &files {
        fs::write(lab.path("copy"), bytes).unwrap();
        fs::rename(lab.path("copy"), lab.path(&format!("models/{name}.gguf"))).unwrap();
    }
    for (name, _) in &files {
        lab.until(name, |_| true).await;
        let answer = lab.answer(name, "What is 2+2?").await;
        // Some load all the same; what they say means nothing.
        let named = [FailureKind::ModelUnavailable, FailureKind::EngineCrashed, FailureKind::BackendFailed];
        assert!(answer.kind().is_none_or(|kind| named.contains(&kind)), "{name}: {answer:?}");
        assert_eq!(lab.answer("demo", "What is 2+2?").await.text, "4", "after {name}");
    }
    assert_eq!(lab.local("demo").unwrap().crashes, 0);
}

#[tokio::test]
async fn a_file_cut_under_its_engine_does_not_move_the_daemon() {
    let Some(lab) = lab().await else { return };
    assert_eq!(lab.answer("demo", "What is 2+2?").await.text, "4");
    File::options().write(true).open(lab.path("models/demo.gguf")).unwrap().set_len(4096).unwrap();
    let answer = lab.answer("demo", "Count to 50").await;
    assert!(answer.kind().is_some() || !answer.text.is_empty());
    let local = lab.until_state("demo", ModelState::Failed).await;
    assert!(local.problem.unwrap().contains("truncated"));
    fs::copy(demo(), lab.path("copy")).unwrap();
    fs::rename(lab.path("copy"), lab.path("models/demo.gguf")).unwrap();
    lab.until_state("demo", ModelState::Available).await;
    assert_eq!(lab.answer("demo", "What is 2+2?").await.text, "4");
}
