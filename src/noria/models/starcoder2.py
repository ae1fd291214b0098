"""StarCoder2: LayerNorms, biases, a feed-forward without a gate; as transformers' modeling_starcoder2 computes it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import layer_norm_head as head  # type: ignore[assignment]  # noqa: F401

ARCHITECTURES = ("Starcoder2ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 2,
    "intermediate_size": 12288,
    "max_position_embeddings": 4096,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
# What published config.json files say beside, and the value that means this family.
FIXED = {"mlp_type": "default", "norm_type": "layer_norm", "scale_attn_weights": True}
WITHOUT_EFFECT = (
    "residual_dropout",
    "embedding_dropout",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "activation_function",
)
MODULES = _decoder.MODULES | {"up": ("mlp.c_fc",), "down": ("mlp.c_proj",)}
sources = partial(_general.sources, places=_general.Places(MODULES))


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, {"layer_norm_epsilon": "norm_epsilon"})
    read.fixed(keys, FIXED)
    biases, window = read.flag(keys, "use_bias", True), _decoder.window_of(keys, range(_decoder.num_layers(keys)))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=biases, window=window)
    found = _general.with_layer_norms("starcoder2", keys, variant, "norm_epsilon")
    keys.refuse_others(*WITHOUT_EFFECT)
    return _general.described(found, "attention_norm", "mlp_norm", norm_biases=True, gated=False)


HALVES = _general.Halves(feed_forward=_general.mlp, norm=_general.layer_norm)
layer = partial(_general.layer, halves=HALVES)
