"""Which of many patterns name a module, by the rules of compressed-tensors (utils/match.py): a whole name, or `re:` and a regular
expression that matches from the name's first character on.

Answers requests of noria.tools.helper: a regular expression is anybody's and may take for ever, so it is tried in a child with
limits. Imports the standard library alone.
"""

import re
from typing import Any

REGEX = "re:"


def answer(request: dict[str, Any]) -> list[list[int]]:
    """For each of `modules` the numbers of the `patterns` that name it."""
    patterns = request["patterns"]
    return [[number for number, one in enumerate(patterns) if _names(one, module)] for module in request["modules"]]


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), module) is not None
    return pattern == module
