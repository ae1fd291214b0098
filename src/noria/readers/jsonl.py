"""Prompts as JSON lines: an object a line, plain or gzip; lines of OpenAI's batch format too. Blank lines are no rows.

Knows no key of a row.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from noria.readers import BadRow, _openai, lines, too_long

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def read(path: str | Path, names: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
    """The file's objects, in order; BadRow for a line that is no JSON object. Raises InputError for a bad file."""
    for number, line in enumerate(lines(path), 1):
        if line is None:
            yield BadRow(too_long(number))
        elif line.strip():
            yield _parse(line, number)


def count(path: str | Path, names: Collection[str] = ()) -> int:
    """The number of rows that `read` gives, without parsing them."""
    return sum(1 for line in lines(path) if line is None or line.strip())


def _parse(line: bytes, number: int) -> dict[str, Any] | BadRow:
    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            return BadRow(f"line {number} is {_NAMES[type(record)]}: a row is a JSON object on one line")
        row = _openai.as_row(record) if _openai.is_request(record) else record
    except UnicodeDecodeError as error:
        return BadRow(f"line {number} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}")
    except RecursionError:
        return BadRow(f"line {number} is nested too deeply")
    except ValueError as error:
        return BadRow(f"line {number} is not JSON: {str(error).partition(';')[0]}")  # after that: advice to programmers
    return BadRow(f"line {number}: {row.error}", row.id) if isinstance(row, BadRow) else row
