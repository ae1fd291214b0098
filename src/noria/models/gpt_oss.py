"""gpt-oss: attention sinks, windows in turn, experts with biases and a clamped SwiGLU; as transformers' modeling_gpt_oss.

An expert's gates and ups lie in turn, as checkpoints have them: a row of gates, a row of ups.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.kernels.expert_layer import Gate
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _heads, _routing
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models._sources import Itself
from noria.pieces import Wanted

ARCHITECTURES = ("GptOssForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
SYNONYMS = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
MODULES = _decoder.MODULES | {
    "sinks": (Itself("self_attn.sinks"),),
    "router": ("mlp.router",),
    "experts_gate_up_bias": (Itself("mlp.experts.gate_up_proj_bias"),),
    "experts_down_bias": (Itself("mlp.experts.down_proj_bias"),),
}
EXPERTS = partial(_experts.sources_in_one, "mlp.experts.gate_up_proj", "mlp.experts.down_proj", True)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    if not (keys.get("rope_scaling") or keys.get("rope_parameters")):
        keys = keys.having(rope_scaling=ROPE)
    number, chosen = _routing.counts(keys, "num_local_experts")
    layers, inner = range(_decoder.num_layers(keys)), read.integer(keys, "intermediate_size")
    alpha, limit = read.number(keys, "swiglu_alpha", 1.702), read.number(keys, "swiglu_limit", 7.0)
    gate = Gate(alpha=alpha, limit=limit, shift=1.0, alternating=True)
    routing = _routing.Routing(chosen, after="softmax")
    experts = Experts(number, inner, layers, routing, fused=True, gate=gate, biased=True)
    biases = read.flag(keys, "attention_bias", True)
    types = read.layers_of(keys, "layer_types", len(layers), ("full_attention", "sliding_attention"))
    windowed = layers[::2] if types is None else [n for n in layers if types[n] == "sliding_attention"]
    window = _decoder.window_of(keys, frozenset(windowed))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, window=window, experts=experts)
    found = _decoder.shape("gpt_oss", keys, variant)
    keys.refuse_others("initial_context_length")  # what rope_scaling says too
    return replace(found, sinks=frozenset(layers))


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's, with sinks [H] and the biases of router and experts [X, 2 * I], [X, E] behind."""
    number, inner = shape.details["experts"].number, shape.details["experts"].inner
    return _decoder.layer_parameters(shape, layer) | {
        "sinks": (shape.num_heads,),
        "router_bias": (number,),
        "experts_gate_up_bias": (number, 2 * inner),
        "experts_down_bias": (number, shape.hidden_size),
    }


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, EXPERTS, layer_parameters)


def layer(  # type: ignore[no-redef]  # its own
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are."""
    normed = _heads.norm(shape, parameters["attention_norm"], hidden)
    queries, keys, values = _heads.split(shape, parameters, normed)
    window, sinks = _decoder.window(shape, index), parameters["sinks"]
    attended = cache.attend(queries, key=keys, value=values, window=window, sinks=sinks, rotary=positional)
    branch = _heads.project_out(parameters, attended)

    hidden, normed = _heads.add_norm(shape, parameters["mlp_norm"], branch, hidden)
    scores = _routing.scores_of(normed, parameters["router"], parameters["router_bias"])
    chosen, weights = _routing.choose(shape.details["experts"].routing, scores)
    experts = parameters["experts.gate_up"], parameters["experts.down"]
    biases = parameters["experts_gate_up_bias"], parameters["experts_down_bias"]
    gate = shape.details["experts"].gate
    return _experts.mixture(normed, chosen, weights, *experts, gate, biases).add_(hidden)
