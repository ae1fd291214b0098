"""Phi-3.5-MoE: LayerNorms, biases, two experts by SparseMixer, longrope; as transformers' modeling_phimoe computes it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _fused, _heads, _routing
from noria.models._cache import Cache
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models._fused import Norming
from noria.models._linear import linear
from noria.models.mixtral import EXPERTS, MODULES
from noria.pieces import Wanted

ARCHITECTURES = ("PhimoeForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "intermediate_size": 6400,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}
SYNONYMS = {"num_experts": "num_local_experts"}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(_with_scale(config), DEFAULTS, SYNONYMS)
    number, chosen = _routing.counts(keys, "num_local_experts")
    require(chosen == 2, f"config.json: num_experts_per_tok is {chosen}: Noria computes this family only with 2")
    layers, inner = range(_decoder.num_layers(keys)), read.integer(keys, "intermediate_size")
    biases = read.flag(keys, "attention_bias", False)
    variant = _decoder.Variant(
        qkv_bias=biases,
        out_bias=biases,
        window=_decoder.window_of(keys, layers),
        experts=Experts(number, inner, layers, _routing.Routing(chosen)),
    )
    found = _decoder.shape("phimoe", keys, variant)
    more = {
        "tolerance": read.number(keys, "router_jitter_noise", 0.01),
        "head_bias": read.flag(keys, "lm_head_bias", False),
    }
    keys.refuse_others("input_jitter_noise", "original_max_position_embeddings")
    return replace(found, details={**found.details, **more})


def _with_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    """longrope scales cosines and sines by `short_mscale` up to the context of the first training, where Noria ends."""
    config = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key)
        if isinstance(parameters, Mapping) and parameters.get("short_mscale") is not None:
            config[key] = {**parameters, "attention_factor": read.number(parameters, "short_mscale")}
    return config


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's, and biases of the norms behind."""
    norms = {f"{name}_bias": (shape.hidden_size,) for name in ("attention_norm", "mlp_norm")}
    return _decoder.layer_parameters(shape, layer) | norms


def head_parameters(shape: ModelShape) -> dict[str, tuple[int, ...]]:  # type: ignore[no-redef]  # its own
    biases = {"norm_bias": (shape.hidden_size,)} | (
        {"lm_head_bias": (shape.vocab_size,)} if shape.details["head_bias"] else {}
    )
    return _decoder.head_parameters(shape) | biases


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    names = _decoder.sources(shape, block_name, MODULES, EXPERTS, layer_parameters)
    if block_name == "head":
        names |= {"norm_bias": ("model.norm.bias",), "lm_head_bias": ("lm_head.bias",)}
        return {name: names[name] for name in head_parameters(shape)}
    return names


def layer(  # type: ignore[no-redef]  # its own
    shape: ModelShape,
    index: int,
    parameters: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    positional: tuple[torch.Tensor, torch.Tensor],
    cache: Cache,
) -> torch.Tensor:
    """[T, E] after layer `index`, from hidden states [T, E], which are left as they are."""
    normed = _norm(shape, parameters, "attention_norm", hidden)
    attended = _decoder.attend(shape, index, parameters, normed, positional, cache)
    how = _how(shape, parameters, "mlp_norm")
    hidden, normed = _fused.add_norm(_heads.project_out(parameters, attended), hidden, how)
    scores = _routing.scores_of(normed, parameters["router"])
    chosen, weights = _routing.sparse_mixer(scores, shape.details["tolerance"])
    experts = parameters["experts.gate_up"], parameters["experts.down"]
    return _experts.mixture(normed, chosen, weights, *experts).add_(hidden)


def _norm(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    return _fused.norm(hidden, _how(shape, parameters, name))


def _how(shape: ModelShape, parameters: Mapping[str, torch.Tensor], name: str) -> Norming:
    return Norming(parameters[name], shape.details["norm_eps"], parameters[f"{name}_bias"], centered=True)


def head(  # type: ignore[no-redef]  # its own
    shape: ModelShape, parameters: Mapping[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, E]."""
    return linear(_norm(shape, parameters, "norm", hidden), parameters["lm_head"], parameters.get("lm_head_bias"))
