"""Qwen3: Qwen2 with a norm of each head in place of biases; as transformers' modeling_qwen3 computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _sources, qwen2
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Qwen3ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    config = read.keys_of(config, DEFAULTS)
    biases = read.flag(config, "attention_bias", False)
    window = qwen2.window(config)
    made = _decoder.shape(
        "qwen3", config, _decoder.Variant(qkv_bias=biases, out_bias=biases, head_norms=True, window=window)
    )
    config.refuse_others("sliding_window", *read.OF_WINDOWS)
    return made
