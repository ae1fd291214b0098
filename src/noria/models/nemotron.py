"""Nemotron 3 and 4, Minitron: LayerNorms of 1 + weight, squared relu without a gate; as transformers' modeling_nemotron."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _fused, _general, _heads
from noria.models._cache import Cache
from noria.models._fused import Norming
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("NemotronForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 24576,
    "max_position_embeddings": 4096,
    "hidden_act": "relu2",
    "partial_rotary_factor": 0.5,
}
SYNONYMS = {"rope_percent": "partial_rotary_factor", "kv_channels": "head_dim", "layer_norm_eps": "norm_eps"}
MODULES = _decoder.MODULES | {"up": ("mlp.up_proj",)}
sources = partial(_general.sources, places=_general.Places(MODULES))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    biases, mlp_bias = (read.flag(keys, key, False) for key in ("attention_bias", "mlp_bias"))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=mlp_bias, partly_rotated=True)
    found = _general.with_layer_norms("nemotron", keys, variant, "norm_eps")
    keys.refuse_others()
    return _general.described(found, "attention_norm", "mlp_norm", norm_biases=True, gated=False)


def _norm(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    """A LayerNorm whose weight is stored without its 1; the same hidden states where the layer has no such norm."""
    if name not in parameters:
        return hidden
    how = Norming(parameters[name], shape.details["norm_eps"], parameters[f"{name}_bias"], centered=True, shift=1.0)
    return _fused.norm(hidden, how)


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
    return cache.attend(queries, key=keys, value=values, rotary=positional)


layer = partial(_general.layer, halves=_general.Halves(_attend, _general.mlp, _norm))
head = partial(_general.head, norm=_norm)
