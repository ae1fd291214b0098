"""Exported rows as a table: CSV and parquet. Two passes over the rows, the first for the names and kinds of columns.

Knows rows as plain objects, nothing of the output that they come from. Parquet needs pyarrow, an extra.
"""

import contextlib
import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from noria.errors import InputError
from noria.tools.text import json_text
from noria.tools.writing import open_new

BATCH_ROWS = 1024
BATCH_NBYTES = 2**28  # of texts and lists: a column of a batch holds less than 2 GiB, which Arrow's offsets end at
# What the cells of a column are: the narrowest of these that holds all of them. `json` is the text of a JSON value.
_NARROW = {bool: "bool", int: "int64", float: "float64", str: "string"}
_EXACT = 2**53  # integers up to here are floats too
_QUOTED = re.compile(r'[",\r\n]|^$')

Rows = Callable[[], Iterable[dict[str, Any]]]


def write_csv(rows: Rows, path: Path, known: Mapping[str, str]) -> int:
    """Writes a header and a record a row (RFC 4180, UTF-8): texts as they are, lists, objects as JSON, null as nothing, an
    empty text as two quotes.

    `known` are the kinds of Noria's own columns by name, in their order. Returns the number of rows.
    """
    names, count = list(columns_of(rows(), known)), 0
    with io.TextIOWrapper(open_new(path), encoding="utf-8", newline="") as file:
        file.write(",".join(map(_cell, _storable_names(names))) + "\n")
        for row in rows():
            file.write(",".join([_cell(row.get(name)) for name in names]) + "\n")
            count += 1
    return count


def write_parquet(rows: Rows, path: Path, known: Mapping[str, str]) -> int:
    """Writes a column a key: numbers, booleans and texts where all of a column are, else JSON texts; lists of numbers.

    Raises InputError where pyarrow is missing.
    """
    _, parquet = _pyarrow("parquet")
    schema, batches = record_batches(rows, known)
    count = 0
    with open_new(path) as file, _closing(parquet.ParquetWriter(file, schema)) as writer:
        for batch in batches:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def record_batches(rows: Rows, known: Mapping[str, str]) -> tuple[Any, Iterator[Any]]:
    """The rows as Arrow has them: the schema, and record batches of it. Raises InputError where pyarrow is missing."""
    pyarrow, _ = _pyarrow("a table of Arrow")
    columns = columns_of(rows(), known)
    kinds = {name: _type(pyarrow, kind) for name, kind in columns.items()}
    schema = pyarrow.schema(list(zip(_storable_names(columns), kinds.values(), strict=True)))

    def batches() -> Iterator[Any]:
        cells = ([_value(row.get(name), kind) for name, kind in columns.items()] for row in rows())
        for batch in _batches(cells):
            values = zip(*batch, strict=True)
            arrays = [pyarrow.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            yield pyarrow.record_batch(arrays, schema=schema)

    return schema, batches()


@contextlib.contextmanager
def _closing(writer: Any) -> Iterator[Any]:
    """The writer of a parquet file, which after an error writes no more: not the table's end, and not when it is collected."""
    try:
        yield writer
        writer.close()
    finally:
        writer.is_open = False


def check_pyarrow(what: str) -> None:
    """Raises InputError where pyarrow is missing. Does not import it, which takes a while."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{what} needs pyarrow: pip install pyarrow, or export to .csv or .jsonl")


def _pyarrow(what: str) -> tuple[Any, Any]:
    check_pyarrow(what)
    import pyarrow
    from pyarrow import parquet

    return pyarrow, parquet


def columns_of(rows: Iterable[dict[str, Any]], known: Mapping[str, str]) -> dict[str, str]:
    """Column -> kind: Noria's own first, those that are in no row left out, then the user's as they come."""
    kinds: dict[str, str | None] = {}
    for row in rows:
        for name, value in row.items():
            kinds[name] = known.get(name) or _wider(kinds.get(name), value)
    ours = {name: kind for name, kind in known.items() if name in kinds or not kinds}
    own = {
        name: "string" if kind is None else "int64" if kind == "int54" else kind
        for name, kind in kinds.items()
        if name not in known
    }
    return ours | own


def _wider(kind: str | None, value: Any) -> str | None:
    """The kind of a column that also holds this value."""
    if value is None:
        return kind
    mine = _kind(value)
    if kind in (None, mine):
        return mine
    both = {kind, mine}
    return "float64" if both == {"int54", "float64"} else "int64" if both == {"int54", "int64"} else "json"


def _kind(value: Any) -> str:
    """The kind of a value; `int54` are integers that floats hold as well."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int54" if abs(value) <= _EXACT else "int64" if -(2**63) <= value < 2**63 else "json"
    return _NARROW.get(type(value), "json")


def _type(pyarrow: Any, kind: str) -> Any:
    """`int32`, `list<int32>`, `list<list<float64>>`: lists of pyarrow's own types."""
    if kind.startswith("list<"):
        return pyarrow.list_(_type(pyarrow, kind[5:-1]))
    return pyarrow.string() if kind == "json" else getattr(pyarrow, {"bool": "bool_"}.get(kind, kind))()


def _value(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        return _storable(json_text(value))
    return _storable(value) if kind == "string" else float(value) if kind == "float64" else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    # Of a float that is as JSON has it, but for infinity, which programs that read tables know as inf.
    text = value if isinstance(value, str) else str(value) if isinstance(value, float) else json_text(value)
    text = _storable(text)
    return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text


def _storable_names(names: Iterable[str]) -> list[str]:
    """Names of columns that UTF-8 holds, each another one."""
    found: list[str] = []
    for name in map(_storable, names):
        while name in found:
            name += "_"
        found.append(name)
    return found


def _storable(text: str) -> str:
    """Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _batches(rows: Iterable[list[Any]]) -> Iterator[list[list[Any]]]:
    """Rows of cells, as many at once as a batch of a table may have."""
    batch, nbytes = list[list[Any]](), 0
    for row in rows:
        its = sum(map(_nbytes, row))
        if batch and (len(batch) == BATCH_ROWS or nbytes + its > BATCH_NBYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(row)
        nbytes += its
    if batch:
        yield batch


def _nbytes(cell: Any) -> int:
    """At most as many bytes as a cell's text or list takes in a table."""
    if isinstance(cell, str):
        return len(cell) if cell.isascii() else 4 * len(cell)
    if not isinstance(cell, list):
        return 0
    nested = any(isinstance(one, (list, str)) for one in (*cell[:1], *cell[-1:]))
    return 8 * len(cell) + (sum(map(_nbytes, cell)) if nested else 0)
