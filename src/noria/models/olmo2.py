"""OLMo 2: norms behind attention and feed-forward, and over all heads; as transformers' modeling_olmo2 computes it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general, _heads
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Olmo2ForCausalLM",)
DEFAULTS = {"intermediate_size": 11008, "rms_norm_eps": 1e-5}  # what a config.json that leaves them out means
MODULES = _decoder.MODULES | {
    "after_attention_norm": ("post_attention_layernorm",),
    "after_mlp_norm": ("post_feedforward_layernorm",),
}
sources = partial(_general.sources, places=_general.Places(MODULES))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    biases = read.flag(keys, "attention_bias", False)
    found = _decoder.shape("olmo2", keys, _decoder.Variant(qkv_bias=biases, out_bias=biases))
    keys.refuse_others()
    return with_norms(found)


def with_norms(found: ModelShape) -> ModelShape:
    """The shape with a norm behind each half, and norms over the numbers of all heads."""
    size = found.head_dim
    across = {"query_norm": (found.num_heads * size,), "key_norm": (found.num_kv_heads * size,)}
    return _general.described(found, "after_attention_norm", "after_mlp_norm", norms=across)


layer = partial(_general.layer, halves=_general.Halves(_heads.attend_across))
