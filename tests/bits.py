"""Runs on a GPU: a Llama of 1.1 billion parameters; families at true widths with few layers whose bits are compared, a run file,
and a hash of each row."""

import hashlib

import numpy as np

from noria.output.generations import open_generations

LLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
COMMON = {
    "vocab_size": 32000,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.05,
}
FAMILIES = {
    "llama": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "qwen2": COMMON
    | {  # biases, seven heads to a key head
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": COMMON
    | {  # of Qwen3-30B-A3B with 32 of its 128 experts
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gemma2": COMMON
    | {  # of Gemma 2 9B: soft caps, a window in every second layer, keys of 256 numbers
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "gpt_oss": COMMON
    | {  # of gpt-oss-120b with 8 of its 128 experts: sinks, biases, a window in every second layer, experts in MXFP4
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    },
    "glm4_moe": COMMON
    | {  # of GLM-4.5-Air with 8 of its 128 experts: routed by sigmoid with a correction, a shared expert, a dense layer
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
    },
    "deepseek_v3": COMMON
    | {  # with 8 of its 256 experts: latent attention, groups of experts
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "glm_moe_dsa": COMMON
    | {  # of GLM-5 with 8 of its 256 experts, as far as its indexer selects every key
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "q_lora_rank": 2048,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "index_topk": 4096,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
}
RUN = """
dtype = "bfloat16"
device = "cuda"
[sampling]
max_new_tokens = 24
ignore_eos = true
logprobs = 2
"""


def hashes(output):
    """Of each row; and what the output says of its bits."""
    found = []
    with open_generations(output) as file:
        for row in file.rows():
            assert row.status == "done", row.error
            arrays = row.token_ids, row.logprobs, row.top_ids, row.top_logprobs
            parts = (np.ascontiguousarray(array).tobytes() for array in arrays)
            found.append(hashlib.sha256(b"".join(parts)).hexdigest())
        return found, file.attrs["exact_bits"]
