"""Whole numbers of 8 bits with a scale, and perhaps a zero, for a group of inputs: `_integers.py` says how they lie.

Settings: group_size (a multiple of 16, or -1 for a whole row), symmetric (without zeros), permuted (groups of inputs in another
order), scale_dtype. By default 8.25 bits: groups of 64, symmetric.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _integers
from noria.kernels.stored import TileForm

BITS = 8
VARIABLE: tuple[str, ...] = ()
DEFAULTS: dict[str, Any] = {"group_size": 64, "symmetric": True, "permuted": False, "scale_dtype": "bfloat16"}
KERNEL = "decode_int8"
rows = _integers.rows


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`codes`, `scales`, `zeros` unless symmetric, `permutation` if permuted."""
    return _integers.fields(BITS, shape, settings)


def form(settings: Mapping[str, Any]) -> TileForm | None:
    """Whole numbers; none where groups are of inputs in another order."""
    return _integers.form(BITS, settings)


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """With searched clipping: the scale of a group is the one of several that leaves the least squared error."""
    return _integers.encode(BITS, numbers, settings)


def quick(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """By the extremes of each group."""
    return _integers.quick(BITS, numbers, settings)


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """(code - zero) x scale, rounded once."""
    _integers.decode(BITS, fields, settings, into)


def most(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> float:
    """What no number is above."""
    return _integers.most(BITS, fields)


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Scales are finite, zeros are any byte, a permutation has each input once."""
    _integers.check(BITS, fields, shape, settings)
