"""Decodes bfloat16 stored with its exponents in fewer bits on a CUDA device (Triton), to the bits of encodings/exponent.py."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from noria.kernels.decode_fp8 import piece_of

RANGE, CHUNK = 256, 4096  # numbers of a base, and of a start


@triton.jit(do_not_specialize_on_alignment=["named"])
def decode_chunks(
    low, planes, bases, starts, escapes, named, into, numbers, inputs, held, piece_of_low, piece_of_planes, piece_of_bases,
    piece_of_starts, piece_of_escapes, plane, piece, row, column, NAMED: tl.constexpr, FLAT: tl.constexpr,
    RANGE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of a piece, its numbers in eights. Strides are in elements; FLAT: those of `into` lie without gaps."""
    number = piece_of(named, NAMED)
    if number < 0:
        return
    eights = tl.program_id(0).to(tl.int64) * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
    bit, at = tl.arange(0, 8), eights[:, None] * 8 + tl.arange(0, 8)[None, :]
    there, inside, code = eights * 8 < numbers, at < numbers, tl.zeros((CHUNK // 8, 8), tl.int32)
    for which in tl.static_range(3):
        its = tl.load(planes + number * piece_of_planes + which * plane + eights, mask=there, other=0).to(tl.int32)
        code |= (its[:, None] >> bit[None, :] & 1) << which
    escaped = ((code == 7) & inside).to(tl.int32)
    of_eights = tl.sum(escaped, 1)
    before = tl.load(starts + number * piece_of_starts + tl.program_id(0)) + tl.cumsum(of_eights, 0) - of_eights
    place = before[:, None] + tl.cumsum(escaped, 1) - escaped
    found = (escaped == 1) & (place >= 0) & (place < held)
    base = tl.load(bases + number * piece_of_bases + eights // (RANGE // 8), mask=there, other=0).to(tl.int32)
    escape = tl.load(escapes + number * piece_of_escapes + place, mask=found, other=0).to(tl.int32)
    exponent = tl.where(escaped == 1, escape, base[:, None] - code & 255)
    small = tl.load(low + number * piece_of_low + at, mask=inside, other=0).to(tl.int32)
    bits = (small & 128) << 8 | exponent << 7 | small & 127
    target = into + tl.program_id(1).to(tl.int64) * piece + (at if FLAT else at // inputs * row + at % inputs * column)
    if into.dtype.element_ty == tl.int16:
        tl.store(target, bits.to(tl.int16), mask=inside)
    else:
        tl.store(target, (bits << 16).to(tl.float32, bitcast=True).to(into.dtype.element_ty), mask=inside)


def decode(
    fields: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    into: torch.Tensor,
    named: torch.Tensor | None = None,
) -> None:
    """The numbers of P pieces into [P, O, I] of any strides; on the current stream."""
    into = into if into.dim() == 3 else into[:, None]
    into = into.view(torch.int16) if into.dtype == torch.bfloat16 else into
    (pieces, _, inputs), low, planes = into.shape, fields["low"], fields["planes"]
    bases, starts, escapes = fields["bases"], fields["starts"], fields["escapes"]
    decode_chunks[(triton.cdiv(low.shape[1], CHUNK), pieces)](
        low, planes, bases, starts, escapes, low if named is None else named, into,
        low.shape[1], inputs, escapes.shape[1], low.stride(0),
        planes.stride(0), bases.stride(0), starts.stride(0), escapes.stride(0), planes.stride(1), *into.stride(),
        named is not None, into[0].is_contiguous(), RANGE, CHUNK, num_warps=8,
    )  # fmt: skip
