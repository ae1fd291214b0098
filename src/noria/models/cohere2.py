"""Command R7B and Command A: Command R with windows in most layers, which alone are turned; as modeling_cohere2."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._rotary import Rotary
from noria.models.cohere import DEFAULTS, head, shape_of, sources  # noqa: F401

ARCHITECTURES = ("Cohere2ForCausalLM",)
# What published config.json files say beside, and the value that means this family.
FIXED = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}
WITHOUT_EFFECT = ("cache_implementation", "use_parallel_embedding", "layer_switch", "sliding_window_pattern")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS | {"sliding_window": 4096, "rope_theta": 10000.0})
    read.fixed(keys, FIXED)
    read.only(keys, "use_embedding_sharing", keys["tie_word_embeddings"], "tie_word_embeddings says otherwise")
    every = read.integer(keys, "sliding_window_pattern", 4)
    kinds = _general.kinds_of(keys, read.integer(keys, "layer_switch", every))
    if keys.get("layer_types") is None:
        read.only(keys, "layer_switch", every, f"sliding_window_pattern is {every}: they must be equal")
    found = shape_of("cohere2", keys, _general.window_of(keys, kinds))
    size = found.hidden_size // found.num_heads
    read.only(keys, "head_dim", size, f"Noria computes this family only with hidden_size / num_attention_heads, {size}")
    keys.refuse_others("sliding_window", *WITHOUT_EFFECT)  # read where some layer has a window
    return _general.described(found, "attention_norm", parallel=True)


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
    window = _decoder.window(shape, index)
    rotary = None if window is None else Rotary(*positional, pairs=True)
    return cache.attend(queries, key=keys, value=values, rotary=rotary, window=window)


layer = partial(_general.layer, halves=_general.Halves(_attend, norm=_general.layer_norm))
