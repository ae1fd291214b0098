"""Mixtral: Mistral with a mixture of experts in every layer; as transformers' modeling_mixtral computes it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _routing
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts

ARCHITECTURES = ("MixtralForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MODULES = _decoder.MODULES | {"router": ("block_sparse_moe.gate",)}
EXPERTS = partial(_experts.sources, "block_sparse_moe.experts", "w1", "w3", "w2")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    config = read.keys_of(config, DEFAULTS)
    layers = range(_decoder.num_layers(config))
    number, chosen = _routing.counts(config, "num_local_experts")
    routing = _routing.Routing(chosen, before="softmax", normalized=True)
    experts = Experts(number, read.integer(config, "intermediate_size"), layers, routing)
    made = _decoder.shape(
        "mixtral", config, _decoder.Variant(window=_decoder.window_of(config, layers), experts=experts)
    )
    config.refuse_others("router_jitter_noise", *read.OF_WINDOWS)
    return made


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, EXPERTS)
