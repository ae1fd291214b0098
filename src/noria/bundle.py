"""What travels from layer to layer: hidden states, and the arrays that a family names beside them; their bytes in a message.

A border lies before every layer and after the last one. Pure arithmetic: no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod

from noria.arrays import Array
from noria.blocks import DTYPE_NBYTES, round_up, wider
from noria.model import ModelShape
from noria.pieces import FIELD_NBYTES, VIEW_ALIGNMENT

NBYTES = FIELD_NBYTES | {"int64": 8, "int16": 2}


@dataclass(frozen=True)
class Bundle:
    """The arrays at a border, each with a dtype. A message holds them one after another: [T, *row] of a step's T tokens."""

    arrays: tuple[Array, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(array.name for array in self.arrays)

    @cached_property
    def row_nbytes(self) -> tuple[int, ...]:
        """Bytes of one token in each array."""
        return tuple(prod(array.row) * NBYTES[array.dtype or ""] for array in self.arrays)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token."""
        return sum(self.row_nbytes)

    def starts(self, num_tokens: int) -> list[int]:
        """The first byte of each array in a message of so many tokens, and the message's length."""
        if len(self.row_nbytes) == 1:  # hidden states alone: asked for again and again
            return [0, num_tokens * self.row_nbytes[0]]
        sizes = [num_tokens * nbytes for nbytes in self.row_nbytes]
        return [0, *accumulate([*(round_up(size, VIEW_ALIGNMENT) for size in sizes[:-1]), sizes[-1]])]

    def nbytes(self, num_tokens: int) -> int:
        """Bytes of a message of so many tokens."""
        return self.starts(num_tokens)[-1]


def of_hidden(hidden_size: int, dtype: str) -> Bundle:
    """Hidden states alone."""
    return Bundle((Array("hidden", (hidden_size,), dtype=dtype),))


def borders_of(shape: ModelShape, dtype: str) -> list[Bundle]:
    """What travels at each border of a model [L + 1], in a run of this dtype."""
    hidden, beside = of_hidden(shape.hidden_size, dtype), shape.bundle
    if not beside:
        return [hidden] * (shape.num_layers + 1)
    borders = shape.num_layers + 1
    assert len(beside) == borders, (
        f"{shape.family}: a bundle at {len(beside)} borders, {borders - 1} layers have {borders}"
    )
    return [Bundle((*hidden.arrays, *(typed(array, dtype) for array in arrays))) for arrays in beside]


def typed(array: Array, dtype: str) -> Array:
    """With the dtype that it has in a run: the wider one of floats, its own of integers."""
    whole = array.dtype is not None and array.dtype not in DTYPE_NBYTES
    return array if whole else replace(array, dtype=wider(array.dtype, dtype))


def most_nbytes(borders: Sequence[Bundle], num_tokens: int) -> int:
    """Bytes of a buffer for any message of so many tokens at these borders, and for the next one to be aligned behind it."""
    if len(borders) == 1:  # hidden states alone: asked for again and again
        return round_up(borders[0].nbytes(num_tokens), VIEW_ALIGNMENT)
    different = {id(border): border for border in borders}.values()
    return max((round_up(border.nbytes(num_tokens), VIEW_ALIGNMENT) for border in different), default=0)


def token_nbytes(borders: Sequence[Bundle]) -> int:
    """Bytes of a token at all of these borders together."""
    return sum(border.token_nbytes for border in borders)


def within(borders: Sequence[Bundle], stages: Sequence[range]) -> list[Bundle]:
    """The borders before, between and after the layers of these stages."""
    return [border for layers in stages for border in borders[layers.start : layers.stop + 1]]


def turns(in_host: bool, bundles: Sequence[Bundle]) -> int:
    """Buffers that a rank which is its own next one needs for a group: two where it may write one while it reads the other."""
    return 2 if in_host or any(len(bundle.arrays) > 1 for bundle in bundles) else 1
