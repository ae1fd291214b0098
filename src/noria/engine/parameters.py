"""A block's bytes as tensors: its parameters as they are stored, and as a model computes with them.

Knows layouts, nothing of tiers or steps; of encodings the fields of those that are multiplied as they are stored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from noria import encodings
from noria.blocks import Block, Parameter
from noria.kernels.fp8 import Fp8Matrix, Fp8Weight
from noria.pieces import Field

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FIELD_DTYPES = TORCH_DTYPES | {"uint8": torch.uint8}  # of an encoded cache's arrays too
# Tensors; of what is multiplied as it is stored an Fp8Weight.
Parameters = dict[str, Any]


@dataclass(frozen=True)
class Undecoded:
    """A block in memory some of whose parameters are decoded before each use: its layout and its bytes."""

    block: Block
    buffer: torch.Tensor


def stored(buffer: torch.Tensor, block: Block) -> Parameters:
    """The block's parameters as they are stored, as views into `buffer` ([block.nbytes] uint8).

    Plain ones have their own shape and dtype, encoded ones are uint8 [pieces, bytes of a piece].
    """
    found = {}
    for parameter in block.parameters:
        its = buffer[parameter.offset : parameter.offset + parameter.nbytes]
        if parameter.plain:
            its = its.view(TORCH_DTYPES[parameter.dtype]).view(parameter.shape)
        else:
            its = its.view(parameter.pieces, parameter.piece.nbytes)
        found[parameter.name] = its
    return found


def named(buffer: torch.Tensor, fields: Iterable[Field]) -> Parameters:
    """These fields, by name, as views into `buffer`."""
    found = {}
    for one in fields:
        its = buffer[one.offset : one.offset + one.nbytes].view(TORCH_DTYPES[one.dtype])
        lies = (*one.shape[:-2], one.shape[-1], one.shape[-2]) if one.turned else one.shape
        found[one.name] = its.view(lies).transpose(-1, -2) if one.turned else its.view(lies)
    return found


def views(buffer: torch.Tensor, block: Block) -> Parameters:
    """What a model computes with of the parameters that are not decoded, as views into `buffer` ([block.nbytes] uint8)."""
    found: Parameters = {}
    numbers = stored(buffer, block)
    for parameter in block.parameters:
        if parameter.plain:
            found |= _computed(numbers[parameter.name], parameter)
        elif parameter.multiplied:
            found[parameter.name] = _multiplied(numbers[parameter.name], parameter)
    return found


def _multiplied(pieces: torch.Tensor, parameter: Parameter) -> Fp8Weight:
    """Codes and scales of a parameter's matrices, as views into its only piece [1, bytes]."""
    fields = [encodings.fields_of(parameter.piece, number, pieces) for number in range(len(parameter.piece.matrices))]
    matrices = tuple(Fp8Matrix(its["codes"][0], its["scales"][0]) for its in fields)
    rows, columns = parameter.settings.get("block_size", (1, parameter.shape[1]))
    return Fp8Weight(matrices, (rows, columns))


def place(buffer: torch.Tensor, block: Block) -> Parameters | Undecoded:
    """A block in memory as it stays there: views, or what is decoded before each use."""
    return Undecoded(block, buffer) if block.encoded else views(buffer, block)


def _computed(numbers: torch.Tensor, parameter: Parameter) -> Parameters:
    """The tensors that a plain parameter is computed as, by name: views, of a transposed matrix the transpose."""
    names, found, row = list(parameter.computed), {}, 0
    if names == [parameter.name]:
        return {parameter.name: numbers}
    transposed = {f"{parameter.name}.{matrix.name}": matrix.transposed for matrix in parameter.piece.matrices}
    for name, shape in parameter.computed.items():
        rows = shape[-1] if transposed[name] else shape[-2]
        its = numbers[..., row : row + rows, :]
        found[name] = its.transpose(-1, -2) if transposed[name] else its
        row += rows
    return found
