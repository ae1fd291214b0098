"""Families that are known and not computed yet: by model_type, what stands in the way."""

_DELTA = "its layers are recurrent (gated delta rule), three of four of them"
_LIGHTNING = "most of its layers are recurrent (lightning attention)"
_MAMBA = "its layers are recurrent (Mamba)"
_CONVOLUTIONS = "most of its layers are short convolutions"
_STREAMS = "its layers pass on several residual streams (hyper-connections)"
OBSTACLES = {
    "qwen3_next": _DELTA,
    "qwen3_5": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "olmo_hybrid": _DELTA,
    "kimi_linear": "its layers are recurrent (Kimi delta attention), three of four of them",
    "bailing_hybrid": "most of its layers are recurrent (linear attention)",
    "minimax": _LIGHTNING,
    "minimax_text_01": _LIGHTNING,  # as its makers call it, and MiniMax-M1
    "minimax_m1": _LIGHTNING,
    "nemotron_h": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "falcon_h1": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": _MAMBA,
    "bamba": _MAMBA,
    "zamba2": _MAMBA,
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "rwkv": "its layers are recurrent",
    "recurrent_gemma": "its layers are recurrent, two of three of them",
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "deepseek_v4": f"its keys are compressed and indexed, and {_STREAMS}",
    "glm5_next": f"most of its layers are recurrent (linear attention), and {_STREAMS}",
    "glm5_next_text": f"most of its layers are recurrent (linear attention), and {_STREAMS}",
    "hy_v4": f"an indexer selects its keys, and {_STREAMS}",
}
