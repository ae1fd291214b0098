"""DeepSeek-V3 to V3.1, R1, Moonlight, Kimi K2: latent attention and mixtures; as transformers' modeling_deepseek_v3."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _latent, _sources
from noria.models._latent import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("DeepseekV3ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
}
SYNONYMS = {"num_local_experts": "n_routed_experts"}
# Of training; of layers behind the last, for drafts alone.
WITHOUT_EFFECT = ("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        read.only(keys, key, value, f"Noria computes this family only with {value!r}")
    layers = range(read.whole(keys, "first_k_dense_replace", 3), _decoder.num_layers(keys))
    experts = _experts.corrected(keys, "n_routed_experts", layers, read.whole(keys, "n_shared_experts", 1))
    found = _latent.shape("deepseek_v3", keys, experts, read.flag(keys, "rope_interleave", True))
    keys.refuse_others(*WITHOUT_EFFECT)
    return found
