//! What a model of each tier takes: its shape, its weights at the usual quantisation, and whether that is free now.
//!
//! Estimates, from published shapes alone; see [`ERROR_PERCENT`] for how good they are.

use super::footprint::{self, Shape};
use super::resources::Resources;
use super::tier::Tier;

/// The quantisation that people run: the best of those with about half a byte for each weight.
pub const QUANTISATION: &str = "Q4_K_M";
/// Tokens of context that the cache is counted for, where the model has as many: what the engine takes when nobody says.
pub const CONTEXT: u32 = 8192;
/// What these may be off: loads of four such shapes took 3 to 8 % less, published files differ from the weights by at most 6 %
/// (`docs/tiers.md`).
pub const ERROR_PERCENT: u32 = 8;

/// The model that stands for a tier.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Name of the tier.
    pub tier: &'static str,
    /// Its shape.
    pub shape: Shape,
    /// One matrix is both the embedding and the output layer.
    pub tied: bool,
    /// Tokens of context that it was trained with.
    pub context: u32,
}

struct Row {
    layers: u32,
    embedding: u32,
    kv_heads: u32,
    head: u32,
    vocabulary: u32,
    parameters: u64,
}

const fn model(tier: &'static str, row: &Row, tied: bool, context: u32) -> Model {
    let Row { layers, embedding, kv_heads, head, vocabulary, parameters } = *row;
    let shape = Shape { layers, kv_heads, key_length: head, value_length: head, embedding, vocabulary, parameters };
    Model { tier, shape, tied, context }
}

const fn row(layers: u32, embedding: u32, kv_heads: u32, head: u32, vocabulary: u32, parameters: u64) -> Row {
    Row { layers, embedding, kv_heads, head, vocabulary, parameters }
}

/// In the order of the table of tiers. Each row is the `config.json` of the repository that is named: `num_hidden_layers`,
/// `hidden_size`, `num_key_value_heads`, `head_dim` (or `hidden_size` by `num_attention_heads`), `vocab_size`,
/// `tie_word_embeddings`, `max_position_embeddings`. The parameters follow from them; a test computes them anew.
pub static MODELS: [Model; 10] = [
    // HuggingFaceTB/SmolLM-360M
    model("SmolLM-360M", &row(32, 960, 5, 64, 49_152, 361_821_120), true, 2048),
    // Qwen/Qwen2-0.5B
    model("Qwen2-0.5B", &row(24, 896, 2, 64, 151_936, 494_032_768), true, 131_072),
    // HuggingFaceTB/SmolLM-1.7B
    model("SmolLM-1.7B", &row(24, 2048, 32, 64, 49_152, 1_711_376_384), true, 2048),
    // TinyLlama/TinyLlama-1.1B-Chat-v1.0
    model("TinyLlama-1.1B", &row(22, 2048, 4, 64, 32_000, 1_100_048_384), false, 2048),
    // microsoft/phi-2
    model("Phi-2-2.7B", &row(32, 2560, 32, 80, 51_200, 2_779_683_840), false, 2048),
    // meta-llama/Llama-3.2-1B: there is no 1.5B of that series, and this one is the nearest.
    model("Llama-3.2-1.5B", &row(16, 2048, 8, 64, 128_256, 1_235_814_400), true, 131_072),
    // meta-llama/Llama-3.2-3B
    model("Llama-3.2-3B", &row(28, 3072, 8, 128, 128_256, 3_212_749_824), true, 131_072),
    // meta-llama/Llama-3.1-8B
    model("Llama-3.1-8B", &row(32, 4096, 8, 128, 128_256, 8_030_261_248), false, 131_072),
    // meta-llama/Llama-3.1-70B
    model("Llama-3.1-70B", &row(80, 8192, 8, 128, 128_256, 70_553_706_496), false, 131_072),
    // meta-llama/Llama-3.1-405B
    model("Llama-3.1-405B", &row(126, 16_384, 8, 128, 128_256, 405_853_388_800), false, 131_072),
];

/// What a model of a tier takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Of the file.
    pub weights: u64,
    /// Bits for each weight, on the whole.
    pub bits_per_weight: f64,
    /// Tokens of context that the cache is for.
    pub context: u32,
    /// Of the cache of one prompt.
    pub kv_cache: u64,
    /// Of all, with what the engine computes with and a tenth for what is not seen.
    pub needed: u64,
}

/// Bits of a weight in the types of which [`QUANTISATION`] is made: matrices are Q4_K, some of them Q6_K, on the whole
/// 4.83; the output layer is Q6_K, and a separate embedding Q4_K. These types come in blocks of 256, and where the rows are
/// no multiple of that, llama.cpp takes Q5_0 and Q8_0 for them.
struct Bits {
    matrices: f64,
    output: f64,
    embedding: f64,
}

const K_BLOCK: u32 = 256;
const K_TYPES: Bits = Bits { matrices: 4.83, output: 6.5625, embedding: 4.5 };
const FALLBACK: Bits = Bits { matrices: 5.63, output: 8.5, embedding: 5.5 };

#[allow(clippy::cast_possible_truncation)] // some hundred gigabytes: far below 2^52
fn weights(model: &Model) -> u64 {
    let bits = if model.shape.embedding.is_multiple_of(K_BLOCK) { &K_TYPES } else { &FALLBACK };
    let table = u64::from(model.shape.vocabulary) * u64::from(model.shape.embedding);
    let (tables, table_bits) = if model.tied { (table, bits.output) } else { (2 * table, (bits.output + bits.embedding) / 2.0) };
    let matrices = model.shape.parameters.saturating_sub(tables);
    ((matrices as f64 * bits.matrices + tables as f64 * table_bits) / 8.0) as u64
}

/// The model that stands for `tier`, and what it takes.
pub fn estimate(tier: &Tier) -> Option<Estimate> {
    let model = MODELS.iter().find(|model| model.tier == tier.name)?;
    let weights = weights(model);
    let context = model.context.min(CONTEXT);
    Some(Estimate {
        weights,
        bits_per_weight: weights as f64 * 8.0 / model.shape.parameters as f64,
        context,
        kv_cache: footprint::kv_bytes(&model.shape, context, 1),
        needed: footprint::needed(weights, &model.shape, context, 1),
    })
}

/// Whether it is free now: in main memory and in that of the largest GPU together, since the engine can split a model between
/// the two, and the table counts on that for its large tiers. `None` when it is not known what is free.
pub fn fits_now(estimate: &Estimate, resources: &Resources) -> Option<bool> {
    let vram = resources.gpus.iter().filter_map(|gpu| gpu.vram_free).max().unwrap_or(0);
    resources.memory.available.map(|memory| memory.saturating_add(vram) >= estimate.needed)
}

/// Whether the machine has it at all, in the same two places.
pub fn can_load(estimate: &Estimate, resources: &Resources) -> bool {
    let vram = resources.gpus.iter().filter_map(|gpu| gpu.vram_total).max().unwrap_or(0);
    resources.memory.total.unwrap_or(0).saturating_add(vram) >= estimate.needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::tier::{self, TIERS};

    /// Heads, width of the feed-forward part, and whether it is of the Phi kind (biases, two matrices in it).
    const MORE: [(u64, u64, &str); 10] = [
        (15, 2560, "llama"),
        (14, 4864, "qwen2"),
        (32, 8192, "llama"),
        (32, 5632, "llama"),
        (32, 10_240, "phi2"),
        (32, 8192, "llama"),
        (24, 8192, "llama"),
        (32, 14_336, "llama"),
        (64, 28_672, "llama"),
        (128, 53_248, "llama"),
    ];

    #[test]
    fn every_tier_has_a_model_whose_parameters_follow_from_its_shape() {
        for ((tier, model), (heads, wide, kind)) in TIERS.iter().zip(&MODELS).zip(MORE) {
            assert_eq!(tier.name, model.tier);
            let shape = &model.shape;
            let (width, kv) = (u64::from(shape.embedding), u64::from(shape.kv_heads * shape.key_length));
            let attention = 2 * width * heads * u64::from(shape.key_length) + 2 * width * kv;
            let (layer, tail) = match kind {
                "llama" => (attention + 3 * width * wide + 2 * width, width),
                "qwen2" => (attention + width + 2 * kv + 3 * width * wide + 2 * width, width),
                // Biases everywhere, one norm for a layer, and a bias of the output.
                _ => {
                    (attention + 4 * width + 2 * width * wide + wide + width + 2 * width, 2 * width + u64::from(shape.vocabulary))
                }
            };
            let tables = u64::from(shape.vocabulary) * width * if model.tied { 1 } else { 2 };
            assert_eq!(shape.parameters, u64::from(shape.layers) * layer + tail + tables, "{}", tier.name);
        }
    }

    #[test]
    fn weights_are_those_of_published_files_within_what_is_said() {
        // Q4_K_M files as their repositories list them, in megabytes.
        let published = [
            ("SmolLM-360M", 271.0),
            ("Qwen2-0.5B", 398.0),
            ("SmolLM-1.7B", 1056.0),
            ("TinyLlama-1.1B", 669.0),
            ("Phi-2-2.7B", 1789.0),
            ("Llama-3.2-1.5B", 808.0),
            ("Llama-3.2-3B", 2019.0),
            ("Llama-3.1-8B", 4921.0),
            ("Llama-3.1-70B", 42_520.0),
        ];
        for (name, megabytes) in published {
            let estimate = estimate(tier::find(name).unwrap()).unwrap();
            let off = (estimate.weights as f64 / 1e6 / megabytes - 1.0) * 100.0;
            println!("{name}: {:.0} MB, published {megabytes:.0} MB: {off:+.1} %", estimate.weights as f64 / 1e6);
            assert!(off.abs() <= 6.0, "{name}: {} bytes is {off:.1} % off", estimate.weights);
        }
    }

    #[test]
    fn the_cache_of_the_largest_is_half_a_megabyte_for_each_token() {
        let largest = estimate(&TIERS[9]).unwrap();
        assert_eq!(largest.kv_cache, 126 * 8 * 256 * 2 * u64::from(CONTEXT));
        assert!((4.4..5.2).contains(&largest.bits_per_weight), "{largest:?}");
    }
}
