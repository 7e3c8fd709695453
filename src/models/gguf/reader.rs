//! Numbers, texts and lists, one after the other, each with a limit before it is read.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{BufReader, ErrorKind, Read};

use super::{GgufError, MAX_HEADER_BYTES, MAX_ITEMS, MAX_TEXT_BYTES, at_most, malformed};

const TEXT: u32 = 8;
const LIST: u32 = 9;

/// A value, as far as anybody asks for it.
#[derive(Debug)]
pub(super) enum Value {
    /// A whole number that is not negative, or a truth value.
    Number(u64),
    /// A text.
    Text(String),
    /// A list of whole numbers: its greatest.
    Numbers { most: u64 },
    /// A list of texts; whether one is there twice is told when it was asked for.
    Texts { count: u64, repeated: bool },
    /// Anything else.
    Other,
}

/// Reads from the front and counts.
pub(super) struct Reader<R> {
    inner: BufReader<R>,
    position: u64,
    limit: u64,
    /// The limit is the end of the file, not that of patience.
    limit_is_end: bool,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(inner: R, limit: u64, limit_is_end: bool) -> Self {
        Self { inner: BufReader::with_capacity(64 << 10, inner), position: 0, limit, limit_is_end }
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Accounts for `count` bytes that are about to be read.
    fn take(&mut self, count: u64) -> Result<(), GgufError> {
        match self.position.checked_add(count).filter(|end| *end <= self.limit) {
            Some(end) => {
                self.position = end;
                Ok(())
            }
            None if self.limit_is_end => Err(self.ended()),
            None => Err(GgufError::TooMuch {
                what: "a header with a number of bytes".to_owned(),
                found: self.position.saturating_add(count),
                limit: MAX_HEADER_BYTES,
            }),
        }
    }

    fn ended(&self) -> GgufError {
        GgufError::Truncated(format!("it ends inside its header, after {} bytes", self.position))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), GgufError> {
        self.take(bytes.len() as u64)?;
        self.inner.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.ended(),
            _ => error.into(),
        })
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Bytes after their length. The length was compared with what is left before it is believed.
    fn bytes(&mut self, limit: u64, what: &str) -> Result<Vec<u8>, GgufError> {
        let length = self.u64()?;
        at_most(&format!("{what} with a number of bytes"), length, limit)?;
        self.take(length)?;
        let mut bytes = Vec::new();
        if (&mut self.inner).take(length).read_to_end(&mut bytes)? as u64 != length {
            return Err(self.ended());
        }
        Ok(bytes)
    }

    pub(super) fn text(&mut self, limit: u64, what: &str) -> Result<String, GgufError> {
        match String::from_utf8(self.bytes(limit, what)?) {
            Ok(text) => Ok(text),
            Err(_) => malformed(format!("{what} is no UTF-8")),
        }
    }

    /// One value with its type. `unique` asks whether a list of texts has one twice.
    pub(super) fn value(&mut self, unique: bool) -> Result<Value, GgufError> {
        match self.u32()? {
            TEXT => Ok(Value::Text(String::from_utf8_lossy(&self.bytes(MAX_TEXT_BYTES, "a text")?).into_owned())),
            LIST => self.list(unique),
            kind => Ok(self.number(kind)?.map_or(Value::Other, Value::Number)),
        }
    }

    /// A number of this type; `None` for one that is negative or has a fraction.
    fn number(&mut self, kind: u32) -> Result<Option<u64>, GgufError> {
        Ok(match kind {
            0 | 7 => Some(u64::from(u8::from_le_bytes(self.array()?))),
            1 => u64::try_from(i8::from_le_bytes(self.array()?)).ok(),
            2 => Some(u64::from(u16::from_le_bytes(self.array()?))),
            3 => u64::try_from(i16::from_le_bytes(self.array()?)).ok(),
            4 => Some(u64::from(self.u32()?)),
            5 => u64::try_from(i32::from_le_bytes(self.array()?)).ok(),
            6 => self.array::<4>().map(|_| None)?,
            10 => Some(self.u64()?),
            11 => u64::try_from(i64::from_le_bytes(self.array()?)).ok(),
            12 => self.array::<8>().map(|_| None)?,
            other => return malformed(format!("a value of the unknown type {other}")),
        })
    }

    fn list(&mut self, unique: bool) -> Result<Value, GgufError> {
        let kind = self.u32()?;
        let count = at_most("a list with a number of items", self.u64()?, MAX_ITEMS)?;
        match kind {
            TEXT => self.texts(count, unique),
            LIST => malformed("a list of lists"),
            kind => {
                let mut most = 0;
                for _ in 0..count {
                    most = most.max(self.number(kind)?.unwrap_or(0));
                }
                Ok(Value::Numbers { most })
            }
        }
    }

    fn texts(&mut self, count: u64, unique: bool) -> Result<Value, GgufError> {
        // Not the texts: 8 bytes for each are enough, and nobody can choose texts that collide.
        let hasher = RandomState::new();
        let mut seen = HashSet::new();
        let mut repeated = false;
        for _ in 0..count {
            let text = self.bytes(MAX_TEXT_BYTES, "a text")?;
            repeated |= unique && !seen.insert(hasher.hash_one(&text));
        }
        Ok(Value::Texts { count, repeated })
    }
}
