"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values; as transformers' modeling_qwen2 computes it."""

from collections.abc import Collection, Mapping
from typing import Any

from noria.errors import require
from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _sources
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Qwen2ForCausalLM",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    made = _decoder.shape("qwen2", keys, _decoder.Variant(qkv_bias=True, window=window(keys)))
    read.only(keys, "use_mrope", False, "Noria computes the text of this family, whose positions are one number")
    keys.refuse_others("sliding_window", *read.OF_WINDOWS)  # read where use_sliding_window asks for them
    return made


def window(config: Mapping[str, Any]) -> tuple[int, Collection[int]] | None:
    """The sliding window of the layers from `max_window_layers` on, or of those that `layer_types` says.

    Only if `use_sliding_window` asks for it. Other families of transformers do not read `layer_types`.
    """
    if not read.flag(config, "use_sliding_window", False):
        return None
    num_layers, types = _decoder.num_layers(config), config.get("layer_types")
    first = read.whole(config, "max_window_layers", 28)
    if types is None:
        return _decoder.window_of(config, range(first, num_layers))
    known = isinstance(types, list) and all(kind in ("full_attention", "sliding_attention") for kind in types)
    right = known and len(types) == num_layers
    require(right, f"config.json: layer_types must be {num_layers} times full_ or sliding_attention")
    return _decoder.window_of(config, frozenset(n for n, kind in enumerate(types) if kind == "sliding_attention"))
