"""Exported rows as a table: CSV and parquet. Two passes over the rows, the first for the names and kinds of columns.

Knows rows as plain objects, nothing of the output that they come from. Parquet needs pyarrow, an extra.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from noria.config import InputError

BATCH_ROWS = 1024
# What the cells of a column are: the narrowest of these that holds all of them. `json` is the text of a JSON value.
_NARROW = {bool: "bool", int: "int64", float: "float64", str: "string"}

Rows = Callable[[], Iterable[dict]]


def write_csv(rows: Rows, path: Path, known: Mapping[str, str]) -> int:
    """Writes a header and a record a row (RFC 4180, UTF-8): texts as they are, lists, objects as JSON, null as nothing.

    `known` are the kinds of Noria's own columns by name, in their order. Returns the number of rows.
    """
    names, count = list(_columns(rows(), known)), 0
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([_storable(name) for name in names])
        for row in rows():
            table.writerow([_cell(row.get(name)) for name in names])
            count += 1
    return count


def write_parquet(rows: Rows, path: Path, known: Mapping[str, str]) -> int:
    """Writes a column a key: numbers, booleans and texts where all of a column are, else JSON texts; lists of numbers.

    Raises InputError where pyarrow is missing.
    """
    pyarrow, parquet = _pyarrow()
    columns, count = _columns(rows(), known), 0
    kinds = {name: _type(pyarrow, kind) for name, kind in columns.items()}
    schema = pyarrow.schema([(_storable(name), kind) for name, kind in kinds.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(rows()):
            values = [[_value(row.get(name), kind) for row in batch] for name, kind in columns.items()]
            arrays = [pyarrow.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            count += len(batch)
    return count


def _pyarrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("parquet needs pyarrow: pip install pyarrow, or export to .csv or .jsonl") from error
    return pyarrow, parquet


def _columns(rows: Iterable[dict], known: Mapping[str, str]) -> dict[str, str]:
    """Column -> kind: Noria's own first, those that are in no row left out, then the user's as they come."""
    kinds: dict[str, str | None] = {}
    for row in rows:
        for name, value in row.items():
            kinds[name] = known.get(name) or _wider(kinds.get(name), value)
    ours = {name: kind for name, kind in known.items() if name in kinds or not kinds}
    return ours | {name: kind or "string" for name, kind in kinds.items() if name not in known}


def _wider(kind: str | None, value) -> str | None:
    """The kind of a column that also holds this value."""
    if value is None:
        return kind
    mine = _NARROW.get(type(value), "json")
    if mine == "int64" and not -(2**63) <= value < 2**63:
        mine = "json"
    if kind in (None, mine):
        return mine
    return "float64" if {kind, mine} == {"int64", "float64"} else "json"


def _type(pyarrow, kind: str):
    """`int32`, `list<int32>`, `list<list<float64>>`: lists of pyarrow's own types."""
    if kind.startswith("list<"):
        return pyarrow.list_(_type(pyarrow, kind[5:-1]))
    return pyarrow.string() if kind == "json" else getattr(pyarrow, {"bool": "bool_"}.get(kind, kind))()


def _value(value, kind: str):
    if value is None:
        return None
    if kind == "json":
        return _storable(json.dumps(value, ensure_ascii=False))
    return _storable(value) if kind == "string" else float(value) if kind == "float64" else value


def _cell(value) -> str:
    if value is None:
        return ""
    return _storable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _storable(text: str) -> str:
    """Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch
