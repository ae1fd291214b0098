"""MiMo-V2-Flash: layers with windows and sinks have more key heads and a rope of their own, values another width.

As transformers' modeling_mimo_v2_flash computes it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.arrays import Array
from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _heads, _rotary
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._sources import Itself
from noria.pieces import Wanted

ARCHITECTURES = ("MiMoV2FlashForCausalLM",)
FULL, SLIDING = "full_attention", "sliding_attention"
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "intermediate_size": 16384,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 129,
    "attention_value_scale": 0.707,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
}
SYNONYMS = {"num_local_experts": "n_routed_experts", "layernorm_epsilon": "rms_norm_eps"}
MODULES = _decoder.MODULES | {"sinks": (Itself("self_attn.attention_sink_bias"),)}
# What published config.json files say beside, and the value that means this family.
FIXED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "n_shared_experts": None,
    "hybrid_block_size": None,
    "rope_scaling": None,
}
# Of drafts; of windows, once more (transformers' and SGLang's programs read neither).
WITHOUT_EFFECT = ("attention_chunk_size", "num_nextn_predict_layers", "sliding_window", "sliding_window_size")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.fixed(keys, FIXED)
    for key in ("head_dim", "v_head_dim", "num_attention_heads"):
        read.only(keys, f"swa_{key}", keys.get(key), f"it must be {key}, {read.shown(keys.get(key))}")
    count = _decoder.num_layers(keys)
    kinds = _by_layer(keys, "layer_types", "hybrid_layer_pattern", (FULL, SLIDING))
    kinds = kinds or [FULL if n == 0 or (n + 1) % 6 == 0 else SLIDING for n in range(count)]
    parts = _by_layer(keys, "mlp_layer_types", "moe_layer_freq", ("dense", "sparse"))
    layers = frozenset(n for n in range(count) if (n > 0 if parts is None else parts[n] == "sparse"))
    experts = _experts.corrected(keys, "n_routed_experts", layers)
    biases = read.flag(keys, "attention_bias", False)
    turns = _rotary.by_kind(_with_ropes(keys), kinds, read.integer(keys, "head_dim"))
    require(all(turns.values()), "config.json: rope_parameters is null for some layers: all have rotary positions")
    plain = keys.having(rope_parameters=None, partial_rotary_factor=None)
    found = _decoder.shape("mimo_v2_flash", plain, _decoder.Variant(qkv_bias=biases, experts=experts))
    scale = keys.get("attention_value_scale")
    details: dict[str, Any] = {
        "window": (_window(keys), frozenset(n for n, kind in enumerate(kinds) if kind == SLIDING)),
        "turns": [turns[kind] for kind in kinds],
        "value_dim": read.integer(keys, "v_head_dim"),
        "value_scale": 1.0 if scale is None else read.number(keys, "attention_value_scale"),
        "kv_heads": read.integer(keys, "swa_num_key_value_heads", 2 * found.num_kv_heads),
    }
    read.multiple(("num_attention_heads", found.num_heads), ("swa_num_key_value_heads", details["kv_heads"]))
    keys.refuse_others(*WITHOUT_EFFECT)
    return _with_caches(replace(found, details={**found.details, **details}))


def _by_layer(config: Mapping[str, Any], key: str, pattern: str, words: tuple[str, str]) -> list[str] | None:
    """A word for each layer, which `pattern` has as 0 and 1."""
    count, found = _decoder.num_layers(config), config.get(pattern)
    right = isinstance(found, list) and len(found) == count and all(one in (0, 1) for one in found)
    require(found is None or right, f"config.json: {pattern} is {read.shown(found)}: it must be {count} times 0 or 1")
    named = read.layers_of(config, key, count, words)
    return named or (found and [words[one] for one in found])


def _with_ropes(keys: read.Keys) -> read.Keys:
    """Of older config.json files: a theta for each kind of layer, and one share of each head that is rotated."""
    factor = read.number(keys, "partial_rotary_factor", 0.334)
    full, sliding = read.number(keys, "rope_theta", 5e6), read.number(keys, "swa_rope_theta", 1e4)
    ropes = {
        kind: {"rope_theta": theta, "partial_rotary_factor": factor}
        for kind, theta in ((FULL, full), (SLIDING, sliding))
    }
    return keys.having(partial_rotary_factor=factor, rope_parameters=keys.get("rope_parameters") or ropes)


def _window(config: Mapping[str, Any]) -> int:
    """The tokens that a query sees: `sliding_window`, or itself and `sliding_window_size` before it."""
    if config.get("sliding_window_size") is None:
        return read.integer(config, "sliding_window")
    return read.integer(config, "sliding_window_size") + 1


def _with_caches(shape: ModelShape) -> ModelShape:
    """With the keys and values of each layer; those with a window have sinks."""
    cache = tuple(
        (
            Array("key", (_of_layer(shape, layer)[1], shape.head_dim), window=_decoder.window(shape, layer)),
            Array(
                "value", (_of_layer(shape, layer)[1], shape.details["value_dim"]), window=_decoder.window(shape, layer)
            ),
        )
        for layer in range(shape.num_layers)
    )
    windowed = (layer for layer in range(shape.num_layers) if _decoder.window(shape, layer) is not None)
    return replace(shape, cache=cache, sinks=frozenset(windowed))


def _of_layer(shape: ModelShape, layer: int) -> tuple[int, int]:
    """H and Hkv of a layer."""
    windowed = _decoder.window(shape, layer) is not None
    return shape.num_heads, shape.details["kv_heads"] if windowed else shape.num_kv_heads


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's; a layer with a window has sinks [H]."""
    (heads, kv_heads), size, value_dim = _of_layer(shape, layer), shape.head_dim, shape.details["value_dim"]
    width = (heads + kv_heads) * size + kv_heads * value_dim
    found = _decoder.layer_parameters(shape, layer)
    found |= {"qkv": (width, shape.hidden_size), "out": (shape.hidden_size, heads * value_dim)}
    found |= {"qkv_bias": (width,)} if "qkv_bias" in found else {}
    return found | ({"sinks": (heads,)} if layer in shape.sinks else {})


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
    """[T, H, Dv] from normed hidden states [T, E]."""
    heads, value_dim, window = _of_layer(shape, index), shape.details["value_dim"], _decoder.window(shape, index)
    queries, keys, values = _heads.split(shape, parameters, normed, heads, value_dim)
    return cache.attend(
        queries,
        key=keys,
        value=values * shape.details["value_scale"],
        window=window,
        sinks=parameters.get("sinks"),
        rotary=positional[shape.details["turns"][index]],
    )


positional = _decoder.positional_by_turn  # type: ignore[assignment]  # by turn
layer = partial(_decoder.layer, attention=_attend)
