"""The rows of a file of prompts: which keys they may have, what is wrong with a row, and what is the user's own.

A bad row is a Prompt with an error, never an exception. Knows no tokenizer, no model and no file format.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from noria import readers
from noria.config import InputError, Sampling
from noria.readers import BadRow
from noria.sampling import misspelt, whole
from noria.text import storable

RESERVED = ("id", "prompt", "messages", "token_ids")
SAMPLING = tuple(f.name for f in fields(Sampling))
EXTENDABLE = (".jsonl", ".ndjson", ".txt")  # more bytes after a line's end leave its rows as they were
_MAX_DEPTH = 200  # of the lists and objects in a row
_MAX_ERROR = 500  # characters: a wrong value may be a megabyte


@dataclass(slots=True)
class Prompt:
    """One row of the prompts. `row` counts from 0 in the whole file.

    `prompt`, `token_ids` or `messages` is to be continued (of messages `prompt` is the JSON text); `sampling` is the
    row's own keys of config.Sampling, checked; `extra` the user's own columns as JSON text ("" without any); `error`
    says why the row cannot run (None: it can).
    """

    row: int
    id: str
    prompt: str
    token_ids: list[int] | None
    sampling: dict
    extra: str
    error: str | None
    messages: list[dict] | None = None


def open_prompts(path: str | Path) -> Iterator[Prompt]:
    """The prompts of a file, one at a time, in order.

    Raises InputError for a missing file and an unknown suffix at once, and for a damaged file when the damage is
    reached. Memory does not grow with the file but for 8 bytes a row, which find duplicate ids.
    """
    reader = readers.for_path(path)
    with readers.opened(path):
        pass
    return _prompts(reader.read(path))


def count(path: str | Path) -> int:
    """The number of rows, counted without parsing them. Raises InputError as open_prompts does."""
    return readers.for_path(path).count(path)


def content_hash(path: str | Path, nbytes: int | None = None) -> str:
    """XXH3 (128 bits, hex) of the file's bytes as they are on disk, or of its first `nbytes`.

    Raises InputError if it cannot be read.
    """
    digest, left = xxhash.xxh3_128(), float("inf") if nbytes is None else nbytes
    try:
        with open(path, "rb", buffering=0) as file:
            while left and (piece := file.read(min(2**22, left) if nbytes is not None else 2**22)):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise InputError(f"prompts {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def content_key(path: str | Path, content: str) -> str:
    """What tells these prompts from others, with all that `extends` must know: the hash and its bytes."""
    return f"{content} of {Path(path).stat().st_size} bytes"


def extends(path: str | Path, key: str) -> bool:
    """Whether the file begins with the bytes of the one that had this key, up to the end of a line.

    Raises InputError for formats in which more bytes can change an old row: an open quotation mark of a CSV, a line that
    goes on in the next piece of a gzip file.
    """
    content, _, nbytes = key.removesuffix(" bytes").partition(" of ")
    path = Path(path)
    if not nbytes.isdigit() or path.stat().st_size < int(nbytes) or content_hash(path, int(nbytes)) != content:
        return False
    if path.stat().st_size == int(nbytes):
        return True
    if path.suffix not in EXTENDABLE:
        raise InputError(
            f"prompts {path}: job.extend needs a format whose rows are lines ({', '.join(EXTENDABLE)}):"
            f" in {path.suffix} an old row may change; put the new rows in a file and an output of their own"
        )
    with open(path, "rb") as file:
        file.seek(max(int(nbytes) - 1, 0))
        border = file.read(2)
    return b"\n" in border


def _prompts(records: Iterator[dict | BadRow]) -> Iterator[Prompt]:
    ids = _Ids()
    for row, record in enumerate(records):
        if not isinstance(record, BadRow) and _too_deep(record):
            record = BadRow(f"its values are nested more than {_MAX_DEPTH} deep", readers.own_id(record.get("id")))
        if isinstance(record, BadRow):
            id, id_error = _id(row, record.id, ids)
            yield Prompt(row, id, "", None, {}, "", "; ".join(filter(None, [record.error, id_error]))[:_MAX_ERROR])
        else:
            yield _prompt(row, record, ids)


def _prompt(row: int, record: dict, ids: "_Ids") -> Prompt:
    own, extra, key_errors = _sort_keys(record)
    id, id_error = _id(row, record.get("id"), ids)
    sampling, sampling_error = _sampling(own) if own else ({}, None)
    prompt, token_ids = record.get("prompt"), _whole_ids(record.get("token_ids"))
    content_error = _content_error(record, prompt, token_ids)
    messages = None
    if content_error is None and record.get("messages") is not None:
        messages = _plain_messages(record["messages"])
        prompt = _json_text(messages)
    error = "; ".join(filter(None, [*key_errors, id_error, content_error, sampling_error]))[:_MAX_ERROR]
    return Prompt(
        row,
        id,
        prompt if isinstance(prompt, str) else "",
        None if content_error else token_ids,
        sampling,
        _json_text(extra) if extra else "",
        error or None,
        messages,
    )


def _sort_keys(record: dict) -> tuple[dict, dict, list[str]]:
    """The row's sampling keys (null: not given), the user's own columns, and what is wrong with keys."""
    own, extra, errors = {}, {}, []
    for name, value in record.items():
        if name in RESERVED:
            continue
        if name in SAMPLING:
            if value is not None:
                own[name] = _without_nulls(value) if name == "logit_bias" else value
        elif meant := misspelt(name, value):
            errors.append(f"unknown key {name!r}; did you mean {meant!r}? (if it is your own column, rename it)")
        else:
            extra[name] = value
    return own, extra, errors


def _without_nulls(value):
    """An object without the keys that null says are not given."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def _too_deep(value, left: int = _MAX_DEPTH) -> bool:
    """Whether lists and objects hold each other more than `left` deep: what reads and writes them has such a limit."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_too_deep(one, left - 1) for one in held if isinstance(one, dict | list))


def _id(row: int, value, ids: "_Ids") -> tuple[str, str | None]:
    """The row's id and what is wrong with it. Without one it is the row's number, whatever ids the file has."""
    if value is None:
        return str(row), None
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return str(row), f"id is {_short(value)}: it must be a string or an integer"
    id = storable(str(value))
    return id, None if ids.add(id) else f"id {_short(id)} is that of an earlier row too"


def _content_error(record: dict, prompt, token_ids) -> str | None:
    """What is wrong with the part of the row that is to be continued."""
    messages = record.get("messages")
    given = [name for name in ("prompt", "token_ids", "messages") if record.get(name) is not None]
    if len(given) > 1:
        return f"both {' and '.join(given)}: give one of them"
    if messages is not None:
        return _messages_error(messages)
    if token_ids is not None:
        return _token_ids_error(token_ids)
    if prompt is None:
        names = ", ".join(repr(name) for name in record if name not in RESERVED)
        return f"neither prompt nor messages nor token_ids{f': this row has {names[:60]}' if names else ''}"
    if not isinstance(prompt, str):
        return f"prompt is {_short(prompt)}: it must be a string"
    return None if prompt else "prompt is empty"


def _messages_error(messages) -> str | None:
    if not isinstance(messages, list):
        return f"messages is {_short(messages)}: it must be a list of objects with role and content"
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{place}] is {_short(message)}: it must be an object with role and content"
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            return f"messages[{place}].role is {_short(role)}: it must be a string such as 'user'"
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    return f"messages[{place}].content has {_short(part)}: only parts of type 'text' can be read"
        elif not isinstance(content, str) and not (content is None and role == "assistant"):
            return f"messages[{place}].content is {_short(content)}: it must be a string"
    return None if messages else "messages is empty"


def _plain_messages(messages: list[dict]) -> list[dict]:
    """The messages with a content of several parts as one text, a part a line."""
    return [
        message | {"content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _whole_ids(token_ids):
    """Token ids as integers where a table has them as floats."""
    if isinstance(token_ids, list) and float in map(type, token_ids):
        return [whole(token_id) for token_id in token_ids]
    return token_ids


def _token_ids_error(token_ids) -> str | None:
    if not isinstance(token_ids, list):
        return f"token_ids is {_short(token_ids)}: it must be a list of integers"
    for place, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            return f"token_ids[{place}] is {_short(token_id)}: it must be an integer from 0"
    return None if token_ids else "token_ids is empty"


def _sampling(own: dict) -> tuple[dict, str | None]:
    """The row's own sampling keys, checked, and what is wrong with them."""
    hashable = not any(isinstance(value, list | dict) or len(str(value)) > 100 for value in own.values())
    override = _override if hashable else _override.__wrapped__
    try:
        return dict(override(tuple(own), *own.values())), None
    except InputError as error:
        return {}, str(error)


@lru_cache(maxsize=4096, typed=True)  # typed: true is not 1
def _override(names: tuple[str, ...], *values) -> dict:
    """Rows mostly repeat each other's values, and checking them takes longer than all the rest."""
    settings = Sampling().override(dict(zip(names, values, strict=True)))
    return {name: getattr(settings, name) for name in names}


def _json_text(extra: dict) -> str:
    """JSON of the user's own columns, readable in any script; lone surrogates, which no file can hold, stay escaped."""
    text = json.dumps(extra, ensure_ascii=False)
    return text if _encodable(text) else json.dumps(extra)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value) -> str:
    """A wrong value as an error message shows it."""
    text = repr(value[:50] if isinstance(value, str | list) else value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Ids:
    """The ids so far, as 8-byte hashes: recent ones in a set, the others in one sorted array."""

    def __init__(self):
        self._recent: set[int] = set()
        self._sorted = np.empty(0, np.uint64)

    def add(self, id: str) -> bool:
        """False if the id was there already."""
        digest = xxhash.xxh3_64_intdigest(id.encode())
        wanted = np.uint64(digest)
        place = self._sorted.searchsorted(wanted)
        if digest in self._recent or (place < len(self._sorted) and self._sorted[place] == wanted):
            return False
        self._recent.add(digest)
        if len(self._recent) > 2**16:
            self._sorted = np.sort(np.concatenate([self._sorted, np.fromiter(self._recent, np.uint64)]))
            self._recent.clear()
        return True
