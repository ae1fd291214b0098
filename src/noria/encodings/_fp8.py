"""Numbers of 8 bits (e4m3: sign, 4 bits of exponent, 3 of mantissa, no infinities) with scales, what both kinds share.

`codes` uint8 [outputs, inputs] are the bits of float8_e4m3fn; a number is its code times the scale of its block,
multiplied in float32 (in float64 runs in float64) and rounded once.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _scales
from noria.errors import require
from noria.kernels.stored import E4M3, NUMBERS, POWERS, TileForm

LARGEST = 448.0  # of e4m3
NO_NUMBER = 127  # the code that stands for none, with either sign
Block = tuple[int, int]  # outputs and inputs that share a scale


def form(settings: Mapping[str, Any], rows: int, columns: int) -> TileForm:
    """Of blocks of so many outputs and inputs."""
    return TileForm(E4M3, POWERS if _scales.field_dtype(settings) == "uint8" else NUMBERS, columns, rows)


def encode(numbers: torch.Tensor, block: Block, settings: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The nearest codes under scales that make the largest number of each block the largest code."""
    numbers = numbers.float()
    require(bool(torch.isfinite(numbers).all()), "a number is infinite or none: e4m3 has finite ones alone")
    return _under(_scales.stored(_scales.quotient(_scales.largest(numbers, *block), LARGEST), settings), numbers, block)


def quick(numbers: torch.Tensor, block: Block, settings: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The same whatever the numbers: a block that has one that is none gets a scale that is none."""
    numbers = numbers.float()
    largest = _scales.largest(numbers, *block)
    found = _under(_scales.stored(_scales.quotient(largest, LARGEST), settings), numbers, block)
    nothing = 255 if found["scales"].dtype == torch.uint8 else torch.nan
    return found | {"scales": found["scales"].masked_fill_(~torch.isfinite(largest), nothing)}


def _under(stored: torch.Tensor, numbers: torch.Tensor, block: Block) -> dict[str, torch.Tensor]:
    """The nearest codes under these scales."""
    scales = _scales.spread(_scales.values(stored), numbers.shape, *block)
    codes = (numbers / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return {"codes": codes.view(torch.uint8), "scales": stored}


def decode(fields: Mapping[str, torch.Tensor], block: Block, into: torch.Tensor) -> None:
    """Codes times scales; within what `fields` and `into` have, whatever they hold."""
    codes, scales, wide = fields["codes"], _scales.values(fields["scales"]), _scales.wide(into.dtype)
    meant = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).to(wide)
    for piece, outputs, blocks in _scales.parts(into, block[0]):
        its = codes[piece, outputs]
        numbers = meant.index_select(0, its.flatten().int()).view(its.shape)  # five times as fast as the CPU's cast
        into[piece, outputs] = numbers.mul_(_scales.spread(scales[piece, blocks].to(wide), its.shape, *block))


def most(fields: Mapping[str, torch.Tensor], settings: Mapping[str, object]) -> float:
    """The largest code under the largest scale."""
    return float(_scales.values(fields["scales"]).max()) * LARGEST


def check(fields: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError for scales or codes that are no numbers."""
    _scales.check(fields["scales"])
    # a maximum is many times as fast as any() of a comparison
    require(
        int(fields["codes"].bitwise_and(127).amax()) != NO_NUMBER,
        f"a code is {NO_NUMBER} or {NO_NUMBER + 128}, which stand for no number in e4m3",
    )
