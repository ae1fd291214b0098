"""Prompts as a JSON array of objects, plain or compressed, an element at a time; and JSON lines under this name.

The text is cut into elements here, by its quotes and brackets, and json reads each: an element that is wrong or too long is
a bad row, and the others are what they are in JSON lines. Knows no key of a row.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from noria import readers
from noria.errors import InputError
from noria.readers import AnyPath, BadRow, jsonl, lines, opened

SUFFIXES = (".json", ".json.gz", ".json.zst")
_CHUNK_NBYTES = 2**18
_MARK = re.compile(rb'["\[\]{},]')
_WITHIN = re.compile(rb'"|[\[{]++|[\]}]++')  # what counts within an element: no comma, and brackets in runs
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # the rest of a string, without its closing quote


def read(path: AnyPath, names: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
    """The array's objects, in order; BadRow for an element that is none. Raises InputError for a bad file."""
    if not _is_array(path):
        yield from jsonl.read(path)
        return
    for number, element in enumerate(_elements(path), 1):
        if element is None:
            yield BadRow(f"element {number} is longer than {readers.MAX_LINE_NBYTES // 2**20} MiB")
        else:
            yield from jsonl.parse(element, f"element {number}")


def count(path: AnyPath, names: Collection[str] = ()) -> int:
    """The number of rows that `read` gives; only elements that may be a request of several prompts are parsed."""
    if not _is_array(path):
        return jsonl.count(path)
    return sum(1 if element is None else jsonl.num_rows(element) for element in _elements(path))


def _is_array(path: AnyPath) -> bool:
    """Whether the file is an array, and not JSON lines. Raises InputError for an object of several lines."""
    first = next((line for line in lines(path) if line is None or line.strip()), b"")
    if first is None or first.lstrip().startswith(b"["):
        return True
    try:
        json.loads(first or "null")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"prompts {path}: it is neither an array of objects nor an object a line; rows are [{{...}}, {{...}}]"
        ) from error
    return False


def _elements(path: AnyPath) -> Iterator[bytes | None]:
    """The text of each element; None for one above MAX_LINE_NBYTES. Raises InputError for a file that is cut short."""
    with opened(path) as file:
        number = 0
        try:
            for element in _cut(file):
                yield element
                number += 1
        except readers.DAMAGED as error:
            raise readers.damaged(path, f"element {number}", error) from error
        except _NoArray as error:
            raise InputError(
                f"prompts {path}: {error} after element {number}: the file is damaged or was cut short"
            ) from error


class _NoArray(Exception):
    """The text is no array, whatever its elements are."""


def _cut(file: BinaryIO) -> Iterator[bytes | None]:
    """The texts between the commas of the array that the file holds."""
    element, found, depth, inside, rest = _Element(), 0, 0, False, b""
    while chunk := file.read(_CHUNK_NBYTES):
        text, place, start = rest + chunk, 0, 0
        rest = b""
        while place < len(text):
            if inside:  # a string
                place = _end_of_string(text, place)
                if text[place : place + 1] == b"\\":  # what it escapes is in the next chunk
                    rest, text = text[place:], text[:place]
                    break
                inside = place == len(text)
                place += 1
                continue
            mark = (_MARK if depth < 2 else _WITHIN).search(text, place)
            if mark is None:
                break
            sign, place = mark[0], mark.end()
            inside = sign == b'"'
            if sign[0] in b"[{":
                start = place if depth == 0 else start
                depth += len(sign)
            elif sign[0] in b"]}" and depth > 1:
                closed = min(len(sign), depth - 1)
                depth, place = depth - closed, mark.start() + closed
            elif sign in b",]}" and depth == 1:
                element.add(text[start : mark.start()])
                if sign == b"," or found or not element.blank:
                    yield element.text
                if sign != b",":
                    _check_end(text[place:], file)
                    return
                element, found, start = _Element(), found + 1, place
        if depth:
            element.add(text[start:])
    raise _NoArray("its array is not closed")


def _end_of_string(text: bytes, place: int) -> int:
    """Where the quote of the string is, or what ends the text before it."""
    found = _STRING.match(text, place)
    return found.end() if found else place


class _Element:
    """The text of an element, in pieces, as long as it is not too long."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._nbytes = 0

    def add(self, piece: bytes) -> None:
        self._nbytes += len(piece)
        self._pieces = [*self._pieces, piece] if self._nbytes <= readers.MAX_LINE_NBYTES else []

    @property
    def text(self) -> bytes | None:
        """The whole; None for one that is too long."""
        return b"".join(self._pieces) if self._nbytes <= readers.MAX_LINE_NBYTES else None

    @property
    def blank(self) -> bool:
        return self.text is not None and not self.text.strip()


def _check_end(text: bytes, file: BinaryIO) -> None:
    while not text.strip():
        if not (text := file.read(_CHUNK_NBYTES)):
            return
    raise _NoArray("something follows its array")
