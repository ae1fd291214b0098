"""Prompts in HDF5: a dataset `prompt`, or `tokens` with `offsets`, and a column of the same length for any other key.

A column of more dimensions has a list a row, one of a compound type an object.

The file is not trusted: links, virtual and external datasets are refused, and nothing is allocated but what it holds. A
child reads it, some rows at a time: on a damaged file HDF5 may hang, crash or ask for all memory. Knows no key of a row.
"""

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d

from noria import readers
from noria.errors import Changed, InputError, require
from noria.readers import PROMPT_NAMES, AnyPath, BadRow, Known
from noria.tools.damage import DAMAGED, has_signature
from noria.tools.helper import Failed, Helper
from noria.tools.helper_process import Limits

SUFFIXES = (".h5", ".hdf5")
BLOCK_NBYTES = 2**22  # read at once of a column, at most, where values are small
BLOCK_ROWS = 1024
_MUCH_NBYTES = 2**26  # of texts and tokens, in an answer
_FEW_ROWS = 64  # at first: texts may be long
MAX_CHUNK_NBYTES = 2**26  # HDF5 unpacks a chunk whole, whatever is read of it
MAX_TOKENS = 2**21  # of a row
_RAGGED = ("tokens", "offsets")
# Seconds of the processor tell a loop from a slow disk, on which the other limit allows minutes.
LIMITS = Limits(memory_nbytes=2**32, cpu_seconds=4, wall_seconds=600, answer_nbytes=2**31, opens_files=True)
Datasets = dict[str, h5py.Dataset]


def read(path: AnyPath, names: Collection[str] = PROMPT_NAMES) -> Iterator[dict[str, Any] | BadRow]:
    """The file's rows, in order; BadRow for one that cannot be read. Raises InputError for a bad file."""
    first, most = 0, _FEW_ROWS
    with _helper() as helper:
        while (found := _ask(helper, path, names, first, most))["rows"]:
            for record, bad in found["rows"]:
                yield record if bad is None else BadRow(*bad)
            first += len(found["rows"])
            most = min(2 * most, BLOCK_ROWS) if found["nbytes"] < BLOCK_NBYTES else max(most // 2, 1)


def count(path: AnyPath, names: Collection[str] = PROMPT_NAMES) -> int:
    """The number of rows that `read` gives."""
    with _helper() as helper:
        return int(_ask(helper, path, names, 0, 0)["of"])


def _helper() -> Helper:
    return Helper(__name__, LIMITS, ("h5py", "numpy", "xxhash"))


def _ask(helper: Helper, path: AnyPath, names: Collection[str], first: int, most: int) -> dict[str, Any]:
    """What the child answers. Raises InputError for a bad file."""
    with readers.opened(path):
        signed = has_signature(path)
    require(
        signed, f"prompts {path}: cannot be read as HDF5 (file signature not found): it is damaged, or of another kind"
    )
    known = [path.path, path.nbytes, path.hash, path.digests.hex(), path.look] if isinstance(path, Known) else None
    asked = {"path": str(path), "known": known, "names": list(names), "first": first, "most": most}
    try:
        found = helper.ask(asked | {"folder": os.getcwd()})
    except Failed as error:
        raise InputError(f"prompts {path}: HDF5 cannot read it ({error}): it is damaged") from error
    if "changed" in found:
        raise Changed(found["changed"])
    if "refused" in found:
        raise InputError(found["refused"])
    return dict(found)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The child's part: `rows` from `first` on, at most `most` of them, each [row, null] or [null, [why it is bad, id]];
    `nbytes` of their texts and tokens, at least; `of`: the number of all rows. Or why the file is `refused`, or that it has
    `changed`."""
    os.chdir(request["folder"])  # so that a path is what the user wrote, also in messages
    rows: list[list[Any]] = []
    nbytes, path = 0, request["path"]
    if request["known"]:
        path, size, hash, digests, look = request["known"]
        path = Known(path, size, hash, bytes.fromhex(digests), tuple(look))
    try:
        with _opened(path, request["names"]) as (columns, ragged, num_rows):
            for row in _rows(columns, ragged, request["first"], min(request["first"] + request["most"], num_rows)):
                rows.append([None, [row.error, row.id]] if isinstance(row, BadRow) else [row, None])
                nbytes += 0 if isinstance(row, BadRow) else sum(map(_size, row.values()))
                if nbytes > _MUCH_NBYTES:
                    break
            return {"rows": rows, "nbytes": nbytes, "of": num_rows}
    except Changed:
        return {"changed": request["path"]}
    except InputError as error:
        return {"refused": str(error)}


def _size(value: object) -> int:
    return 8 * len(value) if isinstance(value, list) else len(value) if isinstance(value, str) else 8


def _rows(columns: Datasets, ragged: Datasets, first: int, last: int) -> Iterator[dict[str, Any] | BadRow]:
    """The rows first .. last-1, read a block at a time."""
    sizes = [column.dtype.itemsize * _row_size(column) for column in columns.values()]
    step = min([BLOCK_ROWS, *(max(1, BLOCK_NBYTES // size) for size in sizes if size)])
    for begin in range(first, last, step):
        end = min(begin + step, last)
        values = {name: column[begin:end] for name, column in columns.items()}
        offsets = ragged["offsets"][begin : end + 1] if ragged else None
        for row in range(end - begin):
            span = None if offsets is None else (int(offsets[row]), int(offsets[row + 1]))
            yield _row(values, row, begin + row, ragged.get("tokens"), span)


@contextmanager
def _opened(path: AnyPath, names: Collection[str]) -> Iterator[tuple[Datasets, Datasets, int]]:
    """The columns of the file, checked; tokens and offsets, where they are the prompts; and the number of its rows."""
    with readers.opened(path):
        pass
    with readers.for_library(path) as source, _open(source, path, names) as found:
        yield found


@contextmanager
def _open(source: Any, path: AnyPath, names: Collection[str]) -> Iterator[tuple[Datasets, Datasets, int]]:
    try:
        with h5py.File(source, "r", locking=False) as file:
            columns = _columns(file, Path(path))
            ragged = _ragged(columns, path, names)
            yield columns, ragged, _num_rows(columns, ragged, path, names)
    except InputError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"prompts {path}: cannot be read as HDF5 ({reason}): it is damaged, or of another kind"
        ) from error


def _columns(file: h5py.File, path: Path) -> dict[str, h5py.Dataset]:
    if file.attrs.get("format") == "noria-generations":
        raise InputError(
            f"prompts {path}: it holds generations; make prompts from it with noria export {path} FILE.jsonl"
        )
    names = list(file)
    require(len(names) <= 1000, f"prompts {path}: it has {len(names)} datasets, at most 1000 are read")
    columns = {}
    for name in names:
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise InputError(
                f"prompts {path}: {name!r} is a {type(link).__name__}: copy what it links to into the file"
            )
        if isinstance(file[name], h5py.Dataset):
            columns[name] = file[name]
            _check(columns[name], f"prompts {path}: {name!r}", path.stat().st_size)
    return columns


def _check(dataset: h5py.Dataset, where: str, file_nbytes: int) -> None:
    """Raises InputError for a dataset whose values are not all in this file, or are no column."""
    require(dataset.ndim, f"{where} has the shape {dataset.shape}: a column has one value for each row")
    require(
        _readable(dataset.dtype),
        f"{where} is of type {dataset.dtype}: columns are text or numbers, or hold these by name",
    )
    size = dataset.dtype.itemsize * _row_size(dataset)
    require(size <= readers.MAX_LINE_NBYTES, f"{where}: a value has {size} bytes, at most {readers.MAX_LINE_NBYTES}")
    create, num = dataset.id.get_create_plist(), dataset.size
    layout = create.get_layout()
    inside = layout in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT) and not create.get_external_count()
    require(inside, f"{where} has its values in other files: copy them into this one")
    size = dataset.id.get_type().get_size()  # of a text of any length: of the pointer that stands for it
    if layout == h5d.CONTIGUOUS:
        fits = num * size <= file_nbytes and (num == 0 or dataset.id.get_offset() is not None)
        require(fits, f"{where} says that it has {num} values, which the file of {file_nbytes} bytes cannot hold")
    elif layout == h5d.CHUNKED:
        chunk = math.prod(dataset.chunks)
        require(
            chunk * max(size, 1) <= MAX_CHUNK_NBYTES,
            f"{where} is stored in chunks of {chunk * size} bytes, at most {MAX_CHUNK_NBYTES} are unpacked",
        )
        chunks = math.prod(-(-length // part) for length, part in zip(dataset.shape, dataset.chunks, strict=True))
        held = dataset.id.get_num_chunks()
        require(
            chunks <= held,
            f"{where} says that it has {num} values, the file holds {held * chunk}: it was never finished",
        )


def _readable(dtype: np.dtype) -> bool:
    """Whether these are texts, numbers, lists of numbers, or hold such under names."""
    if dtype.names is not None:
        return all(_readable(dtype[name]) for name in dtype.names)
    if dtype.subdtype is not None:
        return _readable(dtype.subdtype[0])
    kind = h5py.check_vlen_dtype(dtype) or dtype
    return bool(h5py.check_string_dtype(dtype)) or getattr(kind, "kind", "") in ("i", "u", "f", "b")


def _row_size(dataset: h5py.Dataset) -> int:
    """How many values a row has."""
    return math.prod(dataset.shape[1:])


def _ragged(columns: Datasets, path: AnyPath, names: Collection[str]) -> Datasets:
    """Takes tokens and offsets out of the columns where they are the prompts, and beside prompts if they are no columns."""
    has = [name for name in names if name in columns]
    if has:
        for name in _RAGGED:
            if name in columns and len(columns[name]) != len(columns[has[0]]):
                del columns[name]
        return {}
    if not set(_RAGGED) <= set(columns):
        return {}
    found = {name: columns.pop(name) for name in _RAGGED}
    integers = all(column.dtype.kind in "iu" and column.ndim == 1 for column in found.values())
    require(integers, f"prompts {path}: tokens and offsets must be integers")
    require(len(found["offsets"]), f"prompts {path}: offsets is empty: for n rows it needs n + 1 values")
    return found


def _num_rows(columns: Datasets, ragged: Datasets, path: AnyPath, names: Collection[str]) -> int:
    has = [name for name in names if name in columns]
    if ragged:
        num_rows = len(ragged["offsets"]) - 1
    else:
        needs = f"it needs a dataset {next(iter(names))}, or tokens with offsets"
        require(has, f"prompts {path}: {needs}: {readers.table_without(names, columns)}")
        first = columns[has[0]]
        single = first.ndim == 1 or first.dtype.kind in "iu"
        require(single, f"prompts {path}: {has[0]!r} has the shape {first.shape}: a column has one value for each row")
        num_rows = len(first)
    for name, column in columns.items():
        right = len(column) == num_rows
        require(right, f"prompts {path}: {name!r} has {len(column)} values for {num_rows} rows")
    return num_rows


def _row(
    values: dict[str, np.ndarray], place: int, row: int, tokens: h5py.Dataset | None, span: tuple[int, int] | None
) -> dict[str, Any] | BadRow:
    record: dict[str, Any] = {}
    if tokens is not None and span is not None:
        first, last = span
        if not 0 <= first <= last <= len(tokens):
            return BadRow(f"row {row}: its tokens are {first} to {last} of {len(tokens)}: offsets are wrong")
        if last - first > MAX_TOKENS:
            return BadRow(f"row {row} has {last - first:,} tokens, at most {MAX_TOKENS:,} are read")
        record["token_ids"] = tokens[first:last].tolist()
    wrong = ""
    for name, column in values.items():
        try:
            record[name] = _value(column[place])
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            wrong = wrong or f"row {row} is not UTF-8 text: byte {error.start} of {name} is {byte:#04x}"
        except ValueError as error:
            wrong = wrong or f"row {row}: {name} {error}"
    return BadRow(wrong, readers.own_id(record.get("id"))) if wrong else record


def _value(value: Any) -> Any:
    """A value of a column as JSON would have it; NaN, which tables have where nothing is given, is none."""
    plain = _plain(value)
    return None if isinstance(plain, float) and plain != plain else plain


def _plain(value: Any) -> Any:
    """Texts, numbers, lists, objects. Raises ValueError for a number that is none of Python's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.void):
        return {name: _plain(value[name]) for name in value.dtype.names or ()}
    if isinstance(value, np.ndarray):
        exact = value.dtype.kind in "iub" or (value.dtype.itemsize <= 8 and value.dtype.kind == "f")
        return value.tolist() if exact else [_plain(one) for one in value]
    if isinstance(value, np.longdouble):
        if float(value) != value and value == value:
            raise ValueError(f"is {value!s}: a number of more digits than a float64 has")
        return float(value)
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value
