"""Ministral 3: Mistral with queries that grow with the position; as transformers' modeling_ministral3 computes it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _heads, _sources, mistral4
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Ministral3ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    rope, growth = mistral4.rope_of(keys, 1.0)
    variant = _decoder.Variant(window=_decoder.window_of(keys, range(_decoder.num_layers(keys))))
    found = _decoder.shape("ministral3", keys.having(rope_parameters=rope, rope_scaling=None), variant)
    keys.refuse_others("rope_theta")
    return replace(found, details={**found.details, "growth": growth})


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    *rotary, longer = positional
    queries, keys, values = _heads.split(shape, parameters, normed)
    queries, window = (queries * longer).to(queries.dtype), _decoder.window(shape, index)
    return cache.attend(queries, key=keys, value=values, rotary=(rotary[0], rotary[1]), window=window)


positional = mistral4.positional  # with the growth of queries
layer = partial(_decoder.layer, attention=_attend)
