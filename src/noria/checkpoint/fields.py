"""Parameters that a directory has as fields of an encoding already: which they are, how they lie, and their bytes.

What a matrix is made of is its format's to say (published/). Matrices are read whole, the next ones while one is on its
way to the file. Knows no format and no family's names.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType

import torch

from noria import encodings, kinds
from noria.blocks import Block, Parameter, lay_out
from noria.checkpoint.checkpoint import block_names, model_block
from noria.checkpoint.published import Form, notes
from noria.checkpoint.published._tensors import Published
from noria.checkpoint.sources import PieceSource, Place, as_they_lie, naming, spellings
from noria.checkpoint.tensor_files import Reader, Tensor, ahead
from noria.encodings import Fields
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.models._sources import Slice
from noria.pieces import Encoded, Field, Matrix

WEIGHT = ".weight"


class FieldSources:
    """The parameters of a model that its directory, of `tensors`, has in the fields of `form`; none without one.

    Raises InputError for one of which only a part is in fields, or in different ones, or not in the shape that
    config.json asks for.
    """

    def __init__(self, family: ModuleType, shape: ModelShape, form: Form | None, tensors: Iterable[str] = ()):
        self._form, self._reader = form, Reader()
        self._aside = tuple(f"_{ending}" for ending in form.ASIDE) if form else ()
        self._found: dict[Place, list[Published]] = {}
        names_of = naming(family, shape, tensors)
        for block in block_names(shape) if form else ():
            wanted = names_of(block)
            for parameter in model_block(family, shape, block, "float32").parameters:
                found = [_matrix(name, form, family) for name in wanted[parameter.name]]
                if any(found):
                    names = wanted[parameter.name]
                    whole = _of_one_form(f"{block}/{parameter.name}", names, found)
                    whole = as_they_lie(block, parameter, names, whole, partial(_fit, parameter))
                    gathered = block == "embed" or (shape.tied and parameter.name == "lm_head")
                    require(
                        not gathered,
                        f"{whole[0].shard}: {whole[0].module!r} is quantized: rows of an embedding are gathered,"
                        " from plain numbers; take the unquantized model",
                    )
                    self._found[block, parameter.name] = whole

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, place: object) -> bool:
        return place in self._found

    @property
    def tensors(self) -> dict[Place, list[Tensor]]:
        """The tensors that the parameters are made of."""
        return {place: [its for one in found for its in one.tensors] for place, found in self._found.items()}

    def aside(self, tensors: Mapping[str, Tensor]) -> tuple[set[str], list[str]]:
        """Names of tensors that nothing is made of, as they change no number, and notes on what they serve.

        They serve the rounding of activations or of the cache, or are biases of zeros, which some programs write.
        """
        if self._form is None:
            return set(), []
        modules = {one.module for found in self._found.values() for one in found}
        serving = {name for name in tensors if f"_{name.rpartition('.')[2]}".endswith(self._aside)}
        biases = {f"{module}.bias" for module in modules} & tensors.keys()
        zeros = {name for name in biases if not any(chunk.any() for chunk in self._reader.chunks(tensors[name]))}
        return serving | zeros, notes(self._form, serving)

    def lay_out(self, block: Block, dtype: str) -> Block:
        """The layout of a plain block with the parameters that are stored in fields."""
        found = {
            parameter.name: self._encoded(block, parameter, dtype)
            for parameter in block.parameters
            if (block.name, parameter.name) in self._found
        }
        wanted = {parameter.name: parameter.wanted for parameter in block.parameters}
        return lay_out(block.name, wanted, dtype, found) if found else block

    def _encoded(self, block: Block, parameter: Parameter, dtype: str) -> Encoded:
        matrices = self._piece(block, parameter, 0)
        encoding = matrices[0].encoding
        settings = kinds.load("encodings", encoding).DEFAULTS | matrices[0].settings
        laid = [Matrix("", matrix.shape) for matrix in matrices]
        if parameter.wanted.named:
            laid = _named(parameter, matrices)
        return Encoded(encoding, settings, encodings.capacity(encoding, laid, dtype, settings))

    def _piece(self, block: Block, parameter: Parameter, number: int) -> Sequence[Published]:
        """The matrices of a piece."""
        found = self._found[block.name, parameter.name]
        each = len(found) // parameter.pieces
        return found[number * each : (number + 1) * each]

    def chunks(self, block: Block, parameter: Parameter) -> Iterator[memoryview]:
        """The bytes of a parameter, piece by piece. Raises InputError for fields that its encoding does not have."""
        kind, found = kinds.load("encodings", parameter.encoding), self._found[block.name, parameter.name]
        numbers = [*range(len(parameter.piece.matrices))] * parameter.pieces
        fields = ahead(partial(self._fields, kind, parameter), found, parameter.nbytes // len(found))
        for number, its in zip(numbers, fields, strict=True):
            yield from _bytes(parameter, number, its)

    def _fields(self, kind: ModuleType, parameter: Parameter, matrix: Published) -> Fields:
        """The fields of a matrix, by their names in its encoding."""
        made = {name: value.contiguous() for name, value in matrix.fields(self._reader).items()}
        try:
            kind.check({name: value[None] for name, value in made.items()}, matrix.shape, parameter.settings)
        except InputError as error:
            raise InputError(
                f"{matrix.shard}: {matrix.module!r}, stored as {parameter.encoding}: {error}: the directory is"
                " damaged, download it again"
            ) from error
        return made


def _matrix(name: str, form: Form | None, family: ModuleType) -> Published | None:
    """What the form has of the tensor with this name, or with one that older checkpoints give it."""
    assert form is not None, name
    number = name.number if isinstance(name, Slice) else None
    if number is None and not name.endswith(WEIGHT):
        return None
    found = (form.matrix(its.removesuffix(WEIGHT), number) for its in spellings(str(name), family.ALIASES))
    return next((matrix for matrix in found if matrix), None)


def _of_one_form(where: str, names: Sequence[str], found: Sequence[Published | None]) -> list[Published]:
    """All of them. Raises InputError if one is missing, or in another form than the first."""
    whole = [one for one in found if one]
    first = whole[0]
    for name, one in zip(names, found, strict=True):
        words = one and f"{one.encoding} {dict(one.settings) or ''}".strip()
        if one is None or (one.encoding, one.settings) != (first.encoding, first.settings):
            raise InputError(
                f"{first.shard}: {first.module!r} is stored as {first.encoding} {dict(first.settings) or ''},"
                f" {name.removesuffix(WEIGHT)!r} {f'as {words}' if words else 'is not'}: both are parts of {where}, which"
                " this version of Noria stores in one form; take the unquantized model"
            )
    return whole


def _fit(parameter: Parameter, found: Sequence[PieceSource]) -> bool:
    """Whether matrices make the parameter."""
    if parameter.wanted.named:
        each = len(found) // parameter.pieces
        return all(_named(parameter, found[first : first + each]) for first in range(0, len(found), each))
    rows = sum(one.shape[0] for one in found)
    return all((rows, one.shape[1]) == parameter.shape for one in found)


def _named(parameter: Parameter, found: Sequence[PieceSource]) -> list[Matrix]:
    """The matrices of a piece, each with the name of the one that it is, or is the next rows of; none where they make others."""
    made, rest = list[Matrix](), list(parameter.piece.matrices)
    for one in found:
        if not rest or one.shape[0] > rest[0].shape[0] or one.shape[1:] != rest[0].shape[1:]:
            return []
        whole = rest.pop(0)
        made.append(Matrix(whole.name, one.shape))
        if left := whole.shape[0] - one.shape[0]:
            rest.insert(0, Matrix(whole.name, (left, *one.shape[1:])))
    return [] if rest else made


def _bytes(parameter: Parameter, number: int, fields: Fields) -> Iterator[memoryview]:
    """The fields of a matrix as they lie in its piece, and the zeros behind each."""
    piece = parameter.piece
    ends = [one.offset for one in piece.fields[1:]] + [piece.nbytes]
    next_of = {one.name: end for one, end in zip(piece.fields, ends, strict=True)}
    for name, one in piece.fields_of(number).items():
        its = fields[name]
        _check_field(one, its)
        yield its.view(-1).view(torch.uint8).numpy().data
        if gap := next_of[one.name] - one.offset - one.nbytes:
            yield memoryview(bytes(gap))


def _check_field(one: Field, its: torch.Tensor) -> None:
    right = its.dtype == getattr(torch, one.dtype) and tuple(its.shape) == one.shape
    assert right, f"field {one.name} is {its.dtype} {list(its.shape)}, it is {one.dtype} {list(one.shape)}"
