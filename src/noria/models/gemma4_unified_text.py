"""Gemma 4 12B (text): Gemma 4 without inputs of layers; as transformers' modeling_gemma4_unified computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import gemma4_text
from noria.models.gemma4_text import (  # noqa: F401 - all that a family has beside its shape
    ALIASES,
    embed,
    embed_parameters,
    head,
    head_parameters,
    layer,
    layer_parameters,
    positional,
    sources,
)

ARCHITECTURES = ("Gemma4UnifiedForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = gemma4_text.DEFAULTS | {
    "hidden_size_per_layer_input": 0,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    for key, value in (("hidden_size_per_layer_input", 0), ("enable_moe_block", False)):
        read.only(keys, key, value, f"Noria computes this family only with {value!r}")
    return gemma4_text.shape_of("gemma4_unified_text", keys)
