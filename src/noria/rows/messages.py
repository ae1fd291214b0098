"""The conversation of a row: what its messages may be, and what a template reads beside them. Knows no template."""

from typing import Any

from noria.names import BESIDE
from noria.rows.columns import Content
from noria.tools.text import short

_SPEAKERS = ("user", "system", "developer")  # who says nothing without a content
_SWITCHES = (
    ("continue_final_message", (bool, str), "true, false or the key of the final message that is continued"),
    ("add_generation_prompt", (bool,), "true or false"),
)


def messages_error(messages: Any) -> str | None:
    if not isinstance(messages, list):
        return f"messages is {short(messages)}: it must be a list of objects with role and content"
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{place}] is {short(message)}: it must be an object with role and content"
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            return f"messages[{place}].role is {short(role)}: it must be a string such as 'user'"
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text":
                    return f"messages[{place}].content has {short(part)}: only parts of type 'text' can be read"
                if not isinstance(part.get("text"), str):
                    return f"messages[{place}].content has {short(part)}: its 'text' must be a string"
        elif not isinstance(content, str) and not (content is None and role not in _SPEAKERS):
            return f"messages[{place}].content is {short(content)}: it must be a string"
    return None if messages else "messages is empty"


def given(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without keys that are null, which means not given: tables have every key in every message."""
    return [
        without_nulls(message | {"content": [without_nulls(part) for part in message["content"]]})
        if isinstance(message.get("content"), list)
        else without_nulls(message)
        for message in messages
    ]


def beside_of(content: Content) -> tuple[dict[str, Any], str | None]:
    """What the chat template reads beside the row's messages, and what is wrong with it."""
    beside = {name: content.rest[name] for name in BESIDE if content.rest.get(name) is not None}
    for name in ("tools", "documents"):  # of another kind they are columns of the user's own
        if not isinstance(beside.get(name, []), list):
            del beside[name]
        for place, one in enumerate(beside.get(name, [])):
            if not isinstance(one, dict):
                return beside, f"{name}[{place}] is {short(one)}: it must be an object"
    for name, kinds, words in _SWITCHES:
        if not isinstance(beside.get(name, False), kinds):
            return beside, f"{name} is {short(beside[name])}: it must be {words}"
    if beside.get("continue_final_message") and beside.get("add_generation_prompt"):
        return beside, "continue_final_message and add_generation_prompt contradict each other: give one of them"
    return beside, None


def without_nulls(value: Any) -> Any:
    """An object without the keys that null says are not given."""
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value
