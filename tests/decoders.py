"""Tiny dense decoders of every shape that published configs have. Knows nothing of Noria."""

from families import LLAMA3, YARN, rotary

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = [SLIDING, SLIDING, FULL]
# As they are published, their sizes shrunk.
OLMO2 = rotary("olmo2", "Olmo2ForCausalLM", attention_bias=False, rope_scaling=None, pad_token_id=0)
OLMO3 = rotary(
    "olmo3",
    "Olmo3ForCausalLM",
    attention_bias=False,
    rope_theta=500000,
    rope_scaling=YARN | {"attention_factor": 1.2, "beta_fast": 32, "beta_slow": 1},
    layer_types=KINDS,
    sliding_window=9,
    pad_token_id=0,
)
GRANITE = rotary(
    "granite",
    "GraniteForCausalLM",
    attention_bias=False,
    mlp_bias=False,
    attention_multiplier=0.2,
    embedding_multiplier=3.0,
    logits_scaling=0.5,
    residual_multiplier=0.4,
    tie_word_embeddings=True,
)
SMOLLM3 = rotary(
    "smollm3",
    "SmolLM3ForCausalLM",
    attention_bias=False,
    mlp_bias=False,
    layer_types=[FULL] * 3,
    no_rope_layers=[1, 0, 1],
    no_rope_layer_interval=4,
    max_window_layers=28,
    pretraining_tp=2,
    sliding_window=None,
    use_sliding_window=False,
    tie_word_embeddings=True,
    pad_token_id=0,
)
SEED_OSS = rotary(
    "seed_oss",
    "SeedOssForCausalLM",
    attention_bias=True,
    attention_out_bias=False,
    mlp_bias=False,
    head_dim=12,
    residual_dropout=0.1,
    attention_dropout=0.1,
    rope_scaling={"rope_type": "default"},
    pad_token_id=0,
)
EXAONE4 = rotary(
    "exaone4",
    "Exaone4ForCausalLM",
    head_dim=8,
    rope_scaling=LLAMA3 | {"original_max_position_embeddings": 32},
    rope_theta=1000000,
    layer_types=KINDS,
    sliding_window=9,
    sliding_window_pattern="LLLG",
)
COHERE = rotary(
    "cohere",
    "CohereForCausalLM",
    attention_bias=False,
    layer_norm_eps=1e-5,
    rms_norm_eps=None,
    logit_scale=0.5,
    model_max_length=512,
    pretraining_tp=1,
    use_qk_norm=False,
    tie_word_embeddings=True,
    pad_token_id=0,
    rope_theta=8000000.0,
)
COHERE2 = COHERE | {
    "model_type": "cohere2",
    "architectures": ["Cohere2ForCausalLM"],
    "model_max_length": None,
    "use_qk_norm": None,
    "cache_implementation": "hybrid",
    "head_dim": 8,
    "layer_switch": 2,
    "sliding_window_pattern": 2,
    "sliding_window": 9,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
}
GLM4 = rotary(
    "glm4",
    "Glm4ForCausalLM",
    attention_bias=True,
    head_dim=12,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-5,
    pad_token_id=0,
)
STABLELM = rotary(
    "stablelm",
    "StableLmForCausalLM",
    rms_norm_eps=None,
    layer_norm_eps=1e-5,
    partial_rotary_factor=0.25,
    qk_layernorm=False,
    use_parallel_residual=False,
    use_qkv_bias=True,
)
STARCODER2 = rotary(
    "starcoder2",
    "Starcoder2ForCausalLM",
    rms_norm_eps=None,
    norm_epsilon=1e-5,
    layer_norm_epsilon=1e-5,
    hidden_act="gelu_pytorch_tanh",
    sliding_window=9,
    mlp_type="default",
    norm_type="layer_norm",
    use_bias=True,
    residual_dropout=0.1,
    embedding_dropout=0.1,
    tie_word_embeddings=True,
)
GPT_NEOX = rotary(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    rms_norm_eps=None,
    layer_norm_eps=1e-5,
    hidden_act="gelu",
    num_key_value_heads=None,
    rope_theta=None,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    use_parallel_residual=True,
)
PHI = rotary(
    "phi",
    "PhiForCausalLM",
    rms_norm_eps=None,
    layer_norm_eps=1e-5,
    hidden_act="gelu_new",
    partial_rotary_factor=0.5,
    qk_layernorm=False,
    resid_pdrop=0.1,
    embd_pdrop=0.0,
    num_key_value_heads=4,
)
NEMOTRON = rotary(
    "nemotron",
    "NemotronForCausalLM",
    rms_norm_eps=None,
    norm_eps=1e-5,
    hidden_act="relu2",
    head_dim=12,
    partial_rotary_factor=0.5,
    attention_bias=False,
    mlp_bias=False,
)
FALCON = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 128,
    "hidden_dropout": 0.0,
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
}
NEW_FALCON = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
GEMMA2 = rotary(
    "gemma2",
    "Gemma2ForCausalLM",
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    head_dim=12,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.0,
    sliding_window=9,
    cache_implementation="hybrid",
    tie_word_embeddings=True,
    pad_token_id=0,
)
GEMMA3 = rotary(
    "gemma3_text",
    "Gemma3ForCausalLM",
    hidden_act=None,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=12,
    query_pre_attn_scalar=20,
    rope_theta=1000000,
    rope_local_base_freq=90,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
    sliding_window=9,
    sliding_window_pattern=2,
    cache_implementation="hybrid",
    tie_word_embeddings=True,
    pad_token_id=0,
)
MINISTRAL3 = rotary(
    "ministral3",
    "Ministral3ForCausalLM",
    head_dim=12,
    rope_theta=None,
    rope_parameters=YARN
    | {
        "type": "yarn",
        "rope_theta": 1000000.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16, "factor": 8.0},
    sliding_window=None,
    pad_token_id=0,
)
GEMMA4 = rotary(
    "gemma4_text",
    "Gemma4ForCausalLM",
    hidden_act=None,
    hidden_activation="gelu_pytorch_tanh",
    attention_bias=False,
    attention_k_eq_v=True,
    enable_moe_block=False,
    final_logit_softcapping=2.0,
    head_dim=8,
    global_head_dim=16,
    num_global_key_value_heads=1,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=97,
    num_kv_shared_layers=0,
    use_double_wide_mlp=False,
    use_bidirectional_attention="vision",
    num_experts=None,
    top_k_experts=None,
    moe_intermediate_size=None,
    layer_types=KINDS,
    sliding_window=9,
    rope_theta=None,
    rope_parameters={
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 90.0},
    },
    tie_word_embeddings=True,
    pad_token_id=0,
)
SMALL_GEMMA4 = GEMMA4 | {
    "attention_k_eq_v": False,
    "num_global_key_value_heads": None,
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 4,
    "use_double_wide_mlp": True,
    "use_bidirectional_attention": None,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "layer_types": KINDS * 2,
}
CONFIGS = {
    "olmo2": OLMO2,
    "olmo2 without groups, with biases": OLMO2 | {"num_key_value_heads": 4, "attention_bias": True},
    "olmo3": OLMO3,
    "olmo3 as transformers writes it": OLMO3
    | {
        "rope_scaling": None,
        "rope_theta": None,
        "layer_types": None,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "rope_parameters": {
            FULL: YARN | {"rope_theta": 700.0},
            SLIDING: {"rope_type": "default", "rope_theta": 90.0},
        },
    },
    "granite": GRANITE,
    "granite untied with biases": GRANITE | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "smollm3": SMOLLM3,
    "smollm3 with windows": SMOLLM3
    | {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "no_rope_layers": None}
    | {"no_rope_layer_interval": 2, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "seed_oss": SEED_OSS,
    "seed_oss with all biases": SEED_OSS | {"attention_out_bias": True, "mlp_bias": True},
    "exaone4": EXAONE4,
    "exaone4 without windows (1.2B)": EXAONE4
    | {"sliding_window": None, "sliding_window_pattern": None, "layer_types": [FULL] * 3, "tie_word_embeddings": True},
    "exaone4 by its pattern": EXAONE4 | {"sliding_window_pattern": 2, "layer_types": None},
    "cohere": COHERE,
    "cohere with norms of heads (R+)": COHERE
    | {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False},
    "cohere2": COHERE2,
    "cohere2 by its layers": COHERE2
    | {"layer_types": KINDS, "attention_bias": True, "layer_switch": None, "sliding_window_pattern": None},
    "glm4": GLM4,
    "glm4 without biases (32B)": GLM4 | {"attention_bias": False, "head_dim": 16, "partial_rotary_factor": 1.0},
    "stablelm": STABLELM,
    "stablelm of 12B's shape": STABLELM | {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": False},
    "stablelm with norms of heads": STABLELM | {"qk_layernorm": True, "num_key_value_heads": 4},
    "starcoder2": STARCODER2,
    "starcoder2 without biases": STARCODER2 | {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False},
    "gpt_neox": GPT_NEOX,
    "gpt_neox one after another": GPT_NEOX
    | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast", "rotary_pct": 1.0},
    "phi": PHI,
    "phi with norms of heads": PHI | {"qk_layernorm": True, "num_key_value_heads": 2},
    "nemotron": NEMOTRON,
    "nemotron with biases": NEMOTRON | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "falcon": FALCON,
    "falcon of 40B's shape": NEW_FALCON,
    "falcon of 11B's shape": NEW_FALCON
    | {
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 48,
        "ff_factor": 4,
        "tie_word_embeddings": False,
        "rope_theta": 500042.0,
    },
    "falcon one after another": FALCON | {"parallel_attn": False, "multi_query": False, "bias": True},
    "gemma2": GEMMA2,
    "gemma2 without caps": GEMMA2
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True, "layer_types": KINDS},
    "gemma3_text": GEMMA3,
    "gemma3_text of 1B's shape": GEMMA3 | {"rope_scaling": None, "num_key_value_heads": 1},
    "gemma3_text as transformers writes it": GEMMA3
    | {
        "rope_scaling": None,
        "rope_theta": None,
        "rope_local_base_freq": None,
        "sliding_window_pattern": None,
        "_sliding_window_pattern": 6,
        "layer_types": KINDS,
        "use_bidirectional_attention": False,
        "final_logit_softcapping": 2.0,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
            SLIDING: {"rope_type": "default", "rope_theta": 90.0},
        },
    },
    "ministral3": MINISTRAL3,
    "ministral3 of 3B's shape": MINISTRAL3 | {"tie_word_embeddings": True, "sliding_window": 9},
    "gemma4_text": GEMMA4,
    "gemma4_text of E2B's shape": SMALL_GEMMA4,
    "gemma4_text of 26B-A4B's shape": GEMMA4
    | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 12},
    "gemma4_text as transformers writes it": GEMMA4
    | {"global_head_dim": None, "num_global_key_value_heads": None}
    | {"per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}}},
    "gemma4_text with inputs and biases": GEMMA4
    | {"hidden_size_per_layer_input": 4, "attention_bias": True, "final_logit_softcapping": None, "layer_types": None},
    "gemma4_unified_text": GEMMA4
    | dict.fromkeys(["enable_moe_block", "hidden_size_per_layer_input", "vocab_size_per_layer_input"])
    | {"model_type": "gemma4_unified_text", "architectures": ["Gemma4UnifiedForCausalLM"]},
}
