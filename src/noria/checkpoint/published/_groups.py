"""The config groups of compressed-tensors: which group says how a module is quantized, and what it says.

A module is of the group that names it most exactly: by its name, by a regular expression, by its class (all are `Linear` here).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from noria.checkpoint.group_patterns import REGEX, answer
from noria.errors import InputError, require
from noria.models._config import shown
from noria.tools.helper import Failed, Helper
from noria.tools.helper_process import Limits

LINEAR = "Linear"
MAX_GROUPS = 1000
_LIMITS = Limits(memory_nbytes=2**30, cpu_seconds=2, wall_seconds=120, answer_nbytes=2**20)
_MODULES = 1000  # asked for at once


@dataclass(frozen=True)
class Scheme:
    """What a group says of its weights, as its config names it."""

    name: str
    targets: tuple[str, ...]
    kind: str  # int or float
    bits: int
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    rounds: bool  # activations too
    ordered: bool = False  # groups of inputs in another order

    @property
    def words(self) -> str:
        """`4 bits int by group (128)`."""
        size = self.block or self.group_size
        return f"{self.bits} bits {self.kind} by {self.strategy}" + (f" ({size})" if size else "")


def schemes(settings: Mapping[str, Any]) -> list[Scheme]:
    """The groups that quantize weights. Raises InputError for what is none."""
    groups = settings.get("config_groups")
    right = isinstance(groups, dict) and len(groups) <= MAX_GROUPS
    require(right, f"config_groups is {shown(groups)}: it must be an object of groups")
    assert isinstance(groups, dict)
    return [_scheme(str(name), its) for name, its in groups.items() if not isinstance(its, dict) or its.get("weights")]


def _scheme(name: str, said: Any) -> Scheme:
    where = f"config_groups.{name[:40]}"
    require(isinstance(said, dict), f"{where} is {shown(said)}: Noria reads groups that say what they are")
    weights, targets = said["weights"], said.get("targets")
    require(isinstance(weights, dict), f"{where}.weights is {shown(weights)}: it must be an object")
    require(_texts(targets), f"{where}.targets is {shown(targets)}: it must be a list of names")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    require(
        type(bits) is int and kind in ("int", "float"),
        f"{where}: {shown(bits)} bits of type {shown(kind)} are not read",
    )
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or _default_strategy(size)
    require(isinstance(strategy, str), f"{where}: strategy is {shown(strategy)}: it must be a word")
    return Scheme(
        where,
        tuple(targets),
        kind,
        bits,
        strategy,
        size,
        _block(block, where),
        weights.get("symmetric", True) is True,
        rounds=bool(said.get("input_activations") or said.get("output_activations")),
        ordered=weights.get("actorder") in ("group", "dynamic", True),  # by weight or static: groups lie in order
    )


def _default_strategy(size: Any) -> str:
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _block(said: Any, where: str) -> tuple[int, int] | None:
    if said is None:
        return None
    if isinstance(said, str) and said.count("x") == 1:  # as older files have it
        said = [int(size) if size.isdecimal() else size for size in said.split("x")]
    right = isinstance(said, list) and len(said) == 2 and all(type(size) is int and 0 < size < 2**16 for size in said)
    require(right, f"{where}: block_structure is {shown(said)}: it must be two whole numbers above 0")
    return said[0], said[1]


def _texts(said: Any) -> bool:
    return isinstance(said, list) and all(isinstance(one, str) for one in said)


def of_modules(found: Sequence[Scheme], ignored: Any, modules: Sequence[str]) -> dict[str, Scheme | None]:
    """The group of each module; None: it is ignored, or no group names it. Raises InputError for patterns without an end."""
    require(ignored is None or _texts(ignored), f"ignore is {shown(ignored)}: it must be a list of names")
    ignored = list(ignored or ())
    # In the order in which they count; a group by its class last.
    targets = [(target, one) for one in found for target in one.targets if target != LINEAR]
    targets.sort(key=lambda pair: pair[0].startswith(REGEX))
    patterns = ignored + [target for target, _ in targets]
    by_class = next((one for one in found if LINEAR in one.targets), None)
    made: dict[str, Scheme | None] = {}
    for module, numbers in _matched(patterns, modules).items():
        left = any(number < len(ignored) for number in numbers) or LINEAR in ignored
        its = targets[numbers[0] - len(ignored)][1] if numbers and not left else by_class
        made[module] = None if left else its
    return made


def _matched(patterns: list[str], modules: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of the patterns that name each module."""
    if not any(one.startswith(REGEX) for one in patterns):
        return dict(zip(modules, answer({"patterns": patterns, "modules": modules}), strict=True))
    found: dict[str, list[int]] = {}
    rest = iter(modules)
    with Helper("noria.checkpoint.group_patterns", _LIMITS) as helper:
        while some := list(islice(rest, _MODULES)):
            try:
                answers = helper.ask({"patterns": patterns, "modules": some})
            except Failed as error:
                raise InputError(f"its patterns of modules cannot be used: {error}") from error
            found |= dict(zip(some, answers, strict=True))
    return found
