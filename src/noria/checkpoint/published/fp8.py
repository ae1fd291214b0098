"""FP8 as DeepSeek publishes it: e4m3 codes with a scale a block of outputs and inputs, or one a tensor or an output.

transformers' quantizer_finegrained_fp8.py and its integration; DeepSeek-V3's fp8_cast_bf16.py; vLLM's fp8.py for `weight_scale`
and quant_method fbgemm_fp8. A number is its code times `weight_scale_inv`, whatever its name says. Experts may be FP4
(expert_dtype fp4, DeepSeek V4): two e2m1 codes a byte, the lower four bits first, an e8m0 scale for 32 inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.checkpoint.published._tensors import (
    PLAIN,
    Published,
    Tensors,
    activations_of,
    as_float32,
    cache_of,
    hold,
    matrix_shape,
)
from noria.checkpoint.tensor_files import Reader, Tensor
from noria.encodings import Fields
from noria.errors import InputError, require
from noria.models._config import shown

METHODS = ("fp8", "fbgemm_fp8")
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
E4M3 = (None, "e4m3", "float8_e4m3fn", "float8_e4m3")
GROUP = 32  # inputs that share a scale in FP4
MAX_BLOCK = 1 << 16


class Fp8:
    """The matrices of a directory in FP8."""

    ASIDE = ("input_scale", "activation_scale", "act_scale", "qscale_act", "input_scale_ub", "k_scale", "v_scale")

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors
        fmt = settings.get("fmt")
        require(fmt in E4M3, f"fmt is {shown(fmt)}: Noria reads e4m3")
        self._block = _block(settings.get("weight_block_size"))
        self._bytes = settings.get("scale_fmt") == "ue8m0"  # scales of dtype uint8 are exponents then
        self._fp4 = settings.get("expert_dtype") == "fp4"
        require(
            settings.get("expert_dtype") in (None, "fp8", "fp4"),
            f"expert_dtype is {shown(settings.get('expert_dtype'))}: Noria reads fp8 and fp4",
        )
        self.activations, self.cache = activations_of(settings), cache_of(settings)
        self.words = "fp8" + (f" in blocks of {self._block[0]} x {self._block[1]}" if self._block else "")

    def matrix(self, module: str) -> Published | None:
        """e4m3 codes with their scales; of experts in FP4 e2m1 codes."""
        weight = self._tensors.get(module, "weight")
        if weight is None or weight.dtype in PLAIN:
            return None
        if weight.dtype == "float8_e4m3fn":
            return self._fp8(module, weight)
        if weight.dtype in ("int8", "uint8") and self._fp4:
            return self._packed(module, weight)
        raise InputError(f"{weight.shard}: {weight.name!r} is {weight.dtype!r}, {self.words} has float8_e4m3fn")

    def _fp8(self, module: str, weight: Tensor) -> Published:
        shape = matrix_shape(weight)
        scale = self._tensors.need(weight, module, *SCALES)
        require(
            scale.dtype in SCALE_DTYPES and (scale.dtype != "uint8" or self._bytes),
            f"{scale.shard}: {scale.name!r} is {scale.dtype!r}: scales are float32, bfloat16, float16 or e8m0",
        )
        exponents = scale.dtype in ("float8_e8m0fnu", "uint8")
        settings: dict[str, Any] = {"scale_dtype": "e8m0" if exponents else "float32"}
        encoding = "fp8_channel"
        if self._block:
            encoding, grid = "fp8_block", tuple(-(-size // its) for size, its in zip(shape, self._block, strict=True))
            settings["block_size"] = list(self._block)
            hold(scale, SCALE_DTYPES, grid, f"one for {self._block[0]} x {self._block[1]} of {list(shape)}")
        else:
            right = scale.shape in ((), (1,), (1, 1), (shape[0],), (shape[0], 1))
            require(right, f"{scale.shard}: {scale.name!r} is {list(scale.shape)}: one scale or {shape[0]} are needed")

        def fields(reader: Reader) -> Fields:
            scales = reader.whole(scale)
            scales = scales if exponents else as_float32(scales)
            if encoding == "fp8_channel":
                scales = scales.reshape(-1, 1).expand(shape[0], 1)
            return {"codes": reader.whole(weight), "scales": scales}

        return Published(module, encoding, settings, shape, (weight, scale), fields)

    def _packed(self, module: str, weight: Tensor) -> Published:
        rows, half = matrix_shape(weight)
        scale = self._tensors.need(weight, module, *SCALES)
        require(2 * half % GROUP == 0, f"{weight.shard}: {weight.name!r} has {2 * half} inputs, no multiple of {GROUP}")
        hold(scale, ("float8_e8m0fnu", "uint8"), (rows, 2 * half // GROUP), f"one for {GROUP} inputs")

        def fields(reader: Reader) -> Fields:
            return {"codes": reader.whole(weight).view(torch.uint8), "scales": reader.whole(scale)}

        return Published(module, "mxfp4", {}, (rows, 2 * half), (weight, scale), fields)


FORMAT = Fp8


def _block(said: Any) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale; None: one a tensor, or one an output."""
    if said is None:
        return None
    whole = (
        isinstance(said, list) and len(said) == 2 and all(type(size) is int and 0 < size <= MAX_BLOCK for size in said)
    )
    require(whole, f"weight_block_size is {shown(said)}: it must be two whole numbers above 0, of outputs and inputs")
    rows, columns = said
    require(
        rows > 1, f"weight_block_size is {said}: MXFP8 is not read by this version of Noria: take the unquantized model"
    )
    return rows, columns
