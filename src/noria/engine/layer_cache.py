"""What a layer of a model finds of its cache, for one microbatch: how it attends."""

from collections.abc import Mapping
from types import ModuleType

import torch

from noria.engine.batch import Microbatch


class LayerCache:
    """The arrays of one layer, in which the pages of a microbatch lie; models/_cache.py says what the methods do.

    kind: a module of attention/.
    """

    __slots__ = ("_arrays", "_kind", "_microbatch")

    def __init__(self, kind: ModuleType, microbatch: Microbatch, arrays: Mapping[str, torch.Tensor]):
        self._kind, self._microbatch, self._arrays = kind, microbatch, arrays

    def attend(
        self,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        **rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H, D]: writes the new tokens' rows to their places, and attends."""
        arrays, microbatch = self._arrays, self._microbatch
        for name, new in rows.items():
            arrays[name].index_copy_(0, microbatch.rows, new)
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        keys, values = arrays["key"], arrays["value"]
        return self._kind.attention(microbatch.attention_plan, queries, keys, values, scale, window)

    def commit(self) -> None:
        """The layer has returned: what it gave for its sequences is written."""
