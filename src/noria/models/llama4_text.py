"""Llama 4 (text): inputs of experts weighted, some layers without positions; as transformers' modeling_llama4 computes it.

Layers with positions attend within chunks of the context, which Noria computes up to the end of the first chunk.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _heads, _rotary, _routing, _sources
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts

ARCHITECTURES = ("Llama4ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8192,
}
SYNONYMS = {"num_experts": "num_local_experts"}
MODULES = _decoder.MODULES | {
    "router": ("feed_forward.router",),
    "gate_up": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    "down": ("feed_forward.down_proj",),
    "shared_gate_up": ("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
    "shared_down": ("feed_forward.shared_expert.down_proj",),
}
EXPERTS = partial(_experts.sources_in_one, "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", True)
APART = partial(_experts.sources, "feed_forward.experts", "gate_proj", "up_proj", "down_proj")
WITHOUT_EFFECT = ("cache_implementation", "for_llm_compressor", "router_jitter_noise", "attention_chunk_size")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    number, chosen = _routing.counts(keys, "num_local_experts")
    inner, routing = read.integer(keys, "intermediate_size"), _routing.Routing(chosen, after="sigmoid")
    experts = Experts(number, inner, _sparse(keys), routing, shared=inner, fused=True)
    biases = read.flag(keys, "attention_bias", False)
    found = _decoder.shape("llama4_text", keys, _decoder.Variant(qkv_bias=biases, out_bias=biases, experts=experts))
    rotated = _rotated(keys)
    details = {
        "intermediate_size": read.integer(keys, "intermediate_size_mlp"),
        "rotated": rotated,
        "head_norms": read.flag(keys, "use_qk_norm", True),
        "tuned": bool(keys.get("attn_temperature_tuning", True)),
        "floor_scale": read.integer(keys, "floor_scale", 8192),
        "attn_scale": read.number(keys, "attn_scale", 0.1),
    }
    chunk = _chunk(keys, rotated)
    keys.refuse_others(*WITHOUT_EFFECT)
    found = replace(found, details={**found.details, **details})
    if chunk is None or chunk >= found.max_positions:
        return found
    words = f"attention in chunks of {chunk} tokens begins a second one there, which Noria does not compute"
    return replace(found, max_positions=chunk, end_words=words)


def _sparse(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers with experts: `moe_layers`, or every `interleave_moe_layer_step`-th."""
    count, found = _decoder.num_layers(config), config.get("moe_layers")
    step = read.integer(config, "interleave_moe_layer_step", 1)
    if found is None:
        return frozenset(range(step - 1, count, step))
    right = isinstance(found, list) and all(type(one) is int and 0 <= one < count for one in found)
    require(right, f"config.json: moe_layers is {read.shown(found)}: it must be a list of layers")
    return frozenset(found)


def _rotated(config: Mapping[str, Any]) -> frozenset[int]:
    """The layers with positions: those of which `no_rope_layers` has 1, or all but every `no_rope_layer_interval`-th."""
    count, found = _decoder.num_layers(config), config.get("no_rope_layers") or None
    step = read.integer(config, "no_rope_layer_interval", 4)
    right = isinstance(found, list) and len(found) >= count and all(one in (0, 1) for one in found)
    require(found is None or right, f"config.json: no_rope_layers is {read.shown(found)}: it must have 0 or 1 a layer")
    return frozenset(n for n in range(count) if ((n + 1) % step if found is None else found[n]))


def _chunk(config: Mapping[str, Any], rotated: frozenset[int]) -> int | None:
    """The tokens of a chunk, if some layer attends within one."""
    count, size = _decoder.num_layers(config), config.get("attention_chunk_size")
    types = read.layers_of(config, "layer_types", count, ("full_attention", "chunked_attention"))
    chunked = rotated if types is None else [n for n in range(count) if types[n] == "chunked_attention"]
    if types is None and size is None:
        return None
    return read.integer(config, "attention_chunk_size") if chunked else None


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, Any]:  # type: ignore[no-redef]  # its own
    """In stored order, as the decoder's; norms of heads have no weights."""
    found = _decoder.layer_parameters(shape, layer)
    return {name: wanted for name, wanted in found.items() if name not in ("query_norm", "key_norm")}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, EXPERTS, layer_parameters)


def sources_apart(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """The same in a directory where each expert has tensors of its own."""
    return _decoder.sources(shape, block_name, MODULES, APART, layer_parameters)


def positional(  # type: ignore[no-redef]  # its own
    shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary cosines and sines of positions [T], and by how much queries without positions are longer [T, 1, 1].

    In float32 for half precisions. The longer the context, the sharper these attend (arXiv 2501.19399).
    """
    wide, details = torch.float64 if dtype == torch.float64 else torch.float32, shape.details
    floors = torch.floor((positions.to(wide) + 1) / details["floor_scale"])
    longer = torch.log1p(floors) * details["attn_scale"] + 1
    return *_decoder.positional(shape, positions, wide), longer[:, None, None]


def layer(  # type: ignore[no-redef]  # its own
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are."""
    normed = _heads.norm(shape, parameters["attention_norm"], hidden)
    attended = _attend(shape, index, parameters, normed, positional, cache)
    branch = _heads.project_out(parameters, attended)
    hidden, normed = _heads.add_norm(shape, parameters["mlp_norm"], branch, hidden)
    if "experts.down" not in parameters:
        return _decoder.feed_forward(shape, parameters, normed).add_(hidden)
    scores = _routing.scores_of(normed, parameters["router"])
    chosen, weights = _routing.choose(shape.details["experts"].routing, scores)
    experts = parameters["experts.gate_up"], parameters["experts.down"]
    mixed = _experts.mixture_of_weighted(normed, chosen, weights, *experts)
    return mixed.add_(_experts.shared(parameters, normed)).add_(hidden)


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    *turn, longer = positional
    details, size = shape.details, (shape.head_dim,)
    queries, keys, values = _heads.split(shape, parameters, normed)
    if index in details["rotated"]:
        queries, keys = _rotary.rotate_pairs(queries, *turn), _rotary.rotate_pairs(keys, *turn)
        if details["head_norms"]:
            queries, keys = (F.rms_norm(heads, size, eps=details["norm_eps"]) for heads in (queries, keys))
    elif details["tuned"]:
        queries = (queries * longer).to(queries.dtype)
    return cache.attend(queries, key=keys, value=values)
