//! Headers whole, damaged, and made up to hurt.

use proptest::prelude::*;

#[path = "../../../tests/common/gguf.rs"]
mod file;

use self::file::{Gguf, Meta};
use super::*;

fn parse(bytes: &[u8]) -> Result<Header, GgufError> {
    read(bytes, bytes.len() as u64)
}

fn why(file: &Gguf) -> String {
    parse(&file.bytes()).unwrap_err().to_string()
}

#[test]
fn a_header_tells_what_a_model_is() {
    let header = parse(&Gguf::default().bytes()).unwrap();
    assert_eq!(
        header,
        Header {
            version: 3,
            architecture: "llama".to_owned(),
            title: Some("a test".to_owned()),
            parameters: 24 + 64,
            quantisation: Some("F32".to_owned()),
            context: Some(512),
            layers: 1,
            heads: Some(2),
            kv_heads: Some(1),
            embedding: 8,
            key_length: None,
            value_length: None,
            vocabulary: 3,
            has_template: true,
        }
    );
    let shape = header.shape();
    assert_eq!((shape.kv_heads, shape.key_length, shape.value_length), (1, 4, 4));
}

#[test]
fn the_dominant_type_names_a_file_that_does_not_say_it() {
    let plain = Gguf::default().without("general.file_type");
    assert_eq!(parse(&plain.bytes()).unwrap().quantisation.as_deref(), Some("F16"));
    let medium = Gguf::default().with("general.file_type", Meta::U32(15));
    assert_eq!(parse(&medium.bytes()).unwrap().quantisation.as_deref(), Some("Q4_K_M"));
}

#[test]
fn heads_by_layer_count_by_the_most_of_them() {
    let listed = Gguf::default().with("llama.attention.head_count_kv", Meta::U32s(vec![0, 2, 1]));
    assert_eq!(parse(&listed.bytes()).unwrap().kv_heads, Some(2));
}

#[test]
fn what_is_no_model_is_named() {
    assert!(matches!(parse(b""), Err(GgufError::Magic)));
    assert!(matches!(parse(b"PK\x03\x04 and so on"), Err(GgufError::Magic)));
    for version in [0, 1, 4, 3_u32.swap_bytes()] {
        assert!(
            matches!(parse(&Gguf { version, ..Gguf::default() }.bytes()), Err(GgufError::Version(found)) if found == version)
        );
    }
    assert!(parse(&Gguf { version: 2, ..Gguf::default() }.bytes()).is_ok());
    let adapter = Gguf::default().with("general.type", Meta::Text("adapter".to_owned()));
    assert!(matches!(parse(&adapter.bytes()), Err(GgufError::NoModel(kind)) if kind == "adapter"));
    let part = Gguf::default().with("split.count", Meta::U32(3)).with("split.no", Meta::U32(1));
    assert!(matches!(parse(&part.bytes()), Err(GgufError::Split { part: 2, parts: 3 })));
}

#[test]
fn every_cut_is_an_error_and_most_say_truncated() {
    let whole = Gguf::default().bytes();
    for length in 4..whole.len() {
        match parse(&whole[..length]) {
            Err(GgufError::Truncated(_)) => {}
            other => panic!("{length} of {}: {other:?}", whole.len()),
        }
    }
}

#[test]
fn what_the_engine_would_abort_on_is_refused() {
    for blocks in [0, MAX_LAYERS + 1, u32::MAX] {
        assert!(why(&Gguf::default().with("llama.block_count", Meta::U32(blocks))).contains("block_count"), "{blocks}");
    }
    assert!(parse(&Gguf::default().with("llama.block_count", Meta::U32(MAX_LAYERS)).bytes()).is_ok());
    let twice = Gguf::default().with(TOKENS, Meta::Texts(["a", "b", "a"].map(str::to_owned).to_vec()));
    assert!(why(&twice).contains("twice"));
    let mut beyond = Gguf::default();
    beyond.tensors[1].0 = "blk.1.attn_q.weight".to_owned();
    assert!(why(&beyond).contains("block 1"));
}

#[test]
fn tensors_are_where_they_can_be() {
    let change = |change: fn(&mut (String, Vec<u64>, u32, u64))| {
        let mut file = Gguf::default();
        change(&mut file.tensors[1]);
        why(&file)
    };
    assert!(change(|tensor| tensor.3 = 97).contains("aligned"));
    assert!(change(|tensor| tensor.3 = 128).contains("truncated"));
    assert!(change(|tensor| tensor.3 = u64::MAX - 31).contains("beyond"));
    assert!(change(|tensor| tensor.1 = vec![u64::MAX, 2]).contains("shape"));
    assert!(change(|tensor| tensor.1 = vec![0, 8]).contains("shape"));
    assert!(change(|tensor| tensor.1 = vec![]).contains("0 dimensions"));
    assert!(change(|tensor| tensor.1 = vec![2; 5]).contains("5 dimensions"));
    assert!(change(|tensor| tensor.2 = 4).contains("type 4"));
    assert!(change(|tensor| tensor.2 = 8).contains("blocks of 32"));
    assert!(change(|tensor| tensor.0 = "token_embd.weight".to_owned()).contains("twice"));
    assert!(why(&Gguf { tensors: Vec::new(), ..Gguf::default() }).contains("no tensors"));
}

#[test]
fn each_limit_holds_and_one_past_it_does_not() {
    let named = |length: u64| Gguf::default().with(&"k".repeat(usize::try_from(length).unwrap()), Meta::U32(1));
    assert!(parse(&named(MAX_NAME_BYTES).bytes()).is_ok());
    assert!(why(&named(MAX_NAME_BYTES + 1)).contains("at most 256"));
    let said = |length: u64| Gguf::default().with("x", Meta::Text("t".repeat(usize::try_from(length).unwrap())));
    assert!(parse(&said(MAX_TEXT_BYTES).bytes()).is_ok());
    assert!(why(&said(MAX_TEXT_BYTES + 1)).contains("1048577"));
    let entries = |count: u64| {
        let mut file = Gguf::default();
        (file.meta.len() as u64..count).for_each(|at| file.meta.push((at.to_string(), Meta::U32(0))));
        file
    };
    assert!(parse(&entries(MAX_ENTRIES).bytes()).is_ok());
    assert!(why(&entries(MAX_ENTRIES + 1)).contains("4097"));
    let mut twice = Gguf::default();
    twice.meta.push(("llama.block_count".to_owned(), Meta::U32(1)));
    assert!(why(&twice).contains("twice"));
}

/// Announces what is not there, in every place that announces.
#[test]
fn what_is_only_announced_allocates_nothing() {
    let begin = |tensors: u64, entries: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend_from_slice(&tensors.to_le_bytes());
        bytes.extend_from_slice(&entries.to_le_bytes());
        bytes
    };
    assert!(matches!(parse(&begin(u64::MAX, 1)), Err(GgufError::TooMuch { .. })));
    assert!(matches!(parse(&begin(1, u64::MAX)), Err(GgufError::TooMuch { .. })));
    assert!(matches!(parse(&begin(MAX_TENSORS, MAX_ENTRIES)), Err(GgufError::Truncated(_))));
    let mut key = begin(1, 1);
    key.extend_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(parse(&key), Err(GgufError::TooMuch { .. })));
    for kind in [0_u32, 8, 9, 12] {
        let mut list = begin(1, 1);
        list.extend_from_slice(&1_u64.to_le_bytes());
        list.extend_from_slice(b"k\x09\0\0\0");
        list.extend_from_slice(&kind.to_le_bytes());
        let mut lying = list.clone();
        lying.extend_from_slice(&(MAX_ITEMS + 1).to_le_bytes());
        assert!(matches!(parse(&lying), Err(GgufError::TooMuch { .. })), "{kind}");
        list.extend_from_slice(&MAX_ITEMS.to_le_bytes());
        let error = parse(&list).unwrap_err();
        assert!(matches!(error, GgufError::Truncated(_) | GgufError::Malformed(_)), "{kind}: {error}");
    }
}

#[test]
fn a_header_that_never_ends_is_given_up_at_the_limit() {
    struct Endless(u64);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 += buffer.len() as u64;
            buffer.fill(0);
            Ok(buffer.len())
        }
    }
    let mut begin = b"GGUF\x03\0\0\0".to_vec();
    begin.extend_from_slice(&1_u64.to_le_bytes());
    begin.extend_from_slice(&MAX_ENTRIES.to_le_bytes());
    for at in 0..20_u8 {
        begin.extend_from_slice(&1_u64.to_le_bytes());
        begin.extend_from_slice(&[b'a' + at, 9, 0, 0, 0, 10, 0, 0, 0]);
        begin.extend_from_slice(&MAX_ITEMS.to_le_bytes());
        begin.extend(std::iter::repeat_n(0, usize::try_from(MAX_ITEMS).unwrap() * 8));
        if begin.len() as u64 > MAX_HEADER_BYTES {
            break;
        }
    }
    let mut file = begin.as_slice().chain(Endless(0));
    assert!(matches!(read(&mut file, u64::MAX), Err(GgufError::TooMuch { limit: MAX_HEADER_BYTES, .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&[b"GGUF\x03\0\0\0".as_slice(), &bytes].concat());
        let _ = parse(&bytes);
    }

    #[test]
    fn flipped_bytes_are_refused_or_read_and_never_more(
        flips in proptest::collection::vec((0_usize..700, any::<u8>()), 1..5),
    ) {
        let mut bytes = Gguf::default().bytes();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(header) = parse(&bytes) {
            prop_assert!(header.layers > 0 && header.layers <= MAX_LAYERS && header.embedding > 0);
            // What follows from it does not overflow.
            let _ = crate::domain::footprint::needed(bytes.len() as u64, &header.shape(), u32::MAX, u32::MAX);
        }
    }

    #[test]
    fn a_file_is_never_smaller_than_what_its_tensors_need(missing in 1_usize..224) {
        let bytes = Gguf::default().bytes();
        prop_assert!(matches!(parse(&bytes[..bytes.len() - missing]), Err(GgufError::Truncated(_))));
    }
}
