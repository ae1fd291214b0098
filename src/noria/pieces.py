"""What a parameter consists of: pieces, the matrices of numbers in a piece, and the fields that hold them.

Knows no torch, no file and no block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

VIEW_ALIGNMENT = 16  # bytes: a view in any dtype may begin there; of fields, states and arrays of a message
# Bytes of a number of a field.
FIELD_NBYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int8": 1, "uint8": 1}
PLAIN = "plain"  # the encoding that stores numbers as they are


@dataclass(frozen=True)
class Field:
    """An array of a piece, `offset` bytes from the start of the piece on; turned: the last dimension but one lies innermost."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    turned: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * FIELD_NBYTES[self.dtype]


@dataclass(frozen=True)
class Matrix:
    """Numbers [outputs, inputs] (or a vector) in a piece, which are encoded by themselves; `transposed`: stored [inputs,
    outputs]. Those of one name lie one after another along the outputs of one computed tensor."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    def within(self, parameter: str) -> str:
        """The name of the computed tensor that it is in, of a parameter of this name."""
        return f"{parameter}.{self.name}" if self.name else parameter

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape as it is stored."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Piece:
    """What each piece of a parameter is: the matrices in it, and the fields that hold them.

    Where there are several matrices a field's name begins with the number of its matrix: `0.codes`.
    """

    nbytes: int
    fields: tuple[Field, ...]
    matrices: tuple[Matrix, ...]

    def fields_of(self, number: int) -> dict[str, Field]:
        """The fields of one matrix, by their names in its encoding."""
        prefix = self.prefix(number)
        return {one.name.removeprefix(prefix): one for one in self.fields if one.name.startswith(prefix)}

    def prefix(self, number: int) -> str:
        return f"{number}." if len(self.matrices) > 1 else ""


@dataclass(frozen=True)
class Wanted:
    """What a family says of a parameter where its shape alone does not say it.

    dtype: the parameter's own, where it needs more precision than the model has. matrices: what a piece consists of.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    matrices: tuple[Matrix, ...] = ()

    @property
    def pieces_first(self) -> bool:
        """Whether the first dimension counts pieces: of three dimensions it does (experts)."""
        return len(self.shape) == 3

    @property
    def pieces(self) -> int:
        return self.shape[0] if self.pieces_first else 1

    @property
    def named(self) -> bool:
        """Whether its matrices are computed by names of their own."""
        return bool(self.matrices) and bool(self.matrices[0].name)


@dataclass(frozen=True)
class Encoded:
    """How a parameter is stored: the encoding (a file of encodings/), its settings, and what each piece is.

    multiplied: it is multiplied as it is stored, and never decoded.
    """

    encoding: str
    settings: Mapping[str, Any]
    piece: Piece
    multiplied: bool = False
