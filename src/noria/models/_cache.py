"""What a layer finds of its cache, and how it attends. Knows neither pages nor the kinds of attention."""

from typing import Protocol

import torch


class Cache(Protocol):
    """A layer's cache, for the tokens of one call. T tokens, H heads, D head dim."""

    def attend(
        self,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        **rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H, D]: what queries [T, H, D] attend to, once the new tokens' `rows` [T, ...] of each array are written.

        scale: of the scores (default: D ** -0.5). window: the tokens that a query sees (default: all before it).
        """
        ...
