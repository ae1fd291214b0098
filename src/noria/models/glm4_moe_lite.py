"""GLM-4.7-Flash: DeepSeek-V3's latent attention and routing; as transformers' modeling_glm4_moe_lite computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _latent
from noria.models._latent import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Glm4MoeLiteForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
}
SYNONYMS = {"num_local_experts": "n_routed_experts"}
WITHOUT_EFFECT = ("num_nextn_predict_layers", "num_mtp_layers")  # layers behind the last, for drafts alone


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        read.only(keys, key, value, f"Noria computes this family only with {value!r}")
    layers = _decoder.sparse_layers(keys, 1)
    dense = _decoder.num_layers(keys) - len(layers)
    read.only(keys, "first_k_dense_replace", dense, f"{dense} layers are without experts")
    experts = _experts.corrected(keys, "n_routed_experts", layers, read.whole(keys, "n_shared_experts", 1))
    found = _latent.shape("glm4_moe_lite", keys, experts, read.flag(keys, "rope_interleave", True))
    keys.refuse_others(*WITHOUT_EFFECT)
    return found
