"""What a checkpoint says of a parameter that is not plain: texts beside its dataset, which are not trusted.

The dataset is uint8 [pieces, bytes of a piece]. `encoding` names a file of encodings/; `fields` is a JSON list of the fields
of a piece (name, shape, dtype, offset), `matrices` one of the matrices in it (name, shape, transposed), `settings` an object.
"""

import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import h5py

from noria import encodings, kinds
from noria.blocks import Block, Parameter
from noria.errors import InputError, require
from noria.pieces import FIELD_NBYTES, PLAIN, VIEW_ALIGNMENT, Encoded, Field, Matrix, Piece, Wanted
from noria.tools.container import LinkedFiles, text_attribute

MAX_TEXT = 1 << 20  # characters of one of the texts
MAX_MATRICES = 64  # of a piece
MAX_OFFSET = 1 << 62  # of a field
NAME = re.compile(r"[A-Za-z0-9_.-]{0,64}")  # of a field or a matrix: messages show it


def stored_as(parameter: Parameter) -> tuple[str, tuple[int, ...]]:
    """The type and the shape of a parameter's dataset."""
    if parameter.plain:
        return parameter.dtype, parameter.shape
    return "uint8", (parameter.pieces, parameter.piece.nbytes)


def write_form(dataset: h5py.Dataset, parameter: Parameter) -> None:
    """Says of an encoded parameter's dataset what it holds."""
    assert parameter.encoded is not None, parameter
    dataset.attrs.update(_texts(parameter.encoded))


def _texts(form: Encoded) -> dict[str, str]:
    """What a dataset's attributes say of an encoded parameter."""
    fields = [
        {"name": one.name, "shape": list(one.shape), "dtype": one.dtype, "offset": one.offset}
        for one in form.piece.fields
    ]
    matrices = [
        {"name": one.name, "shape": list(one.shape), "transposed": one.transposed} for one in form.piece.matrices
    ]
    trees = {"fields": fields, "matrices": matrices, "settings": dict(form.settings)}
    return {"encoding": form.encoding} | {name: json.dumps(tree) for name, tree in trees.items()}


def form_words(form: Encoded) -> str:
    """All that says how a parameter is encoded, as one text."""
    return json.dumps(_texts(form), sort_keys=True)


def read_forms(files: LinkedFiles, plain: Block, tied: bool, dtype: str) -> dict[str, Encoded]:
    """How the parameters of a block that are not plain are encoded. Raises InputError for what is wrong with one."""
    found = {}
    for parameter in plain.parameters:
        place = f"{plain.name}/{parameter.name}"
        dataset = files.find(place)
        if "encoding" not in dataset.attrs:
            continue
        gathered = plain.name == "embed" or (tied and parameter.name == "lm_head")
        require(
            not gathered, f"{files.path}: {place!r} is encoded: rows of an embedding are gathered, from plain numbers"
        )
        found[parameter.name] = _read_form(dataset, parameter.wanted, dtype, files.path)
    return found


def _read_form(dataset: h5py.Group | h5py.Dataset, wanted: Wanted, dtype: str, path: Path) -> Encoded:
    """How the dataset of a parameter is encoded.

    Raises InputError for an encoding that is not known, and for pieces, matrices or fields that are not its own.
    """
    where = f"{path}: {str(dataset.name).lstrip('/')!r}"
    encoding = text_attribute(dataset, "encoding", path)
    known = [name for name in kinds.names("encodings") if name != PLAIN]
    require(
        encoding in known,
        f"{where} is encoded as {encoding[:80]!r}: this Noria knows {', '.join(known) or 'plain parameters alone'}; use a"
        " newer Noria",
    )
    texts = {name: text_attribute(dataset, name, path) for name in ("fields", "matrices", "settings")}
    try:
        trees = {name: _parsed(text) for name, text in texts.items()}
        matrices = tuple(_matrix(one) for one in _items(trees["matrices"]))
        fields = tuple(_field(one) for one in _items(trees["fields"]))
        settings = trees["settings"]
        require(isinstance(settings, dict), "its settings are no object")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: what it says of its fields cannot be read: {str(error)[:200]}") from error
    piece = Piece(_piece_nbytes(dataset, wanted, where), fields, matrices)
    _check_matrices(piece, wanted, where)
    try:
        encodings.check_fields(encoding, piece, dtype, settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise InputError(
            f"{where}: {encoding} has no settings {texts['settings'][:80]}: {type(error).__name__} {str(error)[:80]}"
        ) from error
    return Encoded(encoding, settings, piece)


def _parsed(text: str) -> Any:
    require(len(text) <= MAX_TEXT, f"a text of {len(text)} characters says what it holds, at most {MAX_TEXT} are read")
    return json.loads(text)


def _items(tree: Any) -> list[dict[str, Any]]:
    """The objects of a list."""
    if not isinstance(tree, list) or not tree or not all(isinstance(one, dict) for one in tree):
        raise TypeError(f"a list of objects is needed, not {str(tree)[:80]}")
    return tree


def _shape(tree: Any) -> tuple[int, ...]:
    whole = isinstance(tree, list) and all(type(size) is int and 0 <= size < 2**31 for size in tree)
    if not whole or not 1 <= len(tree) <= 2:
        raise ValueError(f"{str(tree)[:80]} is no shape")
    return tuple(tree)


def _named(name: Any) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def _matrix(tree: dict[str, Any]) -> Matrix:
    name, transposed = tree["name"], tree["transposed"]
    if not _named(name) or not isinstance(transposed, bool):
        raise TypeError(f"{str(tree)[:80]} is no matrix")
    return Matrix(name, _shape(tree["shape"]), transposed)


def _field(tree: dict[str, Any]) -> Field:
    name, dtype, offset = tree["name"], tree["dtype"], tree["offset"]
    placed = type(offset) is int and 0 <= offset < MAX_OFFSET
    if not _named(name) or not isinstance(dtype, str) or dtype not in FIELD_NBYTES or not placed:
        raise ValueError(f"{str(tree)[:120]} is no field; dtypes are {', '.join(FIELD_NBYTES)}")
    return Field(name, _shape(tree["shape"]), dtype, offset)


def _piece_nbytes(dataset: h5py.Group | h5py.Dataset, wanted: Wanted, where: str) -> int:
    shape = dataset.shape if isinstance(dataset, h5py.Dataset) else None
    said = f"{where} is encoded and has shape {list(shape or ())}, it should be [{wanted.pieces}, bytes of a piece]"
    require(shape is not None and len(shape) == 2 and shape[0] == wanted.pieces, said)
    assert shape is not None
    require(
        shape[1] > 0 and shape[1] % VIEW_ALIGNMENT == 0,
        f"{where} has pieces of {shape[1]} bytes, they should be multiples of {VIEW_ALIGNMENT}",
    )
    return int(shape[1])


def _together(matrices: Sequence[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of matrices, those of one name as the one of all their rows that they are computed as."""
    made: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in matrices:
        if made and made[-1][0] == name and made[-1][1][1:] == shape[1:]:
            shape = (made.pop()[1][0] + shape[0], *shape[1:])
        made.append((name, shape))
    return made


def _check_matrices(piece: Piece, wanted: Wanted, where: str) -> None:
    """Raises InputError for matrices that do not make the parameter that the family wants."""
    told = [(matrix.name, matrix.shape) for matrix in piece.matrices]
    shape = wanted.shape[1:] if wanted.pieces_first else wanted.shape
    if wanted.named:
        right = _together(told) == _together([(matrix.name, matrix.shape) for matrix in wanted.matrices])
    else:
        outputs = sum(matrix.shape[0] for matrix in piece.matrices)
        right = outputs == shape[0] and all(name == "" and its[1:] == shape[1:] for name, its in told)
    right = right and len(told) <= MAX_MATRICES and all(prod(its) for _, its in told)
    require(
        right and not any(matrix.transposed and len(matrix.shape) == 1 for matrix in piece.matrices),
        f"{where} has matrices {', '.join(f'{name} {list(its)}'.strip() for name, its in told[:6])}, they do not make"
        f" {list(wanted.shape)}, the shape that config.json asks for",
    )
