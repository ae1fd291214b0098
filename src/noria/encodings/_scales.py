"""What encodings with scales share: scales as float32 or as powers of two (e8m0), spread over the numbers that they belong to.

P pieces, O outputs, I inputs; a scale belongs to a block [rows, columns] of a matrix, the last ones may be partial.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from noria.errors import require
from noria.limits import DECODED_NUMBERS

DTYPES = {"float32": "float32", "e8m0": "uint8"}  # how a scale may be stored, and the dtype of its field
MOST_EXPONENT = 254  # of e8m0: 2 ** (code - 127); 255 is no number
_HALF = 1 << 22  # the bits of 2 ** -127 in float32, which is no normal number


def field_dtype(settings: Mapping[str, Any]) -> str:
    """The dtype of the field of scales. Raises InputError for a `scale_dtype` that scales do not have."""
    said = settings["scale_dtype"]
    require(isinstance(said, str) and said in DTYPES, f"scale_dtype is {said!r}: it may be {' or '.join(DTYPES)}")
    return DTYPES[said]


def values(stored: torch.Tensor) -> torch.Tensor:
    """Scales as float32; those that are stored as uint8 are e8m0."""
    if stored.dtype != torch.uint8:
        return stored
    bits = stored.to(torch.int32) << 23
    return bits.masked_fill(stored == 0, _HALF).view(torch.float32)


def quotient(numbers: torch.Tensor, divisor: float) -> torch.Tensor:
    """Numbers divided by one, to the same bits on every device: torch on CUDA takes a Python number's reciprocal as a factor."""
    return numbers / numbers.new_full((), divisor)


def stored(scales: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Scales as they are stored, none of them 0: float32, or the powers of two that are no smaller."""
    scales = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    if field_dtype(settings) == "float32":
        return scales
    fraction, exponent = torch.frexp(scales)  # in [0.5, 1)
    return (exponent - (fraction == 0.5).int() + 127).clamp(0, MOST_EXPONENT).to(torch.uint8)


def check(scales: torch.Tensor) -> None:
    """Raises InputError for scales that are no numbers from 0 on."""
    its = values(scales)
    right = scales != 255 if scales.dtype == torch.uint8 else torch.isfinite(its) & (its >= 0)
    if not bool(right.all()):
        wrong = its[~right].flatten()
        words = "nan" if scales.dtype == torch.uint8 else f"{wrong[0].item():g}"
        require(False, f"{wrong.numel()} of {scales.numel()} scales are no numbers from 0 on, such as {words}")


def largest(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest absolute number of each block of numbers [O, I]: [blocks of rows, blocks of columns]."""
    padded = F.pad(numbers.abs(), (0, -numbers.shape[1] % columns, 0, -numbers.shape[0] % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax(dim=(1, 3))


def spread(scales: torch.Tensor, shape: Sequence[int], rows: int, columns: int) -> torch.Tensor:
    """The scale of each number of a matrix of this shape, from those of its blocks [..., R, C]."""
    its = scales if rows == 1 else scales.repeat_interleave(rows, dim=-2)[..., : shape[0], :]
    if columns >= shape[1]:
        return its.expand(*its.shape[:-1], shape[1])
    return its.repeat_interleave(columns, dim=-1)[..., : shape[1]]


def parts(into: torch.Tensor, rows: int) -> Iterator[tuple[int, slice, slice]]:
    """Cuts the decoding into [P, O, I] so that what is in between takes little memory.

    Each part is a piece, some of its outputs, whole blocks of `rows`, and those blocks.
    """
    pieces, outputs, inputs = into.shape
    blocks = max(DECODED_NUMBERS // max(rows * inputs, 1), 1)
    for piece in range(pieces):
        for first in range(0, -(-outputs // rows), blocks):
            its = slice(first * rows, min((first + blocks) * rows, outputs))
            yield piece, its, slice(first, first + blocks)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What products of codes and scales are computed in, once, before they are rounded to `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
