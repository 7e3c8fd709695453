//! The header of a GGUF file: what is known of a model before anything computes with it.
//!
//! The reader is strict, because the engine's is not: a header that llama.cpp would abort on is an error with a name here.
//! It reads once from the front, keeps only what it tells, and allocates nothing that was merely announced.

mod reader;
mod tensor;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io::{self, Read};

use self::reader::{Reader, Value};
use self::tensor::Kind;
use crate::domain::footprint::Shape;

/// Bytes of header that are read: the largest vocabularies are some 10 MiB.
pub const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Entries of metadata; models have some tens.
pub const MAX_ENTRIES: u64 = 4096;
/// Bytes of a key, and of the name of a tensor.
pub const MAX_NAME_BYTES: u64 = 256;
/// Bytes of a text; chat templates are some tens of KiB.
pub const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Items of a list; vocabularies have some 100,000.
pub const MAX_ITEMS: u64 = 4 << 20;
/// Tensors; the largest models have some 2,000.
pub const MAX_TENSORS: u64 = 64 << 10;
/// Layers.
pub const MAX_LAYERS: u32 = 4096;

/// Why a file is no model that can be used.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be read.
    #[error("the file cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It begins with something else.
    #[error("this is no GGUF file: it does not begin with \"GGUF\"")]
    Magic,
    /// Written for machines with the other order of bytes, or a version that is not known.
    #[error("version {0} of GGUF is not known; versions 2 and 3 are read")]
    Version(u32),
    /// The file ends before what its header announces.
    #[error("the file is truncated: {0}")]
    Truncated(String),
    /// A number is above what is taken.
    #[error("{what} of {found}; at most {limit} are taken")]
    TooMuch {
        /// Of what.
        what: String,
        /// How much there is.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// It cannot be understood, or contradicts itself.
    #[error("the header is damaged: {0}")]
    Malformed(String),
    /// One part of several.
    #[error("this is part {part} of a model in {parts} files; merge them first: llama-gguf-split --merge FIRST-PART OUTPUT")]
    Split {
        /// Counted from 1.
        part: u64,
        /// How many there are.
        parts: u64,
    },
    /// A GGUF file, but nothing that answers prompts.
    #[error("this GGUF file is no language model but {0:?}")]
    NoModel(String),
}

/// What a header tells.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Of the format.
    pub version: u32,
    /// Such as "llama".
    pub architecture: String,
    /// Its title, without control characters.
    pub title: Option<String>,
    /// Weights, counted from the shapes of the tensors.
    pub parameters: u64,
    /// Such as "Q4_K_M".
    pub quantisation: Option<String>,
    /// Context window in training, in tokens.
    pub context: Option<u32>,
    /// Blocks.
    pub layers: u32,
    /// Attention heads.
    pub heads: Option<u32>,
    /// Heads of keys and values, the most of any layer.
    pub kv_heads: Option<u32>,
    /// Width of the hidden state.
    pub embedding: u32,
    /// Numbers in a key.
    pub key_length: Option<u32>,
    /// Numbers in a value.
    pub value_length: Option<u32>,
    /// Tokens that it knows; 0 for a file without a vocabulary.
    pub vocabulary: u32,
    /// It says how conversations are written.
    pub has_template: bool,
}

impl Header {
    /// What its memory depends on.
    pub fn shape(&self) -> Shape {
        let heads = self.heads.unwrap_or(1).max(1);
        let head = self.embedding / heads;
        Shape {
            layers: self.layers,
            kv_heads: self.kv_heads.unwrap_or(heads),
            key_length: self.key_length.unwrap_or(head),
            value_length: self.value_length.unwrap_or(head),
            embedding: self.embedding,
            vocabulary: self.vocabulary,
            parameters: self.parameters,
        }
    }
}

/// Reads the header of a file of `size` bytes from its beginning.
///
/// # Errors
/// [`GgufError`] says what is wrong with it.
pub fn read(file: impl Read, size: u64) -> Result<Header, GgufError> {
    let mut reader = Reader::new(file, size.min(MAX_HEADER_BYTES), size <= MAX_HEADER_BYTES);
    if reader.array::<4>().map_err(|error| if size < 4 { GgufError::Magic } else { error })? != *b"GGUF" {
        return Err(GgufError::Magic);
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version(version));
    }
    let tensors = at_most("a number of tensors", reader.u64()?, MAX_TENSORS)?;
    let entries = at_most("a number of entries", reader.u64()?, MAX_ENTRIES)?;
    let mut metadata = Metadata::default();
    for _ in 0..entries {
        metadata.entry(&mut reader)?;
    }
    metadata.check_kind()?;
    let tensors = Tensors::read(&mut reader, tensors, &metadata, size)?;
    metadata.header(version, &tensors)
}

fn at_most(what: &str, found: u64, limit: u64) -> Result<u64, GgufError> {
    if found > limit { Err(GgufError::TooMuch { what: what.to_owned(), found, limit }) } else { Ok(found) }
}

fn malformed<T>(what: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError::Malformed(what.into()))
}

/// The entries that are used. Those of the architecture may come before it is named, so all that could be are kept: each is
/// a number, and their count is bounded.
#[derive(Debug, Default)]
struct Metadata {
    keys: HashSet<String>,
    numbers: Vec<(String, u64)>,
    texts: Vec<(String, String)>,
    vocabulary: Option<u64>,
    has_template: bool,
}

const TOKENS: &str = "tokenizer.ggml.tokens";

impl Metadata {
    fn entry(&mut self, reader: &mut Reader<impl Read>) -> Result<(), GgufError> {
        let key = reader.text(MAX_NAME_BYTES, "a key")?;
        if key.is_empty() || !self.keys.insert(key.clone()) {
            return malformed(format!("the key {key:?} is empty or there twice"));
        }
        match reader.value(key == TOKENS)? {
            Value::Number(number) => self.numbers.push((key, number)),
            Value::Text(text) => match key.as_str() {
                "general.architecture" | "general.name" | "general.type" => self.texts.push((key, text)),
                "tokenizer.chat_template" => self.has_template = !text.is_empty(),
                _ => {}
            },
            Value::Numbers { most } => self.numbers.push((key, most)),
            Value::Texts { count, repeated } if key == TOKENS => {
                if repeated {
                    return malformed("a token is in the vocabulary twice");
                }
                self.vocabulary = Some(count);
            }
            Value::Texts { .. } | Value::Other => {}
        }
        Ok(())
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.numbers.iter().find(|(known, _)| known == key).map(|(_, number)| *number)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.texts.iter().find(|(known, _)| known == key).map(|(_, text)| text.as_str())
    }

    /// Refuses what is GGUF, but no model.
    fn check_kind(&self) -> Result<(), GgufError> {
        if let Some(kind) = self.text("general.type").filter(|kind| *kind != "model") {
            return Err(GgufError::NoModel(kind.chars().take(32).collect()));
        }
        match self.number("split.count") {
            Some(parts) if parts > 1 => {
                Err(GgufError::Split { part: self.number("split.no").unwrap_or(0).saturating_add(1), parts })
            }
            _ => Ok(()),
        }
    }

    fn alignment(&self) -> Result<u64, GgufError> {
        match self.number("general.alignment") {
            None => Ok(32),
            Some(bytes) if bytes.is_power_of_two() && (8..=1 << 20).contains(&bytes) => Ok(bytes),
            Some(bytes) => malformed(format!("an alignment of {bytes} bytes")),
        }
    }

    fn header(&self, version: u32, tensors: &Tensors) -> Result<Header, GgufError> {
        let Some(architecture) = self.text("general.architecture").filter(|name| is_plain(name)) else {
            return malformed("general.architecture is missing or no name");
        };
        let number = |key: &str| self.number(&format!("{architecture}.{key}"));
        let small = |key: &str, most: u32| match number(key) {
            None | Some(0) => Ok(None),
            Some(found) => match u32::try_from(found) {
                Ok(value) if value <= most => Ok(Some(value)),
                _ => Err(GgufError::TooMuch { what: format!("{architecture}.{key}"), found, limit: most.into() }),
            },
        };
        let Some(layers) = small("block_count", MAX_LAYERS)? else {
            return malformed(format!("{architecture}.block_count is missing or 0"));
        };
        if tensors.blocks > layers {
            return malformed(format!(
                "{architecture}.block_count is {layers}, and there are tensors of block {}",
                tensors.blocks - 1
            ));
        }
        let Some(embedding) = small("embedding_length", 1 << 20)? else {
            return malformed(format!("{architecture}.embedding_length is missing or 0"));
        };
        let vocabulary = match self.vocabulary {
            Some(0) => return malformed("the vocabulary is empty"),
            known => u32::try_from(known.unwrap_or(0)).unwrap_or(u32::MAX),
        };
        let title = self.text("general.name").map(|name| name.chars().filter(|c| !c.is_control()).take(128).collect());
        Ok(Header {
            version,
            architecture: architecture.to_owned(),
            title: title.filter(|title: &String| !title.is_empty()),
            parameters: tensors.parameters,
            quantisation: self.number("general.file_type").and_then(tensor::file_type).or(tensors.dominant).map(str::to_owned),
            context: small("context_length", u32::MAX)?,
            layers,
            heads: small("attention.head_count", 1 << 16)?,
            kv_heads: small("attention.head_count_kv", 1 << 16)?,
            embedding,
            key_length: small("attention.key_length", 1 << 16)?,
            value_length: small("attention.value_length", 1 << 16)?,
            vocabulary,
            has_template: self.has_template,
        })
    }
}

fn is_plain(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// What the list of tensors tells.
#[derive(Debug, Default)]
struct Tensors {
    parameters: u64,
    /// One more than the highest block that has a tensor.
    blocks: u32,
    /// The type that holds the most weights.
    dominant: Option<&'static str>,
}

impl Tensors {
    fn read(reader: &mut Reader<impl Read>, count: u64, metadata: &Metadata, size: u64) -> Result<Self, GgufError> {
        let alignment = metadata.alignment()?;
        if count == 0 {
            return malformed("it has no tensors");
        }
        let mut all = Self::default();
        let mut names = HashSet::new();
        let mut by_kind: Vec<(Kind, u64)> = Vec::new();
        // Where the data of the last tensor ends, counted from the first.
        let mut end = 0_u64;
        for _ in 0..count {
            let name = reader.text(MAX_NAME_BYTES, "the name of a tensor")?;
            let (kind, weights, bytes) = Self::one(reader, &name)?;
            let offset = reader.u64()?;
            if offset % alignment != 0 {
                return malformed(format!("tensor {name:?} is not aligned"));
            }
            let Some(its_end) = offset.checked_add(bytes) else {
                return malformed(format!("tensor {name:?} ends beyond all numbers"));
            };
            end = end.max(its_end);
            all.parameters = all.parameters.saturating_add(weights);
            all.blocks = all.blocks.max(block(&name).map_or(0, |block| block.saturating_add(1)));
            match by_kind.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, sum)) => *sum = sum.saturating_add(weights),
                None => by_kind.push((kind, weights)),
            }
            if !names.insert(name.clone()) {
                return malformed(format!("tensor {name:?} is there twice"));
            }
        }
        let data = reader.position().next_multiple_of(alignment);
        let whole = data.saturating_add(end);
        if whole > size {
            return Err(GgufError::Truncated(format!("it has {size} bytes, and its tensors need {whole}")));
        }
        all.dominant = by_kind.iter().max_by_key(|(_, weights)| *weights).and_then(|(kind, _)| kind.name());
        Ok(all)
    }

    /// Type, weights and bytes of the next tensor.
    fn one(reader: &mut Reader<impl Read>, name: &str) -> Result<(Kind, u64, u64), GgufError> {
        let dimensions = reader.u32()?;
        if !(1..=4).contains(&dimensions) {
            return malformed(format!("tensor {name:?} has {dimensions} dimensions"));
        }
        let mut weights = 1_u64;
        let mut first = 1;
        for at in 0..dimensions {
            let length = reader.u64()?;
            if at == 0 {
                first = length;
            }
            weights = match weights.checked_mul(length) {
                Some(product) if product > 0 && i64::try_from(product).is_ok() => product,
                _ => return malformed(format!("tensor {name:?} has an impossible shape")),
            };
        }
        let kind = Kind(reader.u32()?);
        match kind.bytes(weights, first) {
            Ok(bytes) => Ok((kind, weights, bytes)),
            Err(why) => malformed(format!("tensor {name:?}: {why}")),
        }
    }
}

/// The block that a tensor such as "blk.7.attn_q.weight" is of.
fn block(name: &str) -> Option<u32> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}
