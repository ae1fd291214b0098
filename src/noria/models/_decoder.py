"""The decoder that Llama, Mistral, Qwen, Phi-3 and Mixtral share: RMSNorm, rotary positions, grouped queries, SwiGLU.

A family gives `shape` its Variant (biases, norms of heads, windows, experts) and takes the rest as it is. A layer's
RMSNorms compute in float32 for half precisions. Functions of tensors: nothing of ranks, streams or files.
T tokens, S sampled rows, H heads, Hkv key/value heads, D head dim, E hidden, I intermediate, V vocab.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from noria.arrays import keys_and_values
from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _experts, _fused, _heads, _rotary, _sources
from noria.models._cache import Cache
from noria.models._experts import Experts
from noria.models._linear import linear
from noria.models._rotary import Rotary
from noria.models._sources import Itself
from noria.pieces import Wanted

# What a family takes as it is, by `from noria.models._decoder import *`: what it defines itself replaces it.
__all__ = [
    "ALIASES",
    "embed",
    "embed_parameters",
    "head",
    "head_parameters",
    "layer",
    "layer_parameters",
    "positional",
    "sources",
]

Attention: TypeAlias = Callable[..., torch.Tensor]  # as `attend`
ALIASES = (("model.", ""),)  # a checkpoint saved from the bare model


@dataclass(frozen=True)
class Variant:
    """What sets a family apart from Llama.

    window: the tokens that a query of these layers sees, and the layers. experts: its mixture, if it has one.
    partly_rotated: whether `partial_rotary_factor` may be below 1.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    window: tuple[int, Collection[int]] | None = None
    experts: Experts | None = None
    partly_rotated: bool = False


def shape(family: str, config: Mapping[str, Any], variant: Variant) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what cannot be computed."""
    if config.get("hidden_act") != "swish":  # silu's other name
        read.only(config, "hidden_act", "silu", "Noria computes this family only with silu")
    hidden_size, num_heads = read.integer(config, "hidden_size"), read.integer(config, "num_attention_heads")
    num_kv_heads = read.integer(config, "num_key_value_heads", num_heads)
    read.multiple(("num_attention_heads", num_heads), ("num_key_value_heads", num_kv_heads))
    if config.get("head_dim") is None:
        read.multiple(("hidden_size", hidden_size), ("num_attention_heads", num_heads))
    head_dim, experts = read.integer(config, "head_dim", hidden_size // num_heads), variant.experts
    require(head_dim % 2 == 0, f"config.json: head_dim is {head_dim}: rotary positions need an even number")
    theta, scaling = _rotary.settings(config)
    details = _details(config, variant) | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_size": _rotary.rotated_size(config, head_dim, variant.partly_rotated),
    }
    return ModelShape(
        family,
        num_layers=num_layers(config),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=read.integer(config, "vocab_size"),
        max_positions=_rotary.context(scaling, read.integer(config, "max_position_embeddings", 2048)),
        tied=read.flag(config, "tie_word_embeddings", False),
        mixture_size=experts.work_size(hidden_size) if experts else 0,
        experts_share=experts.share if experts else 1.0,
        end_words=_rotary.end_words(scaling),
        details=details,
        cache=tuple(
            keys_and_values(num_kv_heads, head_dim, _window(variant.window, layer))
            for layer in range(num_layers(config))
        ),
    )


def _details(config: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    mlp = variant.mlp_bias
    return {
        "intermediate_size": read.integer(config, "intermediate_size"),
        "norm_eps": read.number(config, "rms_norm_eps", 1e-6),
        "biases": {"qkv": variant.qkv_bias, "out": variant.out_bias, "gate_up": mlp, "down": mlp},
        "head_norms": variant.head_norms,
        "window": variant.window,
        "experts": variant.experts,
    }


def window(shape: ModelShape, layer: int) -> int | None:
    """The tokens that a query of a layer sees; None: all."""
    return _window(shape.details["window"], layer)


def _window(window: tuple[int, Collection[int]] | None, layer: int) -> int | None:
    return window[0] if window and layer in window[1] else None


def num_layers(config: Mapping[str, Any]) -> int:
    return read.integer(config, "num_hidden_layers", most=read.MAX_LAYERS)


def sparse_layers(config: Mapping[str, Any], first: int) -> Collection[int]:
    """The layers with experts: those that `mlp_layer_types` calls sparse, all from `first` on if it says nothing."""
    count = num_layers(config)
    types = read.layers_of(config, "mlp_layer_types", count, ("dense", "sparse"))
    return range(first, count) if types is None else frozenset(n for n, kind in enumerate(types) if kind == "sparse")


def window_of(config: Mapping[str, Any], layers: Collection[int]) -> tuple[int, Collection[int]] | None:
    """The window in `sliding_window`, on these layers; None if there is none."""
    if config.get("sliding_window") is None:
        return None
    return read.integer(config, "sliding_window"), layers


def embed_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {"tokens": (shape.vocab_size, shape.hidden_size)}


def has_experts(shape: ModelShape, layer: int) -> bool:
    return shape.details["experts"] is not None and layer in shape.details["experts"].layers


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:
    """In stored order. Matrices are [out, in]; queries, keys, values lie one after another in `qkv`."""
    hidden, inner, details = shape.hidden_size, shape.details["intermediate_size"], shape.details
    qkv, heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, shape.num_heads * shape.head_dim
    wanted: dict[str, tuple[int, ...] | Wanted] = {"attention_norm": (hidden,), "qkv": (qkv, hidden)}
    if details["head_norms"]:
        wanted |= {"query_norm": (shape.head_dim,), "key_norm": (shape.head_dim,)}
    wanted |= {"out": (hidden, heads), "mlp_norm": (hidden,)}
    if has_experts(shape, layer):
        wanted |= _experts.parameters(details["experts"], hidden)
    else:
        wanted |= {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    parameters = {}
    for name, sizes in wanted.items():
        parameters[name] = sizes
        if isinstance(sizes, tuple) and details["biases"].get(name):
            parameters[f"{name}_bias"] = sizes[:1]
    return parameters


def head_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {"norm": (shape.hidden_size,), "lm_head": (shape.vocab_size, shape.hidden_size)}


MODULES = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "query_norm": ("self_attn.q_norm",),
    "key_norm": ("self_attn.k_norm",),
    "out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "router": ("mlp.gate",),
    "correction": (Itself("mlp.gate.e_score_correction_bias"),),
    "shared_gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared_down": ("mlp.shared_experts.down_proj",),
    "shared_gate": ("mlp.shared_expert_gate",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
EXPERTS = partial(_experts.sources, "mlp.experts", "gate_proj", "up_proj", "down_proj")


def sources(
    shape: ModelShape,
    block_name: str,
    modules: Mapping[str, tuple[str, ...]] = MODULES,
    experts: Callable[[str, int], tuple[str, ...]] = EXPERTS,
    parameters: Callable[[ModelShape, int], Iterable[str]] = layer_parameters,
) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0 (see _sources.py).

    modules: of a layer, below its prefix; experts: gives those of so many experts below it; parameters: of a layer.
    """
    tokens = "model.embed_tokens.weight"
    if block_name == "embed":
        return {"tokens": (tokens,)}
    if block_name == "head":
        return {"norm": ("model.norm.weight",), "lm_head": (tokens if shape.tied else "lm_head.weight",)}
    layer = int(block_name.removeprefix("layers/"))
    prefix, names = f"model.layers.{layer}", {}
    for name in parameters(shape, layer):
        if name == "experts":
            names[name] = experts(prefix, shape.details["experts"].number)
        else:
            names |= _sources.of_layer(prefix, [name], modules)
    return names


def embed(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[T, E] from token ids [T]; positions are the layers' business."""
    return F.embedding(token_ids, parameters["tokens"])


def positional(shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cosines and sines of positions [T], in `dtype`, for all layers of a microbatch."""
    details = shape.details
    return _rotary.tables(details["rope_theta"], details["rope_scaling"], details["rope_size"], positions, dtype)


def positional_by_turn(
    shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype
) -> dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]]:
    """The same where layers turn differently: by turn; details["turns"] has that of each layer."""
    return _rotary.tables_by(shape.details["turns"], positions, dtype)


def layer(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: Any,
    cache: Cache,
    attention: Attention | None = None,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are.

    attention: how a family attends whose queries and keys are made in another way.
    """
    normed = _heads.norm(shape, parameters["attention_norm"], hidden)
    attended = (attention or attend)(shape, index, parameters, normed, positional, cache)
    branch = _heads.project_out(parameters, attended)
    hidden, normed = _heads.add_norm(shape, parameters["mlp_norm"], branch, hidden)
    return feed_forward(shape, parameters, normed).add_(hidden)


def attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    rotary = Rotary(*positional, norms=_heads.norms(shape, parameters), eps=shape.details["norm_eps"])
    return cache.attend(queries, key=keys, value=values, window=window(shape, index), rotary=rotary)


def feed_forward(shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
    """[T, E] of normed hidden states [T, E]: a layer's mixture of experts, or its SwiGLU."""
    if "experts.down" in parameters:
        return _experts.compute(shape.details["experts"], parameters, normed)
    inner = _fused.gated(linear(normed, parameters["gate_up"], parameters.get("gate_up_bias")))
    return linear(inner, parameters["down"], parameters.get("down_bias"))


def head(shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return linear(_heads.norm(shape, parameters["norm"], hidden), parameters["lm_head"])
