"""Command R: a LayerNorm for both halves of a layer, pairs turned, logits scaled; as transformers' modeling_cohere."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._rotary import Rotary

ARCHITECTURES = ("CohereForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 22528,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}
sources = partial(_general.sources, places=_general.Places(_decoder.MODULES))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    found = shape_of("cohere", keys)
    positions = read.integer(keys, "model_max_length", found.max_positions)
    head_norms = read.flag(keys, "use_qk_norm", False)
    keys.refuse_others()
    norms = {"query_norm": (found.num_heads, found.head_dim), "key_norm": (found.num_kv_heads, found.head_dim)}
    return replace(
        _general.described(found, "attention_norm", norms=norms if head_norms else {}, parallel=True),
        max_positions=positions,
    )


def shape_of(family: str, config: read.Keys, window: tuple[int, frozenset[int]] | None = None) -> ModelShape:
    """The sizes that Command R and its successors have in common."""
    biases = read.flag(config, "attention_bias", False)
    read.only(config, "hidden_act", "silu", "Noria computes this family only with silu")
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, window=window)
    found = _general.with_layer_norms(family, config, variant, "layer_norm_eps")
    return replace(found, details={**found.details, "logit_scale": read.number(config, "logit_scale")})


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    queries, keys, values = _general.split_normed(shape, parameters, normed)
    return cache.attend(queries, key=keys, value=values, rotary=Rotary(*positional, pairs=True))


layer = partial(_general.layer, halves=_general.Halves(_attend, norm=_general.layer_norm))


def head(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return _general.layer_norm_head(shape, parameters, hidden).mul_(shape.details["logit_scale"])
