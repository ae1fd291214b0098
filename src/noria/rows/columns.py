"""Where a row's prompt, conversation and id stand: in Noria's own columns, or in those that the run names.

Reads the forms in which published data sets have them; knows no sampling key, no file and no model.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from noria.readers import OWN, flag_for, folded

# Who speaks in a message of ShareGPT's form.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_ROLES |= {"observation": "tool", "function_response": "tool", "model": "assistant"}
_ROLES |= {name: name for name in ("system", "user", "assistant", "tool", "developer")}


@dataclass(frozen=True)
class Columns:
    """The columns that a run names (None: Noria's own name). `prompt` may be several, `instruction,input`, whose texts
    become one, with an empty line between them; and each may be a path into a row, `doc.question` or `turns.0`."""

    prompt: str | None = None
    id: str | None = None
    messages: str | None = None

    @property
    def of_a_table(self) -> tuple[str, ...]:
        """A table has one of these columns, or no row of it has a prompt."""
        if not self.prompt and not self.messages:
            return OWN[1:]
        names = [self.prompt or "prompt", self.messages or "messages"]
        names += [part.strip() for name in names for part in name.split(",")]
        return tuple(dict.fromkeys([*names, *(name.partition(".")[0] for name in names)]))


@dataclass
class Content:
    """What is to be continued: one of prompt, messages and token_ids (as they stand, not checked); the row's id; `rest`,
    its other columns. `error`: why nothing is; `notes`: what the run's user must know of such rows."""

    prompt: Any = None
    messages: Any = None
    token_ids: Any = None
    id: Any = None
    rest: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    notes: list[str] = field(default_factory=list)


def content_of(record: dict[str, Any], columns: Columns) -> Content:
    """The row by its columns. A column that the run names goes before Noria's own, messages before prompt; what is not
    taken is a column of the user's own."""
    found = Content(rest=dict(record))
    found.id = _take(found.rest, columns.id or "id")
    if columns.id and found.id == "":
        found.id = None
    named = {"messages": columns.messages or "messages", "prompt": columns.prompt or "prompt", "token_ids": "token_ids"}
    given = [kind for kind, name in named.items() if _look(record, name) is not None]
    chosen = _chosen(given, columns)
    if len(chosen) > 1:
        found.error = f"both {' and '.join(sorted(chosen))}: give one of them"
    elif not chosen:
        found.error = _nothing(record, columns)
    else:
        found.notes = [_carried(named[chosen[0]], named[kind]) for kind in given if kind not in chosen]
    for kind in chosen:
        setattr(found, kind, _take(found.rest, named[kind]))
    for kind, name in named.items():
        if kind == name and found.rest.get(kind, 0) is None:
            del found.rest[kind]  # null is not given
    if found.messages is not None or not _joins(record, columns.prompt or ""):  # texts alone are joined
        _first_of_turns(found, columns.prompt, record)
        _read_conversation(found)
    found.notes += [note for name in found.rest if (note := _nearly(name)) and folded(name) not in record]
    return found


def _chosen(given: list[str], columns: Columns) -> list[str]:
    """Which of the kinds of content that a row has is continued; several: it is not said which."""
    explicit = [kind for kind in given if getattr(columns, kind, None)]
    if "messages" in explicit or ("messages" in given and not explicit and "token_ids" not in given):
        return ["messages"]
    return explicit or given


def _carried(read: str, other: str) -> str:
    return f"rows with {read} and {other} are read by {read}; {other} is carried as a column of your own"


def _first_of_turns(found: Content, name: str | None, record: Mapping[str, Any]) -> None:
    """Of a column of several texts, as of MT-bench's turns, the first is the prompt."""
    turns = found.prompt
    if name is None or not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        return
    found.prompt = turns[0]
    if len(turns) > 1:
        found.notes.append(f"{name} has several texts: the first is the prompt, all are carried")
        if name in record:
            found.rest[name] = turns


def _read_conversation(found: Content) -> None:
    """A conversation in the prompt's place, as JSON text, or in ShareGPT's form."""
    if _is_conversation(found.prompt):
        found.prompt, found.messages = None, found.prompt
    if isinstance(found.messages, str) and found.messages.lstrip().startswith("["):
        found.messages = _json(found.messages)
    if isinstance(found.messages, list):
        try:
            found.messages = [_message(message, place) for place, message in enumerate(found.messages)]
        except ValueError as error:
            found.error = str(error)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _message(message: Any, place: int) -> Any:
    """A message with role and content where it has ShareGPT's from and value. Raises ValueError for another speaker."""
    if not isinstance(message, dict) or "role" in message or "from" not in message or "value" not in message:
        return message
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"messages[{place}].from is {str(speaker)[:50]!r}: it is one of {', '.join(_ROLES)}")
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": _ROLES[speaker], "content": message["value"]} | others


def _joins(record: Mapping[str, Any], name: str) -> bool:
    """Whether the name stands for several columns, and is not itself that of one."""
    return "," in name and name not in record


def _look(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column, of several that are one prompt, or at a path; None without any."""
    if name in record:
        return record[name]
    if _joins(record, name):
        values = [_look(record, part.strip()) for part in name.split(",")]
        texts = [value for value in values if value is not None and value != ""]
        other = next((value for value in texts if not isinstance(value, str)), None)
        return "\n\n".join(texts) if other is None and texts else other
    value: object = record
    for step in name.split("."):
        value = _at(value, step)
    return None if value is record else value


def _at(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    index = int(step) if step.isascii() and step.isdigit() and len(step) < 7 else None
    return value[index] if isinstance(value, list) and index is not None and index < len(value) else None


def _take(rest: dict[str, Any], name: str) -> Any:
    """The value of a column, which leaves the others; one that was put together, or of a path, leaves them as they are."""
    return rest.pop(name) if name in rest else _look(rest, name)


def _nothing(record: Mapping[str, Any], columns: Columns) -> str:
    """Why a row has nothing to continue, with the flag that would read it."""
    named = [f"{kind} column {name!r}" for kind in ("prompt", "messages") if (name := getattr(columns, kind))]
    lacking = f"no {' and no '.join(named)}" if named else "neither prompt nor messages nor token_ids"
    names = ", ".join(repr(name) for name in record if name not in OWN)
    flag = flag_for(record)
    if columns.prompt and flag == f"--prompt-column {shlex.quote(columns.prompt)}":
        flag = ""  # it was given
    return lacking + (f": this row has {names[:60]}" if names else "") + (f"; {flag} reads it" if flag else "")


@lru_cache(maxsize=4096)
def _nearly(name: str) -> str | None:
    """What is said of a column that is one of Noria's but for capitals or spaces."""
    meant = folded(name)
    if name == meant or meant not in OWN:
        return None
    does = f" (--{meant}-column {shlex.quote(name)} reads it)" if meant != "token_ids" else ""
    return f"column {name!r} is not {meant!r}: it is carried as a column of your own{does}"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
