"""Codes bfloat16 with its exponents in fewer bits on a CUDA device (Triton), to the bytes of encodings/exponent.py."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from noria.kernels.decode_exponent import CHUNK, RANGE


@triton.jit(do_not_specialize=["plane", "ranges", "chunks"])
def code_chunks(
    bits, low, planes, bases, counts, numbers, piece_of_bits, plane, ranges, chunks, RANGE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of a piece, its numbers in ranges: all but escapes, and how many of these there are."""
    piece, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    rows = chunk * (CHUNK // RANGE) + tl.arange(0, CHUNK // RANGE)
    at = rows[:, None] * RANGE + tl.arange(0, RANGE)[None, :]
    inside = at < numbers
    its = tl.load(bits + piece * piece_of_bits + at, mask=inside, other=0).to(tl.int32)
    tl.store(low + piece * numbers + at, (its >> 8 & 128 | its & 127).to(tl.uint8), mask=inside)
    exponent = its >> 7 & 255
    # From the largest exponent down: of several that as many numbers lie below, the last one is the smallest.
    known = tl.where(inside, exponent, -1024)
    highest, lowest = tl.max(tl.max(known, 1), 0), tl.min(tl.min(tl.where(inside, exponent, 255), 1), 0)
    base, most = tl.zeros((CHUNK // RANGE,), tl.int32), tl.zeros((CHUNK // RANGE,), tl.int32)
    for down in range(highest - lowest + 1):
        top = highest - down
        count = tl.sum(((known <= top) & (known > top - 7)).to(tl.int32), 1)
        base, most = tl.where(count >= most, top, base), tl.maximum(count, most)
    tl.store(bases + piece * ranges + rows, base.to(tl.uint8), mask=rows * RANGE < numbers)
    code = tl.where(inside, tl.minimum(base[:, None] - exponent & 255, 7), 0)
    tl.store(counts + piece * chunks + chunk, tl.sum(tl.sum((code == 7).to(tl.int32), 1), 0))
    in_eights = tl.reshape(code, (CHUNK // RANGE, RANGE // 8, 8))
    eights = rows[:, None] * (RANGE // 8) + tl.arange(0, RANGE // 8)[None, :]
    for which in tl.static_range(3):
        its_plane = tl.sum((in_eights >> which & 1) << tl.arange(0, 8)[None, None, :], 2)
        target = planes + (piece * 3 + which) * plane + eights
        tl.store(target, its_plane.to(tl.uint8), mask=eights * 8 < numbers)


@triton.jit(do_not_specialize=["ranges", "chunks", "held"])
def put_escapes(
    bits, bases, starts, escapes, numbers, piece_of_bits, ranges, chunks, held, RANGE: tl.constexpr, CHUNK: tl.constexpr
):
    """The escapes of a chunk of a piece, its numbers in eights."""
    piece, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    eights = chunk * (CHUNK // 8) + tl.arange(0, CHUNK // 8)
    at = eights[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = at < numbers
    exponent = tl.load(bits + piece * piece_of_bits + at, mask=inside, other=0).to(tl.int32) >> 7 & 255
    base = tl.load(bases + piece * ranges + eights // (RANGE // 8), mask=eights * 8 < numbers, other=0).to(tl.int32)
    escaped = (inside & ((base[:, None] - exponent & 255) >= 7)).to(tl.int32)
    of_eights = tl.sum(escaped, 1)
    before = tl.load(starts + piece * chunks + chunk) + tl.cumsum(of_eights, 0) - of_eights
    place = before[:, None] + tl.cumsum(escaped, 1) - escaped
    tl.store(escapes + piece * held + place, exponent.to(tl.uint8), mask=escaped == 1)


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The fields [P, ...] of P pieces [P, O, I] of bfloat16, each without gaps, with as many escapes as one of them has at most
    and zeros behind the others'. Waits for the device, which says how many there are."""
    pieces, size, device = len(numbers), numbers[0].numel(), numbers.device
    assert numbers.dtype == torch.bfloat16 and numbers[0].is_contiguous(), (numbers.dtype, numbers.stride())
    bits, eights, ranges, chunks = numbers.view(torch.int16), *(triton.cdiv(size, one) for one in (8, RANGE, CHUNK))
    low, planes, bases = (
        torch.empty(pieces, *shape, dtype=torch.uint8, device=device) for shape in ((size,), (3, eights), (ranges,))
    )
    counts, grid = torch.empty(pieces, chunks, dtype=torch.int32, device=device), (chunks, pieces)
    code_chunks[grid](
        bits, low, planes, bases, counts, size, bits.stride(0), eights, ranges, chunks, RANGE, CHUNK, num_warps=8
    )  # fmt: skip
    ends = counts.cumsum(1)
    starts, held = (ends - counts).int(), int(ends[:, -1].max())
    escapes = torch.zeros(pieces, held, dtype=torch.uint8, device=device)
    put_escapes[grid](
        bits, bases, starts, escapes, size, bits.stride(0), ranges, chunks, held, RANGE, CHUNK, num_warps=8
    )  # fmt: skip
    return {"low": low, "planes": planes, "bases": bases, "starts": starts, "escapes": escapes}
