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
}
