"""OPT, the sizes with the norm before each part (125m, 1.3b and larger), as transformers' modeling_opt computes it.

Functions of tensors: nothing of ranks, streams or files.
T tokens, S sampled rows, H heads, D head dim, E hidden, V vocab.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from noria.blocks import ModelShape
from noria.config import require
from noria.models import _config as read
from noria.models._linear import linear

ARCHITECTURES = ("OPTForCausalLM",)
ALIASES = (("model.decoder.", "decoder."),)  # the first published checkpoints
POSITION_OFFSET = 2  # row of the position table that belongs to position 0


def shape(config: Mapping) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    read.refuse_quantized(config)
    hidden_size, num_heads = read.integer(config, "hidden_size"), read.integer(config, "num_attention_heads")
    require(
        hidden_size % num_heads == 0,
        f"config.json: hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_heads})",
    )
    read.only(config, "do_layer_norm_before", True, "OPT with the norm after each part (opt-350m) is not supported")
    read.only(
        config,
        "word_embed_proj_dim",
        hidden_size,
        f"OPT with projected embeddings (opt-350m; hidden_size is {hidden_size}) is not supported",
    )
    read.only(config, "_remove_final_layer_norm", False, "OPT without the final layer norm is not supported")
    read.only(config, "layer_norm_elementwise_affine", True, "OPT without weights of its layer norms is not supported")
    read.only(config, "activation_function", "relu", "Noria computes OPT with relu alone")
    details = {"ffn_dim": read.integer(config, "ffn_dim"), "enable_bias": read.flag(config, "enable_bias", True)}
    return ModelShape(
        "opt",
        num_layers=read.integer(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=read.integer(config, "vocab_size"),
        max_positions=read.integer(config, "max_position_embeddings", 2048),
        tied=read.flag(config, "tie_word_embeddings", True),
        details=details,
    )


def embed_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    positions = shape.max_positions + POSITION_OFFSET
    return {"tokens": (shape.vocab_size, shape.hidden_size), "positions": (positions, shape.hidden_size)}


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Every layer is the same. Matrices are [out, in]; queries, keys, values lie one after another in `qkv`."""
    size, inner = shape.hidden_size, shape.details["ffn_dim"]
    parameters = {
        "attention_norm": (size,),
        "attention_norm_bias": (size,),
        "qkv": (3 * size, size),
        "qkv_bias": (3 * size,),
        "out": (size, size),
        "out_bias": (size,),
        "mlp_norm": (size,),
        "mlp_norm_bias": (size,),
        "up": (inner, size),
        "up_bias": (inner,),
        "down": (size, inner),
        "down_bias": (size,),
    }
    if not shape.details["enable_bias"]:
        for name in ("qkv", "out", "up", "down"):
            del parameters[f"{name}_bias"]
    return parameters


def head_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    size = shape.hidden_size
    return {"norm": (size,), "norm_bias": (size,), "lm_head": (shape.vocab_size, size)}


_LAYER_SOURCES = {
    "attention_norm": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "mlp_norm": ("final_layer_norm",),
    "up": ("fc1",),
    "down": ("fc2",),
}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    tokens, norm = "model.decoder.embed_tokens.weight", "model.decoder.final_layer_norm"
    if block_name == "embed":
        return {"tokens": (tokens,), "positions": ("model.decoder.embed_positions.weight",)}
    if block_name == "head":
        lm_head = tokens if shape.tied else "lm_head.weight"
        return {"norm": (f"{norm}.weight",), "norm_bias": (f"{norm}.bias",), "lm_head": (lm_head,)}
    layer, names = int(block_name.removeprefix("layers/")), {}
    for parameter in layer_parameters(shape, layer):
        ending = "bias" if parameter.endswith("_bias") else "weight"
        modules = _LAYER_SOURCES[parameter.removesuffix("_bias")]
        names[parameter] = tuple(f"model.decoder.layers.{layer}.{module}.{ending}" for module in modules)
    return names


def embed(shape: ModelShape, parameters: Mapping, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[T, E] from token ids [T] and positions [T]."""
    learned = F.embedding(positions + POSITION_OFFSET, parameters["positions"])
    return F.embedding(token_ids, parameters["tokens"]).add_(learned)


def positional(shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype) -> None:
    """Nothing: positions are in the embedding."""


def layer(
    shape: ModelShape, parameters: Mapping, hidden: torch.Tensor, positional: None, attend: Callable
) -> torch.Tensor:
    """[T, E] after one layer, from hidden states [T, E], which are left as they are."""
    heads, size = shape.num_heads, shape.hidden_size
    normed = F.layer_norm(hidden, (size,), parameters["attention_norm"], parameters["attention_norm_bias"])
    qkv = linear(normed, parameters["qkv"], parameters.get("qkv_bias")).view(len(hidden), 3 * heads, shape.head_dim)
    attended = attend(*qkv.split(heads, dim=1)).reshape(len(hidden), size)
    hidden = linear(attended, parameters["out"], parameters.get("out_bias")).add_(hidden)

    normed = F.layer_norm(hidden, (size,), parameters["mlp_norm"], parameters["mlp_norm_bias"])
    inner = linear(normed, parameters["up"], parameters.get("up_bias")).relu_()
    return linear(inner, parameters["down"], parameters.get("down_bias")).add_(hidden)


def head(shape: ModelShape, parameters: Mapping, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    normed = F.layer_norm(hidden, (shape.hidden_size,), parameters["norm"], parameters["norm_bias"])
    return linear(normed, parameters["lm_head"])
