"""compressed-tensors, as LLM Compressor writes it: floats and whole numbers of 8 bits in `weight`, codes of 4 bits, and whole
numbers packed into words, in `weight_packed`; `weight_scale`, `weight_zero_point`, `weight_g_idx`, `weight_global_scale`.

Its compressors/ (naive_quantized, pack_quantized, nvfp4, mxfp4) and quantization/lifecycle/forward.py. A whole number is (code -
zero) x scale; codes and zeros of B bits are packed with 2 ** (B - 1) added, along the inputs and along the outputs, the lowest
bits first.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.checkpoint.published import _floats, _integers
from noria.checkpoint.published._groups import Scheme, of_modules, schemes
from noria.checkpoint.published._tensors import PLAIN, Published, Tensors, cache_of, hold, matrix_shape
from noria.checkpoint.tensor_files import Reader, Tensor
from noria.errors import InputError, require
from noria.models._config import shown

METHODS = ("compressed-tensors", "compressed_tensors")
FORMATS = (
    None,
    "dense",
    "mixed-precision",
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
PACKED, CODES = ".weight_packed", ".weight"


class CompressedTensors:
    """The matrices of a directory of compressed-tensors."""

    ASIDE = (
        "input_scale",
        "output_scale",
        "input_zero_point",
        "output_zero_point",
        "input_global_scale",
        "k_scale",
        "v_scale",
        "q_scale",
    )

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors):
        self._tensors = tensors
        _refuse(settings)
        found = schemes(settings)
        self._schemes = of_modules(found, settings.get("ignore"), _modules(tensors))
        self.words = f"compressed-tensors ({', '.join(dict.fromkeys(one.words for one in found)) or 'no weights'})"
        self.activations = "by its config_groups" if any(one.rounds for one in found) else ""
        self.cache = cache_of(settings)

    def matrix(self, module: str, number: int | None = None) -> Published | None:
        """What the module's group says that its tensors are."""
        if number is not None or module not in self._schemes:
            return None
        packed, scheme = self._tensors.named(module + PACKED), self._schemes[module]
        codes = packed or self._tensors.named(module + CODES)
        assert codes is not None, module
        if scheme is None:
            raise InputError(
                f"{codes.shard}: {codes.name!r} is {codes.dtype} of a module that config.json names in ignore, or in no group"
            )
        if scheme.kind == "float":
            return self._float(module, codes, scheme, packed is not None)
        return self._integer(module, codes, scheme, packed is not None)

    def _float(self, module: str, codes: Tensor, scheme: Scheme, packed: bool) -> Published:
        scale = self._need(codes, module, "scale")
        require(scheme.symmetric, f"{scheme.name}: floats that are not symmetric are not in this version of Noria")
        if scheme.bits == 8 and not packed and scheme.strategy in ("tensor", "channel", "block"):
            hold(codes, ("float8_e4m3fn",), codes.shape, f"for {scheme.words}")
            require(
                (scheme.strategy == "block") == bool(scheme.block),
                f"{scheme.name}: {scheme.words} has no block_structure",
            )
            return _floats.fp8(module, codes, scale, scheme.block, exponents=False)
        if scheme.bits == 4 and packed and scheme.group_size == _floats.NVFP4_GROUP:
            return _floats.nvfp4(module, codes, scale, self._need(codes, module, "global_scale"), divides=True)
        if scheme.bits == 4 and packed and scheme.group_size == _floats.MXFP4_GROUP:
            return _floats.mxfp4(module, codes, scale)
        what = "MXFP8" if scheme.bits == 8 and scheme.group_size == _floats.MXFP4_GROUP else scheme.words
        raise InputError(f"{scheme.name}: {what} is not in this version of Noria: take the unquantized model")

    def _integer(self, module: str, codes: Tensor, scheme: Scheme, packed: bool) -> Published:
        known = scheme.bits in _integers.BITS and scheme.strategy in ("tensor", "channel", "group")
        require(known, f"{scheme.name}: {scheme.words} is not in this version of Noria: take the unquantized model")
        size = _integers.group_of(scheme.group_size if scheme.strategy == "group" else -1, f"{scheme.name}: group_size")
        shape = self._shape(module, codes, scheme.bits) if packed else matrix_shape(codes)
        bits = scheme.bits if packed else 8  # of 4 bits in bytes too
        scale, zeros = self._need(codes, module, "scale"), self._tensors.named(f"{module}.weight_zero_point")
        require(
            scheme.symmetric or zeros,
            f"{codes.shard}: {module + '.weight_zero_point'!r} is missing, {scheme.name} is not symmetric",
        )
        self._hold_scale(scale, scheme, shape, size)
        index = self._tensors.named(f"{module}.weight_g_idx")
        if index is not None:
            hold(index, ("int32", "int64"), shape[1:], "one for each input")
        read = {
            "codes": (lambda reader: _integers.bytes_of(reader.whole(codes), bits, shape[1]))
            if packed
            else (lambda reader: _shifted(reader.whole(codes))),
            "scales": lambda reader: (
                reader.whole(scale).reshape(-1, _integers.groups(shape[1], size)).expand(shape[0], -1)
            ),
        }
        if zeros is not None:
            read["zeros"] = self._zeros(zeros, bits, (shape[0], _integers.groups(shape[1], size)))
        kept = {"codes": codes, "scales": scale, "zeros": zeros, "g_idx": index}
        made = _integers.published(module, bits, shape, size, kept, read, scheme.symmetric)
        told = self._tensors.named(f"{module}.weight_shape")
        return made.using(told) if told else made

    def _need(self, codes: Tensor, module: str, what: str) -> Tensor:
        return self._tensors.need(codes, f"{module}.weight_{what}")

    def _hold_scale(self, scale: Tensor, scheme: Scheme, shape: tuple[int, int], size: int) -> None:
        if size == -1 and scheme.strategy != "group":
            _floats.hold_whole(scale, shape[0])
            hold(scale, _integers.SCALES, scale.shape, f"for {scheme.words}")
        else:
            wanted = shape[0], _integers.groups(shape[1], size)
            hold(scale, _integers.SCALES, wanted, f"for {scheme.words} of {list(shape)}")

    def _shape(self, module: str, packed: Tensor, bits: int) -> tuple[int, int]:
        """[outputs, inputs] of packed codes, which `weight_shape` says."""
        told = self._need(packed, module, "shape")
        right = told.dtype in ("int64", "int32") and told.shape == (2,)
        require(
            right, f"{told.shard}: {told.name!r} is {told.dtype} {list(told.shape)}, it should be two whole numbers"
        )
        outputs, inputs = (int(size) for size in Reader().whole(told))
        require(inputs > 0 and outputs > 0, f"{told.shard}: {told.name!r} says [{outputs}, {inputs}]")
        hold(packed, ("int32",), (outputs, -(-inputs * bits // 32)), f"for {bits} bits of [{outputs}, {inputs}]")
        return outputs, inputs

    def _zeros(self, zeros: Tensor, bits: int, shape: tuple[int, int]) -> _integers.Read:
        """How zeros [outputs, groups] are read: packed along the outputs, or whole numbers of their own."""
        outputs, groups = shape
        if zeros.dtype == "int32":
            hold(zeros, ("int32",), (-(-outputs * bits // 32), groups), f"for {bits} bits of {list(shape)}")
            return lambda reader: _integers.unpacked(reader.whole(zeros).t(), bits)[:, :outputs].t()
        right = zeros.dtype == "int8" and zeros.shape in ((), (1,), (1, 1), (outputs,), shape)
        require(
            right,
            f"{zeros.shard}: {zeros.name!r} is {zeros.dtype} {list(zeros.shape)}, it should be int8 {list(shape)}",
        )
        middle = 2 ** (bits - 1)
        return lambda reader: (reader.whole(zeros).short() + middle).to(torch.uint8).reshape(-1, groups).expand(shape)


FORMAT = CompressedTensors


def _refuse(settings: Mapping[str, Any]) -> None:
    """Raises InputError for what changes results beside the codes of weights."""
    formats = [settings.get("format"), *(its.get("format") for its in _dicts(settings.get("config_groups")))]
    for one in formats:
        mx = " (MXFP8)" if one == "mxfp8-quantized" else ""
        require(one in FORMATS, f"format is {shown(one)}{mx}: not in this version of Noria: take the unquantized model")
    sparsity = settings.get("sparsity_config")
    sparse = sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense"))
    for key, found in (
        ("sparsity_config", sparse),
        ("transform_config", settings.get("transform_config")),
        ("moe_sparsity_config", settings.get("moe_sparsity_config")),
    ):
        require(
            not found, f"{key} is {shown(settings.get(key))}: not in this version of Noria: take the unquantized model"
        )


def _dicts(said: Any) -> list[dict[str, Any]]:
    return [one for one in said.values() if isinstance(one, dict)] if isinstance(said, dict) else []


def _modules(tensors: Tensors) -> list[str]:
    """The modules whose matrices are in codes."""
    found = [name.removesuffix(PACKED) for name in tensors.names() if name.endswith(PACKED)]
    for name in tensors.names():
        tensor = tensors.named(name)
        if name.endswith(CODES) and tensor and tensor.dtype not in PLAIN:
            found.append(name.removesuffix(CODES))
    return found


def _shifted(codes: torch.Tensor) -> torch.Tensor:
    """Whole numbers of 8 bits as codes from 0 on."""
    return codes.view(torch.uint8) ^ 128
