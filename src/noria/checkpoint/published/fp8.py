"""FP8 as DeepSeek publishes it: e4m3 codes with a scale a block of outputs and inputs, or one an output or a tensor.

transformers' quantizer_finegrained_fp8.py and its integration; DeepSeek-V3's fp8_cast_bf16.py; vLLM's fp8.py for `weight_scale`
and quant_method fbgemm_fp8. A number is its code times `weight_scale_inv`, whatever its name says. Experts may be FP4
(expert_dtype fp4, DeepSeek V4). Experts in one tensor NAME [experts, ...] have their scales in NAME_scale_inv, or in NAME_scale
of fbgemm_fp8: blocks, which lie as they do, one or two an expert (its FP8Experts), one an output (its Llama 4), or one for all.
"""

from collections.abc import Mapping
from typing import Any

from noria.checkpoint.published._floats import fp8, fp8_of_many, mxfp4
from noria.checkpoint.published._tensors import PLAIN, Published, Tensors, activations_of, cache_of
from noria.errors import InputError, require
from noria.models._config import shown

METHODS = ("fp8", "fbgemm_fp8")
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
E4M3 = (None, "e4m3", "float8_e4m3fn", "float8_e4m3")
MAX_BLOCK = 1 << 16


class Fp8:
    """The matrices of a directory in FP8."""

    ASIDE = ("input_scale", "activation_scale", "act_scale", "qscale_act", "input_scale_ub", "k_scale", "v_scale")

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors
        fmt, experts = settings.get("fmt"), settings.get("expert_dtype")
        require(fmt in E4M3, f"fmt is {shown(fmt)}: Noria reads e4m3")
        require(experts in (None, "fp8", "fp4"), f"expert_dtype is {shown(experts)}: Noria reads fp8 and fp4")
        self._block = _block(settings.get("weight_block_size"))
        self._exponents = settings.get("scale_fmt") == "ue8m0"  # scales of dtype uint8 are powers of two then
        self._fp4 = experts == "fp4"
        self.activations, self.cache = activations_of(settings), cache_of(settings)
        self.words = "fp8" + (f" in blocks of {self._block[0]} x {self._block[1]}" if self._block else "")

    def matrix(self, module: str, number: int | None = None) -> Published | None:
        """e4m3 codes with their scales; of experts in FP4 e2m1 codes."""
        if number is not None:
            return self._of_many(module, number)
        weight = self._tensors.named(f"{module}.weight")
        if weight is None or weight.dtype in PLAIN:
            return None
        scales = [f"{module}.{ending}" for ending in SCALES]
        if weight.dtype == "float8_e4m3fn":
            return fp8(module, weight, self._tensors.need(weight, *scales), self._block, self._exponents)
        if weight.dtype in ("int8", "uint8") and self._fp4:
            return mxfp4(module, weight, self._tensors.need(weight, *scales))
        raise InputError(f"{weight.shard}: {weight.name!r} is {weight.dtype!r}, {self.words} has float8_e4m3fn")

    def _of_many(self, module: str, number: int) -> Published | None:
        """Matrix `number` of a tensor of many."""
        weight = self._tensors.named(module)
        if weight is None or weight.dtype != "float8_e4m3fn":
            return None
        scales = self._tensors.need(weight, f"{module}_scale_inv", f"{module}_scale")
        return fp8_of_many(module, weight, scales, number, self._block, self._exponents)


FORMAT = Fp8


def _block(said: Any) -> tuple[int, int] | None:
    """Outputs and inputs that share a scale; None: one a tensor, or one an output."""
    if said is None:
        return None
    whole = (
        isinstance(said, list) and len(said) == 2 and all(type(size) is int and 0 < size <= MAX_BLOCK for size in said)
    )
    require(whole, f"weight_block_size is {shown(said)}: it must be two whole numbers above 0, of outputs and inputs")
    require(
        said[0] > 1, f"weight_block_size is {said}: MXFP8 is not in this version of Noria: take the unquantized model"
    )
    return said[0], said[1]
