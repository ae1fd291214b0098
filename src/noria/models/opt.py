"""OPT, OPT-IML and Galactica (OPT with settings of its own), as transformers' modeling_opt computes it.

Functions of tensors: nothing of ranks, streams or files.
T tokens, S sampled rows, H heads, D head dim, E hidden, V vocab.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _sources
from noria.models._cache import Cache
from noria.models._linear import ACTIVATIONS, linear

ARCHITECTURES = ("OPTForCausalLM",)
ALIASES = (("model.decoder.", "decoder."),)  # the first published checkpoints
POSITION_OFFSET = 2  # row of the position table that belongs to position 0


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, {})
    hidden_size, num_heads = read.integer(keys, "hidden_size"), read.integer(keys, "num_attention_heads")
    read.multiple(("hidden_size", hidden_size), ("num_attention_heads", num_heads))
    before = read.flag(keys, "do_layer_norm_before", True)
    details = {
        "ffn_dim": read.integer(keys, "ffn_dim"),
        "embed_dim": read.integer(keys, "word_embed_proj_dim", hidden_size),
        "activation": read.one_of(keys, "activation_function", "relu", tuple(ACTIVATIONS)),
        "biases": read.flag(keys, "enable_bias", True),
        "norm_before": before,
        "norm_weights": read.flag(keys, "layer_norm_elementwise_affine", True),
        "final_norm": before and not read.flag(keys, "_remove_final_layer_norm", False),
    }
    made = ModelShape(
        "opt",
        num_layers=read.integer(keys, "num_hidden_layers", most=read.MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=read.integer(keys, "vocab_size"),
        max_positions=read.integer(keys, "max_position_embeddings", 2048),
        tied=read.flag(keys, "tie_word_embeddings", True),
        details=details,
    )
    keys.refuse_others("activation_dropout", "dropout", "init_std", "layerdrop", "_remove_final_layer_norm")
    return made


def _projected(shape: ModelShape) -> bool:
    """Whether the embedding is narrower than the layers (opt-350m), with a matrix on each side of them."""
    return shape.details["embed_dim"] != shape.hidden_size


def embed_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    narrow, size = shape.details["embed_dim"], shape.hidden_size
    parameters = {"tokens": (shape.vocab_size, narrow), "positions": (shape.max_positions + POSITION_OFFSET, size)}
    return parameters | ({"project_in": (size, narrow)} if _projected(shape) else {})


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Every layer is the same. Matrices are [out, in]; queries, keys, values lie one after another in `qkv`."""
    size, inner, details = shape.hidden_size, shape.details["ffn_dim"], shape.details
    matrices = {"qkv": (3 * size, size), "out": (size, size), "up": (inner, size), "down": (size, inner)}
    parameters: dict[str, tuple[int, ...]] = {}
    for name in ("attention_norm", "qkv", "out", "mlp_norm", "up", "down"):
        if name not in matrices and not details["norm_weights"]:
            continue
        parameters[name] = matrices.get(name, (size,))
        if name not in matrices or details["biases"]:
            parameters[f"{name}_bias"] = parameters[name][:1]
    return parameters


def head_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    size, narrow, details = shape.hidden_size, shape.details["embed_dim"], shape.details
    norm = {"norm": (size,), "norm_bias": (size,)} if details["final_norm"] and details["norm_weights"] else {}
    projection = {"project_out": (narrow, size)} if _projected(shape) else {}
    return norm | projection | {"lm_head": (shape.vocab_size, narrow)}


_MODULES = {
    "attention_norm": ("self_attn_layer_norm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "mlp_norm": ("final_layer_norm",),
    "up": ("fc1",),
    "down": ("fc2",),
}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    top = "model.decoder"
    tokens = f"{top}.embed_tokens.weight"
    if block_name == "embed":
        names = {name: f"{top}.{name}.weight" for name in ("embed_positions", "project_in")}
        names = {"tokens": tokens, "positions": names["embed_positions"], "project_in": names["project_in"]}
        return {parameter: (names[parameter],) for parameter in embed_parameters(shape)}
    if block_name == "head":
        names = {f"norm{end}": f"{top}.final_layer_norm.{word}" for end, word in (("", "weight"), ("_bias", "bias"))}
        names |= {"project_out": f"{top}.project_out.weight", "lm_head": tokens if shape.tied else "lm_head.weight"}
        return {parameter: (names[parameter],) for parameter in head_parameters(shape)}
    layer = int(block_name.removeprefix("layers/"))
    return _sources.of_layer(f"{top}.layers.{layer}", layer_parameters(shape, layer), _MODULES)


def embed(
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], token_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """[T, E] from token ids [T] and positions [T]."""
    learned = F.embedding(positions + POSITION_OFFSET, parameters["positions"])
    tokens = F.embedding(token_ids, parameters["tokens"])
    if _projected(shape):
        tokens = linear(tokens, parameters["project_in"])
    return tokens.add_(learned)


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
    """[T, E] after one layer, from hidden states [T, E], which are left as they are.

    A part's norm stands before it, or after its sum with the residual (opt-350m).
    """
    heads, before = shape.num_heads, shape.details["norm_before"]
    normed = _norm(shape, parameters, "attention_norm", hidden) if before else hidden
    qkv = linear(normed, parameters["qkv"], parameters.get("qkv_bias")).view(len(hidden), 3 * heads, shape.head_dim)
    queries, keys, values = qkv.split(heads, dim=1)
    attended = cache.attend(queries, key=keys, value=values).reshape(len(hidden), shape.hidden_size)
    hidden = linear(attended, parameters["out"], parameters.get("out_bias")).add_(hidden)
    hidden = hidden if before else _norm(shape, parameters, "attention_norm", hidden)

    normed = _norm(shape, parameters, "mlp_norm", hidden) if before else hidden
    inner = ACTIVATIONS[shape.details["activation"]](linear(normed, parameters["up"], parameters.get("up_bias")))
    hidden = linear(inner, parameters["down"], parameters.get("down_bias")).add_(hidden)
    return hidden if before else _norm(shape, parameters, "mlp_norm", hidden)


def _norm(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(hidden, (shape.hidden_size,), parameters.get(name), parameters.get(f"{name}_bias"))


def head(shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    if shape.details["final_norm"]:
        hidden = _norm(shape, parameters, "norm", hidden)
    if _projected(shape):
        hidden = linear(hidden, parameters["project_out"])
    return linear(hidden, parameters["lm_head"])
