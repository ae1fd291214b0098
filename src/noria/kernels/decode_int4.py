"""Decodes whole numbers of 4 bits by groups on a CUDA device (Triton), to the bits of encodings/_integers.py."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from noria.kernels.decode_fp8 import piece_of

ROWS, COLUMNS = 16, 256  # of a tile
WHOLE_ROW = 1 << 30  # a group that is as wide as any row


@triton.jit
def less_zero_times_scale(code, scales, zeros, at, inside, MIDDLE: tl.constexpr):
    """What codes stand for whose groups have their scale, and their zero if MIDDLE is 0, at `at`."""
    scale = tl.load(scales + at, mask=inside, other=0).to(tl.float32)
    if MIDDLE > 0:
        return (code.to(tl.float32) - MIDDLE) * scale
    return (code.to(tl.float32) - tl.load(zeros + at, mask=inside, other=0).to(tl.float32)) * scale


@triton.jit
def groups_of(columns, inputs, places, groups, GROUP: tl.constexpr, PERMUTED: tl.constexpr):
    """The groups of inputs; within their row's, whatever `places` holds."""
    if PERMUTED:
        found = tl.load(places + columns, mask=columns < inputs, other=0) // GROUP
        return tl.minimum(tl.maximum(found, 0), groups - 1)
    return columns // GROUP


@triton.jit(do_not_specialize_on_alignment=["named"])
def decode_halves(
    codes, scales, zeros, places, named, into, outputs, inputs, width, groups, piece_of_codes, piece_of_scales,
    piece_of_zeros, piece_of_places, piece, row, column, NAMED: tl.constexpr, GROUP: tl.constexpr, PERMUTED: tl.constexpr,
    MIDDLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a piece. `width`: bytes of a row of codes. Strides are in elements; fields of a piece lie without gaps."""
    number, tiles = piece_of(named, NAMED), tl.cdiv(inputs, COLUMNS)
    if number < 0:
        return
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % tiles) * COLUMNS
    scales, zeros = scales + number * piece_of_scales, zeros + number * piece_of_zeros
    codes, places = codes + number * piece_of_codes, places + number * piece_of_places
    is_row, of_rows = (rows < outputs)[:, None], rows[:, None] * groups
    pairs, columns = first // 2 + tl.arange(0, COLUMNS // 2), first + tl.arange(0, COLUMNS)
    inside = is_row & (pairs < width)[None, :]
    code = tl.load(codes + rows[:, None] * width + pairs[None, :], mask=inside, other=0)
    at = of_rows + groups_of(2 * pairs, inputs, places, groups, GROUP, PERMUTED)[None, :]
    lows = less_zero_times_scale(code & 15, scales, zeros, at, inside, MIDDLE)
    if PERMUTED:  # both are else of one group: it has an even number of inputs
        at = of_rows + groups_of(2 * pairs + 1, inputs, places, groups, GROUP, PERMUTED)[None, :]
    highs = less_zero_times_scale(code >> 4, scales, zeros, at, inside, MIDDLE)
    target = into + tl.program_id(1).to(tl.int64) * piece + rows[:, None] * row + columns.to(tl.int64)[None, :] * column
    numbers = tl.interleave(lows, highs).to(into.dtype.element_ty)
    tl.store(target, numbers, mask=is_row & (columns < inputs)[None, :])


def decode(
    fields: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    into: torch.Tensor,
    named: torch.Tensor | None = None,
) -> None:
    """Codes of P pieces, less the zeros and times the scales of their groups, into [P, O, I] of any strides; on the
    current stream."""
    launch(decode_halves, fields, settings, 8, into, named)


def launch(
    kernel: Any,
    fields: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    middle: int,
    into: torch.Tensor,
    named: torch.Tensor | None,
) -> None:
    """A kernel of this file's arguments over the tiles of all pieces."""
    codes, scales = fields["codes"], fields["scales"]
    zeros, places = fields.get("zeros", scales), fields.get("permutation", codes)
    pieces, outputs, inputs = into.shape
    tiles = triton.cdiv(outputs, ROWS) * triton.cdiv(inputs, COLUMNS)
    kernel[(tiles, pieces)](
        codes, scales, zeros, places, codes if named is None else named, into, outputs, inputs,
        codes.shape[2], scales.shape[2], codes.stride(0),
        scales.stride(0), zeros.stride(0), places.stride(0), *into.stride(),
        named is not None, settings["group_size"] if settings["group_size"] > 0 else WHOLE_ROW, settings["permuted"],
        middle if settings["symmetric"] else 0, ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip
