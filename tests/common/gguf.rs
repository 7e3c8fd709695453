//! Makes small GGUF files, whole and damaged.

/// A value of the metadata.
#[derive(Debug, Clone)]
pub enum Meta {
    U32(u32),
    Text(String),
    Texts(Vec<String>),
    U32s(Vec<u32>),
}

/// A file in the making. What is announced may be something else than what is there.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub version: u32,
    pub meta: Vec<(String, Meta)>,
    /// Name, dimensions, type, offset.
    pub tensors: Vec<(String, Vec<u64>, u32, u64)>,
    /// Bytes of the tensors.
    pub data: usize,
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

impl Default for Gguf {
    fn default() -> Self {
        let meta = [
            ("general.architecture", Meta::Text("llama".to_owned())),
            ("general.name", Meta::Text("a test".to_owned())),
            ("general.file_type", Meta::U32(0)),
            ("llama.block_count", Meta::U32(1)),
            ("llama.context_length", Meta::U32(512)),
            ("llama.embedding_length", Meta::U32(8)),
            ("llama.attention.head_count", Meta::U32(2)),
            ("llama.attention.head_count_kv", Meta::U32(1)),
            ("tokenizer.ggml.tokens", Meta::Texts(["a", "b", "c"].map(str::to_owned).to_vec())),
            ("tokenizer.chat_template", Meta::Text("{{ messages }}".to_owned())),
        ];
        Self {
            version: 3,
            meta: meta.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            tensors: vec![
                ("token_embd.weight".to_owned(), vec![8, 3], 0, 0),
                ("blk.0.attn_q.weight".to_owned(), vec![8, 8], 1, 96),
            ],
            data: 96 + 128,
        }
    }
}

impl Gguf {
    /// With this value in place of the one before, or as a new one.
    #[must_use]
    pub fn with(mut self, key: &str, value: Meta) -> Self {
        self.meta.retain(|(known, _)| known != key);
        self.meta.push((key.to_owned(), value));
        self
    }

    /// Without this key.
    #[must_use]
    pub fn without(mut self, key: &str) -> Self {
        self.meta.retain(|(known, _)| known != key);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            text(&mut bytes, key);
            match value {
                Meta::U32(number) => {
                    bytes.extend_from_slice(&4_u32.to_le_bytes());
                    bytes.extend_from_slice(&number.to_le_bytes());
                }
                Meta::Text(value) => {
                    bytes.extend_from_slice(&8_u32.to_le_bytes());
                    text(&mut bytes, value);
                }
                Meta::Texts(list) => {
                    bytes.extend_from_slice(&9_u32.to_le_bytes());
                    bytes.extend_from_slice(&8_u32.to_le_bytes());
                    bytes.extend_from_slice(&(list.len() as u64).to_le_bytes());
                    list.iter().for_each(|value| text(&mut bytes, value));
                }
                Meta::U32s(list) => {
                    bytes.extend_from_slice(&9_u32.to_le_bytes());
                    bytes.extend_from_slice(&4_u32.to_le_bytes());
                    bytes.extend_from_slice(&(list.len() as u64).to_le_bytes());
                    list.iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
                }
            }
        }
        for (name, dimensions, kind, offset) in &self.tensors {
            text(&mut bytes, name);
            bytes.extend_from_slice(&u32::try_from(dimensions.len()).unwrap().to_le_bytes());
            dimensions.iter().for_each(|length| bytes.extend_from_slice(&length.to_le_bytes()));
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        bytes
    }
}
