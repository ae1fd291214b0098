"""Decodes e2m1 codes by groups on a CUDA device (Triton), to the bits of encodings/mxfp4.py and encodings/nvfp4.py."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from noria.kernels.decode_fp8 import e4m3, e8m0, piece_of

ROWS, COLUMNS = 16, 256  # of a tile


@triton.jit
def e2m1(code):
    """The float32 of codes in e2m1, as `e4m3` makes them."""
    bits = ((code & 7).to(tl.int32) << 22) | ((code & 8).to(tl.int32) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit(do_not_specialize_on_alignment=["named"])
def decode_pairs(
    codes, scales, of_tensors, named, into, outputs, inputs, width, groups, piece_of_codes, piece_of_scales,
    piece_of_tensors, piece, row, column, NAMED: tl.constexpr, GROUP: tl.constexpr, MULTIPLIES: tl.constexpr,
    DIVIDES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a piece. `width`: bytes of a row of codes. Strides are in elements; fields of a piece lie without gaps.

    Scales are e4m3 where they multiply the tensor's, or are divided by it; else e8m0.
    """
    number, tiles = piece_of(named, NAMED), tl.cdiv(inputs, COLUMNS)
    if number < 0:
        return
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
    pairs = tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row = (rows < outputs)[:, None]
    inside = is_row & (pairs < width)[None, :]
    code = tl.load(codes + number * piece_of_codes + rows[:, None] * width + pairs[None, :], mask=inside, other=0)
    at = scales + number * piece_of_scales + rows[:, None] * groups + (2 * pairs // GROUP)[None, :]
    stored = tl.load(at, mask=inside, other=0)
    if MULTIPLIES:
        scale = e4m3(stored) * tl.load(of_tensors + number * piece_of_tensors)
    elif DIVIDES:
        scale = tl.div_rn(e4m3(stored), tl.load(of_tensors + number * piece_of_tensors))
    else:
        scale = e8m0(stored)
    numbers = tl.interleave(e2m1(code & 15) * scale, e2m1(code >> 4) * scale)
    target = into + tl.program_id(1).to(tl.int64) * piece + rows[:, None] * row + columns.to(tl.int64)[None, :] * column
    tl.store(target, numbers.to(into.dtype.element_ty), mask=is_row & (columns < inputs)[None, :])


def decode(
    fields: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    into: torch.Tensor,
    named: torch.Tensor | None = None,
) -> None:
    """Codes of P pieces times the scales of their groups, into [P, O, I] of any strides; on the current stream."""
    codes, scales = fields["codes"], fields["scales"]
    of_tensors, tensor_scale = fields.get("tensor_scale", scales), settings.get("tensor_scale")
    pieces, outputs, inputs = into.shape
    tiles = triton.cdiv(outputs, ROWS) * triton.cdiv(inputs, COLUMNS)
    decode_pairs[(tiles, pieces)](
        codes, scales, of_tensors, codes if named is None else named, into, outputs, inputs,
        codes.shape[2], scales.shape[2], codes.stride(0),
        scales.stride(0), of_tensors.stride(0), *into.stride(), named is not None, 32 if tensor_scale is None else 16,
        tensor_scale == "multiplies", tensor_scale == "divides", ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip
