"""What an adapter_config.json of peft says: checked, and what Noria does not merge refused by its key."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from noria.errors import InputError, require
from noria.tools.helper import Failed, Helper
from noria.tools.helper_process import Limits

_LIMITS = Limits(memory_nbytes=2**30, cpu_seconds=2, wall_seconds=120, answer_nbytes=2**20)
_MODULES = 1000  # asked for at once
MAX_RANK = 2**16

# Keys that change no number of the merge: where the adapter is from, how it was trained.
_SAID = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *(
        "lora_dropout",
        "megatron_core",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "qalora_group_size",
    ),
    *("bias", "fan_in_fan_out", "init_lora_weights"),  # the last three are looked at, or seen by the tensors
)
_USED = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save"),
)
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the model's own weights as they are
_BY_PEFT = "merge it by peft (merge_and_unload(), save_pretrained()) and convert that"


@dataclass(frozen=True)
class Module:
    """What the patterns say of one module. `scale`: of B A in what is added to its weight."""

    is_target: bool
    rank: int
    scale: float


class LoraConfig:
    """The keys of an adapter_config.json. Raises InputError, naming the key, for what is wrong or not done."""

    def __init__(self, tree: dict[str, Any], path: Path):
        self._path, self._tree = path, tree
        kind = tree.get("peft_type")
        require(kind == "LORA", f"{path}: peft_type is {kind!r}: Noria merges LORA alone; {_BY_PEFT}")
        for name, value in tree.items():
            if name not in (*_SAID, *_USED) and value not in (None, False, 0, "", [], {}):
                raise InputError(f"{path}: {name[:80]} is {str(value)[:80]!r}, which Noria does not merge: {_BY_PEFT}")
        self._require("bias", tree.get("bias", "none") in (None, "none"), f"trained biases are not merged: {_BY_PEFT}")
        initial = tree.get("init_lora_weights", True)
        known = isinstance(initial, bool | str | None) and initial in _INITIAL
        self._require("init_lora_weights", known, f"it may have changed the model's own weights: {_BY_PEFT}")
        self.modules_to_save: list[str] = self._texts("modules_to_save") or []
        self._rank = self._number("r", tree.get("r", 8), whole=True)
        self._alpha = self._number("lora_alpha", tree.get("lora_alpha", 8))
        self._root = bool(tree.get("use_rslora", False))
        self._ranks, self._alphas = self._pattern("rank_pattern", True), self._pattern("alpha_pattern", False)
        targets = tree.get("target_modules")
        self.targets = targets if isinstance(targets, str) else self._texts("target_modules") or []
        layers = tree.get("layers_to_transform")
        whole = layers is None or all(type(one) is int for one in (layers if isinstance(layers, list) else [layers]))
        self._require("layers_to_transform", whole, "it must be an integer or a list of integers")
        self._patterns = {
            "target_modules": ".*" if self.every_linear else self.targets,
            "exclude_modules": self._text_or_texts("exclude_modules"),
            "modules_to_save": self.modules_to_save,
            "layers_to_transform": layers,
            "layers_pattern": self._text_or_texts("layers_pattern"),
        }

    @property
    def every_linear(self) -> bool:
        """Whether peft took every linear layer: which these are the tensors say."""
        return isinstance(self.targets, str) and self.targets.lower() == "all-linear"

    def modules(self, names: Sequence[str]) -> dict[str, Module]:
        """What the patterns say of modules of the model. Raises InputError for patterns that come to no end."""
        ranks, alphas = list(self._ranks), list(self._alphas)
        found: dict[str, Module] = {}
        with Helper("noria.checkpoint.lora_patterns", _LIMITS) as helper:
            for some in _pieces(names):
                request = {"modules": some, "patterns": self._patterns, "ranks": ranks, "alphas": alphas}
                try:
                    answers = helper.ask(request)
                except Failed as error:
                    raise InputError(f"{self._path}: its patterns of modules cannot be used: {error}") from error
                found |= {name: self._module(*one) for name, one in zip(some, answers, strict=True)}
        return found

    def _module(self, is_target: bool, rank_key: str | None, alpha_key: str | None) -> Module:
        rank = int(self._rank if rank_key is None else self._ranks[rank_key])
        alpha = self._alpha if alpha_key is None else self._alphas[alpha_key]
        return Module(is_target, rank, alpha / (math.sqrt(rank) if self._root else rank))

    def _require(self, name: str, condition: bool, wrong: str) -> None:
        require(condition, f"{self._path}: {name} is {str(self._tree.get(name))[:80]!r}: {wrong}")

    def _number(self, name: str, value: Any, whole: bool = False) -> float:
        kinds = (int,) if whole else (int, float)
        right = type(value) in kinds and math.isfinite(value) and (not whole or 1 <= value <= MAX_RANK)
        self._require(name, right, f"it must be {f'an integer from 1 to {MAX_RANK}' if whole else 'a number'}")
        return float(value)

    def _pattern(self, name: str, whole: bool) -> dict[str, float]:
        table = self._tree.get(name) or {}
        self._require(name, isinstance(table, dict), "it must be a table of numbers by module")
        return {key: self._number(name, value, whole) for key, value in table.items()}

    def _texts(self, name: str) -> list[str] | None:
        values = self._tree.get(name)
        right = values is None or (isinstance(values, list) and all(isinstance(one, str) for one in values))
        self._require(name, right, "it must be a list of names of modules")
        return values

    def _text_or_texts(self, name: str) -> str | list[str] | None:
        value = self._tree.get(name)
        return value if isinstance(value, str) else self._texts(name)


def _pieces(names: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(names)
    while some := list(islice(rest, _MODULES)):
        yield some
