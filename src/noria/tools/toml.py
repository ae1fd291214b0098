"""TOML files of people: read with limits, and keys written as TOML."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noria.errors import InputError, require

_MAX_DOTS = 1000  # in a key: tomllib's work grows with their square


def read_toml(path: str | Path, what: str, most: int, remedy: str = "") -> dict[str, Any]:
    """The tables of a file of at most so many bytes. Raises InputError, naming `what` it is, for what is wrong with it.

    `remedy`: what to do if it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{what} {path}: {error.strerror or error}{remedy}") from error
    return parse_toml(text, what, path, most)


def parse_toml(text: bytes, what: str, path: str | Path, most: int) -> dict[str, Any]:
    """The same from its bytes, of which there may be one more than `most`. Raises InputError."""
    require(len(text) <= most, f"{what} {path} is longer than {most} bytes: is it the right file?")
    dots = max(piece.count(b".") for piece in re.split(rb"[={},\[\]\n]", text))
    require(dots <= _MAX_DOTS, f"{what} {path} has a key of more than {_MAX_DOTS} parts")
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, no UTF-8, a number of too many digits
        raise InputError(f"{what} {path} is not TOML: {str(error).partition(';')[0][:200]}") from error


def toml_lines(values: Mapping[str, Any]) -> list[str]:
    """A line for each key that is set; TOML has no null."""
    return [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]


def has_null(value: Any) -> bool:
    """Whether an object or list holds null somewhere, which no TOML file can hold."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(one is None or has_null(one) for one in inner)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(name)} = {_toml(one)}" for name, one in value.items()) + " }"
    # As in JSON, but for a character that stands there as it is; and letters as they are: TOML has no pairs of surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
