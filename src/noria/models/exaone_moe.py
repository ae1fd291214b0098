"""EXAONE MoE (K-EXAONE): norms of heads, windows in most layers, which alone are rotated; as transformers' exaone_moe."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _heads
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._rotary import Rotary
from noria.models._sources import Itself

ARCHITECTURES = ("ExaoneMoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 32,
    "intermediate_size": 16384,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
}
SYNONYMS = {"num_local_experts": "num_experts", "first_last_k_dense_replace": "first_k_dense_replace"}
MODULES = _decoder.MODULES | {"correction": (Itself("mlp.e_score_correction_bias"),)}
# What published config.json files say beside, and the value that means this family.
FIXED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    read.only(config, "first_last_k_dense_replace", 1, "Noria knows it with 1 alone: give mlp_layer_types")
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.fixed(keys, FIXED)
    layers = _decoder.sparse_layers(keys, first=read.whole(keys, "first_k_dense_replace", 1))
    sparse = [n in layers for n in range(_decoder.num_layers(keys))]
    read.only(keys, "is_moe_layer", sparse, "mlp_layer_types, or first_k_dense_replace without it, say otherwise")
    experts = _experts.corrected(keys, "num_experts", layers, read.whole(keys, "num_shared_experts", 1))
    window = read.integer(keys, "sliding_window"), _windowed(keys)
    found = _decoder.shape("exaone_moe", keys, _decoder.Variant(head_norms=True, window=window, experts=experts))
    keys.refuse_others("num_nextn_predict_layers", "sliding_window_pattern", "layer_types")
    return found


def _windowed(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers with a window: all but every `sliding_window_pattern`-th, if `layer_types` does not say it."""
    count = _decoder.num_layers(config)
    types = read.layers_of(config, "layer_types", count, ("full_attention", "sliding_attention"))
    if types is not None:
        return frozenset(n for n, kind in enumerate(types) if kind == "sliding_attention")
    step = read.integer(config, "sliding_window_pattern")
    return frozenset(n for n in range(count) if (n + 1) % step)


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES)


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]; layers without a window know no positions."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    window, norms = _decoder.window(shape, index), _heads.norms(shape, parameters)
    cosines, sines = (None, None) if window is None else positional
    rotary = Rotary(cosines, sines, norms=norms, eps=shape.details["norm_eps"])
    return cache.attend(queries, key=keys, value=values, window=window, rotary=rotary)


layer = partial(_decoder.layer, attention=_attend)
