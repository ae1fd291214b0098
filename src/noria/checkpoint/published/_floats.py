"""Matrices of small floats with scales, as several formats have them: e4m3, and e2m1 two a byte, the first in the low half."""

from functools import partial
from typing import Any

import torch

from noria.checkpoint.published._tensors import Published, hold, matrix_shape
from noria.checkpoint.tensor_files import Reader, Tensor, slice_of
from noria.encodings import Fields
from noria.errors import require

EXPONENTS = ("float8_e8m0fnu", "uint8")  # dtypes of scales that are powers of two
SCALES = ("float32", "bfloat16", "float16")
MXFP4_GROUP, NVFP4_GROUP = 32, 16  # inputs that share a scale


def fp8(module: str, weight: Tensor, scale: Tensor, block: tuple[int, int] | None, exponents: bool = True) -> Published:
    """e4m3 codes with a scale for each `block` of outputs and inputs; without one a scale an output, or one for all.

    exponents: whether scales of dtype uint8 are powers of two. Raises InputError for another shape or dtype of the scales.
    """
    if not block:
        hold_whole(scale, matrix_shape(weight)[0])
    return _fp8(module, weight, scale, block, SCALES + (EXPONENTS if exponents else EXPONENTS[:1]))


def fp8_of_many(
    module: str,
    weight: Tensor,
    scale: Tensor,
    number: int,
    block: tuple[int, int] | None = None,
    exponents: bool = False,
) -> Published:
    """Matrix `number` of a tensor [X, ...], whichever way all lie, with its part of `scale` [X, ...], or the one of all.

    Without a `block` a matrix has one scale, two for its gates and its ups, or one an output. Raises InputError as fp8 does.
    """
    many, single = len(weight.shape) == 3 and number < weight.shape[0], scale.size == 1 and not block
    dimensions = (3,) if block else (1, 2, 3)
    require(
        many and (single or (len(scale.shape) in dimensions and scale.shape[0] == weight.shape[0])),
        f"{weight.shard}: {weight.name!r} {list(weight.shape)} and {scale.name!r} {list(scale.shape)}: they should be"
        f" as many matrices, more than {number}",
    )
    matrix, part = slice_of(weight, number), scale if single else slice_of(scale, number)
    right = block or part.size in (1, 2, *matrix.shape)
    require(
        right,
        f"{scale.shard}: {scale.name!r} is {list(scale.shape)}: one scale a matrix of {list(matrix.shape)} is needed, two for"
        " its gates and ups, or one an output",
    )
    return _fp8(f"{module}[{number}]", matrix, part, block, SCALES + (EXPONENTS if exponents else EXPONENTS[:1]))


def _fp8(
    module: str,
    weight: Tensor,
    scale: Tensor,
    block: tuple[int, int] | None,
    dtypes: tuple[str, ...],
    turned: bool = False,
) -> Published:
    """What a matrix's tensors are; the transpose of what they are otherwise if `turned`."""
    lies = matrix_shape(weight)
    shape = lies[::-1] if turned else lies
    require(
        scale.dtype in dtypes,
        f"{scale.shard}: {scale.name!r} is {scale.dtype!r}: scales are {', '.join(dtypes)}",
    )
    settings: dict[str, Any] = {"scale_dtype": "e8m0" if scale.dtype in EXPONENTS else "float32"}
    if block:
        grid = -(-lies[0] // block[0]), -(-lies[1] // block[1])
        hold(scale, dtypes, grid, f"one for {block[0]} x {block[1]} of {list(lies)}")
        settings["block_size"] = list(block[::-1] if turned else block)

    def fields(reader: Reader) -> Fields:
        codes, scales = reader.whole(weight), reader.whole(scale)
        scales = scales if scale.dtype in EXPONENTS else scales.float()
        if not block:
            require(shape[0] % scale.size == 0, f"{scale.shard}: {scale.name!r} are not scales of {shape[0]} outputs")
            scales = scales.reshape(-1, 1, 1).expand(-1, shape[0] // scale.size, 1).reshape(-1, 1)
        elif turned:
            scales = scales.t()
        return {"codes": codes.t() if turned else codes, "scales": scales}

    kind, turn = (
        "fp8_block" if block else "fp8_channel",
        partial(_fp8, module, weight, scale, block, dtypes, not turned),
    )
    return Published(module, kind, settings, shape, (weight, scale), fields, turn)


def hold_whole(scale: Tensor, outputs: int) -> None:
    """Raises InputError for scales that are neither one nor one an output."""
    right = scale.shape in ((), (1,), (1, 1), (outputs,), (outputs, 1))
    require(right, f"{scale.shard}: {scale.name!r} is {list(scale.shape)}: one scale is needed, or {outputs}")


def mxfp4(module: str, codes: Tensor, scale: Tensor) -> Published:
    """e2m1 codes with a power of two for 32 inputs."""
    shape = _of_pairs(codes, MXFP4_GROUP)
    hold(scale, EXPONENTS, (shape[0], shape[1] // MXFP4_GROUP), f"one for {MXFP4_GROUP} inputs of {list(shape)}")

    def fields(reader: Reader) -> Fields:
        return {"codes": reader.whole(codes).view(torch.uint8), "scales": reader.whole(scale)}

    return Published(module, "mxfp4", {}, shape, (codes, scale), fields)


def nvfp4(module: str, codes: Tensor, scale: Tensor, whole: Tensor, divides: bool) -> Published:
    """e2m1 codes with an e4m3 scale for 16 inputs, which `whole`, one float32, multiplies or divides."""
    shape = _of_pairs(codes, NVFP4_GROUP)
    hold(
        scale, ("float8_e4m3fn",), (shape[0], shape[1] // NVFP4_GROUP), f"one for {NVFP4_GROUP} inputs of {list(shape)}"
    )
    right = whole.dtype == "float32" and whole.shape in ((), (1,))
    require(right, f"{whole.shard}: {whole.name!r} is {whole.dtype} {list(whole.shape)}, it should be one float32")

    def fields(reader: Reader) -> Fields:
        scales = {"scales": reader.whole(scale), "tensor_scale": reader.whole(whole).reshape(1)}
        return {"codes": reader.whole(codes).view(torch.uint8)} | scales

    settings = {"tensor_scale": "divides" if divides else "multiplies"}
    return Published(module, "nvfp4", settings, shape, (codes, scale, whole), fields)


def _of_pairs(codes: Tensor, group: int) -> tuple[int, int]:
    """[outputs, inputs] of codes two a byte."""
    outputs, half = matrix_shape(codes)
    require(codes.dtype in ("uint8", "int8"), f"{codes.shard}: {codes.name!r} is {codes.dtype!r}, it should be uint8")
    require(
        2 * half % group == 0,
        f"{codes.shard}: {codes.name!r} {list(codes.shape)} has {2 * half} inputs, no multiple of {group}",
    )
    return outputs, 2 * half
