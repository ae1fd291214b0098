"""Codes of 4 bits of which each is a float: a sign, two bits of exponent, one of mantissa (e2m1 of the OCP's Microscaling
Formats, version 1.0). Their magnitudes, by the low three bits of a code, are those of MAGNITUDES."""

from itertools import pairwise

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]


def nearest(numbers: torch.Tensor) -> torch.Tensor:
    """The codes, uint8, nearest to float32 numbers; of two as near the one with an even mantissa; saturated."""
    magnitudes = numbers.abs()
    codes = torch.zeros_like(numbers, dtype=torch.uint8)
    for code, (below, above) in enumerate(pairwise(MAGNITUDES), 1):
        middle = (below + above) / 2
        codes += magnitudes > middle if code % 2 else magnitudes >= middle
    return codes | torch.signbit(numbers).to(torch.uint8) << 3


def values(content: torch.Tensor, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers [R, inputs] of bytes [R, half of the inputs], each of two codes, the first in its low half."""
    magnitudes = torch.tensor(MAGNITUDES, dtype=dtype, device=content.device)
    codes = torch.cat((magnitudes, -magnitudes))
    pairs = torch.stack((codes.repeat(16), codes.repeat_interleave(16)), -1)  # of each byte
    as_one = torch.complex128 if dtype == torch.float64 else torch.float64
    found = pairs.view(as_one)[:, 0].take(content.long())
    return found.view(dtype)[:, :inputs]
