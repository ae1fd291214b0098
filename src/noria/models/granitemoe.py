"""Granite MoE (PowerMoE): a mixture in every layer, sums and logits scaled; as transformers' modeling_granitemoe has it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _heads, _routing
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts

ARCHITECTURES = ("GraniteMoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {"intermediate_size": 11008, "num_local_experts": 8, "num_experts_per_tok": 2}
MODULES = _decoder.MODULES | {"router": ("block_sparse_moe.router.layer",)}
EXPERTS = partial(
    _experts.sources_in_one,
    "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.output_linear.weight",
    False,
)
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    number, chosen = _routing.counts(keys, "num_local_experts")
    layers, inner = range(_decoder.num_layers(keys)), read.integer(keys, "intermediate_size")
    experts = Experts(number, inner, layers, _routing.Routing(chosen, after="softmax"), fused=True)
    biases = read.flag(keys, "attention_bias", False)
    found = _decoder.shape("granitemoe", keys, _decoder.Variant(qkv_bias=biases, out_bias=biases, experts=experts))
    multipliers = {name: read.number(keys, name, 1.0) for name in MULTIPLIERS}
    keys.refuse_others()
    return replace(found, details={**found.details, **multipliers})


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, EXPERTS)


def embed(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[T, E] from token ids [T]; positions are the layers' business."""
    return _decoder.embed(shape, parameters, token_ids, positions).mul_(shape.details["embedding_multiplier"])


def layer(  # type: ignore[no-redef]  # its own
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are."""
    scale, part = shape.details["attention_multiplier"], shape.details["residual_multiplier"]
    normed = _heads.norm(shape, parameters["attention_norm"], hidden)
    queries, keys, values = _heads.split(shape, parameters, normed)
    attended = cache.attend(queries, key=keys, value=values, scale=scale, rotary=positional)
    branch = _heads.project_out(parameters, attended).mul_(part)
    hidden, normed = _heads.add_norm(shape, parameters["mlp_norm"], branch, hidden)
    return _decoder.feed_forward(shape, parameters, normed).mul_(part).add_(hidden)


def head(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return _decoder.head(shape, parameters, hidden).div_(shape.details["logits_scaling"])
