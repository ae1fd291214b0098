"""What a layer calls for its attention. Knows neither the cache nor the kinds of attention."""

from typing import Protocol

import torch


class Attend(Protocol):
    """What a layer of a model calls with its new tokens' queries [T, H, D], keys and values [T, Hkv, D]: [T, H, D].

    scale: of the scores (default: D ** -0.5). window: the tokens that a query sees (default: all before it).
    """

    def __call__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor: ...
