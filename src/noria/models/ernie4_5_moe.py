"""ERNIE 4.5 (text): a mixture with a corrected choice in most layers, pairs rotated; as transformers' modeling_ernie4_5_moe."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _heads, _routing
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models._sources import Itself
from noria.pieces import Wanted

ARCHITECTURES = ("Ernie4_5_MoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_k": 6,
}
SYNONYMS = {"num_experts": "moe_num_experts", "num_local_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
MODULES = _decoder.MODULES | {"correction": (Itself("mlp.moe_statics.e_score_correction_bias"),)}
# Of training, and of a layer behind the last, for drafts alone.
WITHOUT_EFFECT = "moe_capacity moe_use_aux_free moe_aux_loss_lambda num_nextn_predict_layers use_rmsnorm"


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.only(keys, "use_bias", False, "Noria computes this family only without biases")
    number, chosen = _routing.counts(keys, "moe_num_experts", "moe_k")
    least = read.number(keys, "moe_norm_min", 1e-12)
    routing = _routing.Routing(chosen, before="softmax", normalized=True, least=least)
    inner = read.integer(keys, "moe_intermediate_size")
    shared = inner * read.whole(keys, "moe_num_shared_experts", 2)
    experts = Experts(number, inner, _sparse(keys), routing, shared, corrected=True, wide=True)
    found = _decoder.shape("ernie4_5_moe", keys, _decoder.Variant(experts=experts))
    read.one_of(keys, "moe_gate", "topk", ("topk", "top2_fused"))  # two ways to compute the same
    keys.refuse_others(*WITHOUT_EFFECT.split())
    return found


def _sparse(config: Mapping[str, Any]) -> frozenset[int]:
    """Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`, which -1 leaves open."""
    num_layers, step = _decoder.num_layers(config), read.integer(config, "moe_layer_interval", 1)
    first, last = read.whole(config, "moe_layer_start_index", 1), num_layers - 1
    if config.get("moe_layer_end_index") not in (None, -1):
        last = min(last, read.whole(config, "moe_layer_end_index", 0))
    return frozenset(n for n in range(step - 1, num_layers, step) if first <= n <= last)


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's; the correction is a matrix of one row, as checkpoints have it."""
    found = _decoder.layer_parameters(shape, layer)
    if "correction" in found:
        found["correction"] = Wanted((1, shape.details["experts"].number), "float32")
    return found


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES)


def positional(  # type: ignore[no-redef]  # its own
    shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cosines and sines of positions [T], in float32 for half precisions."""
    return _decoder.positional(shape, positions, torch.float64 if dtype == torch.float64 else torch.float32)


layer = partial(_decoder.layer, attention=_heads.attend_pairs)
