"""EXAONE 4: norms of heads and behind each half; windowed layers alone rotated; as transformers' modeling_exaone4."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import FULL, SLIDING
from noria.models._rotary import Rotary
from noria.models.olmo2 import sources  # noqa: F401

ARCHITECTURES = ("Exaone4ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 32,
    "intermediate_size": 16384,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys, count = read.keys_of(config, DEFAULTS), _decoder.num_layers(config)
    asked = keys.get("sliding_window") is not None
    if asked and keys.get("layer_types") is None:
        kinds = _general.kinds_of(keys, read.integer(keys, "sliding_window_pattern"))
    else:
        kinds = read.layers_of(keys, "layer_types", count, (FULL, SLIDING)) or [FULL] * count
    found = _decoder.shape("exaone4", keys, _decoder.Variant(window=_general.window_of(keys, kinds)))
    keys.refuse_others("sliding_window_pattern")
    heads = dict.fromkeys(("query_norm", "key_norm"), (found.head_dim,))
    rotated = frozenset(n for n in range(count) if kinds[n] == SLIDING or not asked)
    found = _general.described(found, "after_attention_norm", "after_mlp_norm", norms=heads)
    return replace(found, details={**found.details, "rotated": rotated})


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    cosines, sines = positional if index in shape.details["rotated"] else (None, None)
    norms = parameters["query_norm"], parameters["key_norm"]
    rotary = Rotary(cosines, sines, norms=norms, eps=shape.details["norm_eps"])
    return cache.attend(queries, key=keys, value=values, rotary=rotary, window=_decoder.window(shape, index))


layer = partial(_general.layer, halves=_general.Halves(_attend))
