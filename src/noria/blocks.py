"""What a model looks like as bytes: its parameters, and the layout of its layer blocks.

A block (`embed`, `layers/0007`, `head`) is one contiguous run of bytes, the same on disk, in CPU memory and on the GPU.
This file knows no torch, no file and no rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from noria.limits import CODED, CODED_BITS, CODED_NUMBERS, IN_TILES
from noria.pieces import PLAIN, VIEW_ALIGNMENT, Encoded, Field, Matrix, Piece, Wanted

ALIGNMENT = 4096  # every parameter starts at a multiple of it: one page of memory, one sector run of a disk
DTYPE_NBYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # what numbers are computed in


@dataclass(frozen=True)
class Parameter:
    """One parameter of a block: its numbers, how they are stored, and where in the block.

    dtype: of its numbers when they are computed. own_dtype: the dtype below which it is not computed, whatever the run's.
    pieces: how many runs of bytes it has, one after another, all like `piece`: an expert each, or one with all of it.
    offset: bytes from the start of the block. multiplied: products take it as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    pieces: int
    piece: Piece
    own_dtype: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    offset: int = 0
    multiplied: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""
        return self.pieces * self.piece.nbytes

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def computed_nbytes(self) -> int:
        """Bytes of the numbers as they are computed."""
        return self.nbytes if self.multiplied else self.numbers * DTYPE_NBYTES[self.dtype]

    @property
    def between_nbytes(self) -> int:
        """Bytes that one token takes as inputs and outputs of its products."""
        sizes = (sum(matrix.shape) for matrix in self.piece.matrices if len(matrix.shape) == 2)
        return self.pieces * sum(sizes) * DTYPE_NBYTES[self.dtype]

    @property
    def plain(self) -> bool:
        return self.encoding == PLAIN

    @property
    def in_tiles(self) -> bool:
        """Whether kernels multiply it as it is stored, where rows are few: programs decode their own tiles."""
        whole = self.settings.get("group_size", -1).bit_count() == 1  # of -1 too
        return self.encoding in IN_TILES and whole and not self.settings.get("permuted", False)

    @property
    def may_be_coded(self) -> bool:
        """Whether it is coded where its block is coded without loss: large matrices of bfloat16."""
        large = len(self.shape) > 1 and self.numbers >= CODED_NUMBERS * self.pieces
        return self.plain and self.dtype == "bfloat16" and large

    @property
    def computed(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that it is computed as, by name: itself, or of its named matrices one each, such as
        experts.down [pieces, outputs, inputs]."""
        if not self.piece.matrices[0].name:
            return {self.name: self.shape}
        outputs = dict.fromkeys((matrix.name for matrix in self.piece.matrices), 0)
        for matrix in self.piece.matrices:
            outputs[matrix.name] += matrix.shape[0]
        first, inputs = self.shape[:-2], {matrix.name: matrix.shape[1:] for matrix in self.piece.matrices}
        return {f"{self.name}.{name}": (*first, number, *inputs[name]) for name, number in outputs.items()}

    def decoded(self, pieces: int | None = None) -> tuple[Field, ...]:
        """The tensors that so many of its pieces are decoded to (None: all), one behind the other; they lie as plain ones do,
        so that products read the same memory in the same order."""
        turned = {f"{self.name}.{its.name}" for its in _turned(self.wanted).matrices if its.transposed}
        found: list[Field] = []
        for name, shape in self.computed.items():
            its = shape if pieces is None else (pieces, *shape[1:])
            found.append(Field(name, its, self.dtype, round_up(end_of(found)), name in turned))
        return tuple(found)

    @property
    def wanted(self) -> Wanted:
        """What its family says of it."""
        return Wanted(self.shape, self.own_dtype, self.piece.matrices)

    @property
    def encoded(self) -> Encoded | None:
        return None if self.plain else Encoded(self.encoding, self.settings, self.piece, self.multiplied)

    def place(self, piece: int) -> tuple[int, int]:
        """Where a piece lies: offset from the start of the block, and bytes."""
        assert 0 <= piece < self.pieces, (self.name, piece)
        return self.offset + piece * self.piece.nbytes, self.piece.nbytes


@dataclass(frozen=True)
class Block:
    """The layout of one block. `nbytes` is a multiple of ALIGNMENT."""

    name: str
    parameters: tuple[Parameter, ...]
    nbytes: int

    @cached_property
    def numbers(self) -> int:
        return sum(parameter.numbers for parameter in self.parameters)

    @cached_property
    def widest(self) -> int:
        """The largest first dimension of a parameter."""
        return max(parameter.shape[0] for parameter in self.parameters)

    @cached_property
    def expert_numbers(self) -> int:
        """Those of parameters in several pieces, of which a token needs a few."""
        return sum(parameter.numbers for parameter in self.parameters if parameter.pieces > 1)

    @cached_property
    def computed_nbytes(self) -> int:
        """Bytes that products read."""
        return sum(parameter.computed_nbytes for parameter in self.parameters)

    @cached_property
    def expert_nbytes(self) -> int:
        return sum(parameter.computed_nbytes for parameter in self.parameters if parameter.pieces > 1)

    @cached_property
    def stored_expert_nbytes(self) -> int:
        """Bytes of experts as they are stored."""
        return sum(parameter.nbytes for parameter in self.parameters if parameter.pieces > 1)

    @cached_property
    def between_nbytes(self) -> int:
        """Bytes that one token takes as inputs and outputs of all products, with every expert."""
        return sum(parameter.between_nbytes for parameter in self.parameters)

    @cached_property
    def expert_between_nbytes(self) -> int:
        return sum(parameter.between_nbytes for parameter in self.parameters if parameter.pieces > 1)

    @cached_property
    def encoded(self) -> tuple[Parameter, ...]:
        """The parameters that are decoded before they are used."""
        return tuple(one for one in self.fielded if not one.multiplied)

    @cached_property
    def fielded(self) -> tuple[Parameter, ...]:
        """The parameters that are stored in fields of an encoding."""
        return tuple(parameter for parameter in self.parameters if not parameter.plain)

    @cached_property
    def decoded(self) -> tuple[Field, ...]:
        """The tensors that its encoded parameters are computed as, one behind the other."""
        found: list[Field] = []
        for parameter in self.encoded:
            start = round_up(end_of(found))
            found += [replace(one, offset=start + one.offset) for one in parameter.decoded()]
        return tuple(found)

    @cached_property
    def decoded_nbytes(self) -> int:
        """Bytes of these tensors."""
        return round_up(end_of(self.decoded))

    def decoding_room(self, most: int) -> int:
        """Bytes that it is decoded through where there are `most`: all, or some at a time, a piece of a parameter at least."""
        return min(self.decoded_nbytes, max(most, self._largest_part))

    @cached_property
    def _largest_part(self) -> int:
        """Bytes of the largest parameter, or piece of one, that is decoded at a time."""
        return round_up(max((end_of(one.decoded(1 if one.pieces > 1 else None)) for one in self.encoded), default=0))

    @cached_property
    def decoding_nbytes(self) -> int:
        """Bytes that are read and written where a visit decodes them."""
        return self.decoded_nbytes + sum(parameter.nbytes for parameter in self.encoded)

    @cached_property
    def decoding_expert_nbytes(self) -> tuple[int, int]:
        """Those of parameters in several pieces; of these, those that few rows take as they are stored."""
        every = [(one.computed_nbytes + one.nbytes, one.in_tiles) for one in self.encoded if one.pieces > 1]
        return sum(nbytes for nbytes, _ in every), sum(nbytes for nbytes, in_tiles in every if in_tiles)

    @cached_property
    def coded(self) -> "Block":
        """The layout that is expected of the block, as a run has it, coded without loss; itself where nothing is coded."""
        held = {one.name: one.encoded for one in self.fielded}
        for parameter in (one for one in self.parameters if one.may_be_coded):
            nbytes = round_up(int(parameter.numbers // parameter.pieces * CODED_BITS / 8), VIEW_ALIGNMENT)
            held[parameter.name] = Encoded(CODED, {}, Piece(nbytes, (), parameter.piece.matrices))
        if not any(one.may_be_coded for one in self.parameters):
            return self
        return lay_out(self.name, {one.name: one.wanted for one in self.parameters}, "bfloat16", held)

    @cached_property
    def _casts(self) -> dict[str, tuple["Block", bool]]:
        return {}

    def plain(self, dtype: str) -> "Block":
        """The layout of the block in a run in `dtype` with none of its parameters to be decoded."""
        held = {one.name: one.encoded for one in self.fielded if one.multiplied}
        wanted = {one.name: _turned(one.wanted) if one.name not in held else one.wanted for one in self.parameters}
        return lay_out(self.name, wanted, dtype, held)

    def cast(self, dtype: str) -> "Block":
        """The layout of the block as a run in `dtype` has it: plain numbers are of that, or of a wider one of their own; encoded
        ones stay as they are stored."""
        return self._cast(dtype)[0]

    def changes(self, dtype: str) -> bool:
        """Whether bytes of the block are others in a run in `dtype`."""
        return self._cast(dtype)[1]

    def _cast(self, dtype: str) -> tuple["Block", bool]:
        if dtype not in self._casts:  # kept: a plan asks for every block of every candidate
            encoded = {one.name: one.encoded for one in self.fielded}
            made = lay_out(self.name, {one.name: one.wanted for one in self.parameters}, dtype, encoded)
            pairs = zip(self.parameters, made.parameters, strict=True)
            self._casts[dtype] = made, any(one.piece != other.piece for one, other in pairs)
        return self._casts[dtype]


def end_of(fields: Sequence[Field]) -> int:
    """Where the last of these fields ends; 0 without any."""
    return fields[-1].offset + fields[-1].nbytes if fields else 0


def round_up(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def wider(own: str | None, dtype: str) -> str:
    """The dtype in which what has a dtype of its own, if it has one, is computed in a run in `dtype`."""
    return own if own and DTYPE_NBYTES[own] >= DTYPE_NBYTES[dtype] else dtype


def lay_out(
    name: str,
    shapes: Mapping[str, tuple[int, ...] | Wanted],
    dtype: str,
    encoded: Mapping[str, Encoded | None] | None = None,
) -> Block:
    """The block of parameters with these shapes, in this order, each starting at a multiple of ALIGNMENT.

    `encoded` says how those that are not plain are stored.
    """
    parameters, offset = [], 0
    for parameter, shape in shapes.items():
        wanted = shape if isinstance(shape, Wanted) else Wanted(tuple(shape))
        computed = wider(wanted.dtype, dtype)
        held = (encoded or {}).get(parameter) or _plain(wanted, computed)
        of_form = held.encoding, wanted.pieces, held.piece, wanted.dtype, held.settings
        laid = Parameter(parameter, wanted.shape, computed, *of_form, offset, held.multiplied)
        parameters.append(laid)
        offset += round_up(laid.nbytes)
    return Block(name, tuple(parameters), offset)


def _turned(wanted: Wanted) -> Wanted:
    """What is stored plain has matrices of as many columns as its shape: the others lie transposed."""
    columns = wanted.shape[-1]
    matrices = [replace(one, transposed=len(one.shape) > 1 and one.shape[1] != columns) for one in wanted.matrices]
    return replace(wanted, matrices=tuple(matrices) if wanted.named else ())


def _plain(wanted: Wanted, dtype: str) -> Encoded:
    """Numbers as they are computed, the matrices one after another without gaps."""
    matrices = wanted.matrices or (Matrix("", wanted.shape[1:] if wanted.pieces_first else wanted.shape),)
    fields: list[Field] = []
    for number, matrix in enumerate(matrices):
        name = f"{number}.numbers" if len(matrices) > 1 else "numbers"
        fields.append(Field(name, matrix.stored, dtype, sum(field.nbytes for field in fields)))
    return Encoded(PLAIN, {}, Piece(sum(field.nbytes for field in fields), tuple(fields), matrices))


def dtype_of(blocks: Iterable[Block]) -> str:
    """The dtype of the model that these blocks are stored for: of the parameters that have none of their own."""
    return next(p.dtype for block in blocks for p in block.parameters if p.own_dtype is None)


def layer_name(layer: int) -> str:
    return f"layers/{layer:04d}"
