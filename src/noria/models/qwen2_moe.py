"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with a mixture and a gated shared expert; as transformers' modeling_qwen2_moe has it."""

from collections.abc import Collection, Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _routing, qwen3_moe
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts

ARCHITECTURES = ("Qwen2MoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
SYNONYMS = {"num_local_experts": "num_experts"}
MODULES = _decoder.MODULES | {
    "shared_gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_down": ("mlp.shared_expert.down_proj",),
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    number, chosen = _routing.counts(keys, "num_experts")
    routing = _routing.Routing(chosen, before="softmax", normalized=read.flag(keys, "norm_topk_prob", False))
    inner, shared = (read.integer(keys, f"{name}_intermediate_size") for name in ("moe", "shared_expert"))
    experts = Experts(number, inner, qwen3_moe.sparse_layers(keys), routing, shared, gated=True)
    biases = read.flag(keys, "qkv_bias", True)
    variant = _decoder.Variant(qkv_bias=biases, window=_window(keys), experts=experts)
    found = _decoder.shape("qwen2_moe", keys, variant)
    keys.refuse_others("sliding_window", "max_window_layers", "layer_types")
    return found


def _window(config: Mapping[str, Any]) -> tuple[int, Collection[int]] | None:
    """The window of the layers that `layer_types` says: every second one below `max_window_layers` if it says nothing."""
    if not read.flag(config, "use_sliding_window", False):
        return None
    count = _decoder.num_layers(config)
    types = read.layers_of(config, "layer_types", count, ("full_attention", "sliding_attention"))
    below = min(count, read.whole(config, "max_window_layers", 28))
    layers = range(0, below, 2) if types is None else [n for n, kind in enumerate(types) if kind[0] == "s"]
    return _decoder.window_of(config, frozenset(layers))


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES)
