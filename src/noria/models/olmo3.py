"""OLMo 3: OLMo 2 with windows in three of four layers, whose rope is not scaled; as transformers' modeling_olmo3 has it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads, _rotary
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import FULL
from noria.models.olmo2 import sources, with_norms  # noqa: F401

ARCHITECTURES = ("Olmo3ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {"intermediate_size": 11008, "rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    biases, kinds = read.flag(keys, "attention_bias", False), _general.kinds_of(keys, every=4)
    ropes = _general.ropes_of(keys)
    window = _general.window_of(keys, kinds)
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, window=window)
    found = _decoder.shape("olmo3", keys.having(rope_scaling=None, rope_parameters=ropes[FULL]), variant)
    turns = _rotary.by_kind(keys.having(rope_parameters=ropes), kinds, found.head_dim)
    keys.refuse_others("sliding_window")  # read where some layer has a window
    return replace(found := with_norms(found), details={**found.details, "turns": [turns[kind] for kind in kinds]})


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    queries, keys = _heads.norm_across(shape, parameters, queries, keys)
    rotary, window = positional[shape.details["turns"][index]], _decoder.window(shape, index)
    return cache.attend(queries, key=keys, value=values, rotary=rotary, window=window)


positional = _decoder.positional_by_turn  # type: ignore[assignment]  # by turn
layer = partial(_general.layer, halves=_general.Halves(_attend))
