"""Beam: gated heads, four norms a layer, sums scaled by depth, soft-capped logits; as transformers' modeling_beam has it.

Layers with windows have rotary positions; the others have none, and queries that grow longer with the context.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from noria.kernels.expert_layer import Gate
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _gates, _general, _heads, _rotary, _routing
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._linear import linear
from noria.models._sources import Itself
from noria.pieces import Wanted

ARCHITECTURES = ("BeamForCausalLM",)
FULL, SLIDING = "full_attention", "sliding_attention"
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 20480,
    "max_position_embeddings": 8192,
    "sliding_window": 512,
    "moe_intermediate_size": 2560,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {SLIDING: {"rope_theta": 10000.0}, FULL: None},
}
MODULES = _decoder.MODULES | {
    "head_gate": ("self_attn.gate_proj",),
    "head_gate_bias": (Itself("self_attn.gate_bias"),),
    "after_attention_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "after_mlp_norm": ("post_feedforward_layernorm",),
}
GATE = Gate(wide=True)
GROWTH, UNIT = 0.1, 2048  # of queries without positions: (1 + tokens / 2,048) ** 0.1


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    experts = replace(_experts.corrected(keys, "num_experts", _decoder.sparse_layers(keys, first=3)), gate=GATE)
    biases, count = read.flag(keys, "attention_bias", False), _decoder.num_layers(keys)
    kinds = read.layers_of(keys, "layer_types", count, (FULL, SLIDING))
    kinds = kinds or [SLIDING if (n + 1) % 6 and n < count - 1 else FULL for n in range(count)]
    turns = _rotary.by_kind(keys, kinds, read.integer(keys, "head_dim"))
    window = _decoder.window_of(keys, frozenset(n for n in range(count) if kinds[n] == SLIDING))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, head_norms=True, window=window, experts=experts)
    found = _decoder.shape("beam", keys.having(rope_parameters=None), variant)
    details = {
        "turns": [turns[kind] for kind in kinds],
        "logits_cap": _general.cap_of(keys, "final_logit_softcapping"),
    }
    keys.refuse_others()
    return replace(found, details={**found.details, **details})


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's; gates of heads [H * D, E], their biases [H], and the norms behind each part."""
    gates = {"head_gate": (shape.num_heads * shape.head_dim, shape.hidden_size), "head_gate_bias": (shape.num_heads,)}
    norms = {f"after_{name}_norm": (shape.hidden_size,) for name in ("attention", "mlp")}
    return _decoder.layer_parameters(shape, layer) | gates | norms


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, parameters=layer_parameters)


def positional(  # type: ignore[no-redef]  # its own
    shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Rotary cosines and sines of positions [T] in `dtype`, by turn; by how much queries without are longer [T, 1, 1]."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    longer = torch.exp(GROWTH * torch.log1p((positions.to(wide) + 1) / UNIT))
    return _decoder.positional_by_turn(shape, positions, dtype), longer[:, None, None]


def layer(  # type: ignore[no-redef]  # its own
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: tuple[dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]], torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are."""
    normed = _heads.norm(shape, parameters["attention_norm"], hidden)
    attended = _attend(shape, index, parameters, normed, positional, cache)
    gate = linear(normed, parameters["head_gate"]).view_as(attended) + parameters["head_gate_bias"][:, None]
    output = _heads.project_out(parameters, attended * torch.sigmoid(gate))
    hidden = _sum(_heads.norm(shape, parameters["after_attention_norm"], output), hidden, 2 * index + 2)
    output = _feed_forward(shape, parameters, _heads.norm(shape, parameters["mlp_norm"], hidden))
    return _sum(_heads.norm(shape, parameters["after_mlp_norm"], output), hidden, 2 * index + 3)


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]], torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    queries, keys = _heads.norm_each(shape, parameters, queries, keys)
    (tables, longer), turn = positional, shape.details["turns"][index]
    if turn is None:
        queries = (queries * longer).to(queries.dtype)
    else:
        queries, keys = (_rotary.rotate(heads, *tables[turn]) for heads in (queries, keys))
    return cache.attend(queries, key=keys, value=values, window=_decoder.window(shape, index))


def _sum(output: torch.Tensor, hidden: torch.Tensor, place: int) -> torch.Tensor:
    """[T, E]: the sum of what a part returns and what it was given, weighed as 1 and `place` - 1 equal ones."""
    return (output * (1 / math.sqrt(place))).add_(hidden * math.sqrt((place - 1) / place))


def _feed_forward(shape: ModelShape, parameters: Mapping[str, torch.Tensor], normed: torch.Tensor) -> torch.Tensor:
    """[T, E]: as the decoder's, with gates and ups multiplied in float32 for half precisions."""
    if "experts.down" not in parameters:
        return linear(_gates.inner(GATE, linear(normed, parameters["gate_up"])), parameters["down"])
    routing = shape.details["experts"].routing
    scores = _routing.scores_of(normed, parameters["router"])
    chosen, weights = _routing.choose(routing, scores, parameters["correction"])
    experts = parameters["experts.gate_up"], parameters["experts.down"]
    return _experts.mixture(normed, chosen, weights, *experts, gate=GATE)


def head(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return _general.capped(_decoder.head(shape, parameters, hidden), shape.details["logits_cap"])
