"""Configs of published large models, in the bytes they are published in: whole, for benchmarks to cut.

What a config.json says beside them (names, tokens, training) is left out.
"""

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ROUTED = {"n_shared_experts": 1, "num_experts_per_tok": 8, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "moe_intermediate_size": 2048}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **LATENT, **ROUTED,
    "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_attention_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "n_routed_experts": 256, "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": FP8,
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {  # of K2.5 the text_config, whose experts are whole numbers of 4 bits
    "model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "vocab_size": 163840,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:.*{name}.*" for name in ("self_attn", "shared_experts")),
                   "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        }}},
    },
}  # fmt: skip
GLM_5 = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", **LATENT, **ROUTED,
    "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78, "first_k_dense_replace": 3,
    "num_attention_heads": 64, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256,
    "n_routed_experts": 256, "vocab_size": 154880, "max_position_embeddings": 202752, "index_topk": 2048,
    "quantization_config": FP8,
}  # fmt: skip
GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 150000,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    },
}  # fmt: skip
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960, "rope_theta": 1e6,
    "quantization_config": FP8,
}  # fmt: skip
