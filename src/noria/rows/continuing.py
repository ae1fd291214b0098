"""A conversation whose final message the model goes on with: transformers' `continue_final_message`.

A tag behind the message's text shows where the template writes it; what comes after it is cut off.
"""

from typing import Any

from noria.errors import InputError, require

FIELDS = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of a message's reasoning: the first that is there counts
_TAG = "THE_FINAL_MESSAGE_GOES_ON_HERE "  # its space tells whether the template trims the text


class Continued:
    """`messages` with the tag. `field` is what is continued: true for the content, or a key of the message.

    `source` is the template's. Raises InputError where there is nothing to continue, as transformers does.
    """

    def __init__(self, messages: list[dict[str, Any]], field: bool | str, source: str):
        field = field if isinstance(field, str) else "content"
        final = messages[-1]
        text = final.get(field)
        require(text is not None, f"continue_final_message: the final message has no {field!r}")
        names = [name for name in FIELDS if final.get(name) == text] if field in FIELDS else [field]
        read = any(name in source for name in names)
        require(read, f"continue_final_message: the chat template does not read {field!r}")
        tagged: str | list[dict[str, Any]]
        if isinstance(text, list):
            self._text, tagged = _tagged_parts(text)
        elif isinstance(text, str):
            self._text, tagged = text, text + _TAG
        else:
            raise InputError(f"continue_final_message: {field!r} of the final message is not a text")
        self.messages = [*messages[:-1], final | dict.fromkeys(names, tagged)]

    def cut(self, said: str) -> str:
        """What the template made of the messages, up to the end of the final one's text. Raises InputError."""
        tag = _TAG.strip()
        if self._text.strip() not in said or tag not in said:
            raise InputError("continue_final_message: the chat template does not write the final message as it is")
        end = said.rindex(tag)
        kept = said[:end]
        require(tag not in kept, "continue_final_message: the chat template writes the final message more than once")
        return kept if said.startswith(_TAG, end) else kept.rstrip()


def _tagged_parts(parts: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The last text among content parts, and the parts with the tag behind it."""
    place = max((place for place, part in enumerate(parts) if "text" in part), default=None)
    if place is None:
        raise InputError("continue_final_message: the final message has no part with a text")
    text = parts[place]["text"]
    return text, [*parts[:place], parts[place] | {"text": text + _TAG}, *parts[place + 1 :]]
