"""OLMoE: Llama with a mixture in every layer and norms across heads; as transformers' modeling_olmoe computes it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _heads, _routing
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models.minimax_m2 import layer_parameters  # noqa: F401 - norms across heads

ARCHITECTURES = ("OlmoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
SYNONYMS = {"num_local_experts": "num_experts"}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    number, chosen = _routing.counts(keys, "num_experts")
    routing = _routing.Routing(chosen, before="softmax", normalized=read.flag(keys, "norm_topk_prob", False))
    layers, inner = range(_decoder.num_layers(keys)), read.integer(keys, "intermediate_size")
    biases = read.flag(keys, "attention_bias", False)
    variant = _decoder.Variant(
        qkv_bias=biases,
        out_bias=biases,
        head_norms=True,
        window=_decoder.window_of(keys, layers),
        experts=Experts(number, inner, layers, routing),
    )
    found = _decoder.shape("olmoe", keys, variant)
    clip = None if keys.get("clip_qkv") is None else read.number(keys, "clip_qkv")
    keys.refuse_others()
    return replace(found, details={**found.details, "clip": clip})


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
    queries, keys = _heads.norm_across(shape, parameters, queries, keys)
    if clip := shape.details["clip"]:
        queries, keys, values = (heads.clamp(-clip, clip) for heads in (queries, keys, values))
    return cache.attend(queries, key=keys, value=values, window=_decoder.window(shape, index), rotary=positional)


layer = partial(_decoder.layer, attention=_attend)
