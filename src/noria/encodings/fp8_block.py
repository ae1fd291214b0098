"""Numbers of 8 bits (e4m3) with a scale for each block of outputs and inputs, as published FP8 checkpoints have them.

`codes` uint8 [outputs, inputs]; `scales` [blocks of outputs, blocks of inputs], float32 or powers of two (uint8, e8m0:
2 ** (code - 127)). The blocks at the edges may be partial.
"""

from collections.abc import Mapping
from typing import Any

import torch

from noria.encodings import _fp8, _scales
from noria.errors import require
from noria.kernels.stored import TileForm

VARIABLE: tuple[str, ...] = ()
DEFAULTS: dict[str, Any] = {"block_size": [128, 128], "scale_dtype": "float32"}
KERNEL = "decode_fp8"
most = _fp8.most


def block(shape: tuple[int, ...], settings: Mapping[str, Any]) -> _fp8.Block:
    """The outputs and inputs that share a scale. Raises InputError for a `block_size` that is none."""
    said = settings["block_size"]
    whole = isinstance(said, list) and len(said) == 2 and all(type(size) is int and 0 < size < 2**31 for size in said)
    require(whole, f"block_size is {said!r}: it must be two whole numbers above 0, of outputs and inputs")
    return said[0], said[1]


def fields(shape: tuple[int, ...], dtype: str, settings: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """`codes` and `scales`. Raises InputError for a vector."""
    require(len(shape) == 2, f"fp8_block stores matrices, not a parameter of shape {list(shape)}")
    rows, columns = block(shape, settings)
    blocks = -(-shape[0] // rows), -(-shape[1] // columns)
    return {"codes": (shape, "uint8"), "scales": (blocks, _scales.field_dtype(settings))}


def form(settings: Mapping[str, Any]) -> TileForm:
    """e4m3 under the scales of blocks."""
    rows, columns = block((0, 0), settings)
    return _fp8.form(settings, rows, columns)


def encode(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Codes and scales of numbers [outputs, inputs]. Raises InputError for those that are not finite."""
    return _fp8.encode(numbers, block(tuple(numbers.shape), settings), settings)


def quick(numbers: torch.Tensor, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same, of whatever numbers."""
    return _fp8.quick(numbers, block(tuple(numbers.shape), settings), settings)


def rows(settings: Mapping[str, Any]) -> int:
    """Whole blocks."""
    return block((0, 0), settings)[0]


def decode(fields: Mapping[str, torch.Tensor], settings: Mapping[str, Any], into: torch.Tensor) -> None:
    """Codes times the scales of their blocks."""
    _fp8.decode(fields, block(tuple(into.shape[1:]), settings), into)


def check(fields: Mapping[str, torch.Tensor], shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Raises InputError for scales or codes that are no numbers."""
    _fp8.check(fields)
