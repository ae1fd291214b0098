"""SmolLM3: Llama with every fourth layer not rotated; as transformers' modeling_smollm3 computes it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import FULL, SLIDING

ARCHITECTURES = ("SmolLM3ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 4,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    biases, mlp_bias = (read.flag(keys, key, False) for key in ("attention_bias", "mlp_bias"))
    rotated = _rotated(keys)
    window = _general.window_of(keys, _kinds(keys, rotated))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=mlp_bias, window=window)
    found = _decoder.shape("smollm3", keys, variant)
    keys.refuse_others("max_window_layers", "no_rope_layer_interval", "sliding_window")
    return replace(found, details={**found.details, "rotated": rotated})


def _rotated(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers with rotary positions: those with a 1 in `no_rope_layers`, else all but every so-many-th."""
    count, found = _decoder.num_layers(config), config.get("no_rope_layers")
    if found is None:
        step = read.integer(config, "no_rope_layer_interval")
        return frozenset(n for n in range(count) if (n + 1) % step)
    right = isinstance(found, list) and len(found) == count and all(one in (0, 1) for one in found)
    require(right, f"config.json: no_rope_layers is {read.shown(found)}: it must be {count} times 0 or 1")
    return frozenset(n for n, one in enumerate(found) if one)


def _kinds(config: Mapping[str, Any], rotated: frozenset[int]) -> list[str]:
    """What `layer_types` says; else windows in the layers without rotary positions, if they are asked for."""
    count = _decoder.num_layers(config)
    asked = read.flag(config, "use_sliding_window", False)
    found = read.layers_of(config, "layer_types", count, (FULL, SLIDING))
    require(
        asked or SLIDING not in (found or ()),
        f"config.json: layer_types has {SLIDING} where use_sliding_window is false: one of them must change",
    )
    windowed = asked and config.get("sliding_window") is not None
    return found or [SLIDING if windowed and n not in rotated else FULL for n in range(count)]


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    rotary = positional if index in shape.details["rotated"] else None
    return cache.attend(queries, key=keys, value=values, rotary=rotary, window=_decoder.window(shape, index))


layer = partial(_decoder.layer, attention=_attend)
