"""Decode-only steps with rows of nobody, up to a size for which there are graphs.

S rows of such a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from noria.engine.page_table import NOBODY
from noria.step import NO_STATE, Step


@dataclass(frozen=True)
class Spare:
    """What of the cache belongs to no row, where rows of nobody write: a page, and a state. rows: that a step has at most."""

    page: int
    state: int
    rows: int


@dataclass(frozen=True)
class Padded:
    """A step as graphs take it.

    numbers: int64 on the device, one after another: positions [S], cache rows [S], and where the family has states starts
    [S + 1], kept, reads and writes [S]. plans: of attention, in pages as 0, in rings by window. tokens: of the step, which
    come first.
    """

    tokens: int
    size: int
    numbers: torch.Tensor
    plans: Mapping[int, object]
    spare: Spare

    @property
    def has_states(self) -> bool:
        return len(self.numbers) > 2 * self.size

    @property
    def aside(self) -> torch.Tensor:
        """The numbers, but for states, which are written where they belong to nobody: of what is to be computed again."""
        numbers = self.numbers.clone()
        if self.has_states:
            numbers[-self.size :] = self.spare.state
        return numbers


def padded(step: Step, spare: Spare, size: int) -> Step:
    """A step of rows with a token each, with rows of nobody behind its own: `size` in all."""
    more = size - len(step.slots)
    if not more:
        return step
    filling = {"slots": NOBODY, "counts": 1, "positions": 0}
    if len(step.writes):
        filling |= {"reads": NO_STATE, "writes": spare.state, "kept": 1}
    arrays: dict[str, Any] = {name: _filled(getattr(step, name), more, value) for name, value in filling.items()}
    return replace(step, **arrays)


def _filled(array: np.ndarray, more: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full(more, value, array.dtype)])
