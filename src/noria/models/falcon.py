"""Falcon 7B, 40B, 180B and 11B: LayerNorms, halves in parallel, keys shared by many; as transformers' modeling_falcon."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import layer_norm_head as head  # type: ignore[assignment]  # noqa: F401

ARCHITECTURES = ("FalconForCausalLM",)
ALIASES = (("transformer.", ""),)  # a checkpoint saved from the bare model
DEFAULTS = {"activation": "gelu", "tie_word_embeddings": True}  # what a config.json that leaves them out means
SYNONYMS = {"n_embed": "hidden_size", "ffn_hidden_size": "intermediate_size"}
WITHOUT_EFFECT = ("ff_factor", "multi_query", "num_kv_heads", "num_ln_in_parallel_attn", "parallel_attn")
MODULES = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attention.query_key_value",),
    "out": ("self_attention.dense",),
    "mlp_norm": ("post_attention_layernorm",),
    "up": ("mlp.dense_h_to_4h",),
    "down": ("mlp.dense_4h_to_h",),
}
TWO_NORMS = MODULES | {"attention_norm": ("ln_attn",), "mlp_norm": ("ln_mlp",)}
AT = "transformer.word_embeddings", "transformer.h", "transformer.ln_f"


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.only(keys, "alibi", False, "Noria computes this family only with rotary positions")
    read.only(keys, "apply_residual_connection_post_layernorm", False, "Noria adds what stands before a norm")
    biases, new = read.flag(keys, "bias", False), read.flag(keys, "new_decoder_architecture", False)
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=biases)
    sizes = keys.having(num_key_value_heads=_kv_heads(keys, new))
    if keys.get("intermediate_size") is None:
        sizes = sizes.having(intermediate_size=4 * read.integer(keys, "hidden_size"))
    found = _general.with_layer_norms("falcon", sizes, variant, "layer_norm_epsilon", "activation")
    norms, parallel = _norms(keys, new)
    keys.refuse_others(*WITHOUT_EFFECT)
    return _general.described(found, *norms, norm_biases=True, gated=False, parallel=parallel, new=new)


def _kv_heads(config: Mapping[str, Any], new: bool) -> int:
    """Key heads: as many as `num_kv_heads` says in the new architecture, else one, or one for each query head."""
    heads = read.integer(config, "num_attention_heads")
    if new:
        return read.integer(config, "num_kv_heads", heads)
    return 1 if read.flag(config, "multi_query", True) else heads


def _norms(config: Mapping[str, Any], new: bool) -> tuple[tuple[str, ...], bool]:
    """The norms of a layer, and whether its halves take the same hidden states."""
    parallel = read.flag(config, "parallel_attn", True)
    if not parallel:
        read.only(config, "new_decoder_architecture", False, "Noria computes it only with parallel_attn")
        return ("attention_norm", "mlp_norm"), False
    count = read.integer(config, "num_ln_in_parallel_attn", 2 if new else 1, most=2)
    if not new:
        read.only(config, "num_ln_in_parallel_attn", 1, "Noria computes this only with new_decoder_architecture")
    return ("attention_norm", "mlp_norm")[:count], True


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    two = shape.details["new"] and "mlp_norm" in shape.details["norms"]
    return _general.sources(shape, block_name, _general.Places(TWO_NORMS if two else MODULES, *AT))


layer = partial(_general.layer, halves=_general.Halves(_general.attend_groups, _general.mlp, _general.layer_norm))
