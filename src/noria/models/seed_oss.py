"""Seed-OSS: Llama with biases of queries, keys and values; as transformers' modeling_seed_oss computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("SeedOssForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 27648,
    "max_position_embeddings": 524288,
}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    variant = _decoder.Variant(
        qkv_bias=read.flag(keys, "attention_bias", True),
        out_bias=read.flag(keys, "attention_out_bias", False),
        mlp_bias=read.flag(keys, "mlp_bias", False),
    )
    found = _decoder.shape("seed_oss", keys, variant)
    keys.refuse_others("residual_dropout")
    return found
