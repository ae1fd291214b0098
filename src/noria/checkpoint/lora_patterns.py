"""Which modules an adapter's patterns name, by the rules of peft (tuners_utils.check_target_module_exists,
utils.other.get_pattern_key).

Answers requests of noria.tools.helper: a pattern is a regular expression of anybody's, which may take for ever, so it is tried
in a child with limits. Imports the standard library alone.
"""

import re
from typing import Any


def answer(request: dict[str, Any]) -> list[list[Any]]:
    """For each of `modules`: whether it is a target, and the first key of `ranks` and of `alphas` that matches it (or null)."""
    patterns = request["patterns"]
    return [
        [_is_target(patterns, module), _first(request["ranks"], module), _first(request["alphas"], module)]
        for module in request["modules"]
    ]


def _first(keys: list[str], module: str) -> str | None:
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), None)


def _is_target(patterns: dict[str, Any], module: str) -> bool:
    if _named(patterns["exclude_modules"], module) or _is_saved(patterns["modules_to_save"], module):
        return False
    targets = patterns["target_modules"]
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return _named(targets, module) and _in_layers(patterns["layers_to_transform"], patterns["layers_pattern"], module)


def _named(names: str | list[str] | None, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _is_saved(names: list[str] | None, module: str) -> bool:
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names or ())


def _in_layers(layers: int | list[int] | None, pattern: str | list[str] | None, module: str) -> bool:
    """Whether the module is in one of the layers, if only some are meant; `pattern`: what stands before their number."""
    if layers is None or layers == []:
        return True
    names = [pattern] if isinstance(pattern, str) and pattern else list(pattern or ())
    tries = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for one in tries if (match := re.match(one, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)
