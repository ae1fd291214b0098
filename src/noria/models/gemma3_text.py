"""Gemma 3 (text): Gemma 2 with norms of heads and two ropes, without caps; as transformers' modeling_gemma3 has it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads, _rotary, _sources, gemma2
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import FULL
from noria.models.gemma2 import embed, head, sources  # noqa: F401

ARCHITECTURES = ("Gemma3ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = gemma2.DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
SYNONYMS = {"_sliding_window_pattern": "sliding_window_pattern"}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.only(keys, "attn_logit_softcapping", None, "Noria computes this family only without, as transformers does")
    kinds = _general.kinds_of(keys, read.integer(keys, "sliding_window_pattern", 6))
    ropes = _general.ropes_of(keys, "rope_local_base_freq")
    of_rope = keys.having(rope_parameters=ropes[FULL], rope_scaling=None)
    head_dim = read.integer(keys, "head_dim")
    found = gemma2.shape_of("gemma3_text", of_rope, kinds, norms=dict.fromkeys(("query_norm", "key_norm"), (head_dim,)))
    turns = _rotary.by_kind(keys.having(rope_parameters=ropes), kinds, head_dim)
    keys.refuse_others(*gemma2.WITHOUT_EFFECT)
    # a scaled context is what max_position_embeddings says here
    positions = read.integer(keys, "max_position_embeddings")
    turned = {**found.details, "turns": [turns[kind] for kind in kinds]}
    return replace(found, max_positions=positions, details=turned)


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    queries = gemma2.norm(shape, parameters, "query_norm", queries)
    keys = gemma2.norm(shape, parameters, "key_norm", keys)
    rotary, window = positional[shape.details["turns"][index]], _decoder.window(shape, index)
    scale = shape.details["scale"]
    return cache.attend(queries, key=keys, value=values, rotary=rotary, window=window, scale=scale)


positional = _decoder.positional_by_turn  # type: ignore[assignment]  # by turn
layer = partial(_general.layer, halves=_general.Halves(_attend, _general.gated, gemma2.norm))
