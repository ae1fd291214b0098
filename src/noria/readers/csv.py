"""Prompts as a table in text: a header with the names of the columns, then a row a record (RFC 4180), plain or compressed.

An empty cell is a key that is not given; numbers, lists, booleans are read as JSON. Knows no key of a row but its type.
"""

import json
import typing
from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from noria.errors import InputError, require
from noria.names import BESIDE, SYNONYMS
from noria.readers import PROMPT_NAMES, AnyPath, BadRow, table_without
from noria.readers._records import TABS, records
from noria.sampling import Sampling
from noria.tools.keys import types_of
from noria.tools.text import plural

SUFFIXES = (".csv", ".csv.gz", ".csv.zst", *TABS)
_HINTS = types_of(Sampling)
# Columns whose cells are values in JSON's notation; all others are text.
_TEXTS = {name for name, hint in _HINTS.items() if str in (hint, *typing.get_args(hint))}
_VALUES = {"messages", "token_ids", *SYNONYMS, *(f.name for f in fields(Sampling) if f.name not in _TEXTS)}
_EITHER = {f.name for f in fields(Sampling)} - _VALUES  # text, or a list of texts


def read(path: AnyPath, names: Collection[str] = PROMPT_NAMES) -> Iterator[dict[str, Any] | BadRow]:
    """The table's rows, in order; BadRow for a record that does not fit it. Raises InputError for a bad file."""
    table = records(path)
    _, header = next(table, (1, None))
    if header is None:
        return
    if isinstance(header, BadRow):
        raise InputError(f"prompts {path}: its header cannot be read: {header.error}")
    _check_header(path, header, names)
    for number, record in table:
        yield record if isinstance(record, BadRow) else _row(header, record, number)


def count(path: AnyPath, names: Collection[str] = PROMPT_NAMES) -> int:
    """The number of rows that `read` gives."""
    return sum(1 for _ in read(path, names))


def _check_header(path: AnyPath, header: list[str], names: Collection[str]) -> None:
    twice = [name for name in header if header.count(name) > 1]
    require(not twice, f"prompts {path}: two columns have the name {twice[0] if twice else ''!r}")
    if not set(header) & set(names):
        raise InputError(f"prompts {path}: its first line names {table_without(names, header)}")


def _row(header: list[str], record: list[str], number: int) -> dict[str, Any] | BadRow:
    if len(record) != len(header):
        return BadRow(f"line {number} has {plural(len(record), 'cell')}, the header has {len(header)}")
    row = {name: _value(name, cell) for name, cell in zip(header, record, strict=True)}
    if isinstance(row.get("messages"), list):
        row |= {name: _json_value(row[name]) for name in BESIDE if name in row}
    if row.get("prompt") == "" and any(row.get(name) is not None for name in ("token_ids", "messages")):
        del row["prompt"]  # a table has the column in every row
    return row


def _value(name: str, cell: str) -> Any:
    if name == "prompt":
        return cell
    if cell == "" and (name in _VALUES or name in _EITHER or name in (*PROMPT_NAMES, "id")):
        return None
    return _json_value(cell) if name in _VALUES or (name in _EITHER and cell.startswith("[")) else cell


def _json_value(cell: str) -> Any:
    """The value of a cell in JSON's notation, None of an empty one; the cell where it is no JSON."""
    try:
        return json.loads(cell.lower() if cell in ("True", "False", "TRUE", "FALSE") else cell or "null")
    except (ValueError, RecursionError):
        return cell
