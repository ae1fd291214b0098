"""Decodes whole numbers of 8 bits by groups on a CUDA device (Triton), to the bits of encodings/_integers.py."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from noria.kernels.decode_fp8 import piece_of
from noria.kernels.decode_int4 import groups_of, launch, less_zero_times_scale


@triton.jit(do_not_specialize_on_alignment=["named"])
def decode_bytes(
    codes, scales, zeros, places, named, into, outputs, inputs, width, groups, piece_of_codes, piece_of_scales,
    piece_of_zeros, piece_of_places, piece, row, column, NAMED: tl.constexpr, GROUP: tl.constexpr, PERMUTED: tl.constexpr,
    MIDDLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of a piece. Strides are in elements; fields of a piece lie without gaps."""
    number, tiles = piece_of(named, NAMED), tl.cdiv(inputs, COLUMNS)
    if number < 0:
        return
    rows = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    code = tl.load(codes + number * piece_of_codes + rows[:, None] * width + columns[None, :], mask=inside, other=0)
    its = groups_of(columns, inputs, places + number * piece_of_places, groups, GROUP, PERMUTED)
    scales, zeros = scales + number * piece_of_scales, zeros + number * piece_of_zeros
    at = rows[:, None] * groups + its[None, :]
    numbers = less_zero_times_scale(code, scales, zeros, at, inside, MIDDLE)
    target = into + tl.program_id(1).to(tl.int64) * piece + rows[:, None] * row + columns.to(tl.int64)[None, :] * column
    tl.store(target, numbers.to(into.dtype.element_ty), mask=inside)


def decode(
    fields: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    into: torch.Tensor,
    named: torch.Tensor | None = None,
) -> None:
    """Codes of P pieces, less the zeros and times the scales of their groups, into [P, O, I] of any strides; on the
    current stream."""
    launch(decode_bytes, fields, settings, 128, into, named)
