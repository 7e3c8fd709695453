//! Just enough of the file format to change a value in a file, or to break one.

use std::collections::HashMap;

/// A file in memory, and where its values lie.
pub struct Gguf {
    pub bytes: Vec<u8>,
    values: HashMap<String, (u32, usize)>,
    /// Behind the values: the tensors' names and shapes begin.
    pub tensors: usize,
}

/// Kinds of values, as the format numbers them.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl Gguf {
    /// Reads a file that is known to be sound.
    pub fn read(path: &std::path::Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        assert_eq!(&bytes[..4], b"GGUF");
        let count = number(&bytes, 16);
        let (mut values, mut at) = (HashMap::new(), 24);
        for _ in 0..count {
            let length = number(&bytes, at);
            let key = String::from_utf8(bytes[at + 8..at + 8 + length].to_vec()).unwrap();
            at += 8 + length;
            let kind = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            at += 4;
            values.insert(key, (kind, at));
            at = after(&bytes, at, kind);
        }
        Self { bytes, values, tensors: at }
    }

    /// Where a value lies.
    pub fn place(&self, key: &str) -> usize {
        self.values.get(key).unwrap_or_else(|| panic!("no {key}")).1
    }

    /// The file with another number of four bytes.
    pub fn with(&self, key: &str, value: u32) -> Vec<u8> {
        let (kind, at) = self.values[key];
        assert!(matches!(kind, 4..=6), "{key} is no number of four bytes");
        let mut bytes = self.bytes.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    /// Where each text of an array of texts lies, and how long it is.
    pub fn texts(&self, key: &str) -> Vec<(usize, usize)> {
        let mut at = self.place(key) + 12;
        let count = number(&self.bytes, at - 8);
        let mut texts = Vec::new();
        for _ in 0..count {
            let length = number(&self.bytes, at);
            texts.push((at + 8, length));
            at += 8 + length;
        }
        texts
    }
}

fn number(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

fn after(bytes: &[u8], at: usize, kind: u32) -> usize {
    match kind {
        0 | 1 | 7 => at + 1,
        2 | 3 => at + 2,
        4..=6 => at + 4,
        10..=12 => at + 8,
        STRING => at + 8 + number(bytes, at),
        ARRAY => {
            let kind = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let count = number(bytes, at + 4);
            (0..count).fold(at + 12, |at, _| after(bytes, at, kind))
        }
        _ => panic!("a value of kind {kind}"),
    }
}
