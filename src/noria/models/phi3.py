"""Phi-3 and Phi-4-mini: Llama with fused matrices and heads rotated in part; as transformers' modeling_phi3 has it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("Phi3ForCausalLM",)
DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}  # what a config.json that leaves them out means
MODULES = _decoder.MODULES | {"qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)}


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(_with_longrope(dict(config)), DEFAULTS)
    window = _decoder.window_of(keys, range(_decoder.num_layers(keys)))
    made = _decoder.shape("phi3", keys, _decoder.Variant(window=window, partly_rotated=True))
    only = {
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    }
    for key, value in only.items():
        read.only(keys, key, value, f"Noria computes this family only with {value}")
    keys.refuse_others(*read.OF_WINDOWS, "original_max_position_embeddings")  # which some ropes have of their own
    return made


def _with_longrope(config: dict[str, Any]) -> dict[str, Any]:
    """What Phi-3 calls `su` or `yarn` is longrope."""
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key)
        if isinstance(parameters, Mapping):
            kind = parameters.get("rope_type") or parameters.get("type")
            parameters = dict(parameters, rope_type="longrope") if kind in ("su", "yarn") else parameters
            config[key] = parameters
    return config


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES)
