"""Gemma 4 (text): layers with windows and without that differ in heads and ropes, keys of earlier layers, inputs of each
layer, a mixture beside the feed-forward; as transformers' modeling_gemma4 computes it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from noria.arrays import Array, Entry, keys_and_values
from noria.errors import require
from noria.kernels.expert_layer import GELU_TANH, Gate
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _general, _heads, _rotary, _routing, _sources, gemma2
from noria.models._cache import Cache
from noria.models._experts import Experts
from noria.models._general import FULL, SLIDING
from noria.models._linear import ACTIVATIONS, linear
from noria.models._rotary import Rotary
from noria.models._sources import Itself
from noria.pieces import Wanted

Given: TypeAlias = Any  # hidden states [T, E], or them and the inputs of the layers to come [T, L, P], by name
ARCHITECTURES = ("Gemma4ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS
# Published beside the layers that read an earlier one's keys and values.
LEFT_OUT = (".self_attn.k_proj.", ".self_attn.v_proj.", ".self_attn.k_norm.")
# What a config.json that leaves them out means.
DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}
MODULES = gemma2.MODULES | {
    "after_dense_norm": ("post_feedforward_layernorm_1",),
    "experts_norm": ("pre_feedforward_layernorm_2",),
    "after_experts_norm": ("post_feedforward_layernorm_2",),
    "router": ("router.proj",),
    "router_scale": (Itself("router.scale"),),
    "expert_scales": (Itself("router.per_expert_scale"),),
    "inputs_gate": ("per_layer_input_gate",),
    "inputs_out": ("per_layer_projection",),
    "after_inputs_norm": ("post_per_layer_input_norm",),
    "scale": (Itself("layer_scalar"),),
}
EXPERTS = partial(_experts.sources_in_one, "experts.gate_up_proj", "experts.down_proj", False)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    return shape_of("gemma4_text", read.keys_of(config, DEFAULTS, {"top_k_experts": "num_experts_per_tok"}))


def shape_of(family: str, keys: read.Keys) -> ModelShape:
    """The sizes of a family that is this one, or this one without a mixture and inputs of layers."""
    if keys.get("use_bidirectional_attention") != "vision":  # of images, which are not computed
        read.only(keys, "use_bidirectional_attention", None, "Noria computes this family only as a decoder")
    biases, kinds = read.flag(keys, "attention_bias", False), _general.kinds_of(keys, every=6)
    kinds[-1] = FULL
    window, experts = _general.window_of(keys, kinds), _experts_of(keys)
    plain = keys.having(rope_parameters=None, hidden_act=None)
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, window=window, experts=experts)
    found = _decoder.shape(family, plain, variant)
    by_layer = keys.having(**_of_layers(keys, kinds))
    sizes = {kind: _heads_of(by_layer, kind, found) for kind in (FULL, SLIDING)}
    turns = {kind: _rotary.by_kind(keys, [kind], sizes[kind][1])[kind] for kind in sorted({*kinds})}
    inputs = read.whole(keys, "hidden_size_per_layer_input", 0)
    if inputs:
        read.only(keys, "vocab_size_per_layer_input", found.vocab_size, "Noria knows only that of vocab_size")
    details = {
        "turns": [turns[kind] for kind in kinds],
        "heads": [sizes[kind] for kind in kinds],
        "one_matrix": [kind == FULL and read.flag(keys, "attention_k_eq_v", False) for kind in kinds],
        "double": read.flag(keys, "use_double_wide_mlp", False),
        "inputs": inputs,
        "activation": read.one_of(keys, "hidden_activation", "gelu_pytorch_tanh", tuple(ACTIVATIONS)),
        "logits_cap": _general.cap_of(keys, "final_logit_softcapping"),
        "biases": found.details["biases"] | {"q": biases},
    }
    cache = _cache(keys, kinds, sizes, window)
    others = "hidden_act", "vocab_size_per_layer_input", "num_global_key_value_heads", "moe_intermediate_size"
    keys.refuse_others("sliding_window", *others)  # read where some layer has a window
    left = range(found.num_layers, 0, -1)
    bundle = (*((Array("inputs", (count, inputs)),) for count in left), ()) if inputs else ()
    return replace(found, cache=cache, bundle=bundle, details={**found.details, **details})


def _experts_of(config: Mapping[str, Any]) -> Experts | None:
    if not read.flag(config, "enable_moe_block", False):
        return None
    read.only(
        config, "hidden_activation", "gelu_pytorch_tanh", "Noria computes this mixture only with gelu_pytorch_tanh"
    )
    number, chosen = _routing.counts(config, "num_experts")
    routing = _routing.Routing(chosen, before="softmax", normalized=True)
    inner, layers = read.integer(config, "moe_intermediate_size"), range(_decoder.num_layers(config))
    return Experts(number, inner, layers, routing, fused=True, gate=Gate(GELU_TANH))


def _of_layers(config: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """What `per_layer_config` says of the heads of layers without windows, under the keys that say it otherwise."""
    found = config.get("per_layer_config")
    if found is None:
        return {}
    known = {"head_dim"} | ({"num_key_value_heads"} if read.flag(config, "attention_k_eq_v", False) else set())
    its = [*found.values()] if isinstance(found, Mapping) else []
    layers = {str(n) for n, kind in enumerate(kinds) if kind == FULL}
    right = bool(its) and {*map(str, found)} == layers and all(one == its[0] for one in its)
    right = right and isinstance(its[0], Mapping) and its[0].keys() <= known
    words = f"it must say the same {' and '.join(sorted(known))} of each layer without a window and nothing else"
    require(right, f"config.json: per_layer_config is {read.shown(found)}: {words}")
    count = its[0].get("num_key_value_heads")
    return {"global_head_dim": its[0].get("head_dim", config["head_dim"]), "num_global_key_value_heads": count}


def _heads_of(config: Mapping[str, Any], kind: str, found: ModelShape) -> tuple[int, int]:
    """Key heads of layers of this kind, and their numbers."""
    if kind == SLIDING:
        return found.num_kv_heads, found.head_dim
    count = found.num_kv_heads
    if read.flag(config, "attention_k_eq_v", False):
        count = read.integer(config, "num_global_key_value_heads", count)
        read.multiple(("num_attention_heads", found.num_heads), ("num_global_key_value_heads", count))
    size = read.integer(config, "global_head_dim")
    require(size % 2 == 0, f"config.json: global_head_dim is {size}: rotary positions need an even number")
    return count, size


def _cache(
    config: Mapping[str, Any],
    kinds: list[str],
    sizes: Mapping[str, tuple[int, int]],
    window: tuple[int, frozenset[int]] | None,
) -> tuple[Entry, ...]:
    """Keys and values of each layer; the last `num_kv_shared_layers` read those of the last layer of their kind before."""
    shared = read.whole(config, "num_kv_shared_layers", 0)
    first = len(kinds) - shared
    known = shared == 0 or (first > 0 and {*kinds[:first]} == {*kinds})
    require(known, f"config.json: num_kv_shared_layers is {shared}: no layer of each kind is before them")
    last = {kind: n for n, kind in enumerate(kinds[:first])}
    seen = {SLIDING: window[0] if window else None, FULL: None}
    own = [keys_and_values(*sizes[kind], seen[kind]) for kind in kinds[:first]]
    return *own, *(last[kind] for kind in kinds[first:])


def embed_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """inputs of layers: a table of tokens, a matrix and a norm, for all layers."""
    found, size = {"tokens": (shape.vocab_size, shape.hidden_size)}, shape.details["inputs"]
    width = shape.num_layers * size
    more = {"inputs": (shape.vocab_size, width), "project": (width, shape.hidden_size), "inputs_norm": (size,)}
    return found | (more if size else {})


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:
    """In stored order. Matrices are [out, in]; what a layer has of queries, keys and values lies one after another in `qkv`."""
    details, hidden, reads = shape.details, shape.hidden_size, shape.reads(layer) != layer
    (kv_heads, size), heads = details["heads"][layer], shape.num_heads * details["heads"][layer][1]
    inner = details["intermediate_size"] * (2 if reads and details["double"] else 1)
    width = heads + kv_heads * size * (0 if reads else 1 if details["one_matrix"][layer] else 2)
    wanted: dict[str, tuple[int, ...] | Wanted] = {"attention_norm": (hidden,), "qkv": (width, hidden)}
    wanted |= ({"qkv_bias": (width,)} if details["biases"]["qkv"] else {}) | {"query_norm": (size,)}
    wanted |= ({} if reads else {"key_norm": (size,)}) | {"out": (hidden, heads)}
    wanted |= {"out_bias": (hidden,)} if details["biases"]["out"] else {}
    wanted |= {"after_attention_norm": (hidden,), "mlp_norm": (hidden,), "gate_up": (2 * inner, hidden)}
    wanted |= {"down": (hidden, inner), "after_mlp_norm": (hidden,)}
    if details["experts"]:
        norms = "after_dense_norm", "experts_norm", "after_experts_norm"
        wanted |= dict.fromkeys(norms, (hidden,)) | {"router_scale": (hidden,)}
        wanted |= {"expert_scales": (details["experts"].number,)} | _experts.parameters(details["experts"], hidden)
    if details["inputs"]:
        gate = {"inputs_gate": (details["inputs"], hidden), "inputs_out": (hidden, details["inputs"])}
        wanted |= gate | {"after_inputs_norm": (hidden,)}
    return wanted | {"scale": (1,)}


head_parameters = _decoder.head_parameters
positional = _decoder.positional_by_turn


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    if block_name == "embed":
        names = {"tokens": "embed_tokens", "inputs": "embed_tokens_per_layer"}
        names |= {"project": "per_layer_model_projection", "inputs_norm": "per_layer_projection_norm"}
        return {parameter: (f"model.{names[parameter]}.weight",) for parameter in embed_parameters(shape)}
    if block_name == "head":
        return _decoder.sources(shape, block_name)
    layer = int(block_name.removeprefix("layers/"))
    count = 1 if shape.reads(layer) != layer else 2 if shape.details["one_matrix"][layer] else 3
    modules = MODULES | {"qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"[:count])}
    return _decoder.sources(shape, block_name, modules, EXPERTS, layer_parameters)


def embed(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor
) -> Given:
    """[T, E] from token ids [T]; and the inputs of all layers [T, L, P], of the token and of its embedding."""
    hidden, size = _scaled(F.embedding(token_ids, parameters["tokens"])), shape.details["inputs"]
    if not size:
        return hidden
    projected = linear(hidden, parameters["project"]).mul_(shape.hidden_size**-0.5).unflatten(-1, (-1, size))
    projected = _heads.norm(shape, parameters["inputs_norm"], projected)
    own = F.embedding(token_ids, parameters["inputs"]).unflatten(-1, (-1, size))
    return {"hidden": hidden, "inputs": projected.add_(_scaled(own)).mul_(2**-0.5)}


def _scaled(tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings times the root of their width, as their dtype has it."""
    return tokens.mul_(torch.tensor(tokens.shape[-1] ** 0.5, dtype=tokens.dtype).item())


def layer(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    given: Given,
    positional: dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]],
    cache: Cache,
) -> Given:
    """[T, E] after layer `index`, and the inputs of those behind it; what is given is left as it is."""
    hidden = given["hidden"] if shape.bundle else given
    norm = partial(_general.rms, shape, parameters)
    attended = _attend(shape, index, parameters, norm("attention_norm", hidden), positional, cache)
    hidden = norm("after_attention_norm", _heads.project_out(parameters, attended)).add_(hidden)
    made = _general.gated(shape, parameters, norm("mlp_norm", hidden))
    if shape.details["experts"]:
        made = norm("after_dense_norm", made).add_(norm("after_experts_norm", _mixed(shape, parameters, hidden)))
    hidden = norm("after_mlp_norm", made).add_(hidden)
    if not shape.bundle:
        return hidden.mul_(parameters["scale"])
    gate = ACTIVATIONS[shape.details["activation"]](linear(hidden, parameters["inputs_gate"]))
    made = linear(gate.mul_(given["inputs"][:, 0]), parameters["inputs_out"])
    hidden = norm("after_inputs_norm", made).add_(hidden).mul_(parameters["scale"])
    rest = {"inputs": given["inputs"][:, 1:]} if index + 1 < shape.num_layers else {}
    return {"hidden": hidden, **rest}


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: dict[_rotary.Turn, tuple[torch.Tensor, torch.Tensor]],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]. Values have a norm without weight; scores are not scaled."""
    kv_heads, size = shape.details["heads"][index]
    turn, window = positional[shape.details["turns"][index]], _decoder.window(shape, index)
    made = linear(normed, parameters["qkv"], parameters.get("qkv_bias")).unflatten(-1, (-1, size))
    queries = _heads.norm(shape, parameters["query_norm"], made[:, : shape.num_heads])
    if "key_norm" not in parameters:
        return cache.attend(_rotary.rotate(queries, *turn), scale=1.0, window=window)
    keys, values = made[:, shape.num_heads :][:, :kv_heads], made[:, -kv_heads:]
    keys = _heads.norm(shape, parameters["key_norm"], keys)
    values = F.rms_norm(values, (size,), eps=shape.details["norm_eps"])
    return cache.attend(queries, key=keys, value=values, scale=1.0, rotary=Rotary(*turn), window=window)


def _mixed(shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """[T, E] of hidden states [T, E]: the mixture, whose router has a norm, a scale and weights of experts of its own."""
    experts, size = shape.details["experts"], shape.hidden_size
    routed = F.rms_norm(hidden, (size,), eps=shape.details["norm_eps"]) * parameters["router_scale"]
    scores = _routing.scores_of(routed.mul_(size**-0.5), parameters["router"])
    chosen, weights = _routing.choose(experts.routing, scores)
    weights = weights * parameters["expert_scales"][chosen].to(weights.dtype)
    normed = _heads.norm(shape, parameters["experts_norm"], hidden)
    matrices = parameters["experts.gate_up"], parameters["experts.down"]
    return _experts.mixture(normed, chosen, weights, *matrices, experts.gate)


def head(shape: ModelShape, parameters: Mapping[str, torch.Tensor], given: Given) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    hidden = given["hidden"] if shape.bundle else given
    return _general.capped(_decoder.head(shape, parameters, hidden), shape.details["logits_cap"])
