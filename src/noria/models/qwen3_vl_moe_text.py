"""Qwen3-VL-MoE (text): Qwen3-MoE whose weights are always normalized; as transformers' modeling_qwen3_vl_moe computes it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _sources, qwen3_moe
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Qwen3VLMoeForConditionalGeneration",)
ALIASES = _decoder.ALIASES + _sources.IN_WRAPPERS  # type: ignore[assignment]  # of text with images
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}
EXPERTS = partial(_experts.sources_in_one, "mlp.experts.gate_up_proj", "mlp.experts.down_proj", True)
APART = partial(_experts.sources, "mlp.experts", "gate_proj", "up_proj", "down_proj")


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, qwen3_moe.SYNONYMS)
    for key, value in (("norm_topk_prob", True), ("use_sliding_window", False)):
        read.only(keys, key, value, f"Noria computes this family only with {value}")
    return qwen3_moe.shape_of("qwen3_vl_moe_text", keys, normalized=True, fused=True)


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, experts=EXPERTS)


def sources_apart(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:
    """The same in a directory where each expert has tensors of its own."""
    return _decoder.sources(shape, block_name, experts=APART)
