"""Numbers of 8 bits (e4m3) with a scale for each output; what has one scale a tensor is stored so, with equal ones.

`codes` uint8 [outputs, inputs]; `scales` [outputs, 1], float32 or powers of two (uint8, e8m0: 2 ** (code - 127)).
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _fp8, _scales
from noria.errors import require
from noria.kernels.stored import WHOLE_ROW, TileForm

VARIABLE: tuple[str, ...] = ()
DEFAULTS: dict[str, Any] = {"scale_dtype": "float32"}
KERNEL = "decode_fp8"
most = _fp8.most


def block(shape: tuple[int, ...], settings: Mapping[str, Any]) -> _fp8.Block:
    """The outputs and inputs that share a scale: one output, all inputs."""
    return 1, max(shape[1], 1)


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`codes` and `scales`. Raises InputError for a vector."""
    require(len(shape) == 2, f"fp8_channel stores matrices, not a parameter of shape {list(shape)}")
    return {"codes": (shape, "uint8"), "scales": ((shape[0], 1), _scales.field_dtype(settings))}


def form(settings: Mapping[str, Any]) -> TileForm:
    """e4m3 under the scales of outputs."""
    return _fp8.form(settings, 1, WHOLE_ROW)


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Codes and scales of numbers [outputs, inputs]. Raises InputError for those that are not finite."""
    return _fp8.encode(numbers, block(tuple(numbers.shape), settings), settings)


def rows(settings: Mapping[str, Any]) -> int:
    """Each output has its own scale."""
    return 1


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """Codes times the scales of their outputs."""
    _fp8.decode(fields, block(tuple(into.shape[1:]), settings), into)


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Raises InputError for scales or codes that are no numbers."""
    _fp8.check(fields)
