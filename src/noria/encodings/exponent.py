"""bfloat16 as it is, bit for bit, in fewer bits (11.2 for normal weights): exponents as distances from one for 256 numbers.

Of N numbers, one row of the matrix after another: `low` uint8 [N], sign and mantissa. `planes` uint8 [3, N / 8], the bits of
codes of 3 bits: bit i % 8 of byte i / 8 of plane p is bit p of code i. `bases` uint8 [N / 256], the exponent from which a code
below 7 is the distance down, so chosen that most are. Code 7 says that the exponent itself stands in `escapes` uint8, in the
order of the numbers; `starts` int32 [N / 4096] says how many stand there before each 4,096 numbers. Divisions round up, and bits
behind the last code are 0. There is room for an escape in eight numbers: a matrix with more does not fit and stays plain.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, TypeAlias

import torch

from noria.encodings._groups import count
from noria.errors import InputError, require
from noria.limits import DECODED_NUMBERS

Parts: TypeAlias = dict[str, torch.Tensor]
Each: TypeAlias = Callable[[Callable[[torch.Tensor], Parts], Iterable[torch.Tensor]], Iterable[Parts]]
RANGE, CHUNK = 256, 4096  # numbers of a base, and of a start
ESCAPE = 7
ENCODED_NUMBERS = {"cuda": 1 << 24}  # at once: launches take longer than their work with fewer
ROOM = 8  # numbers for which there is one escape
BY_PARTS = True
VARIABLE: tuple[str, ...] = ("escapes",)
DEFAULTS: dict[str, Any] = {}
KERNEL = "decode_exponent"
ENCODER = "encode_exponent"
_ONES = 0x0101010101010101  # the lowest bit of each of 8 bytes
_GATHER = 0x0102040810204080  # times bytes of which each is 0 or 1: the highest byte has them as bits


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`low`, `planes`, `bases`, `starts` and `escapes`. Raises InputError where numbers are not bfloat16."""
    require(dtype == "bfloat16", f"exponent stores numbers of bfloat16, not {dtype}: leave them plain")
    require(not settings, f"exponent has no settings, not {sorted(settings)[:3]}")
    numbers = prod(shape)
    return {
        "low": ((numbers,), "uint8"),
        "planes": ((3, count(numbers, 8)), "uint8"),
        "bases": ((count(numbers, RANGE),), "uint8"),
        "starts": ((count(numbers, CHUNK),), "int32"),
        "escapes": ((numbers // ROOM,), "uint8"),
    }


def encode(numbers: torch.Tensor, settings: Mapping[str, Any], each: Each = map) -> dict[str, torch.Tensor]:
    """As many escapes as there are, also beyond their room. Raises InputError for numbers that bfloat16 does not have."""
    whole = numbers.to(torch.bfloat16)
    same = whole.dtype == numbers.dtype or torch.equal(whole.to(numbers.dtype), numbers)
    require(same, f"exponent stores numbers of bfloat16: {numbers.dtype} has some that it has not")
    at_once = ENCODED_NUMBERS.get(whole.device.type, DECODED_NUMBERS)
    made = list(each(_encoded, whole.flatten().split(at_once)))
    found = {name: torch.cat([its[name] for its in made], dim=-1) for name in made[0]}
    counts = found.pop("counts")
    return found | {"starts": (counts.cumsum(0) - counts).int()}


def _encoded(numbers: torch.Tensor) -> Parts:
    """The fields of some numbers, a multiple of 4,096 or the last ones, and how many escapes each 4,096 have."""
    bits = numbers.view(torch.int16)
    exponents = (bits >> 7).to(torch.uint8)  # the sign falls off
    padded = torch.nn.functional.pad(exponents, (0, -len(bits) % CHUNK))
    bases = _bases(padded[: len(bits) + -len(bits) % RANGE].view(-1, RANGE), len(bits))
    bases = torch.nn.functional.pad(bases, (0, len(padded) // RANGE - len(bases)))
    codes = (bases[:, None] - padded.view(-1, RANGE)).clamp_(max=ESCAPE).view(-1)  # what is above the base wraps around
    codes[len(bits) :] = 0
    escaped = codes == ESCAPE
    eights = codes.view(torch.int64)
    planes = torch.stack([((eights >> plane & _ONES) * _GATHER >> 56).to(torch.uint8) for plane in range(3)])
    return {
        "low": (bits >> 8 & 128 | bits & 127).to(torch.uint8),
        "planes": planes[:, : count(len(bits), 8)],
        "bases": bases[: count(len(bits), RANGE)],
        "counts": _counts(escaped),
        "escapes": padded[escaped],
    }


def _counts(escaped: torch.Tensor) -> torch.Tensor:
    """How many of each 4,096 are True. int64: first eight bytes at a time, none of which counts more than 128."""
    in_eights = escaped.view(torch.int64).view(-1, CHUNK // 1024, 128).sum(2)
    return in_eights.view(torch.uint8).view(-1, CHUNK // 128).sum(1)


def _bases(exponents: torch.Tensor, numbers: int) -> torch.Tensor:
    """Of exponents uint8 [R, 256], so many and then zeros, the largest of the 7 neighbouring ones that most of a row have. [R]"""
    ones = exponents.new_ones(1, dtype=torch.int16).expand(exponents.shape)
    counts = exponents.new_zeros(len(exponents), 256, dtype=torch.int16).scatter_add_(1, exponents.long(), ones)
    counts[-1, 0] -= exponents.numel() - numbers
    sums = counts.cumsum(1, dtype=torch.int16)
    sums[:, ESCAPE:] -= sums[:, :-ESCAPE].clone()
    return sums.argmax(1).to(torch.uint8)


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """The numbers; in bfloat16 every bit of them."""
    into = into if into.dim() == 3 else into[:, None]
    for piece in range(len(into)):
        its = {name: field[piece] for name, field in fields.items()}
        for first, codes in _codes(its):
            _put(_numbers(its, first, codes), first, into[piece])


def _codes(fields: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The codes uint8 of a piece, some after another, each time with the place of the first."""
    whole = len(fields["low"])
    bits = torch.arange(256, device=fields["low"].device)
    spread = sum((bits >> place & 1) << 8 * place for place in range(8))  # of each byte, its bits in a byte each
    assert isinstance(spread, torch.Tensor)
    for first in range(0, whole, DECODED_NUMBERS // 2):
        last = min(first + DECODED_NUMBERS // 2, whole)
        planes = fields["planes"][:, first // 8 : count(last, 8)].long()
        eights = sum(spread.take(its) << plane for plane, its in enumerate(planes))
        assert isinstance(eights, torch.Tensor)
        yield first, eights.view(torch.uint8)[: last - first]


def _numbers(fields: Mapping[str, torch.Tensor], first: int, codes: torch.Tensor) -> torch.Tensor:
    """The numbers from place `first` on that have these codes."""
    bases = fields["bases"][first // RANGE : count(first + len(codes), RANGE)]
    exponents = bases.repeat_interleave(RANGE)[: len(codes)] - codes
    where = (codes == ESCAPE).nonzero().flatten()
    if len(where):
        chunks = torch.div(where, CHUNK, rounding_mode="floor")
        counts = torch.bincount(chunks, minlength=int(chunks[-1]) + 1)
        starts = fields["starts"][first // CHUNK :][chunks].long()
        places = starts + torch.arange(len(where), device=where.device) - (counts.cumsum(0) - counts)[chunks]
        exponents[where] = _escapes(fields["escapes"], places)
    low = fields["low"][first : first + len(codes)].short()
    return ((low & 128) << 8 | exponents.short() << 7 | low & 127).view(torch.bfloat16)


def _escapes(escapes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The exponents at these places, 0 where there is none."""
    if not len(escapes):
        return torch.zeros_like(places, dtype=torch.uint8)
    there = (places >= 0) & (places < len(escapes))
    return escapes[places.clamp(0, len(escapes) - 1)] * there


def _put(numbers: torch.Tensor, first: int, into: torch.Tensor) -> None:
    """Writes numbers in the order of rows into a matrix, from place `first` on."""
    row, column = divmod(first, into.shape[1])
    if column:
        rest = min(into.shape[1] - column, len(numbers))
        into[row, column : column + rest].copy_(numbers[:rest])
        numbers, row = numbers[rest:], row + 1
    whole = len(numbers) // into.shape[1]
    into[row : row + whole].copy_(numbers[: whole * into.shape[1]].view(whole, -1))
    if len(numbers) > whole * into.shape[1]:
        its = numbers[whole * into.shape[1] :]
        into[row + whole, : len(its)].copy_(its)


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Escapes begin where those before end, and there are as many as codes ask for."""
    for piece in range(len(fields["low"])):
        its, before = {name: field[piece] for name, field in fields.items()}, 0
        for first, codes in _codes(its):
            escaped = torch.nn.functional.pad(codes == ESCAPE, (0, -len(codes) % CHUNK)).view(-1, CHUNK).sum(1)
            wanted, starts = before + escaped.cumsum(0) - escaped, its["starts"][first // CHUNK :][: len(escaped)]
            wrong = (wanted != starts).nonzero()
            if len(wrong):
                place, told = first // CHUNK + int(wrong[0, 0]), int(starts[wrong[0, 0]])
                raise InputError(
                    f"escapes of chunk {place} begin at {told}, those before end at {int(wanted[wrong[0, 0]])}"
                )
            before += int(escaped.sum())
        held = len(its["escapes"])
        require(before <= held, f"{before} exponents are escapes, there are {held}")
