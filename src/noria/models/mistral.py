"""Mistral: Llama with grouped queries and a sliding window; as transformers' modeling_mistral computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _sources
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("MistralForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means; a window of null is none.
DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    window = _decoder.window_of(keys, range(_decoder.num_layers(keys)))
    made = _decoder.shape("mistral", keys, _decoder.Variant(window=window))
    keys.refuse_others(*read.OF_WINDOWS)
    return made
