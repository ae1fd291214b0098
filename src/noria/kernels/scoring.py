"""What becomes of the products of queries and keys before they are exponents: data for every kind of attention.

H heads.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scoring:
    """How a layer scores its keys."""

    scale: float
    window: int | None = None  # how many keys a query sees, its own the last
    soft_cap: float | None = None  # c: scores are c * tanh(score / c)
    sinks: torch.Tensor | None = None  # [H]: the score of a key without a value, which no cap changes

    @property
    def plain(self) -> bool:
        """Whether exponents are those of the scaled products alone."""
        return self.soft_cap is None and self.sinks is None
