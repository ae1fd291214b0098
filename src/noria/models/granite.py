"""Granite 3: Llama with sums, scores, embeddings and logits scaled; as transformers' modeling_granite computes it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models.granitemoe import MULTIPLIERS, embed, head, layer  # noqa: F401

ARCHITECTURES = ("GraniteForCausalLM",)
DEFAULTS = {"intermediate_size": 11008}  # what a config.json that leaves it out means


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS)
    biases, mlp_bias = (read.flag(keys, key, False) for key in ("attention_bias", "mlp_bias"))
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, mlp_bias=mlp_bias)
    found = _decoder.shape("granite", keys, variant)
    multipliers = {name: read.number(keys, name, 1.0) for name in MULTIPLIERS}
    keys.refuse_others()
    return replace(found, details={**found.details, **multipliers})
