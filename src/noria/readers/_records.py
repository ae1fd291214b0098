"""Records of a table in text, each with the number of its first line: lines, quotes and delimiters, not what cells mean.

A record that cannot be read costs its first line alone: the lines behind it are read as records of their own.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from noria import readers
from noria.readers import AnyPath, BadRow, lines, too_long

TABS = (".tsv", ".tsv.gz", ".tsv.zst")  # ends of the names of files whose cells have tabs between them
_LEAST_NBYTES = 64  # that a line counts in its record
# The rest of a quoted field, up to its closing quote: a doubled quote is one of its text (RFC 4180).
_CLOSING = re.compile(r'[^"]*+(?:""[^"]*+)*+"')


def records(path: AnyPath) -> Iterator[tuple[int, list[str] | BadRow]]:
    """Each record with the number of its first line. Blank lines are no records.

    Lines end in \\n, \\r\\n or \\r, as for csv and pandas. Raises InputError for a file that cannot be read.
    """
    feed = Feed(path)
    split = _tsv_record if str(path).lower().endswith(TABS) else _csv_records(feed)
    while feed.begin():
        record = split(feed)
        if record:
            yield feed.first, _text(record, feed.first)


class TooLong(Exception):
    """A record is longer than a line may be."""


class Feed:
    """The lines of a file as text with their ends. It counts what a record takes, and gives lines back to be read again."""

    def __init__(self, path: AnyPath):
        self._lines = _numbered(path)
        self._back: deque[tuple[int, str | None]] = deque()
        self.taken: list[tuple[int, str | None]] = []  # the lines of this record, with their numbers
        self._nbytes = 0

    def begin(self) -> bool:
        """Whether there is a line for another record."""
        self.taken, self._nbytes = [], 0
        if not self._back and (line := next(self._lines, None)) is not None:
            self._back.append(line)
        return bool(self._back)

    @property
    def first(self) -> int:
        """The number of the record's first line."""
        return (self.taken or self._back)[0][0]

    def peek(self) -> str:
        """The line that comes next, after `begin` or `keep`; "" for one that is too long."""
        return self._back[0][1] or ""

    def keep(self, count: int) -> None:
        """The record has its first `count` lines alone; the others are read again."""
        again = self.taken[count:]
        self._nbytes -= sum(map(_held, again))
        self._back.extendleft(reversed(again))
        del self.taken[count:]

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._lines)
        self.taken.append(line)
        self._nbytes += _held(line)
        if line[1] is None or self._nbytes > readers.MAX_LINE_NBYTES:
            raise TooLong
        return line[1]


def _held(line: tuple[int, str | None]) -> int:
    """What a line counts: a record of very many short ones takes memory by their number."""
    return max(len(line[1] or ""), _LEAST_NBYTES)


def _numbered(path: AnyPath) -> Iterator[tuple[int, str | None]]:
    """The lines with their numbers; None for one that is too long. Bytes that are not UTF-8 are lone surrogates."""
    number = 0
    for line in lines(path, ends=True):
        text = None if line is None else line.decode(errors="surrogateescape")
        for piece in (text,) if text is None or "\r" not in text else io.StringIO(text, newline=""):
            number += 1
            yield number, piece


def _csv_records(feed: Feed) -> Callable[[Feed], list[str] | BadRow]:
    """A function that takes a record of commas, or of semicolons, as spreadsheets write where the comma is in numbers."""
    # Above what Feed lets through. The module keeps this limit for the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * readers.MAX_LINE_NBYTES))
    while feed.begin() and feed.peek() in ("\n", "\r\n", "\r"):
        next(feed)
    if not feed.begin():
        return _csv_record
    header = _csv_record(feed)
    feed.keep(0)
    text = feed.peek() if isinstance(header, BadRow) else header[0] if len(header) == 1 else ""
    return partial(_csv_record, delimiter=";") if ";" in text and "," not in text else _csv_record


def _csv_record(feed: Feed, delimiter: str = ",") -> list[str] | BadRow:
    try:
        return next(csv.reader(feed, delimiter=delimiter, strict=True))
    except csv.Error as error:
        last = feed.taken[-1][0]
        why = f"a quote that it opens is not closed ({error} in line {last})" if last > feed.first else error
        what = f"line {feed.first} is not CSV: {why}"
    except TooLong:
        what = too_long(feed.first)
    feed.keep(1)
    return BadRow(what)


def _tsv_record(feed: Feed) -> list[str] | BadRow:
    """A record of tabs. A cell is a quoted field if it is one as a whole (it may span lines), else its text as it stands."""
    try:
        text, place, cells = next(feed), 0, []
    except TooLong:
        return BadRow(too_long(feed.first))
    if not text.rstrip("\r\n"):
        return []
    while True:
        cell, text, place = _quoted(feed, text, place) or _literal(text, place)
        cells.append(cell)
        if not text.startswith("\t", place):
            return cells
        place += 1


def _literal(text: str, place: int) -> tuple[str, str, int]:
    """The cell that begins at `place`, the text of its line and the place where it ends there."""
    end = text.find("\t", place)
    cell = text[place:].rstrip("\r\n") if end < 0 else text[place:end]
    return cell, text, place + len(cell)


def _quoted(feed: Feed, text: str, place: int) -> tuple[str, str, int] | None:
    """As `_literal` for a quoted field, which may end in a later line; None for a cell that is none as a whole."""
    if not text.startswith('"', place):
        return None
    pieces, start, before = [], place + 1, len(feed.taken)
    try:
        while (closing := _CLOSING.match(text, start)) is None:
            pieces.append(text[start:])
            text, start = next(feed), 0
        end = closing.end()
        if text[end : end + 1] in ("", "\t", "\r", "\n"):
            return "".join([*pieces, text[start : end - 1]]).replace('""', '"'), text, end
    except (StopIteration, TooLong):
        pass
    feed.keep(before)
    return None


def _text(record: list[str] | BadRow, number: int) -> list[str] | BadRow:
    """The record, or what is wrong with it if a cell is not UTF-8."""
    for cell in record if isinstance(record, list) else ():
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) - 0xDC00
            return BadRow(f"line {number} is not UTF-8 text: a cell has the byte {byte:#04x}")
    return record
