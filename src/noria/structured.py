"""Structured output as keys say it: one constraint and what it may be, and OpenAI's name for it.

Knows no grammar, no tokenizer and no file.
"""

import json
from collections.abc import Mapping
from typing import Any

from noria.errors import InputError, require

KINDS = ("json", "json_object", "regex", "choice", "grammar")  # of which a row has one
MAX_NBYTES = 2**18  # of a constraint as JSON
_COMPACT = "disable_any_whitespace"
_QUIET = {"disable_fallback": (True, False)}  # there is nothing to fall back to
# The other keys of vLLM's structured_outputs, with the values that ask for nothing.
_THEIRS: dict[str, tuple[Any, ...]] = {
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}
_NAME = "sampling.structured_outputs"


def kind_of(value: Mapping[str, Any]) -> str | None:
    """Which of KINDS a checked value of structured_outputs has; None: it asks for nothing."""
    return next(iter(_kinds(value)), None)


def is_compact(value: Mapping[str, Any]) -> bool:
    """Whether JSON is to have no whitespace between its parts."""
    return bool(value.get(_COMPACT))


def may_have_blanks(value: Mapping[str, Any]) -> bool:
    """Whether rows of a run with this value may be JSON with whitespace between its parts: by it, or by their own."""
    return kind_of(value) in (None, "json", "json_object") and not is_compact(value)


def check_structured(value: Mapping[str, Any]) -> None:
    """Raises InputError for what is not one constraint that can be read, of at most MAX_NBYTES. {} asks for nothing."""
    for name, one in value.items():
        neutral = _QUIET.get(name, _THEIRS.get(name, ()))
        if name in KINDS or name == _COMPACT or one is None or one in neutral:
            continue
        why = "is not in Noria" if name in _THEIRS else f"is not one of its keys, {', '.join((*KINDS, _COMPACT))}"
        raise InputError(f"{_NAME} has {str(name)[:40]!r}, which {why}: take it out")
    given = _kinds(value)
    require(len(given) <= 1, f"{_NAME} has {' and '.join(given)}: a row has one constraint, give one of them")
    compact = value.get(_COMPACT)
    require(compact in (None, True, False), f"{_NAME}.{_COMPACT} is {str(compact)[:40]}: it must be true or false")
    for kind in given:
        _check_kind(kind, value[kind])
    size = _nbytes(value)
    require(size <= MAX_NBYTES, f"{_NAME} has {size:,} bytes as JSON, at most {MAX_NBYTES:,} are read: make it smaller")


def of_response_format(value: Mapping[str, Any]) -> dict[str, Any]:
    """The structured_outputs of OpenAI's response_format. Raises InputError for a type that there is not."""
    kind = value.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    require(
        kind == "json_schema", f"response_format.type is {str(kind)[:40]!r}: it is text, json_object or json_schema"
    )
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    require(schema is not None, "response_format has no json_schema.schema, which its type json_schema needs")
    return {"json": schema}


def from_run(json_schema: str | None, regex: str | None, choice: str | list[str] | None) -> dict[str, Any] | None:
    """The structured_outputs of a run's own keys, of which one at most is given; `json_schema`: the text of its file."""
    if json_schema is not None:
        return {"json": json_schema}
    if choice is not None:
        return {"choice": choice.split(",") if isinstance(choice, str) else choice}
    return None if regex is None else {"regex": regex}


def schema_of(value: Any) -> Any:
    """A JSON schema that may be given as its text. Raises InputError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_NAME}.json is a text that is not JSON: {str(error)[:100]}") from error


def _kinds(value: Mapping[str, Any]) -> list[str]:
    """False asks for nothing, but for a schema, which no text fits then."""
    return [kind for kind in KINDS if value.get(kind) is not None and (kind == "json" or value[kind] is not False)]


def _check_kind(kind: str, value: Any) -> None:
    if kind == "json":
        schema = schema_of(value)
        require(isinstance(schema, dict | bool), f"{_NAME}.json is {str(value)[:40]!r}: it must be a JSON schema")
    elif kind == "json_object":
        require(value is True, f"{_NAME}.json_object is {str(value)[:40]!r}: it must be true")
    elif kind == "choice":
        texts = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
        require(
            texts and value, f"{_NAME}.choice is {str(value)[:40]!r}: it must be a list of texts, none of them empty"
        )
    else:
        right = isinstance(value, str) and bool(value)
        require(right, f"{_NAME}.{kind} is {str(value)[:40]!r}: it must be a text that is not empty")


def _nbytes(value: Mapping[str, Any]) -> int:
    try:
        return len(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{_NAME} is not JSON: {str(error)[:100]}") from error
