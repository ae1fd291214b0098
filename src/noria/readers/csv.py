"""Prompts as a table in text: a header with the names of the columns, then a row a record (RFC 4180), plain or gzip.

An empty cell is a key that is not given; numbers, lists, booleans are read as JSON. Knows no key of a row but its type.
"""

import csv
import json
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from noria import readers
from noria.config import InputError, Sampling, require
from noria.readers import PROMPT_NAMES, BadRow, lines, too_long

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_HINTS = typing.get_type_hints(Sampling)
# Columns whose cells are values in JSON's notation; all others are text.
_TEXTS = {name for name, hint in _HINTS.items() if str in (hint, *typing.get_args(hint))}
_VALUES = {"messages", "token_ids", *(f.name for f in fields(Sampling) if f.name not in _TEXTS)}
_EITHER = {f.name for f in fields(Sampling)} - _VALUES  # text, or a list of texts


def read(path: str | Path) -> Iterator[dict | BadRow]:
    """The table's rows, in order; BadRow for a record that does not fit it. Raises InputError for a bad file."""
    records = _records(path)
    number, header = next(records, (1, None))
    if header is None:
        return
    require(
        not isinstance(header, BadRow), f"prompts {path}: its header cannot be read: {getattr(header, 'error', '')}"
    )
    _check_header(path, header)
    for number, record in records:
        yield record if isinstance(record, BadRow) else _row(header, record, number)


def count(path: str | Path) -> int:
    """The number of rows that `read` gives."""
    return sum(1 for _ in read(path))


def _records(path: str | Path) -> Iterator[tuple[int, list[str] | BadRow]]:
    """Each record with the number of its first line. What is wrong with one ends with its last line."""
    feed = _Feed(path)
    # Above what _Feed lets through. The module keeps this limit for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * readers.MAX_LINE_NBYTES))
    table = csv.reader(feed, delimiter=feed.delimiter, strict=True)
    while True:
        feed.begin()
        try:
            record = next(table, None)
        except csv.Error as error:
            record = BadRow(f"line {feed.first} is not CSV: {error}")
        except _TooLong:
            # The reader is in the middle of a record that it will never see the end of.
            table = csv.reader(feed, delimiter=feed.delimiter, strict=True)
            record = BadRow(too_long(feed.first))
        if record is None:
            return
        if record:
            yield feed.first, _text(record, feed.first)


class _TooLong(Exception):
    """A record is longer than a line may be."""


class _Feed:
    """The lines of a file as text for csv.reader, which counts what one record takes."""

    def __init__(self, path: str | Path):
        self._lines, self._number, self._nbytes = lines(path), 0, 0
        self.first = 1
        self._ahead = next(self._lines, b"")
        self.delimiter = "\t" if ".tsv" in str(path).lower()[-7:] else ","
        if self.delimiter == "," and b"," not in (self._ahead or b"") and b";" in (self._ahead or b""):
            self.delimiter = ";"  # as spreadsheets write it where the comma is in numbers

    def begin(self) -> None:
        self._nbytes, self.first = 0, self._number + 1

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line, self._ahead = (self._ahead, b"") if self._number == 0 else (next(self._lines), b"")
        self._number += 1
        self._nbytes += len(line or b"")
        if line is None or self._nbytes > readers.MAX_LINE_NBYTES:
            raise _TooLong
        return line.decode(errors="surrogateescape") + "\n"


def _text(record: list[str] | BadRow, number: int) -> list[str] | BadRow:
    for cell in record if isinstance(record, list) else ():
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) - 0xDC00
            return BadRow(f"line {number} is not UTF-8 text: a cell has the byte {byte:#04x}")
    return record


def _check_header(path: str | Path, header: list[str]) -> None:
    twice = [name for name in header if header.count(name) > 1]
    require(not twice, f"prompts {path}: two columns have the name {twice[0] if twice else ''!r}")
    if not set(header) & set(PROMPT_NAMES):
        shown = ", ".join(header)[:100]
        raise InputError(f"prompts {path}: its first line names no column {' or '.join(PROMPT_NAMES)}; it has: {shown}")


def _row(header: list[str], record: list[str], number: int) -> dict | BadRow:
    if len(record) != len(header):
        return BadRow(f"line {number} has {len(record)} cells, the header has {len(header)}")
    row = {name: _value(name, cell) for name, cell in zip(header, record, strict=True)}
    if row.get("prompt") == "" and any(row.get(name) is not None for name in ("token_ids", "messages")):
        del row["prompt"]  # a table has the column in every row
    return row


def _value(name: str, cell: str):
    if name == "prompt":
        return cell
    if cell == "" and (name in _VALUES or name in _EITHER or name in (*PROMPT_NAMES, "id")):
        return None
    if name in _VALUES or (name in _EITHER and cell.startswith("[")):
        try:
            return json.loads(cell.lower() if cell in ("True", "False", "TRUE", "FALSE") else cell)
        except (ValueError, RecursionError):
            return cell
    return cell
