"""Decodes e4m3 codes under scales of blocks on a CUDA device (Triton), to the bits of encodings/_fp8.py.

`e4m3`, `e8m0` and `piece_of` are for other kernels too. Numbers are made of their bits, so that no GPU needs to know
these dtypes; those without an exponent are no normal float32 until they are multiplied.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 128  # of a tile


@triton.jit
def e4m3(code):
    """The float32 of codes in e4m3: their bits in the place of float32's, whose smallest exponents mean the same, times a power
    of two."""
    magnitude = (code & 127).to(tl.int32)
    bits = tl.where(magnitude == 127, 0x7FC00000, magnitude << 20) | ((code & 128).to(tl.int32) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def piece_of(named, NAMED: tl.constexpr):
    """The piece that a program decodes: that at its own place, or which `named` has there; -1 for none."""
    number = tl.program_id(1).to(tl.int64)
    return tl.load(named + number).to(tl.int64) if NAMED else number


@triton.jit
def e8m0(code):
    """The float32 of scales in e8m0."""
    code = code.to(tl.int32)
    return tl.where(code == 0, 1 << 22, code << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["named"])
def decode_blocks(
    codes, scales, named, into, outputs, inputs, piece_of_codes, piece_of_scales, scales_of_row,
    piece, row, column, NAMED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, POWERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a piece. Strides are in elements; codes and scales of a piece lie without gaps."""
    number, tiles = piece_of(named, NAMED), tl.cdiv(inputs, COLUMNS)
    if number < 0:
        return
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    code = tl.load(codes + number * piece_of_codes + rows[:, None] * inputs + columns[None, :], mask=inside, other=0)
    of_rows = scales + number * piece_of_scales + (rows // BLOCK_ROWS) * scales_of_row
    if BLOCK_COLUMNS % COLUMNS == 0:  # one block of inputs: a scale a row
        at = of_rows + (tl.program_id(0) % tiles) * COLUMNS // BLOCK_COLUMNS
        scale = tl.load(at, mask=rows < outputs, other=0)[:, None]
    else:
        scale = tl.load(of_rows[:, None] + (columns // BLOCK_COLUMNS)[None, :], mask=inside, other=0)
    if POWERS:
        scale = e8m0(scale)
    target = into + tl.program_id(1).to(tl.int64) * piece + rows[:, None] * row + columns[None, :] * column
    tl.store(target, (e4m3(code) * scale).to(into.dtype.element_ty), mask=inside)


def decode(
    fields: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    into: torch.Tensor,
    named: torch.Tensor | None = None,
) -> None:
    """Codes [P, O, I] times the scales of their blocks, into [P, O, I] of any strides; on the current stream.

    named: int32 on the device, which piece each of `into` is; -1: none. As all kernels that decode have it.
    """
    codes, scales = fields["codes"], fields["scales"]
    pieces, outputs, inputs = into.shape
    # one scale a row: a block as wide as any number of tiles
    rows, columns = settings.get("block_size", (1, -(-inputs // COLUMNS) * COLUMNS))
    tiles = triton.cdiv(outputs, ROWS) * triton.cdiv(inputs, COLUMNS)
    decode_blocks[(tiles, pieces)](
        codes, scales, codes if named is None else named, into, outputs, inputs, codes.stride(0), scales.stride(0),
        scales.shape[2], *into.stride(), named is not None, rows, columns, scales.dtype == torch.uint8, ROWS, COLUMNS,
        num_warps=4,
    )  # fmt: skip
