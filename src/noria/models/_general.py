"""Decoders whose layers are not Llama's: other norms, in other places; both halves beside each other; no gate.

Which norms a layer has, its parameters say. Functions of tensors: nothing of ranks, streams or files.
T tokens, S sampled rows, H heads, Hkv key/value heads, D head dim, E hidden, I intermediate, V vocab.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _fused, _heads, _sources
from noria.models._cache import Cache
from noria.models._decoder import ALIASES, Attention, embed, embed_parameters, positional
from noria.models._fused import Norming
from noria.models._linear import ACTIVATIONS, linear

# What a family takes as it is, by `from noria.models._general import *`: what it defines itself replaces it.
__all__ = ["ALIASES", "embed", "embed_parameters", "head", "head_parameters", "layer_parameters", "positional"]

Norm: TypeAlias = Callable[[ModelShape, Mapping[str, torch.Tensor], str, torch.Tensor], torch.Tensor]
Sizes: TypeAlias = dict[str, tuple[int, ...]]
FULL, SLIDING = "full_attention", "sliding_attention"
# Of a layer, in stored order; it has those norms that details["norms"] names, and gates where details["gated"] says so.
ORDER = (
    "attention_norm",
    "qkv",
    "query_norm",
    "key_norm",
    "out",
    "after_attention_norm",
    "mlp_norm",
    "gate_up",
    "up",
    "down",
    "after_mlp_norm",
)


@dataclass(frozen=True)
class Places:
    """Where a checkpoint of Hugging Face has a model's tensors; `modules` of a layer, by parameter."""

    modules: Mapping[str, tuple[str, ...]]
    tokens: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    lm_head: str = "lm_head"


def described(
    found: ModelShape, *norms: str, norm_biases: bool = False, gated: bool = True, **details: Any
) -> ModelShape:
    """The shape with what this file reads: the names of a layer's norms [E], their biases and the last norm's, gates.

    norms: the sizes of its other norms. biases: other parameters that have one. parallel: both halves take the same hidden
    states. activation: of a feed-forward without a gate.
    """
    sizes = dict.fromkeys(norms, (found.hidden_size,)) | details.pop("norms", {})
    biases = found.details["biases"] | {"up": found.details["biases"]["gate_up"]}
    biases |= dict.fromkeys((*norms, "norm"), norm_biases) | details.pop("biases", {})
    more = {"norms": sizes, "biases": biases, "gated": gated, "parallel": False, **details}
    return replace(found, details={**found.details, **more})


def with_layer_norms(
    family: str, config: read.Keys, variant: _decoder.Variant, eps: str, activation: str = "hidden_act"
) -> ModelShape:
    """The shape by a config.json that has the epsilon of LayerNorms and the feed-forward's activation under these keys.

    Raises InputError, naming the key, for what cannot be computed.
    """
    norm_eps = read.number(config, eps, 1e-5)
    named = read.one_of(config, activation, "silu", tuple(ACTIVATIONS))
    found = _decoder.shape(family, config.having(rms_norm_eps=norm_eps, hidden_act=None), variant)
    return replace(found, details={**found.details, "activation": named})


def kinds_of(config: Mapping[str, Any], every: int) -> list[str]:
    """Of each layer, whether it attends in a window: as `layer_types` says, else all but every so-many-th do."""
    count = _decoder.num_layers(config)
    found = read.layers_of(config, "layer_types", count, (FULL, SLIDING))
    return found or [SLIDING if (n + 1) % every else FULL for n in range(count)]


def window_of(config: Mapping[str, Any], kinds: list[str]) -> tuple[int, frozenset[int]] | None:
    """The window in `sliding_window` on the layers of this kind; None if there are none. Raises InputError."""
    layers = frozenset(n for n, kind in enumerate(kinds) if kind == SLIDING)
    return (read.integer(config, "sliding_window"), layers) if layers else None


def ropes_of(config: Mapping[str, Any], local: str = "rope_theta") -> dict[str, Mapping[str, Any]]:
    """`rope_parameters` of layers with and without windows: as it has them, else with `rope_scaling` of those without.

    local: the key of the theta of those with windows. Raises InputError.
    """
    found, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling")
    thetas: dict[str, Mapping[str, Any]] = {
        kind: {"rope_theta": config.get(key)} for kind, key in ((FULL, "rope_theta"), (SLIDING, local))
    }
    known = isinstance(found, Mapping) and (not found or FULL in found or SLIDING in found)
    words = f"it must have an object {FULL} or {SLIDING}"
    require(known, f"config.json: rope_parameters is {read.shown(found)}: {words}")
    read.objects_alone(found, "rope_parameters")
    twice = found and scaling
    found = found or {FULL: scaling}
    for kind in (FULL, SLIDING):
        its = found.get(kind) or {}
        require(isinstance(its, Mapping), f"config.json: rope_scaling is {read.shown(its)}: no object")
        thetas[kind] = {**thetas[kind], **{key: value for key, value in its.items() if value is not None}}
    same = not twice or (isinstance(scaling, Mapping) and scaling.items() <= thetas[FULL].items())
    require(same, f"config.json: rope_scaling is {read.shown(scaling)}: rope_parameters says otherwise")
    return thetas


def cap_of(config: Mapping[str, Any], key: str) -> float | None:
    """A soft cap; None where the key is null or missing. Raises InputError."""
    return None if config.get(key) is None else read.number(config, key)


def layer_parameters(shape: ModelShape, layer: int) -> Sizes:
    """In stored order. Matrices are [out, in]; queries, keys, values lie one after another in `qkv`, if not in groups."""
    details, hidden, inner = shape.details, shape.hidden_size, shape.details["intermediate_size"]
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = details["norms"] | {"qkv": (heads + 2 * kv_heads, hidden), "out": (hidden, heads), "down": (hidden, inner)}
    sizes |= {"gate_up": (2 * inner, hidden)} if details["gated"] else {"up": (inner, hidden)}
    return _with_biases(details["biases"], {name: sizes[name] for name in ORDER if name in sizes})


def head_parameters(shape: ModelShape) -> Sizes:
    sizes = {"norm": (shape.hidden_size,), "lm_head": (shape.vocab_size, shape.hidden_size)}
    return _with_biases(shape.details["biases"], sizes)


def _with_biases(biases: Mapping[str, bool], sizes: Sizes) -> Sizes:
    parameters = {}
    for name, size in sizes.items():
        parameters[name] = size
        if biases.get(name):
            parameters[f"{name}_bias"] = size[:1]
    return parameters


def sources(shape: ModelShape, block_name: str, places: Places) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0 (see _sources.py)."""
    if block_name == "embed":
        return {"tokens": (f"{places.tokens}.weight",)}
    if block_name == "head":
        found = {f"norm{end}": f"{places.norm}.{word}" for end, word in (("", "weight"), ("_bias", "bias"))}
        lm_head = places.tokens if shape.tied else places.lm_head
        found |= {"lm_head": f"{lm_head}.weight", "lm_head_bias": f"{places.lm_head}.bias"}
        return {parameter: (found[parameter],) for parameter in head_parameters(shape)}
    layer = int(block_name.removeprefix("layers/"))
    return _sources.of_layer(f"{places.layers}.{layer}", layer_parameters(shape, layer), places.modules)


def rms(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension; the same hidden states where the layer has no such norm."""
    return _heads.norm(shape, parameters[name], hidden) if name in parameters else hidden


def layer_norm(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor
) -> torch.Tensor:
    """LayerNorm over the last dimension; the same hidden states where the layer has no such norm."""
    if name not in parameters:
        return hidden
    how = Norming(parameters[name], shape.details["norm_eps"], parameters.get(f"{name}_bias"), centered=True)
    return _fused.norm(hidden, how)


def layer_norm_each(shape: ModelShape, weight: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Heads [T, N, D] after a LayerNorm of each, with weights of its own [N * D]; in float32 for half precisions."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    normed = F.layer_norm(wide, wide.shape[-1:], eps=shape.details["norm_eps"])
    return (normed * weight.view(heads.shape[1:])).to(heads.dtype)


def split_normed(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _heads.split; queries and keys have a LayerNorm of each head, if the layer has one."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    if "query_norm" in parameters:
        queries = layer_norm_each(shape, parameters["query_norm"], queries)
        keys = layer_norm_each(shape, parameters["key_norm"], keys)
    return queries, keys, values


def mlp(shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
    """[T, E] of normed hidden states [T, E]: a feed-forward without a gate."""
    inner = linear(normed, parameters["up"], parameters.get("up_bias"))
    return linear(ACTIVATIONS[shape.details["activation"]](inner), parameters["down"], parameters.get("down_bias"))


def gated(shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
    """[T, E] of normed hidden states [T, E]: a feed-forward with a gate, by the activation in details."""
    inner = _fused.gated(linear(normed, parameters["gate_up"]), shape.details["activation"])
    return linear(inner, parameters["down"])


def attend_groups(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]; queries, keys and values lie head after head in `qkv`."""
    queries, keys, values = _heads.split_groups(shape, parameters, normed)
    return cache.attend(queries, key=keys, value=values, rotary=positional)


@dataclass(frozen=True)
class Halves:
    """What the halves of a family's layer are: how it attends, its feed-forward, and their norm."""

    attend: Attention = _decoder.attend
    feed_forward: Callable[..., torch.Tensor] = _decoder.feed_forward
    norm: Norm = rms


def layer(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: Any,
    cache: Cache,
    halves: Halves,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are.

    A half has a norm before it, behind it, or both; in parallel both have the same one if there is no other.
    """
    norm = halves.norm
    normed = norm(shape, parameters, "attention_norm", hidden)
    attended = halves.attend(shape, index, parameters, normed, positional, cache)
    attended = _heads.project_out(parameters, attended)
    if shape.details["parallel"]:
        normed = norm(shape, parameters, "mlp_norm", hidden) if "mlp_norm" in parameters else normed
        return halves.feed_forward(shape, parameters, normed).add_(attended).add_(hidden)
    hidden = norm(shape, parameters, "after_attention_norm", attended).add_(hidden)
    made = halves.feed_forward(shape, parameters, norm(shape, parameters, "mlp_norm", hidden))
    return norm(shape, parameters, "after_mlp_norm", made).add_(hidden)


def layer_norm_head(shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E], behind a LayerNorm."""
    return head(shape, parameters, hidden, layer_norm)


def head(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor, norm: Norm = rms
) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return linear(norm(shape, parameters, "norm", hidden), parameters["lm_head"], parameters.get("lm_head_bias"))


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits, bent by a tanh in float32 for half precisions to stay within the cap, if there is one."""
    if cap is None:
        return logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (torch.tanh(wide / cap) * cap).to(logits.dtype)
