"""GLM-5 up to 2,048 tokens, where its indexer selects every key; as transformers' modeling_glm_moe_dsa computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _indexed
from noria.models._indexed import LEFT_OUT  # noqa: F401
from noria.models._latent import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("GlmMoeDsaForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    return _indexed.shape("glm_moe_dsa", config, DEFAULTS)
