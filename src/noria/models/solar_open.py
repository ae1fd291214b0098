"""Solar Open: GLM-4.5's mixture in every layer, heads rotated whole; as transformers' modeling_solar_open computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("SolarOpenForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "head_dim": 128,
    "moe_intermediate_size": 1280,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "intermediate_size": 1,  # of dense layers, of which there are none
}
SYNONYMS = {"num_local_experts": "n_routed_experts"}
DENSE = ("first_k_dense_replace", "num_nextn_predict_layers", "use_qk_norm")  # of no layer here


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    layers, shared = range(_decoder.num_layers(keys)), read.whole(keys, "n_shared_experts", 1)
    experts = _experts.corrected(keys, "n_routed_experts", layers, shared)
    biases = read.flag(keys, "attention_bias", False)
    found = _decoder.shape("solar_open", keys, _decoder.Variant(qkv_bias=biases, experts=experts))
    keys.refuse_others(*DENSE)
    return found
