"""Llama 1, 2 and 3: RMSNorm, rotary positions, grouped queries, SwiGLU; as transformers' modeling_llama computes it.

Functions of tensors: nothing of ranks, streams or files. A layer's RMSNorms compute in float32 for half precisions.
T tokens, S sampled rows, H heads, Hkv key/value heads, D head dim, E hidden, I intermediate, V vocab.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F

from noria.blocks import ModelShape
from noria.config import InputError, require
from noria.models import _config as read
from noria.models._linear import linear

ARCHITECTURES = ("LlamaForCausalLM",)
ALIASES = (("model.", ""),)  # a checkpoint saved from the bare LlamaModel
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


def shape(config: Mapping) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute.

    `rope_scaling` and its successor `rope_parameters` are both understood. The type `dynamic` changes nothing up to
    max_position_embeddings, which is where Noria ends a sequence, so it is computed as `default`.
    """
    read.refuse_quantized(config)
    read.only(config, "hidden_act", "silu", "Noria computes Llama with silu alone")
    hidden_size, num_heads = read.integer(config, "hidden_size"), read.integer(config, "num_attention_heads")
    num_kv_heads = read.integer(config, "num_key_value_heads", num_heads)
    require(
        num_heads % num_kv_heads == 0,
        f"config.json: num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads})",
    )
    if config.get("head_dim") is None:
        require(
            hidden_size % num_heads == 0,
            f"config.json: hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_heads})",
        )
    head_dim = read.integer(config, "head_dim", hidden_size // num_heads)
    require(head_dim % 2 == 0, f"config.json: head_dim is {head_dim}: rotary positions need an even number")
    theta, scaling = _rope(config)
    details = {
        "intermediate_size": read.integer(config, "intermediate_size"),
        "norm_eps": read.number(config, "rms_norm_eps", 1e-6),
        "attention_bias": read.flag(config, "attention_bias", False),
        "mlp_bias": read.flag(config, "mlp_bias", False),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }
    return ModelShape(
        "llama",
        num_layers=read.integer(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=read.integer(config, "vocab_size"),
        max_positions=read.integer(config, "max_position_embeddings", 2048),
        tied=read.flag(config, "tie_word_embeddings", False),
        details=details,
    )


def _rope(config: Mapping) -> tuple[float, tuple]:
    """Theta, and the scaling as a tuple: () for none, ("linear", factor), or ("llama3", factor, low, high, context)."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    require(isinstance(parameters, Mapping), f"config.json: rope_scaling is {parameters!r}: it must be an object")
    theta = read.number(parameters, "rope_theta", read.number(config, "rope_theta", 10000.0))
    for place in (config, parameters):
        read.only(place, "partial_rotary_factor", 1.0, "Noria computes Llama with all of each head rotated")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("default", "dynamic"):
        return theta, ()
    if kind == "linear":
        return theta, ("linear", read.number(parameters, "factor"))
    if kind == "llama3":
        context = config.get("max_position_embeddings") or 2048
        for place in (parameters, config):
            context = read.integer(place, "original_max_position_embeddings", context)
        factors = [read.number(parameters, key) for key in ("factor", "low_freq_factor", "high_freq_factor")]
        require(
            factors[1] < factors[2],
            f"config.json: low_freq_factor ({factors[1]}) must be below high_freq_factor ({factors[2]})",
        )
        return theta, ("llama3", *factors, float(context))
    raise InputError(f"config.json: rope type {kind!r} is not in this version of Noria; known: {', '.join(ROPE_TYPES)}")


def embed_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {"tokens": (shape.vocab_size, shape.hidden_size)}


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Every layer is the same. Matrices are [out, in]; queries, keys, values lie one after another in `qkv`."""
    hidden, inner = shape.hidden_size, shape.details["intermediate_size"]
    qkv, heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, shape.num_heads * shape.head_dim
    matrices = {"qkv": (qkv, hidden), "out": (hidden, heads), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    parameters: dict[str, tuple[int, ...]] = {}
    for part, names in (("attention", ("qkv", "out")), ("mlp", ("gate_up", "down"))):
        parameters[f"{part}_norm"] = (hidden,)
        for name in names:
            parameters[name] = matrices[name]
            if shape.details[f"{part}_bias"]:
                parameters[f"{name}_bias"] = matrices[name][:1]
    return parameters


def head_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {"norm": (shape.hidden_size,), "lm_head": (shape.vocab_size, shape.hidden_size)}


_LAYER_SOURCES = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    tokens = "model.embed_tokens.weight"
    if block_name == "embed":
        return {"tokens": (tokens,)}
    if block_name == "head":
        return {"norm": ("model.norm.weight",), "lm_head": (tokens if shape.tied else "lm_head.weight",)}
    layer, names = int(block_name.removeprefix("layers/")), {}
    for parameter in layer_parameters(shape, layer):
        ending = "bias" if parameter.endswith("_bias") else "weight"
        modules = _LAYER_SOURCES[parameter.removesuffix("_bias")]
        names[parameter] = tuple(f"model.layers.{layer}.{module}.{ending}" for module in modules)
    return names


def embed(shape: ModelShape, parameters: Mapping, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[T, E] from token ids [T]; positions are the layers' business."""
    return F.embedding(token_ids, parameters["tokens"])


def positional(shape: ModelShape, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary cosines [T, 1, D] and sines [T, 1, D/2] of positions [T], in `dtype`.

    Angles are computed in float32 as transformers does, whatever the half precision; in float64 they are float64, where
    transformers keeps float32: at position p the angle differs by up to p * 6e-8. Source: RoFormer, arXiv 2104.09864.
    """
    table = torch.float64 if dtype == torch.float64 else torch.float32
    details = shape.details
    frequencies = _frequencies(details["rope_theta"], shape.head_dim, details["rope_scaling"], table, positions.device)
    angles = positions[:, None].to(table) * frequencies
    cosines, sines = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    return torch.cat((cosines, cosines), dim=-1), sines


@lru_cache(maxsize=16)
def _frequencies(theta: float, head_dim: int, scaling: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[D/2] radians per position. llama3: long wavelengths slowed by `factor`, a smooth ramp between (Llama 3.1)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(dtype) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling and scaling[0] == "linear":
        frequencies = frequencies / scaling[1]
    elif scaling:
        _, factor, low, high, context = scaling
        wavelengths = 2 * math.pi / frequencies
        ramp = (context / wavelengths - low) / (high - low)
        smooth = (1 - ramp) * frequencies / factor + ramp * frequencies
        slowed = torch.where(wavelengths > context / low, frequencies / factor, smooth)
        frequencies = torch.where(wavelengths < context / high, frequencies, slowed)
    return frequencies.to(device)


def layer(
    shape: ModelShape, parameters: Mapping, hidden: torch.Tensor, positional: tuple, attend: Callable
) -> torch.Tensor:
    """[T, E] after one layer, from hidden states [T, E], which are left as they are."""
    heads, kv_heads, size, eps = shape.num_heads, shape.num_kv_heads, shape.hidden_size, shape.details["norm_eps"]
    normed = F.rms_norm(hidden, (size,), parameters["attention_norm"], eps)
    qkv = linear(normed, parameters["qkv"], parameters.get("qkv_bias"))
    qkv = qkv.view(len(hidden), heads + 2 * kv_heads, shape.head_dim)
    rotated = _rotate(qkv[:, : heads + kv_heads], *positional)
    attended = attend(rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :])
    attended = attended.reshape(len(hidden), heads * shape.head_dim)
    hidden = linear(attended, parameters["out"], parameters.get("out_bias")).add_(hidden)

    normed = F.rms_norm(hidden, (size,), parameters["mlp_norm"], eps)
    gate, up = linear(normed, parameters["gate_up"], parameters.get("gate_up_bias")).chunk(2, dim=-1)
    return linear(F.silu(gate).mul_(up), parameters["down"], parameters.get("down_bias")).add_(hidden)


def _rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Heads [T, N, D] turned by their positions: the first half of D pairs with the second, as in transformers."""
    half = heads.shape[-1] // 2
    rotated = heads * cosines
    rotated[..., :half].addcmul_(heads[..., half:], sines, value=-1)
    rotated[..., half:].addcmul_(heads[..., :half], sines)
    return rotated


def head(shape: ModelShape, parameters: Mapping, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    normed = F.rms_norm(hidden, (shape.hidden_size,), parameters["norm"], shape.details["norm_eps"])
    return linear(normed, parameters["lm_head"])
