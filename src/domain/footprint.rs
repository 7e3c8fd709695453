//! How much memory a model needs to be computed: estimates from its shape alone, for a file that was not loaded yet and for
//! the tiers. The engine tells what it really took once it has loaded a model.

/// What the numbers depend on. All of it is in the header of a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Transformer blocks.
    pub layers: u32,
    /// Heads of keys and values in each of them.
    pub kv_heads: u32,
    /// Numbers in one key.
    pub key_length: u32,
    /// Numbers in one value.
    pub value_length: u32,
    /// Width of the hidden state.
    pub embedding: u32,
    /// Entries of the vocabulary.
    pub vocabulary: u32,
    /// Weights.
    pub parameters: u64,
}

/// The cache holds 16-bit numbers.
const CACHE_BYTES: u64 = 2;
/// llama.cpp rounds the cache of a sequence up to this many tokens.
const CACHE_STEP: u64 = 256;
/// Tokens of a prompt that are computed together.
const BATCH: u64 = 512;
/// 32-bit intermediate rows of the width of the hidden state that are alive at once, the wider ones of the feed-forward
/// part counted as several.
const ROWS: u64 = 12;
/// One entry of the vocabulary: its text, its score, and its place in two tables.
const VOCABULARY_ENTRY: u64 = 160;
/// The program itself, its kernels and its threads.
const PROGRAM: u64 = 12 << 20;

/// Bytes of the cache of keys and values for `slots` prompts of `context` tokens each.
pub fn kv_bytes(shape: &Shape, context: u32, slots: u32) -> u64 {
    let token = u64::from(shape.layers)
        .saturating_mul(u64::from(shape.kv_heads))
        .saturating_mul(u64::from(shape.key_length) + u64::from(shape.value_length))
        .saturating_mul(CACHE_BYTES);
    let tokens = u64::from(context).next_multiple_of(CACHE_STEP).saturating_mul(u64::from(slots.max(1)));
    token.saturating_mul(tokens)
}

/// Bytes of everything else that is neither the file nor the cache: intermediate results of a batch, one row of logits for
/// each slot, the vocabulary, the program.
pub fn compute_bytes(shape: &Shape, context: u32, slots: u32) -> u64 {
    let rows = BATCH.min(u64::from(context).max(1)).saturating_mul(u64::from(shape.embedding)).saturating_mul(4 * ROWS);
    let vocabulary = u64::from(shape.vocabulary);
    let logits = vocabulary.saturating_mul(4).saturating_mul(u64::from(slots.max(1)));
    PROGRAM.saturating_add(rows).saturating_add(logits).saturating_add(vocabulary.saturating_mul(VOCABULARY_ENTRY))
}

/// Bytes that must be free before a model is loaded: its file, which is mapped, what it computes with, and a tenth more
/// for what the estimate does not see.
pub fn needed(file: u64, shape: &Shape, context: u32, slots: u32) -> u64 {
    let whole = file.saturating_add(kv_bytes(shape, context, slots)).saturating_add(compute_bytes(shape, context, slots));
    whole.saturating_add(whole / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// SmolLM-360M.
    const SMALL: Shape = Shape {
        layers: 32,
        kv_heads: 5,
        key_length: 64,
        value_length: 64,
        embedding: 960,
        vocabulary: 49_152,
        parameters: 361_821_120,
    };

    #[test]
    fn the_cache_is_two_bytes_for_each_number_of_keys_and_values() {
        assert_eq!(kv_bytes(&SMALL, 2048, 1), 32 * 5 * 128 * 2 * 2048);
        assert_eq!(kv_bytes(&SMALL, 2048, 8), 8 * kv_bytes(&SMALL, 2048, 1));
        assert_eq!(kv_bytes(&SMALL, 1, 1), kv_bytes(&SMALL, 256, 1), "rounded up as llama.cpp does");
    }

    #[test]
    fn a_small_model_computes_in_some_tens_of_megabytes() {
        let bytes = compute_bytes(&SMALL, 2048, 1);
        assert!((20_000_000..80_000_000).contains(&bytes), "{bytes}");
    }

    proptest! {
        #[test]
        fn no_shape_overflows_and_more_is_never_less(
            numbers in proptest::array::uniform6(any::<u32>()), file in any::<u64>(), context in any::<u32>(), slots in any::<u32>(),
        ) {
            let [layers, kv_heads, key_length, value_length, embedding, vocabulary] = numbers;
            let shape = Shape { layers, kv_heads, key_length, value_length, embedding, vocabulary, parameters: file };
            let bytes = needed(file, &shape, context, slots);
            prop_assert!(bytes >= file);
            prop_assert!(needed(file, &shape, context.saturating_add(1000), slots) >= bytes);
            prop_assert!(needed(file, &shape, context, slots.saturating_add(1)) >= bytes);
        }
    }
}
