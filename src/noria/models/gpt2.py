"""GPT-2 (and DistilGPT-2), whose matrices are stored [in, out]; as transformers' modeling_gpt2 computes it.

Functions of tensors: nothing of ranks, streams or files.
T tokens, S sampled rows, H heads, D head dim, E hidden, V vocab.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _fused, _sources
from noria.models._cache import Cache
from noria.models._fused import Norming
from noria.models._linear import ACTIVATIONS, linear
from noria.models._sources import Transposed

ARCHITECTURES = ("GPT2LMHeadModel",)
ALIASES = (("transformer.", ""),)  # the first published checkpoints
SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")  # of models that classify


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, {})
    read.only(keys, "add_cross_attention", False, "Noria computes GPT-2 only as a decoder")
    hidden_size, num_heads = read.integer(keys, "n_embd", 768), read.integer(keys, "n_head", 12)
    read.multiple(("n_embd", hidden_size), ("n_head", num_heads))
    details = {
        "inner": read.integer(keys, "n_inner", 4 * hidden_size),
        "activation": read.one_of(keys, "activation_function", "gelu_new", tuple(ACTIVATIONS)),
        "norm_eps": read.number(keys, "layer_norm_epsilon", 1e-5),
        "scaled": read.flag(keys, "scale_attn_weights", True),
        "scaled_by_layer": read.flag(keys, "scale_attn_by_inverse_layer_idx", False),
    }
    made = ModelShape(
        "gpt2",
        num_layers=read.integer(keys, "n_layer", 12, read.MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=read.integer(keys, "vocab_size", 50257),
        max_positions=read.integer(keys, "n_positions", 1024),
        tied=read.flag(keys, "tie_word_embeddings", True),
        details=details,
    )
    keys.refuse_others("n_ctx", "attn_pdrop", "reorder_and_upcast_attn", *(f"summary_{name}" for name in SUMMARY))
    return made


def embed_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {"tokens": (shape.vocab_size, shape.hidden_size), "positions": (shape.max_positions, shape.hidden_size)}


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Every layer is the same. Matrices are [out, in]; queries, keys, values lie one after another in `qkv`."""
    size, inner = shape.hidden_size, shape.details["inner"]
    sizes = {"attention_norm": (size,), "qkv": (3 * size, size), "out": (size, size)}
    sizes |= {"mlp_norm": (size,), "up": (inner, size), "down": (size, inner)}
    return {key: value for name, all in sizes.items() for key, value in ((name, all), (f"{name}_bias", all[:1]))}


def head_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    size = shape.hidden_size
    return {"norm": (size,), "norm_bias": (size,), "lm_head": (shape.vocab_size, size)}


_MODULES = {
    "attention_norm": ("ln_1",),
    "qkv": ("attn.c_attn",),
    "out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "up": ("mlp.c_fc",),
    "down": ("mlp.c_proj",),
}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint; the layers' matrices are stored [in, out] there."""
    tokens, norm = "transformer.wte.weight", "transformer.ln_f"
    if block_name == "embed":
        return {"tokens": (tokens,), "positions": ("transformer.wpe.weight",)}
    if block_name == "head":
        lm_head = tokens if shape.tied else "lm_head.weight"
        return {"norm": (f"{norm}.weight",), "norm_bias": (f"{norm}.bias",), "lm_head": (lm_head,)}
    layer = int(block_name.removeprefix("layers/"))
    parameters = layer_parameters(shape, layer)
    names = _sources.of_layer(f"transformer.h.{layer}", parameters, _MODULES)
    return {key: tuple(map(Transposed, names[key])) if len(parameters[key]) == 2 else names[key] for key in names}


def embed(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[T, E] from token ids [T] and positions [T]."""
    return F.embedding(token_ids, parameters["tokens"]).add_(F.embedding(positions, parameters["positions"]))


def positional(shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype) -> None:
    """Nothing: positions are in the embedding."""


def layer(
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: None,
    cache: Cache,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are."""
    details, heads = shape.details, shape.num_heads
    scale = shape.head_dim**-0.5 if details["scaled"] else 1.0
    scale = scale / (index + 1) if details["scaled_by_layer"] else scale
    normed = _norm(shape, parameters, "attention_norm", hidden)
    qkv = linear(normed, parameters["qkv"], parameters["qkv_bias"]).view(len(hidden), 3 * heads, shape.head_dim)
    queries, keys, values = qkv.split(heads, dim=1)
    attended = cache.attend(queries, key=keys, value=values, scale=scale).reshape(len(hidden), shape.hidden_size)
    branch = linear(attended, parameters["out"], parameters["out_bias"])

    hidden, normed = _fused.add_norm(branch, hidden, _how(shape, parameters, "mlp_norm"))
    inner = ACTIVATIONS[details["activation"]](linear(normed, parameters["up"], parameters["up_bias"]))
    return linear(inner, parameters["down"], parameters["down_bias"]).add_(hidden)


def _norm(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    return _fused.norm(hidden, _how(shape, parameters, name))


def _how(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str) -> Norming:
    return Norming(parameters[name], shape.details["norm_eps"], parameters[f"{name}_bias"], centered=True)


def head(shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return linear(_norm(shape, parameters, "norm", hidden), parameters["lm_head"])
