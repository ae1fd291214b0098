"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers; as transformers' modeling_qwen3_moe computes it."""

from collections.abc import Mapping
from typing import Any

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _routing, qwen2
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = qwen2.DEFAULTS | {
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
SYNONYMS = {"num_local_experts": "num_experts"}  # as transformers 5 writes it


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Every `decoder_sparse_step`-th layer has experts, less `mlp_only_layers`.

    Raises InputError, naming the key, for what this family cannot compute.
    """
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    return shape_of("qwen3_moe", keys, normalized=read.flag(keys, "norm_topk_prob", False))


def shape_of(family: str, config: read.Keys, normalized: bool, fused: bool = False) -> ModelShape:
    """The same of a family. normalized: whether weights are divided by their sum; fused: see Experts. Raises InputError."""
    number, chosen = _routing.counts(config, "num_experts")
    routing = _routing.Routing(chosen, before="softmax", normalized=normalized)
    inner = read.integer(config, "moe_intermediate_size")
    experts = Experts(number, inner, sparse_layers(config), routing, fused=fused)
    windowed = read.flag(config, "use_sliding_window", False)
    window = _decoder.window_of(config, range(_decoder.num_layers(config))) if windowed else None
    biases = read.flag(config, "attention_bias", False)
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, head_norms=True, window=window, experts=experts)
    made = _decoder.shape(family, config, variant)
    for key, value in (("qkv_bias", biases), ("use_qk_norm", True), ("shared_expert_intermediate_size", 0)):
        read.only(config, key, value, f"Noria computes this family only with {value}")
    # intermediate_size is of dense layers, which there may be none of
    config.refuse_others("sliding_window", "intermediate_size", *read.OF_WINDOWS)
    return made


def sparse_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer, less `mlp_only_layers`. Raises InputError."""
    step, dense = read.integer(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    known = isinstance(dense, list) and all(isinstance(number, int) for number in dense)
    require(known, f"config.json: mlp_only_layers is {read.shown(dense)}: it must be a list of layers")
    return frozenset(range(step - 1, _decoder.num_layers(config), step)) - frozenset(dense)
