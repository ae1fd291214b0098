"""The forms that a message may have and a template may want: content as a text or as parts, a tool call's arguments as
an object or as JSON text, what a developer says as a developer's or as a system's.

Which one a template reads is found out by trying it on the conversation with marks in the place of the user's texts.
Knows no template's source and no tokenizer.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeAlias

from noria.errors import require
from noria.rows.template import TemplateError, TemplateStopped

Render: TypeAlias = Callable[[list[dict[str, Any]]], str]  # the text of messages

ARGUMENTS = "arguments"  # beside the roles whose contents are parts: what a form is chosen for
_MARK = "40917{:06d}26385"  # digits: no filter of texts changes them
_PRINTED = "\x85"  # behind a mark: Python prints it as \\x85, and JSON as it is or as \\u0085


def formed(messages: list[dict[str, Any]], render: Render) -> list[dict[str, Any]]:
    """The messages in the form that the template behind `render` reads.

    Content parts stay parts where it reads parts and are joined with a space, as transformers' server does it, where it
    prints them; arguments given as JSON text become an object where it takes one. `render` raises TemplateError for what
    the template does not take. Raises TemplateStopped if it does in a trial.
    """
    wanted = frozenset(_wanted(messages))
    return _with(messages, _taken(messages, wanted, render)) if wanted else messages


def reads_parts_alone(render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Whether the template behind `render` loses a message whose content is a text, and reads it in a part."""
    mark = _MARK.format(0)
    for content in (mark, [{"type": "text", "text": mark}]):
        said = _tried(render, [{"role": "user", "content": content}])
        if said is None or (mark in said) == isinstance(content, str):
            return False
    return True


def heard(messages: list[dict[str, Any]], render: Render) -> list[dict[str, Any]]:
    """The messages with those of a developer as a system's, where the template behind `render` loses or refuses the role.

    Raises InputError where it loses them as a system's too; TemplateStopped as `formed`.
    """
    if not any(message["role"] == "developer" for message in messages):
        return messages
    known = _hears(messages, messages, render)
    if known:
        return messages
    as_system = [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]
    found = _hears(as_system, messages, render)
    if known is None and found is None:  # what a template refuses either way is said when it is rendered
        return messages
    require(
        found,
        "the model's chat template loses messages of role 'developer', and of role 'system' too: give their text in a"
        " user's message",
    )
    return as_system


def _hears(messages: list[dict[str, Any]], given: list[dict[str, Any]], render: Render) -> bool | None:
    """Whether the template prints all that a developer says in the `given` messages; None: it does not take them."""
    marks = {place: _MARK.format(place) for place, message in enumerate(given) if message["role"] == "developer"}
    said = _tried(render, [_saying(message, marks.get(place)) for place, message in enumerate(messages)])
    return None if said is None else all(mark in said for mark in marks.values())


def _saying(message: dict[str, Any], mark: str | None) -> dict[str, Any]:
    if mark is None:
        return message
    content = [{"type": "text", "text": mark}] if isinstance(message.get("content"), list) else mark
    return message | {"content": content}


def _wanted(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The roles whose messages have parts, and ARGUMENTS if there are such texts: what has two forms."""
    for message in messages:
        if isinstance(message.get("content"), list):
            yield message["role"]
        if any(_object(function) is not None for function in _functions(message)):
            yield ARGUMENTS


def _taken(messages: list[dict[str, Any]], wanted: frozenset[str], render: Render) -> frozenset[str]:
    """Of `wanted` what the template takes in its first form: as parts, as an object."""
    for kept in _choices(wanted):
        marks = _Marks()
        said = _tried(render, _with(messages, kept, marks))
        if said is None:
            continue
        wrong = {one for one in kept if not marks.read(one, said)}
        if wrong and _tried(render, _with(messages, kept - wrong, _Marks())) is not None:
            return kept - wrong
        return kept
    return wanted


def _choices(wanted: frozenset[str]) -> list[frozenset[str]]:
    """All, all but one, one alone, none."""
    found = [wanted, *(wanted - {one} for one in sorted(wanted)), *(frozenset({one}) for one in sorted(wanted))]
    return list(dict.fromkeys([*found, frozenset()]))


def _tried(render: Render, messages: list[dict[str, Any]]) -> str | None:
    try:
        return render(messages)
    except TemplateStopped:
        raise
    except TemplateError:
        return None


class _Marks:
    """Texts that stand in the place of the user's, and whether a template printed them as they are.

    Beside each is a second one under a key of its own, which Python writes otherwise where it prints an object.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self._given: dict[str, list[str]] = {}

    def part(self, part: dict[str, Any]) -> dict[str, Any]:
        """A content part with a mark as its text."""
        mark = _MARK.format(next(self._numbers))
        return part | {"text": mark, mark: mark + _PRINTED}

    def argument(self) -> dict[str, Any]:
        """A key and a value among a call's arguments."""
        mark = _MARK.format(next(self._numbers))
        return {mark: mark + _PRINTED}

    def note(self, wanted: str, found: dict[str, Any]) -> dict[str, Any]:
        """The marked object, kept in mind for `wanted`."""
        self._given.setdefault(wanted, []).append(next(reversed(found)))
        return found

    def read(self, wanted: str, said: str) -> bool:
        """Whether some are there, and none as Python prints an object."""
        given = self._given.get(wanted, [])
        printed = any(re.search(rf"{mark}\\+x85", said, re.IGNORECASE) for mark in given)
        return any(mark in said for mark in given) and not printed


def _with(messages: list[dict[str, Any]], kept: frozenset[str], marks: _Marks | None = None) -> list[dict[str, Any]]:
    """The messages with what is in `kept` in its first form and all else in its second; marked ones for a trial."""
    return [_message(message, kept, marks) for message in messages]


def _message(message: dict[str, Any], kept: frozenset[str], marks: _Marks | None) -> dict[str, Any]:
    content, role = message.get("content"), message["role"]
    if isinstance(content, list):
        parts = [marks.note(role, marks.part(part)) if marks else part for part in content]
        joined = " ".join(part["text"] for part in parts)
        message = message | {"content": parts if role in kept else joined}
    if any(_object(function) is not None for function in _functions(message)):
        message = message | {"tool_calls": [_call(call, ARGUMENTS in kept, marks) for call in message["tool_calls"]]}
    return message


def _call(call: Any, as_object: bool, marks: _Marks | None) -> object:
    function = _function(call)
    found = _object(function)
    if function is None or found is None:
        return call
    if marks:
        found = marks.note(ARGUMENTS, found | marks.argument())
        value = found if as_object else json.dumps(found)
    else:
        value = found if as_object else function["arguments"]
    changed = function | {"arguments": value}
    return call | {"function": changed} if function is call.get("function") else changed


def _functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    return [one for one in map(_function, calls) if one is not None] if isinstance(calls, list) else []


def _function(call: object) -> dict[str, Any] | None:
    """Where a call's name and arguments are: in its `function`, or in the call itself."""
    if not isinstance(call, dict):
        return None
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _object(function: dict[str, Any] | None) -> dict[str, Any] | None:
    """The object that arguments given as text hold; a blank text holds none inside. None: they are no such text."""
    text = (function or {}).get("arguments")
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
