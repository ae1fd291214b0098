"""Prompts as plain text: a prompt a line, plain or compressed, exactly as it stands. Knows no key but `prompt`.

Row r is line r + 1: a blank line between others is a row with an empty prompt, blank lines at the end are no rows.
"""

from collections.abc import Collection, Iterator
from typing import Any

from noria.readers import AnyPath, BadRow, lines, too_long

SUFFIXES = (".txt", ".txt.gz", ".txt.zst")


def read(path: AnyPath, names: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
    """The file's prompts, in order; BadRow for a line that is not UTF-8. Raises InputError for a bad file."""
    blank = 0
    for number, line in enumerate(lines(path), 1):
        if line == b"":
            blank += 1
            continue
        for _ in range(blank):
            yield {"prompt": ""}
        blank = 0
        yield _parse(line, number)


def count(path: AnyPath, names: Collection[str] = ()) -> int:
    """The number of rows that `read` gives."""
    last = 0
    for number, line in enumerate(lines(path), 1):
        if line != b"":
            last = number
    return last


def _parse(line: bytes | None, number: int) -> dict[str, Any] | BadRow:
    if line is None:
        return BadRow(too_long(number))
    try:
        return {"prompt": line.decode()}
    except UnicodeDecodeError as error:
        return BadRow(f"line {number} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}")
