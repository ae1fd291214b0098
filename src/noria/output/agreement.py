"""Which headers are of one run: what rows that are put together must have in common.

A header is a table of plain JSON values; see desk/identity.py, which makes it. Knows no rows.
"""

import json
from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any

from noria.sampling import OLD_RULES, OPEN, Sampling
from noria.tools.values import WHOLE

ANEW = "decoded anew"  # what an output of the old rules says of its texts if this version finished it
# What a header means that lacks the key: it was written before there was such a key, so with what is now its default.
_DEFAULTS = {
    "rules": OLD_RULES,
    "shard": WHOLE,
    "kv_cache_dtype": "auto",
    "products": "auto",
    **{f"sampling.{key.name}": OPEN.get(key.name, key.default) for key in fields(Sampling)},
}


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], but: Container[str] = ()) -> list[str]:
    """The names of the values that two headers do not share, `but` for some.

    A value that a header lacks is at its default (null without one), so a later version with more keys agrees with it.
    """
    names = dict.fromkeys([*ours, *theirs])
    return [name for name in names if name not in but and _value(theirs, name) != _value(ours, name)]


def difference(name: str, theirs: Mapping[str, Any], there: str, ours: Mapping[str, Any]) -> str:
    """`sampling.top_k: 3 in part-000000.h5, 5 now`: a value that two headers do not share, in words."""
    return f"{name}: {_json(theirs, name)} {there}, {_json(ours, name)} now"


def _value(header: Mapping[str, Any], name: str) -> object:
    return header.get(name, _DEFAULTS.get(name))


def _json(header: Mapping[str, Any], name: str) -> str:
    return json.dumps(_value(header, name))
