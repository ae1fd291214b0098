"""Llama 1, 2 and 3.x: RMSNorm, rotary positions, grouped queries, SwiGLU; as transformers' modeling_llama has it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("LlamaForCausalLM",)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, {})
    biases, mlp_bias = read.flag(keys, "attention_bias", False), read.flag(keys, "mlp_bias", False)
    made = _decoder.shape("llama", keys, _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=mlp_bias))
    read.only(keys, "rope_interleaved", False, "Noria computes this family only with halves of heads turned together")
    keys.refuse_others("max_sequence_length", "is_llama_config", "sliding_window", *read.OF_WINDOWS)
    return made
