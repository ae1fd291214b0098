"""GPT-NeoX and Pythia: LayerNorms, halves in parallel, heads turned in part; as transformers' modeling_gpt_neox."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _general
from noria.models._general import *  # noqa: F403 - all that a family has beside its shape
from noria.models._general import layer_norm_head as head  # type: ignore[assignment]  # noqa: F401

ARCHITECTURES = ("GPTNeoXForCausalLM",)
ALIASES = (("gpt_neox.", ""), ("embed_out.", "lm_head."))  # type: ignore[assignment]  # of published checkpoints
LEFT_OUT = (".attention.bias",)  # causal masks
# What a config.json that leaves them out means.
DEFAULTS = {"intermediate_size": 24576, "hidden_act": "gelu", "partial_rotary_factor": 0.25}
SYNONYMS = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
WITHOUT_EFFECT = ("classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "custom_pipelines")
MODULES = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("attention.query_key_value",),
    "out": ("attention.dense",),
    "mlp_norm": ("post_attention_layernorm",),
    "up": ("mlp.dense_h_to_4h",),
    "down": ("mlp.dense_4h_to_h",),
}
PLACES = _general.Places(MODULES, "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "embed_out")
sources = partial(_general.sources, places=PLACES)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    biases, parallel = read.flag(keys, "attention_bias", True), read.flag(keys, "use_parallel_residual", True)
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=True, partly_rotated=True)
    found = _general.with_layer_norms("gpt_neox", keys.having(num_key_value_heads=None), variant, "layer_norm_eps")
    keys.refuse_others(*WITHOUT_EFFECT)
    norms = "attention_norm", "mlp_norm"
    return _general.described(found, *norms, norm_biases=True, gated=False, parallel=parallel)


layer = partial(_general.layer, halves=_general.Halves(_general.attend_groups, _general.mlp, _general.layer_norm))
