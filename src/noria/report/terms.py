"""A prediction beside its measurement, and numbers of a stored plan, which may hold anything."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from noria.plan.plan import TOLERANCE

PHASES = ("prefill", "decode")
Timings = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Term:
    """A prediction and its measurement, in words; `difference` as a share of the prediction. `note`: what binds it, if the
    plan says so."""

    name: str
    planned: str
    measured: str
    difference: float
    note: str = ""
    is_limit: bool = False  # what is planned is the most there may be
    is_hidden: bool = False  # by what goes on beside it and takes longer

    @property
    def change(self) -> str:
        """The difference in words."""
        return f"{100 * self.difference:+.0f} %" if self.difference < 100 else ">9999 %"

    @property
    def is_off(self) -> bool:
        """Whether the run differed from the plan, by more than a prediction may (plan.TOLERANCE) or beyond a limit, and that
        may have cost time."""
        if self.is_hidden:
            return False
        return self.difference > 0 if self.is_limit else abs(self.difference) > TOLERANCE


def number(tree: object, *path: str) -> float | None:
    """The finite number at this place of a table of tables, None where there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    known = isinstance(tree, int | float) and not isinstance(tree, bool) and abs(tree) < 1e30 and math.isfinite(tree)
    return float(tree) if known else None  # type: ignore[arg-type]  # `known` says so


def on_cpu(predicted: object) -> bool:
    """Whether a plan's prediction is of ranks that compute on their CPU."""
    return isinstance(predicted, Mapping) and predicted.get("device") == "CPU"


def term(
    name: str, planned: float | None, measured: float | None, words: Callable[[float], str], note: str = ""
) -> Term | None:
    """The two beside each other, where both are known."""
    if not planned or measured is None:
        return None
    return Term(name, words(planned), words(measured), measured / planned - 1, note)
