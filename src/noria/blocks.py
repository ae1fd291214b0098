"""What a model looks like as bytes: its sizes, and the layout of its layer blocks.

A block (`embed`, `layers/0007`, `head`) is one contiguous run of bytes, the same on disk, in CPU memory and on the GPU.
This file knows no torch, no file and no rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

ALIGNMENT = 4096  # every parameter starts at a multiple of it: one page of memory, one sector run of a disk
DTYPE_NBYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Parameter:
    """One parameter's place in its block: `offset` and `nbytes` in bytes from the start of the block."""

    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Block:
    """The layout of one block. `nbytes` is a multiple of ALIGNMENT."""

    name: str
    dtype: str
    parameters: tuple[Parameter, ...]
    nbytes: int


def round_up(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def lay_out(name: str, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Block:
    """The block of parameters with these shapes, in this order, each starting at a multiple of ALIGNMENT."""
    parameters, offset = [], 0
    for parameter, shape in shapes.items():
        nbytes = prod(shape) * DTYPE_NBYTES[dtype]
        parameters.append(Parameter(parameter, tuple(shape), offset, nbytes))
        offset += round_up(nbytes)
    return Block(name, dtype, tuple(parameters), offset)


def layer_name(layer: int) -> str:
    return f"layers/{layer:04d}"
