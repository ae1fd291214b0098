"""What a key of the run file is: a field with words of help, its type, and what is said of a value it does not take.

Knows no key.
"""

import difflib
import functools
import operator
import types
import typing
from collections.abc import Iterable
from dataclasses import field, fields, is_dataclass
from typing import Any

from noria.errors import InputError, require

MAX_NAME_NBYTES, MAX_PATH_NBYTES = 255, 4095  # of a file's name, and of a path (Linux)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` if a known word is near, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def key(help: str, default: Any = None, choices: tuple[str, ...] = (), text: bool = False, json: bool = False) -> Any:
    """A field that is a key. `text`: its flag's value is taken as text, whatever it looks like; `json`: as JSON."""
    return field(default=default, metadata={"help": help, "choices": choices, "text": text, "json": json})


WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "a table"}


def check_path(path: str | None, name: str) -> None:
    """Raises InputError for a path that no file system takes. Looks at its letters alone."""
    text = path or ""
    require("\0" not in text, f"{name} is {text[:100]!r}: a path cannot have a NUL character")
    longest = max(text.split("/"), key=_nbytes)
    require(
        _nbytes(longest) <= MAX_NAME_NBYTES,
        f"{name} has the name {longest[:40]!r}... of {_nbytes(longest)} bytes, a name in a path has at most"
        f" {MAX_NAME_NBYTES}: shorten it",
    )
    require(
        _nbytes(text) <= MAX_PATH_NBYTES,
        f"{name} begins with {text[:40]!r} and has {_nbytes(text)} bytes, a path has at most {MAX_PATH_NBYTES}: shorten it",
    )


def _nbytes(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


@functools.cache  # every row of the prompts asks
def types_of(kind: type) -> dict[str, Any]:
    """The type of each key of a section, and of the run file's top level, by name: `list | None`, whatever it lists."""
    hints = typing.get_type_hints(kind)
    return {f.name: _bare(hints[f.name]) for f in fields(kind) if not is_dataclass(hints[f.name])}


def _bare(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return functools.reduce(operator.or_, map(_bare, typing.get_args(hint)))
    return typing.get_origin(hint) or hint


def checked(value: Any, kind: Any, name: str) -> Any:
    """`value` if it is of this type (an int will do for a float). Raises InputError that names the key."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**63, f"{name} is {str(value)[:20]}...: the number is too large")
        return float(value)
    exact = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not exact:
        wanted = " or ".join(WORDS[k] for k in kinds if k is not type(None))
        raise InputError(f"{name} is {value!r}: it must be {wanted}")
    return value
