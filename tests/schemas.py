"""Three hundred JSON schemas in the shapes that people use and that attackers use, made here from a seed.

The shapes are those of function calls, records, configurations, unions, recursive trees, formats, patterns and numbers, and
of schemas that are large, deep, contradictory or never end. `least` tokens are surely enough for the smallest instance.
"""

import random
import string
from dataclasses import dataclass

FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri", "duration")
PATTERNS = (
    r"^[A-Z]{2}\d{4}$",
    r"^(red|green|blue)(-(dark|light))?$",
    r"^\d{3}-\d{2}-\d{4}$",
    r"^[a-z][a-z0-9_]{0,15}$",
    r"^v\d+\.\d+\.\d+$",
    r"^#[0-9a-fA-F]{6}$",
    r"[aeiou]",
    r"^\+?[1-9]\d{6,11}$",
    r"^$|^x+$",
    r"^[^\s@]{1,8}@[^\s@]{1,8}$",
)
NAMES = "id name type kind status value items user-name created_at e-mail größe 名前 with/slash with~tilde ☃".split()
NAMES += ['say "so"', "back\\slash", "line\nbreak", " ", "$ref?", "a.b", "not", "enum"]


@dataclass(frozen=True)
class Case:
    """A schema by a name; `fits`: its smallest instance fits into 1,024 tokens, and it is one that can be done."""

    name: str
    schema: object
    fits: bool = True


def cases(seed=0):
    """All of them, always the same."""
    draw = random.Random(seed)
    makers = [
        (function_call, 50),
        (record, 60),
        (configuration, 25),
        (union, 30),
        (tree, 20),
        (array, 30),
        (scalar, 35),
    ]
    made = [Case(f"{maker.__name__} {place}", maker(draw)) for maker, count in makers for place in range(count)]
    made += hostile()
    assert len(made) == 300, len(made)
    return made


def names(draw, count):
    return draw.sample(NAMES, min(count, len(NAMES)))


def text(draw):
    return draw.choice(
        [
            {"type": "string"},
            {"type": "string", "maxLength": draw.randint(1, 40)},
            {"type": "string", "minLength": 1, "maxLength": 12, "description": "some words"},
            {"type": "string", "format": draw.choice(FORMATS)},
            {"type": "string", "pattern": draw.choice(PATTERNS)},
            {"enum": ["a", "b c", 'quo"ted', "ü", "\u2028", ""]},
            {"const": draw.choice(["fixed", "☃", "with \\ and /"])},
        ]
    )


def number(draw):
    low = draw.randint(-50, 50)
    return draw.choice(
        [
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)},
            {"type": "number", "exclusiveMinimum": low, "maximum": low + 7.5},
            {"type": "integer", "multipleOf": draw.choice([2, 5, 10]), "minimum": 0, "maximum": 10_000},
            {"type": "number", "minimum": 0, "maximum": 1},
            {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
        ]
    )


def leaf(draw):
    other = [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"type": ["integer", "boolean"]}]
    return draw.choice([text, text, number, lambda draw: draw.choice(other)])(draw)


def obj(draw, depth, most=5):
    keys = names(draw, draw.randint(1, most))
    properties = {key: thing(draw, depth - 1) for key in keys}
    made = {"type": "object", "properties": properties, "required": draw.sample(keys, draw.randint(0, len(keys)))}
    return made | draw.choice([{"additionalProperties": False}, {"additionalProperties": False}, {"title": "A thing"}])


def thing(draw, depth):
    if depth <= 0 or draw.random() < 0.5:
        return leaf(draw)
    if draw.random() < 0.4:
        return {"type": "array", "items": thing(draw, depth - 1), "maxItems": draw.randint(1, 4)}
    return obj(draw, depth, 4)


def function_call(draw):
    """As tools are called: a name that is given, and arguments of a few types."""
    arguments = {
        key: leaf(draw) | {"description": f"the {key}"}
        for key in draw.sample(["city", "unit", "days", "to", "body"], 3)
    }
    parameters = {
        "type": "object",
        "properties": arguments,
        "required": list(arguments)[:2],
        "additionalProperties": False,
    }
    one = {"name": {"const": f"tool_{draw.randint(0, 9)}"}, "arguments": parameters}
    call = {"type": "object", "properties": one, "required": ["name", "arguments"], "additionalProperties": False}
    return draw.choice([call, call, {"type": "array", "items": call, "minItems": 1, "maxItems": 2}])


def record(draw):
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **obj(draw, draw.randint(1, 4))}


def configuration(draw):
    """Many optional properties, some required, shared definitions, open or typed additional ones."""
    shared = {"port": {"type": "integer", "minimum": 1, "maximum": 65535}, "label": {"type": "string", "maxLength": 16}}
    keys = [f"{a}{b}" for a in ("spec", "host", "replica", "volume", "env") for b in ("", "Name", "Limit", "Policy")]
    properties = {key: draw.choice([{"$ref": "#/$defs/port"}, {"$ref": "#/$defs/label"}, leaf(draw)]) for key in keys}
    more = draw.choice([False, {"type": "integer"}, {"$ref": "#/$defs/label"}])
    made = {"type": "object", "properties": properties, "required": draw.sample(keys, 3), "$defs": shared}
    return made | {"additionalProperties": more}


def union(draw):
    """Alternatives: by type, by a constant, nullable, merged."""
    kinds = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": leaf(draw)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind in ("circle", "square", "line")
    ]
    return draw.choice(
        [
            {"anyOf": kinds},
            {"oneOf": [{"type": "string", "maxLength": 9}, {"type": "integer"}, {"type": "null"}]},
            {"anyOf": [leaf(draw), {"type": "null"}]},
            {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
            {
                "type": "object",
                "properties": {"shape": {"anyOf": kinds}, "n": number(draw)},
                "required": ["shape", "n"],
            },
            {"allOf": [obj(draw, 1, 2), {"type": "object", "description": "both"}]},
        ]
    )


def tree(draw):
    node = {
        "type": "object",
        "properties": {"value": leaf(draw), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    wide = {
        "type": "object",
        "properties": {
            "name": {"enum": ["a", "b"]},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": draw.choice([node, wide])}}


def array(draw):
    return draw.choice(
        [
            {"type": "array", "items": leaf(draw), "minItems": 2, "maxItems": 5},
            {"type": "array", "items": obj(draw, 1, 3), "maxItems": 3},
            {
                "type": "array",
                "prefixItems": [number(draw), text(draw), {"type": "boolean"}],
                "items": False,
                "minItems": 3,
            },
            {"type": "array", "items": {"type": "array", "items": number(draw), "maxItems": 3}, "maxItems": 3},
            {"type": "array", "items": {"enum": [1, "1", None, True, 1.5]}, "minItems": 1, "maxItems": 6},
        ]
    )


def scalar(draw):
    return draw.choice([text, number, leaf])(draw)


def hostile():
    """Large, deep, contradictory, endless, or with keywords that cannot be done."""
    deep = {"type": "integer"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"], "additionalProperties": False}
    many = {
        "type": "object",
        "properties": {f"p{place}": {"type": "integer"} for place in range(400)},
    }
    loop = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
    words = ["".join(random.Random(place).choices(string.ascii_letters, k=12)) for place in range(5000)]
    fine = {
        "sixty levels": deep,
        "400 optional properties": many | {"additionalProperties": False},
        "5,000 words": {"enum": words},
        "words of 16 KiB": {"enum": ["x" * 2**14, "y"]},
        "a text of at most a million characters": {"type": "string", "maxLength": 10**6},
        "nested repetitions": {"type": "string", "pattern": r"^((a{1,20}b?){1,20}c?){1,20}$"},
        "repetitions that backtrack": {"type": "string", "pattern": r"^(a+)+$"},
        "alternatives that overlap": {"type": "string", "pattern": r"^(a|aa|aaa)*b$"},
        "the 15th letter from the end": {"type": "string", "pattern": r"^[ab]*a[ab]{15}$"},
        "any character, often": {"type": "string", "pattern": r"^(.*x){12}$"},
        "unicode classes": {"type": "string", "pattern": r"^[à-ö]{1,20}$"},
        "large bounds": {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
        "a tiny interval": {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.1000001},
        "keys of two kinds": {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "string", "maxLength": 3}}, "additionalProperties": False},
        "an empty key": {"type": "object", "properties": {"": {"const": ""}}, "required": [""], "additionalProperties": False},
        "a key that is a path": {"type": "object", "properties": {"../../etc/passwd": {"type": "null"}}, "additionalProperties": False},
        "control characters": {"const": "\0\x01\x1f\x7f\u202e\ufeff"},
        "an emoji of several parts": {"const": "👩‍👩‍👧‍👦"},
        "anything": True,
        "nothing said": {},
        "an unknown keyword": {"type": "integer", "x-own": {"not": 1}, "$comment": "not a schema"},
        "definitions that nobody uses": {"type": "null", "$defs": {"bad": {"not": {}}}},
        "twenty alternatives": {"anyOf": [{"const": place} for place in range(20)]},
        "alternatives of alternatives": {"anyOf": [{"anyOf": [{"anyOf": [{"const": a * b} for a in range(5)]} for b in range(5)]}]},
        "a square of references": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {"type": "boolean"}}},
        "lists of lists of lists": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2}}},
        "500 required numbers": {"type": "array", "minItems": 200, "maxItems": 200, "items": {"enum": [1]}},
        "draft 4 exclusive bounds": {"type": "integer", "minimum": 5, "maximum": 9},
        "a date between texts": {"type": "string", "format": "date", "maxLength": 10},
        "a default that does not fit": {"type": "integer", "default": "x", "examples": [None]},
        "types of every kind": {"type": ["null", "boolean", "integer", "number", "string"]},
        "a long constant": {"const": list(range(150))},
    }  # fmt: skip
    endless = {
        "a million items": {"type": "array", "minItems": 10**6, "items": {"type": "boolean"}},
        "it has itself": loop,
        "a text of at least 100,000 characters": {"type": "string", "minLength": 100_000},
        "a reference to itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        "20,000 levels of lists": {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        "words of 16 KiB alone": {"const": "x" * 2**14},
    }
    # Refused, each for one keyword.
    refused = {
        "no equal items": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        "nothing of a kind": {"properties": {"a": {"not": {"type": "string"}}}},
        "a condition": {"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        "one that is contained": {"type": "array", "contains": {"const": 1}},
        "a file": {"$ref": "file:///etc/passwd"},
        "look-ahead": {"type": "string", "pattern": "^(?=.*[0-9])[a-z0-9]+$"},
        "at most two of three": {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2},
        "nothing fits": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    }
    rest = 50 - len(fine) - len(endless) - len(refused)
    draw = random.Random(7)
    more = {f"record {place} of large parts": obj(draw, 5, 6) for place in range(rest)}
    return [
        *(Case(name, schema) for name, schema in (fine | more).items()),
        *(Case(name, schema, False) for name, schema in (endless | refused).items()),
    ]
