//! Files that are broken, or made to break: each is refused, or ends the child alone, in time.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use opengateway_engine_protocol::{Down, Generate, Up};

use crate::client::{Engine, chat, demo, load};
use crate::gguf::Gguf;

/// What became of a file.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Fate {
    /// With a sentence, and exit code 3.
    Refused,
    /// The child ended by itself or by a signal.
    Died,
    /// It loaded and computed, whatever it said.
    Answered,
}

/// Loads a file and asks. The client's deadlines hold for every step.
fn fate(path: &Path) -> Fate {
    let (mut engine, _) = Engine::start();
    engine.send(&Down::Load(load(path, 1)));
    loop {
        match engine.try_next() {
            Some(Up::Loading { .. } | Up::Started { .. } | Up::Delta { .. }) => {}
            Some(Up::Ready(_)) => engine.send(&Down::Generate(Generate { max_tokens: Some(16), ..chat(1, "What is 2+2?") })),
            Some(Up::LoadFailed { reason }) => {
                assert!(!reason.is_empty());
                assert_eq!(engine.ended().code(), Some(3));
                return Fate::Refused;
            }
            Some(Up::Done { .. } | Up::Error { .. }) => return Fate::Answered,
            Some(other) => panic!("{other:?}"),
            None => {
                let status = engine.ended();
                assert!(!status.success(), "it ended as if all were well");
                // An instruction that does not exist would be our own mistake.
                assert_ne!(status.signal(), Some(4), "illegal instruction");
                return Fate::Died;
            }
        }
    }
}

/// Writes each and reports; `names` of those that may not answer are checked by the caller.
fn fates(files: Vec<(String, Vec<u8>)>) -> Vec<(String, Fate)> {
    let folder = tempfile::tempdir().unwrap();
    files
        .into_iter()
        .map(|(name, bytes)| {
            let path = folder.path().join("hostile.gguf");
            std::fs::write(&path, bytes).unwrap();
            let fate = fate(&path);
            println!("{name}: {fate:?}");
            (name, fate)
        })
        .collect()
}

/// Numbers in the header, at their extremes.
const EXTREMES: &[(&str, &[u32])] = &[
    ("llama.block_count", &[0, 1000, u32::MAX]),
    ("llama.attention.head_count", &[0, 3, u32::MAX]),
    ("llama.attention.head_count_kv", &[0, 3, u32::MAX]),
    ("llama.context_length", &[0, 1, u32::MAX]),
    ("llama.embedding_length", &[0, 1, u32::MAX]),
    ("llama.feed_forward_length", &[0, u32::MAX]),
    ("llama.rope.dimension_count", &[0, 7, u32::MAX]),
    ("tokenizer.ggml.eos_token_id", &[100_000, u32::MAX]),
    ("tokenizer.ggml.bos_token_id", &[u32::MAX]),
    ("llama.vocab_size", &[0, u32::MAX]),
    ("general.quantization_version", &[u32::MAX]),
];

#[test]
fn numbers_at_their_extremes() {
    let gguf = Gguf::read(&demo());
    let files: Vec<_> = EXTREMES
        .iter()
        .flat_map(|(key, values)| {
            values.iter().map(|value| (format!("{key} = {value}"), gguf.with(key, *value))).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(files.len(), 26);
    for (name, fate) in fates(files) {
        if name.contains("block_count") || name.contains("embedding_length") || name.contains("feed_forward") {
            assert_ne!(fate, Fate::Answered, "{name}: the tensors cannot have that shape");
        }
    }
}

#[test]
fn forty_random_edits_of_the_header() {
    let gguf = Gguf::read(&demo());
    let mut state = 1_u64;
    // SplitMix64: the same edits every time.
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % below as u64).unwrap()
    };
    let files: Vec<_> = (0..40)
        .map(|edit| {
            let mut bytes = gguf.bytes.clone();
            // Values, names and shapes of tensors, all before their data.
            let end = gguf.tensors + 2000;
            let (at, count) = (random(end - 4), 1 + random(4));
            for byte in &mut bytes[at..at + count] {
                *byte = u8::try_from(random(256)).unwrap();
            }
            (format!("edit {edit}: {count} bytes at {at}"), bytes)
        })
        .collect();
    // Each ends somehow, in time: most are found out, some change nothing that matters.
    assert_eq!(fates(files).len(), 40);
}

#[test]
fn damaged_files_are_refused() {
    let gguf = Gguf::read(&demo());
    let whole = &gguf.bytes;
    let edited = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let huge = u64::MAX.to_le_bytes();
    let files: Vec<(String, Vec<u8>)> = [
        ("empty", Vec::new()),
        ("only a name", b"GGUF".to_vec()),
        ("half a header", whole[..1000].to_vec()),
        ("no tensors", whole[..gguf.tensors].to_vec()),
        ("half the weights", whole[..whole.len() / 2].to_vec()),
        ("a byte too short", whole[..whole.len() - 1].to_vec()),
        ("garbage", (0..100_000_u32).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()),
        ("another format", edited(0, b"GGML")),
        ("a version to come", edited(4, &99_u32.to_le_bytes())),
        ("too many tensors", edited(8, &huge)),
        ("too many values", edited(16, &huge)),
        ("a key without end", edited(24, &huge)),
        ("a key without letters", edited(24, &0_u64.to_le_bytes())),
        ("a text without end", edited(gguf.place("tokenizer.chat_template"), &huge)),
        ("an array without end", edited(gguf.place("tokenizer.ggml.tokens") + 4, &huge)),
    ]
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .into();
    for (name, fate) in fates(files) {
        assert_ne!(fate, Fate::Answered, "{name}");
    }
}

#[test]
fn two_tokens_with_one_text_end_the_child_alone() {
    let gguf = Gguf::read(&demo());
    let texts = gguf.texts("tokenizer.ggml.tokens");
    let mut bytes = gguf.bytes.clone();
    let (first, second) = (texts[40], texts[41]);
    assert_eq!(first.1, second.1);
    bytes.copy_within(first.0..first.0 + first.1, second.0);
    for (_, fate) in fates(vec![("a token twice".to_owned(), bytes)]) {
        assert_ne!(fate, Fate::Answered);
    }
}

#[test]
fn a_file_that_shrinks_under_the_child_ends_it_with_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shrinks.gguf");
    std::fs::copy(demo(), &path).unwrap();
    let (mut engine, _) = Engine::loaded(&load(&path, 1));
    assert_eq!(engine.answer("What is 2+2?"), "4");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    engine.send(&Down::Generate(chat(2, "What is 2+2?")));
    while engine.try_next().is_some() {}
    assert_eq!(engine.ended().signal(), Some(7), "SIGBUS");
}
