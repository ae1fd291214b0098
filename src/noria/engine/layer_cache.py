"""What a layer of a model finds of its cache, for one microbatch: how it attends, the states of its rows."""

from collections.abc import Mapping
from types import ModuleType

import torch

from noria.engine.batch import Microbatch
from noria.engine.states import States
from noria.models import _rotary


class LayerCache:
    """The arrays of one layer, in which the pages of a microbatch lie; models/_cache.py says what the methods do.

    kind: a module of attention/; arrays: as KvCache.tensors returns them.
    """

    __slots__ = ("_after", "_arrays", "_kind", "_microbatch")

    def __init__(self, kind: ModuleType, microbatch: Microbatch, arrays: Mapping[str, torch.Tensor]):
        self._kind, self._microbatch, self._arrays = kind, microbatch, arrays
        self._after: dict[str, torch.Tensor] | None = None

    @property
    def starts(self) -> torch.Tensor:
        """[N + 1]"""
        return self._states.starts

    @property
    def kept(self) -> torch.Tensor:
        """[N]"""
        return self._states.kept

    @property
    def _states(self) -> States:
        states = self._microbatch.states
        assert states is not None, "the family says of no layer that it has arrays per sequence"
        return states

    def attend(
        self,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        soft_cap: float | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        values: str | int | None = None,
        **rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H, Dv]: writes the new tokens' rows to their places, and attends."""
        if sinks is not None or soft_cap is not None:
            raise NotImplementedError(
                f"no kind of attention computes {'sinks' if soft_cap is None else 'a soft cap'} yet"
            )
        if rotary is not None:
            queries = _rotary.rotate(queries, *rotary)
            rows |= {name: _rotary.rotate(rows[name], *rotary) for name in [*rows][:1]}
        its, arrays = self._microbatch, self._arrays
        for name, new in rows.items():
            arrays[name].index_copy_(0, its.rows, new if new.dim() == 3 else new[:, None])
        names = iter(rows or arrays)
        keys = arrays[next(names)]
        taken = arrays.get(next(names, ""), keys)
        if values is not None:
            taken = keys[..., :values] if isinstance(values, int) else arrays[values]
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        return self._kind.attention(its.attention_plan, queries, keys, taken, scale, window)

    def before(self, name: str) -> torch.Tensor:
        """[N, ...]: a copy of the rows' states, zeros for those that begin."""
        array, states = self._arrays[name], self._states
        return array.index_select(0, states.reads).masked_fill_(_like(states.fresh, array), 0)

    def after(self, name: str, rows: torch.Tensor) -> None:
        """Keeps the rows' new states [N, ...] until the layer has returned."""
        self._after = (self._after or {}) | {name: rows.to(self._arrays[name].dtype)}

    def commit(self) -> None:
        """The layer has returned: what it gave for its sequences is written.

        A layer that memory does not let return leaves nothing, so that it may be computed again.
        """
        if self._after is not None:
            for name, rows in self._after.items():
                self._arrays[name].index_copy_(0, self._states.writes, rows)


def _like(mask: torch.Tensor, array: torch.Tensor) -> torch.Tensor:
    """[N, 1, ...]: a mask of rows as the array's rows are."""
    return mask.view(-1, *[1] * (array.dim() - 1))
