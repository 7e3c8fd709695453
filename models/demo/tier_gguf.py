"""tier_gguf.py out.gguf TIER - a file with the shape, the types and the size that a Q4_K_M file of a tier's model has.

Its weights are zero: it answers nothing, but it loads, and takes the memory that the real one takes. Types are chosen for
each tensor as llama.cpp chooses them for Q4_K_M. For the figures in docs/tiers.md. Needs PyPI's gguf and numpy."""
import sys
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as QT, GGUFWriter, LlamaFileType
from tok import *

# width, layers, heads, key-value heads, feed-forward width, context, vocabulary, tied, head size
TIERS = {
    "SmolLM-360M": (960, 32, 15, 5, 2560, 2048, 49152, True, 64),
    "Qwen2-0.5B": (896, 24, 14, 2, 4864, 4096, 151936, True, 64),
    "SmolLM-1.7B": (2048, 24, 32, 32, 8192, 2048, 49152, True, 64),
    "TinyLlama-1.1B": (2048, 22, 32, 4, 5632, 2048, 32000, False, 64),
    "Llama-3.2-1.5B": (2048, 16, 32, 8, 8192, 4096, 128256, True, 64),
    "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 4096, 128256, True, 128),
    "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 4096, 128256, False, 128),
}


def better(layer, layers):
    """The layers whose sensitive tensors get more bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def main(out, tier):
    width, layers, heads, kv, wide, context, vocabulary, tied, head = TIERS[tier]
    g = GGUFWriter(out, "llama")
    g.add_name(f"shape of {tier}")
    g.add_block_count(layers); g.add_context_length(context); g.add_embedding_length(width); g.add_feed_forward_length(wide)
    g.add_head_count(heads); g.add_head_count_kv(kv); g.add_key_length(head); g.add_value_length(head)
    g.add_rope_dimension_count(head); g.add_layer_norm_rms_eps(1e-5); g.add_rope_freq_base(10000.0)
    g.add_vocab_size(vocabulary); g.add_file_type(LlamaFileType.MOSTLY_Q4_K_M); g.add_quantization_version(2)
    vocab = list(VOCAB[:EOT]) + SPECIALS
    vocab += [f"<|unused{at}|>" for at in range(len(vocab), vocabulary)]
    g.add_tokenizer_model("gpt2"); g.add_tokenizer_pre("smollm"); g.add_token_list(vocab)
    g.add_token_types([5 if t.startswith("<|unused") else 3 if t.startswith("<|") else 1 for t in vocab])
    g.add_token_merges([a + " " + b for a, b in MERGES])
    at = {t: i for i, t in enumerate(vocab)}
    g.add_bos_token_id(at["<|im_start|>"]); g.add_eos_token_id(at["<|im_end|>"]); g.add_add_bos_token(False)
    g.add_chat_template(TEMPLATE)

    def matrix(name, rows, columns, kind):
        if columns % 256:
            kind = {QT.Q4_K: QT.Q5_0, QT.Q6_K: QT.Q8_0}[kind]
        block, size = GGML_QUANT_SIZES[kind]
        g.add_tensor(name, np.zeros((rows, columns // block * size), np.uint8), raw_dtype=kind)

    matrix("token_embd.weight", vocabulary, width, QT.Q6_K if tied else QT.Q4_K)
    if not tied:
        matrix("output.weight", vocabulary, width, QT.Q6_K)
    for layer in range(layers):
        more = QT.Q6_K if better(layer, layers) else QT.Q4_K
        name = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            g.add_tensor(f"{name}{norm}.weight", np.ones(width, np.float32))
        matrix(name + "attn_q.weight", heads * head, width, QT.Q4_K)
        matrix(name + "attn_k.weight", kv * head, width, QT.Q4_K)
        matrix(name + "attn_v.weight", kv * head, width, more)
        matrix(name + "attn_output.weight", width, heads * head, QT.Q4_K)
        matrix(name + "ffn_gate.weight", wide, width, QT.Q4_K)
        matrix(name + "ffn_up.weight", wide, width, QT.Q4_K)
        matrix(name + "ffn_down.weight", width, wide, more)
    g.add_tensor("output_norm.weight", np.ones(width, np.float32))
    g.write_header_to_file(); g.write_kv_data_to_file(); g.write_tensors_to_file(); g.close()


main(*sys.argv[1:])
