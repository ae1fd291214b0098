"""GLM-4.5 to 4.7: a mixture with a shared expert behind some dense layers; as transformers' modeling_glm4_moe computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _sources
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Glm4MoeForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
}
SYNONYMS = {"num_local_experts": "n_routed_experts"}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    layers = range(read.whole(keys, "first_k_dense_replace", 1), _decoder.num_layers(keys))
    experts = _experts.corrected(keys, "n_routed_experts", layers, read.whole(keys, "n_shared_experts", 1))
    variant = _decoder.Variant(
        qkv_bias=read.flag(keys, "attention_bias", False),
        head_norms=read.flag(keys, "use_qk_norm", False),
        experts=experts,
        partly_rotated=True,
    )
    found = _decoder.shape("glm4_moe", keys, variant)
    keys.refuse_others("num_nextn_predict_layers", "num_mtp_layers")  # layers behind the last, for drafts alone
    return found
