"""MXFP4: numbers of 4 bits with a power of two for each 32 inputs (OCP Microscaling Formats, version 1.0; 4.25 bits).

`codes` uint8 [outputs, half of the inputs, rounded up]: e2m1, two a byte, the first input in the low half, as gpt-oss is
published. `scales` uint8 [outputs, groups]: s stands for 2^(s - 127) (e8m0).
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _e2m1, _groups, _scales
from noria.kernels.stored import E2M1, POWERS, TileForm

GROUP = 32
VARIABLE: tuple[str, ...] = ()
DEFAULTS: dict[str, Any] = {}
KERNEL = "decode_e2m1"


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`codes` and `scales`."""
    _groups.check_settings("mxfp4", settings, {})
    outputs, inputs = _groups.matrix("mxfp4", shape)
    return {
        "codes": ((outputs, _groups.count(inputs, 2)), "uint8"),
        "scales": ((outputs, _groups.count(inputs, GROUP)), "uint8"),
    }


def form(settings: Mapping[str, Any]) -> TileForm:
    """e2m1 under powers of two."""
    return TileForm(E2M1, POWERS, GROUP)


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The specification's way: the scale by the exponent of a group's largest number, less that of e2m1's largest;
    numbers beyond 6 scales become 6."""
    codes, scales = [], []
    for some in _groups.finite("mxfp4", numbers).split(max(1, _groups.CHUNK // numbers.shape[1])):
        groups = _groups.grouped(some, GROUP)
        exponents = torch.frexp(groups.abs().amax(2)).exponent - 1 - 2
        powers = torch.where(groups.any(2), exponents, -127).clamp(-127, 127)
        scaled = torch.ldexp(groups.double(), -powers[..., None]).float()
        codes.append(_groups.packed(_e2m1.nearest(scaled).flatten(1)[:, : numbers.shape[1]]))
        scales.append((powers + 127).to(torch.uint8))
    return {"codes": torch.cat(codes), "scales": torch.cat(scales)}


def rows(settings: Mapping[str, Any]) -> int:
    """Each output has its own scales."""
    return 1


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """Code times scale, rounded once."""
    dtype = _scales.wide(into.dtype)
    for piece, rows, _ in _scales.parts(into, 1):
        scales = _scales.values(fields["scales"][piece, rows])
        values = _e2m1.values(fields["codes"][piece, rows], into.shape[2], dtype)
        into[piece, rows].copy_(_groups.scale(values, GROUP, scales.to(dtype)))


def most(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> float:
    """The largest code under the largest scale."""
    return float(_scales.values(fields["scales"]).max()) * _e2m1.LARGEST


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """No scale is nan."""
    _scales.check(fields["scales"])
    _groups.check_halves(fields["codes"], shape[1])
