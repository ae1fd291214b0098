"""Phi-1, 1.5 and 2: one LayerNorm for both halves of a layer, biases everywhere; as transformers' modeling_phi."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import layer_norm_head as head  # type: ignore[assignment]  # noqa: F401

ARCHITECTURES = ("PhiForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {"intermediate_size": 8192, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5}
MODULES = _decoder.MODULES | {
    "query_norm": ("self_attn.q_layernorm",),
    "key_norm": ("self_attn.k_layernorm",),
    "out": ("self_attn.dense",),
    "up": ("mlp.fc1",),
    "down": ("mlp.fc2",),
}
sources = partial(_general.sources, places=_general.Places(MODULES, norm="model.final_layernorm"))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    variant = _decoder.Variant(qkv_bias=True, out_bias=True, mlp_bias=True, partly_rotated=True)
    found = _general.with_layer_norms("phi", keys, variant, "layer_norm_eps")
    heads = ("query_norm", "key_norm") if read.flag(keys, "qk_layernorm", False) else ()
    keys.refuse_others()
    return _general.described(
        found,
        "attention_norm",
        norms=dict.fromkeys(heads, (found.head_dim,)),
        norm_biases=True,
        biases=dict.fromkeys((*heads, "lm_head"), True),
        gated=False,
        parallel=True,
    )


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
    queries = _general.layer_norm(shape, parameters, "query_norm", queries)
    keys = _general.layer_norm(shape, parameters, "key_norm", keys)
    return cache.attend(queries, key=keys, value=values, rotary=positional)


layer = partial(_general.layer, halves=_general.Halves(_attend, _general.mlp, _general.layer_norm))
