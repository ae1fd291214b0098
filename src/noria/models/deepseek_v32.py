"""DeepSeek-V3.2 up to 2,048 tokens, where its indexer selects every key; as transformers' modeling_deepseek_v32 computes it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _indexed, deepseek_v3
from noria.models._indexed import LEFT_OUT  # noqa: F401
from noria.models._latent import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("DeepseekV32ForCausalLM",)
DEFAULTS = deepseek_v3.DEFAULTS | {"max_position_embeddings": 163840}  # what a config.json that leaves them out means


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    return _indexed.shape("deepseek_v32", config, DEFAULTS)
