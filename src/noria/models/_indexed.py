"""Latent attention whose keys an indexer selects (DeepSeek-V3.2), up to the context within which it selects every key.

There the indexer has no effect: its tensors are left out. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _latent

LEFT_OUT = (".self_attn.indexer.",)  # in names of tensors that have no effect
WITHOUT_EFFECT = (
    *("index_head_dim", "index_n_heads", "indexer_types", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset"),
    *("indexer_rope_interleave", "index_share_for_mtp_iteration"),
    *("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers"),
)  # fmt: skip
LAYERS = ("indexed_attention", "deepseek_sparse_attention")  # two names of the same
# What Noria knows with one value only.
ONLY = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "moe_router_dtype": "float32",
    "rope_interleave": True,
    "mlp_bias": False,
}


def shape(family: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what cannot be computed."""
    keys = read.keys_of(config, defaults, {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"})
    read.fixed(keys, ONLY)
    read.layers_of(keys, "layer_types", _decoder.num_layers(keys), LAYERS)
    first = read.whole(keys, "first_k_dense_replace", 3)
    experts = _experts.corrected(
        keys, "n_routed_experts", _decoder.sparse_layers(keys, first), read.whole(keys, "n_shared_experts", 1)
    )
    found, most = _latent.shape(family, keys, experts), read.integer(keys, "index_topk", 2048)
    keys.refuse_others(*WITHOUT_EFFECT)
    if most >= found.max_positions:
        return found
    words = f"beyond it the model's indexer selects {most} of the keys, which Noria does not compute"
    return replace(found, max_positions=most, end_words=words)
