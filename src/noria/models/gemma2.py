"""Gemma 2: norms before and behind each half, scaled embedding, soft caps, a window in every second layer; as
transformers' modeling_gemma2 computes it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _fused, _general, _heads
from noria.models._cache import Cache
from noria.models._fused import Norming
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._linear import ACTIVATIONS

ARCHITECTURES = ("Gemma2ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
SYNONYMS = {"sliding_window_size": "sliding_window"}
WITHOUT_EFFECT = ("hidden_act", "cache_implementation", "sliding_window")
MODULES = _decoder.MODULES | {
    "after_attention_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "after_mlp_norm": ("post_feedforward_layernorm",),
}
NORMS = "attention_norm", "after_attention_norm", "mlp_norm", "after_mlp_norm"
sources = partial(_general.sources, places=_general.Places(MODULES))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    found = shape_of("gemma2", keys, _general.kinds_of(keys, every=2))
    cap = _general.cap_of(keys, "attn_logit_softcapping")
    keys.refuse_others(*WITHOUT_EFFECT)
    return replace(found, soft_cap=cap)


def shape_of(family: str, config: read.Keys, kinds: list[str], **described: Any) -> ModelShape:
    """The sizes that Gemma 2 and its successors have in common."""
    read.only(config, "use_bidirectional_attention", False, "Noria computes this family only as a decoder")
    biases = read.flag(config, "attention_bias", False)
    named = read.one_of(config, "hidden_activation", "gelu_pytorch_tanh", tuple(ACTIVATIONS))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, window=_general.window_of(config, kinds))
    found = _decoder.shape(family, config.having(hidden_act=None), variant)
    scale = read.number(config, "query_pre_attn_scalar") ** -0.5
    cap = _general.cap_of(config, "final_logit_softcapping")
    return _general.described(found, *NORMS, activation=named, scale=scale, logits_cap=cap, **described)


def embed(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[T, E] from token ids [T], scaled by the root of E as their dtype has it; positions are the layers' business."""
    tokens = _decoder.embed(shape, parameters, token_ids, positions)
    return tokens.mul_(torch.tensor(shape.hidden_size**0.5, dtype=tokens.dtype).item())


def norm(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm whose weight is stored without its 1, in float32 for half precisions."""
    return _fused.norm(hidden, Norming(parameters[name], shape.details["norm_eps"], shift=1.0))


def _attend(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    normed: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, H, D] from normed hidden states [T, E]."""
    queries, keys, values = _heads.split(shape, parameters, normed)
    how = {"scale": shape.details["scale"], "soft_cap": shape.soft_cap, "window": _decoder.window(shape, index)}
    return cache.attend(queries, key=keys, value=values, rotary=positional, **how)


layer = partial(_general.layer, halves=_general.Halves(_attend, _general.gated, norm))


def head(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return _general.capped(_general.head(shape, parameters, hidden, norm), shape.details["logits_cap"])
