"""GLM-4-0414 and GLM-Z1: norms before and behind each half, pairs turned in part; as transformers' modeling_glm4."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Glm4ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 0.00000015625,
    "partial_rotary_factor": 0.5,
}
MODULES = _decoder.MODULES | {
    "after_attention_norm": ("post_self_attn_layernorm",),
    "after_mlp_norm": ("post_mlp_layernorm",),
    "gate_up": ("mlp.gate_up_proj",),
}
sources = partial(_general.sources, places=_general.Places(MODULES))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    biases = read.flag(keys, "attention_bias", True)
    found = _decoder.shape("glm4", keys, _decoder.Variant(qkv_bias=biases, partly_rotated=True))
    keys.refuse_others()
    return _general.described(found, "attention_norm", "after_attention_norm", "mlp_norm", "after_mlp_norm")


layer = partial(_general.layer, halves=_general.Halves(_heads.attend_pairs))
