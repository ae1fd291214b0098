"""Laguna: heads by layer, each with a gate; two ropes; sigmoid routing with a soft cap; as transformers' modeling_laguna."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _heads, _rotary, _routing, qwen3_moe
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models._linear import linear
from noria.models._rotary import Rotary
from noria.models._sources import Itself
from noria.pieces import Wanted

ARCHITECTURES = ("LagunaForCausalLM",)
FULL, SLIDING = "full_attention", "sliding_attention"
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "rope_parameters": {
        FULL: {"rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        SLIDING: {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
}
SYNONYMS = {"num_local_experts": "num_experts"}
MODULES = _decoder.MODULES | {
    "head_gate": ("self_attn.g_proj",),
    "correction": (Itself("mlp.experts.e_score_correction_bias"),),
    "shared_gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_down": ("mlp.shared_expert.down_proj",),
}
# What published config.json files say beside, and the value that means this family.
FIXED = {
    "qkv_bias": False,
    "norm_topk_prob": True,
    "moe_router_use_sigmoid": True,
    "moe_apply_router_weight_on_input": False,
    "swa_attention_sink_enabled": False,
}
WITHOUT_EFFECT = ("rope_theta", "partial_rotary_factor", "sliding_window")  # rope_parameters says them layer by layer


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.fixed(keys, FIXED)
    biases, count = read.flag(keys, "attention_bias", False), _decoder.num_layers(keys)
    kinds = read.layers_of(keys, "layer_types", count, (FULL, SLIDING)) or [FULL] * count
    turns = _rotary.by_kind(keys, kinds, read.integer(keys, "head_dim"))
    require(all(turns.values()), "config.json: rope_parameters is null for some layers: all have rotary positions")
    windowed = frozenset(n for n in range(count) if kinds[n] == SLIDING)
    variant = _decoder.Variant(
        qkv_bias=biases,
        out_bias=biases,
        head_norms=True,
        window=_decoder.window_of(keys, windowed) if windowed else None,
        experts=_experts_of(keys),
    )
    plain = keys.having(rope_parameters=None, rope_theta=None, partial_rotary_factor=None)
    found = _decoder.shape("laguna", plain, variant)
    gating = keys.get("gating", True)
    each = ["per_element" if gating == "per-element" else "per_head"] * count
    known = gating is True or gating in ("per-head", "per-element")
    require(known, f"config.json: gating is {read.shown(gating)}: it must be true, 'per-head' or 'per-element'")
    read.only(keys, "gating_types", each, f"all layers must be as gating says, {read.shown(gating)}")
    details = {
        "turns": [turns[kind] for kind in kinds],
        "heads": _by_layer(keys, count),
        "gates": found.head_dim if gating == "per-element" else 1,
    }
    keys.refuse_others(*WITHOUT_EFFECT)
    return replace(found, details={**found.details, **details})


def _experts_of(config: Mapping[str, Any]) -> Experts:
    number, chosen = _routing.counts(config, "num_experts")
    cap = config.get("moe_router_logit_softcapping")
    routing = _routing.Routing(
        chosen,
        before="sigmoid",
        normalized=True,
        least=_routing.LEAST_SUM,
        scaling=read.number(config, "moe_routed_scaling_factor", 1.0),
        soft_cap=0.0 if not cap else read.number(config, "moe_router_logit_softcapping"),
    )
    inner, shared = (read.integer(config, f"{name}_intermediate_size") for name in ("moe", "shared_expert"))
    return Experts(number, inner, _sparse(config), routing, shared, corrected=True)


def _sparse(config: Mapping[str, Any]) -> Collection[int]:
    """The layers with experts: by `mlp_layer_types`, else by `mlp_only_layers`, else all but the first."""
    read.only(config, "decoder_sparse_step", 1, "Noria computes this family only with 1")
    if config.get("mlp_only_layers") is None:
        return _decoder.sparse_layers(config, first=1)
    sparse = qwen3_moe.sparse_layers(config)
    types = _decoder.sparse_layers(config, first=0)
    known = config.get("mlp_layer_types") is None or {*types} == sparse
    require(
        known,
        f"config.json: mlp_only_layers is {read.shown(config['mlp_only_layers'])}: mlp_layer_types says otherwise",
    )
    return sparse


def _by_layer(config: Mapping[str, Any], count: int) -> list[int]:
    """The query heads of each layer."""
    found = config.get("num_attention_heads_per_layer")
    heads = [read.integer(config, "num_attention_heads")] * count if found is None else found
    right = isinstance(heads, list) and len(heads) == count
    require(right, f"config.json: num_attention_heads_per_layer is {read.shown(found)}: it must be a list of {count}")
    kv_heads = read.integer(config, "num_key_value_heads")
    for one in heads:
        number = read.integer({"num_attention_heads_per_layer": one}, "num_attention_heads_per_layer")
        read.multiple(("num_attention_heads_per_layer", number), ("num_key_value_heads", kv_heads))
    return heads


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's, with gates of heads behind, [H, E] or [H * D, E]."""
    heads, size, hidden = shape.details["heads"][layer], shape.head_dim, shape.hidden_size
    width = (heads + 2 * shape.num_kv_heads) * size
    found = _decoder.layer_parameters(shape, layer) | {"qkv": (width, hidden), "out": (hidden, heads * size)}
    found |= {"qkv_bias": (width,)} if "qkv_bias" in found else {}
    return found | {"head_gate": (heads * shape.details["gates"], hidden)}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, parameters=layer_parameters)


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]; a gate multiplies a head, or each of its numbers."""
    heads = shape.details["heads"][index], shape.num_kv_heads
    queries, keys, values = _heads.split(shape, parameters, normed, heads)
    turn, norms = positional[shape.details["turns"][index]], _heads.norms(shape, parameters)
    rotary = Rotary(*turn, norms=norms, eps=shape.details["norm_eps"])
    attended = cache.attend(queries, key=keys, value=values, window=_decoder.window(shape, index), rotary=rotary)
    gates = linear(normed, parameters["head_gate"]).unflatten(-1, (heads[0], -1))
    return attended * F.softplus(gates.to(torch.promote_types(gates.dtype, torch.float32))).to(attended.dtype)


positional = _decoder.positional_by_turn  # type: ignore[assignment]  # by turn
layer = partial(_decoder.layer, attention=_attend)
