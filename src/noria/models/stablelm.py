"""StableLM 3B and 2: LayerNorms, heads turned in part, halves in parallel in 12B; as transformers' modeling_stablelm."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general
from noria.models._cache import Cache
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import layer_norm_head as head  # type: ignore[assignment]  # noqa: F401

ARCHITECTURES = ("StableLmForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 32,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "partial_rotary_factor": 0.25,
}
# The makers' own code read them, with these values; transformers' does not.
WITHOUT_EFFECT = ("norm_eps", "rotary_scaling_factor")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, {"rope_pct": "partial_rotary_factor"})
    read.only(keys, "hidden_act", "silu", "Noria computes this family only with silu")
    variant = _decoder.Variant(qkv_bias=read.flag(keys, "use_qkv_bias", False), partly_rotated=True)
    found = _general.with_layer_norms("stablelm", keys, variant, "layer_norm_eps")
    head_norms, parallel = read.flag(keys, "qk_layernorm", False), read.flag(keys, "use_parallel_residual", False)
    keys.refuse_others(*WITHOUT_EFFECT)
    counts = {"query_norm": found.num_heads, "key_norm": found.num_kv_heads}
    return _general.described(
        found,
        *("attention_norm",) if parallel else ("attention_norm", "mlp_norm"),
        norms={name: (count * found.head_dim,) for name, count in counts.items() if head_norms},
        norm_biases=True,
        parallel=parallel,
    )


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint: each head's norm has one of its own."""
    counts = {"q": shape.num_heads, "k": shape.num_kv_heads}
    query, key = (tuple(f"self_attn.{k}_layernorm.norms.{n}" for n in range(counts[k])) for k in counts)
    modules = _decoder.MODULES | {"query_norm": query, "key_norm": key}
    return _general.sources(shape, block_name, _general.Places(modules))


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]; each head has a LayerNorm of its own."""
    queries, keys, values = _general.split_normed(shape, parameters, normed)
    return cache.attend(queries, key=keys, value=values, rotary=positional)


layer = partial(_general.layer, halves=_general.Halves(_attend, norm=_general.layer_norm))
