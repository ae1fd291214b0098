"""Prompts in HDF5: a dataset `prompt`, or `tokens` with `offsets`, and a column of the same length for any other key.

The file is not trusted: links, virtual and external datasets are refused, and nothing is allocated but what it holds.
Knows no key of a row.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d

from noria import readers
from noria.config import InputError, require
from noria.readers import PROMPT_NAMES, BadRow

SUFFIXES = (".h5", ".hdf5")
BLOCK_NBYTES = 2**22  # read at once of a column, at most, where values are small
BLOCK_ROWS = 1024
MAX_CHUNK_NBYTES = 2**26  # HDF5 unpacks a chunk whole, whatever is read of it
_RAGGED = ("tokens", "offsets")


def read(path: str | Path, names: Collection[str] = PROMPT_NAMES) -> Iterator[dict[str, Any] | BadRow]:
    """The file's rows, in order; BadRow for one that cannot be read. Raises InputError for a bad file."""
    with _opened(path, names) as (columns, num_rows):
        tokens = columns.pop("tokens", None)
        step = min([BLOCK_ROWS, *(max(1, BLOCK_NBYTES // column.dtype.itemsize) for column in columns.values())])
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            values = {name: column[first : last + (name == "offsets")] for name, column in columns.items()}
            for row in range(last - first):
                yield _row(values, row, first + row, tokens)


def count(path: str | Path, names: Collection[str] = PROMPT_NAMES) -> int:
    """The number of rows that `read` gives."""
    with _opened(path, names) as (_, num_rows):
        return num_rows


@contextmanager
def _opened(path: str | Path, names: Collection[str]) -> Iterator[tuple[dict[str, h5py.Dataset], int]]:
    """The columns of the file, checked, and the number of its rows."""
    with readers.opened(path):
        pass
    try:
        with h5py.File(path, "r", locking=False) as file:
            columns = _columns(file, Path(path))
            yield columns, _num_rows(columns, path, names)
    except InputError:
        raise
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"prompts {path}: cannot be read as HDF5 ({reason}): it is damaged, or of another kind"
        ) from error


def _columns(file: h5py.File, path: Path) -> dict[str, h5py.Dataset]:
    if file.attrs.get("format") == "noria-generations":
        raise InputError(
            f"prompts {path}: it holds generations; make prompts of it with noria export {path} FILE.jsonl"
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
    require(dataset.ndim == 1, f"{where} has the shape {dataset.shape}: a column has a value a row")
    kind = h5py.check_vlen_dtype(dataset.dtype) or dataset.dtype
    readable = h5py.check_string_dtype(dataset.dtype) or getattr(kind, "kind", "") in "iufb"
    require(readable, f"{where} is of type {dataset.dtype}: columns are text or numbers")
    size = dataset.dtype.itemsize
    require(size <= readers.MAX_LINE_NBYTES, f"{where}: a value has {size} bytes, at most {readers.MAX_LINE_NBYTES}")
    create, num = dataset.id.get_create_plist(), len(dataset)
    layout = create.get_layout()
    inside = layout in (h5d.CONTIGUOUS, h5d.CHUNKED, h5d.COMPACT) and not create.get_external_count()
    require(inside, f"{where} has its values in other files: copy them into this one")
    size = dataset.id.get_type().get_size()  # of a text of any length: of the pointer that stands for it
    if layout == h5d.CONTIGUOUS:
        fits = num * size <= file_nbytes and (num == 0 or dataset.id.get_offset() is not None)
        require(fits, f"{where} says that it has {num} values, which the file of {file_nbytes} bytes cannot hold")
    elif layout == h5d.CHUNKED:
        chunk = dataset.chunks[0]
        require(
            chunk * max(size, 1) <= MAX_CHUNK_NBYTES,
            f"{where} is stored in chunks of {chunk * size} bytes, at most {MAX_CHUNK_NBYTES} are unpacked",
        )
        held = dataset.id.get_num_chunks() * chunk
        require(num <= held, f"{where} says that it has {num} values, the file holds {held}: it was never finished")


def _num_rows(columns: dict[str, h5py.Dataset], path: str | Path, names: Collection[str]) -> int:
    has = [name for name in names if name in columns]
    if not has and set(_RAGGED) <= set(columns):
        ragged = [columns[name].dtype.kind in "iu" for name in _RAGGED]
        require(all(ragged), f"prompts {path}: tokens and offsets must be integers")
        num_rows = len(columns["offsets"]) - 1
        require(num_rows >= 0, f"prompts {path}: offsets is empty: of n rows it has n + 1 values")
    else:
        needs = f"it needs a dataset {next(iter(names))}, or tokens with offsets"
        require(has, f"prompts {path}: {needs}: {readers.table_without(names, columns)}")
        for name in _RAGGED:  # without a meaning beside a prompt
            columns.pop(name, None)
        num_rows = len(columns[has[0]])
    for name, column in columns.items():
        right = name in _RAGGED or len(column) == num_rows
        require(right, f"prompts {path}: {name!r} has {len(column)} values for {num_rows} rows")
    return num_rows


def _row(values: dict[str, np.ndarray], place: int, row: int, tokens: h5py.Dataset | None) -> dict[str, Any] | BadRow:
    record = {}
    for name, column in values.items():
        if name == "offsets":
            assert tokens is not None, "offsets stand beside tokens"
            first, last = int(column[place]), int(column[place + 1])
            if not 0 <= first <= last <= len(tokens) or (last - first) * 8 > readers.MAX_LINE_NBYTES:
                return BadRow(f"row {row}: its tokens are {first} to {last} of {len(tokens)}: offsets are wrong")
            record["token_ids"] = tokens[first:last].tolist()
            continue
        try:
            record[name] = _value(column[place])
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            return BadRow(f"row {row} is not UTF-8 text: byte {error.start} of {name} is {byte:#04x}")
    return record


def _value(value: Any) -> Any:
    """A value of a column as JSON would have it; NaN, which tables have where nothing is given, is none."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return value.tolist()
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bytes):
        return value.decode()
    return None if isinstance(value, float) and value != value else value
