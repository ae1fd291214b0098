"""NVIDIA's ModelOpt: NVFP4 (`weight` uint8, `weight_scale` e4m3 for 16 inputs, `weight_scale_2` float32) and FP8 (`weight` e4m3,
`weight_scale` one a tensor, one an output, or by blocks of 128 x 128), each layer by itself. Experts in one tensor NAME (Llama 4)
have NAME_weight_scale, one or one an expert.

Its torch/export/quant_utils.py and quantization/qtensor/nvfp4_tensor.py. Said by hf_quant_config.json, or by config.json.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.checkpoint.published import _floats
from noria.checkpoint.published._tensors import PLAIN, Published, Tensors, cache_of
from noria.errors import InputError, require
from noria.models._config import shown

METHODS = ("modelopt", "modelopt_fp4")
ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "NVFP4",
    "W4A16_NVFP4",
    "W4A8_NVFP4_FP8",
    "MIXED_PRECISION",
)
BLOCK = 128  # outputs and inputs that share a scale in FP8_PB_WO
NVFP4 = "NVFP4"


class ModelOpt:
    """The matrices of a directory of ModelOpt."""

    ASIDE = ("input_scale", "k_scale", "v_scale", "k_bias", "v_bias")

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors
        said = settings.get("quantization", settings)
        require(isinstance(said, dict), f"quantization is {shown(said)}: it must be an object")
        algorithm = said.get("quant_algo")
        layers = said.get("quantized_layers") or {}
        require(isinstance(layers, dict), f"quantized_layers is {shown(layers)}: it must be an object")
        own = [its.get("quant_algo") for its in layers.values() if isinstance(its, dict)]
        for one in [algorithm, *own]:
            require(one in ALGORITHMS, f"quant_algo is {shown(one)}: Noria reads {', '.join(ALGORITHMS)}")
        size = said.get("group_size")
        known = NVFP4 not in algorithm or size in (None, _floats.NVFP4_GROUP)
        require(known, f"group_size is {shown(size)}: NVFP4 has groups of {_floats.NVFP4_GROUP}")
        self.words, self.cache = f"modelopt ({algorithm})", cache_of(said)
        self.activations = "" if algorithm in ("W4A16_NVFP4", "FP8_PB_WO") else "by its input_scale"

    def matrix(self, module: str, number: int | None = None) -> Published | None:
        """NVFP4 or FP8, as the module's tensors are."""
        if number is not None:
            return self._of_many(module, number)
        weight = self._tensors.named(f"{module}.weight")
        if weight is None or weight.dtype in PLAIN:
            return None
        scale = self._tensors.need(weight, f"{module}.weight_scale")
        if weight.dtype == "uint8":
            whole = self._tensors.need(weight, f"{module}.weight_scale_2")
            return _floats.nvfp4(module, weight, scale, whole, divides=False)
        if weight.dtype == "float8_e4m3fn":
            outputs = weight.shape[:1]
            if len(scale.shape) == 4 and scale.shape[1::2] == (1, 1):  # blocks as [rows, 1, columns, 1]
                scale = replace(scale, shape=scale.shape[::2])
            block = None if scale.shape in ((), (1,), outputs, (*outputs, 1)) else (BLOCK, BLOCK)
            return _floats.fp8(module, weight, scale, block, exponents=False)
        raise InputError(
            f"{weight.shard}: {weight.name!r} is {weight.dtype!r}, {self.words} has uint8 and float8_e4m3fn"
        )

    def _of_many(self, module: str, number: int) -> Published | None:
        """Matrix `number` of a tensor of many: FP8 with one scale a matrix, or one for all."""
        weight = self._tensors.named(module)
        if weight is None or weight.dtype in PLAIN:
            return None
        require(
            weight.dtype == "float8_e4m3fn",
            f"{weight.shard}: {weight.name!r} is {weight.dtype!r}: of experts in one tensor Noria reads FP8: take the"
            " unquantized model",
        )
        scale = self._tensors.need(weight, f"{module}_weight_scale")
        return _floats.fp8_of_many(module, weight, scale, number)


FORMAT = ModelOpt
