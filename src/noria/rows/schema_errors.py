"""Where in a JSON schema the keyword is that a compiler refuses: found by compiling its parts. Knows no compiler."""

import json
from collections.abc import Callable, Iterator
from typing import Any

_MOST_TRIED = 2**22  # characters of JSON that are compiled: a second of work
_DEFINITIONS = ("$defs", "definitions")
_OF_NAMES = ("properties", "patternProperties", "dependentSchemas", *_DEFINITIONS)  # schemas by name
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = (
    "additionalProperties",
    "additionalItems",
    "items",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
)

# How llguidance's errors of references begin, or what they have, in words that say what to do.
_OF_REFERENCES = {
    "circular references with sibling keys": "it leads back to where it stands, beside other keys or in allOf: a recursive"
    " $ref has to be alone in its object, which may be one of anyOf",
    "is not present in a registry": "it leads out of the schema, and nothing is fetched: put what it names into $defs",
    "Pointer": "it leads to a place that is not in the schema",
}

Place = tuple[str, ...]


def place_of(schema: Any, error_of: Callable[[Any], str]) -> str:
    """The place, `#/properties/a/not`, of the keyword without which the innermost wrong part has another error.

    `error_of(schema)` says what is wrong with one, "" for nothing. Definitions go along with each part.
    """
    tries = _Tries(schema, error_of)
    where, part = _innermost((), schema, tries)
    named = tries.error(part)
    if isinstance(part, dict):
        for one in sorted(part, key=lambda name: (name not in named, -len(name))):  # those that the error names first
            without = {name: part[name] for name in part if name != one}
            if one not in _DEFINITIONS and tries.error(without) != named:
                return _written((*where, one))
    return _written(where)


def plainly(place: str, said: str) -> str:
    """What is wrong at a place, where `said` is llguidance's own word."""
    words = (text for part, text in _OF_REFERENCES.items() if place.endswith("$ref") and part in said)
    return next(words, said)


class _Tries:
    """Errors of parts of a schema, as long as they may be asked for: none after that."""

    def __init__(self, schema: Any, error_of: Callable[[Any], str]):
        self._error_of, self._left = error_of, _MOST_TRIED
        self._definitions = {name: schema[name] for name in _DEFINITIONS if isinstance(schema, dict) and name in schema}

    def error(self, part: Any) -> str:
        part = self._definitions | part if isinstance(part, dict) else part
        self._left -= len(json.dumps(part))
        return self._error_of(part) if self._left >= 0 else ""


def _innermost(where: Place, schema: Any, tries: _Tries) -> tuple[Place, Any]:
    """The deepest part that is wrong by itself."""
    for place, part in _parts(schema):
        if tries.error(part):
            return _innermost((*where, *place), part, tries)
    return where, schema


def _parts(schema: Any) -> Iterator[tuple[Place, Any]]:
    """The schemas right inside one, with where they are."""
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        if name in _OF_NAMES and isinstance(value, dict):
            yield from (((name, key), one) for key, one in value.items())
        elif name in _LISTS and isinstance(value, list):
            yield from (((name, str(place)), one) for place, one in enumerate(value))
        elif name in _SCHEMAS and isinstance(value, dict):
            yield (name,), value


def _written(where: Place) -> str:
    """A JSON pointer (RFC 6901)."""
    return "/".join(["#", *(name.replace("~", "~0").replace("/", "~1") for name in where)])[:200]
