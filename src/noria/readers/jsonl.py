"""Prompts as JSON lines: an object a line, plain or compressed; lines of OpenAI's batch format too. Blank lines are no rows.

Knows no key of a row.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from noria.readers import AnyPath, BadRow, _openai, lines, too_long

_ESCAPED = re.compile(rb"\\u00[2-7]")  # letters of a key may be written so
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")
_NAMES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


def read(path: AnyPath, names: Collection[str] = ()) -> Iterator[dict[str, Any] | BadRow]:
    """The file's objects, in order; BadRow for a line that is no JSON object. Raises InputError for a bad file."""
    for number, line in enumerate(lines(path), 1):
        if line is None:
            yield BadRow(too_long(number))
        elif line.strip():
            yield from parse(line, f"line {number}", " on one line")


def count(path: AnyPath, names: Collection[str] = ()) -> int:
    """The number of rows that `read` gives; only lines that may be a request of several prompts are parsed."""
    return sum(_num_rows(line) for line in lines(path) if line is None or line.strip())


def _num_rows(line: bytes | None) -> int:
    return 1 if line is None else num_rows(line)


def num_rows(text: bytes) -> int:
    """How many rows `parse` gives."""
    escaped = _ESCAPED.search(text) is not None
    several = all(escaped or name in text for name in (b'"custom_id"', b'"prompt"'))
    return len(parse(text, "")) if several else 1


def parse(text: bytes, where: str, form: str = "") -> list[dict[str, Any] | BadRow]:
    """The rows that are written there: one, but of a request with several prompts. `form`: how a row has to be."""
    try:
        record = json.loads(text.decode())
        if not isinstance(record, dict):
            return [BadRow(f"{where} is {_NAMES[type(record)]}: a row is a JSON object{form}")]
        rows = _openai.requested_rows(record) if _openai.is_request(record) else [record]
        return [BadRow(f"{where}: {row.error}", row.id) if isinstance(row, BadRow) else row for row in rows]
    except UnicodeDecodeError as error:
        wrong = f"{where} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
    except RecursionError:
        wrong = f"{where} is nested too deeply"
    except ValueError as error:
        wrong = f"{where} is not JSON: {str(error).partition(';')[0]}"  # after that: advice to programmers
    return [BadRow(wrong)]
