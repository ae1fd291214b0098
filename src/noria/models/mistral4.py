"""Mistral 4 (text): latent attention, queries that grow with the position; as transformers' modeling_mistral4 computes it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.errors import InputError
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _latent, _routing, _sources
from noria.models._latent import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Mistral4ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "q_lora_rank": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 1048576,
}
SYNONYMS = {"num_local_experts": "n_routed_experts"}
EXPERTS = partial(_experts.sources_in_one, "mlp.experts.gate_up_proj", "mlp.experts.down_proj", False)
APART = partial(_experts.sources, "mlp.experts", "gate_proj", "up_proj", "down_proj")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    number, chosen = _routing.counts(keys, "n_routed_experts")
    inner, shared = read.integer(keys, "moe_intermediate_size"), read.whole(keys, "n_shared_experts", 1)
    layers = range(read.whole(keys, "first_k_dense_replace", 0), _decoder.num_layers(keys))
    routing = replace(_routing.corrected_sigmoid(keys, number, chosen), before="softmax")
    routing = replace(routing, scaling=read.number(keys, "routed_scaling_factor", 1.0))
    experts = _experts.Experts(number, inner, layers, routing, shared * inner, fused=True)
    turned = read.integer(keys, "qk_rope_head_dim")
    rope, growth = rope_of(keys, turned / (turned + read.integer(keys, "qk_nope_head_dim")))
    of_rope = keys.having(rope_parameters=rope, rope_scaling=None, rope_theta=None)
    found = _latent.shape("mistral4", of_rope, experts, read.flag(keys, "rope_interleave", True))
    keys.refuse_others()
    return replace(found, details={**found.details, "growth": growth})


def rope_of(config: Mapping[str, Any], part: float) -> tuple[dict[str, Any], tuple[float, int]]:
    """The settings of rotary positions, and by how much queries grow: a factor and the tokens between two steps.

    part: of a head, what is turned.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(found, Mapping):
        raise InputError(f"config.json: rope_parameters is {read.shown(found)}: it must be an object")
    given: dict[str, Any] = {**found}
    given.setdefault("rope_theta", config.get("rope_theta"))
    growth = read.number(given, "llama_4_scaling_beta"), read.integer(given, "original_max_position_embeddings")
    for key, value in (
        ("partial_rotary_factor", part),
        ("max_position_embeddings", config.get("max_position_embeddings")),
    ):
        read.only(given, key, value, f"Noria computes this family only with {value!r}")
    others = ("llama_4_scaling_beta", "partial_rotary_factor", "max_position_embeddings")
    return {key: value for key, value in given.items() if key not in others}, growth


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, _latent.MODULES, EXPERTS, _latent.layer_parameters)


def sources_apart(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """The same in a directory where each expert has tensors of its own."""
    return _decoder.sources(shape, block_name, _latent.MODULES, APART, _latent.layer_parameters)


def positional(  # type: ignore[no-redef]  # its own
    shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary cosines and sines of positions [T], and by how much queries are longer [T, 1, 1], in float32 at least."""
    wide, (factor, step) = torch.float64 if dtype == torch.float64 else torch.float32, shape.details["growth"]
    longer = 1 + factor * torch.log(1 + torch.floor(positions.to(wide) / step))
    return *_decoder.positional(shape, positions, dtype), longer[:, None, None]
