"""What a layer of a model finds of its cache, for one microbatch: how it attends, the states of its rows."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from noria.arrays import Array
from noria.engine.batch import Attention, Microbatch
from noria.engine.rings import RingRows, made_apart
from noria.engine.rounding import RoundedArray, rotate_and_round
from noria.engine.states import States
from noria.kernels.scoring import Scoring
from noria.models import _fused
from noria.models._rotary import Rotary


class LayerCache:
    """The arrays of one layer, in which the pages of a microbatch lie; models/_cache.py says what the methods do.

    kind: a module of attention/, or rounding.py's where arrays are encoded; arrays: as KvCache.tensors returns them; entry:
    what the family says of them; tied: whether they are another layer's, of which the layer reads what it has of each token.
    Asserts that a family keeps to what it says.
    """

    __slots__ = ("_after", "_arrays", "_kind", "_made", "_microbatch", "_of_states", "_of_tokens", "_rings", "_tied")

    def __init__(
        self,
        kind: Attention,
        microbatch: Microbatch,
        arrays: Mapping[str, torch.Tensor],
        entry: Iterable[Array],
        tied: bool = False,
    ):
        self._kind, self._microbatch, self._tied = kind, microbatch, tied
        entry = tuple(entry)
        self._arrays: Mapping[str, Any] = arrays
        if encoded := [array for array in entry if array.encoding]:
            self._arrays = {**arrays, **{array.name: _rounded(array, arrays) for array in encoded}}
        self._of_tokens = [array.name for array in entry if array.per == "token"]
        self._of_states = [array.name for array in entry if array.per == "sequence" and not tied]
        self._after: dict[str, torch.Tensor] = {}
        window = next((array.window for array in entry if array.ring), None)
        self._rings: RingRows | None = None if window is None else microbatch.rings[window]
        self._made: dict[str, torch.Tensor] = {}  # of rows beside the rings

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
        rotary: Rotary | tuple[torch.Tensor, torch.Tensor] | None = None,
        values: str | int | None = None,
        **rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H, Dv]: writes the new tokens' rows to their places, and attends."""
        assert not (rows and self._tied), f"a layer that reads another's cache gives rows of {', '.join(rows)}"
        its, rings = self._microbatch, self._rings
        scores = Scoring(queries.shape[-1] ** -0.5 if scale is None else scale, window, soft_cap, sinks)
        names, making = [*(rows or self._of_tokens)], Rotary() if rotary is None else Rotary(*rotary)

        def attended(plan: Any, queries: torch.Tensor, arrays: Mapping[str, Any]) -> torch.Tensor:
            keys = arrays[names[0]]
            taken = arrays[names[1]] if len(names) > 1 else keys
            if values is not None:
                taken = _first(keys, values) if isinstance(values, int) else arrays[values]
            found: torch.Tensor = self._kind.attention(plan, queries, keys, taken, scores)
            return found

        if isinstance(values, str):
            self._array(values, self._of_tokens)
        into = {name: self._array(name, self._of_tokens) for name in rows}
        if rings is not None and rings.parts:
            queries, self._made = made_apart(queries, making, rows)
            return rings.attend(queries, self._made, into, attended)
        places, plan = (its.rows, its.attention_plan) if rings is None else (rings.places, rings.plan)
        if rotary is not None or rows:
            rounded = isinstance(next(iter(into.values()), None), RoundedArray)
            write = rotate_and_round if rounded else _fused.rotate_and_write
            queries = write(queries, making, [*rows.values()], [*into.values()], places)
        return attended(plan, queries, self._arrays)

    def before(self, name: str) -> torch.Tensor:
        """[N, ...]: a copy of the rows' states, zeros for those that begin."""
        array: torch.Tensor = self._array(name, self._of_states)
        states = self._states
        return array.index_select(0, states.reads).masked_fill_(_like(states.fresh, array), 0)

    def after(self, name: str, rows: torch.Tensor) -> None:
        """Keeps the rows' new states [N, ...] until the layer has returned."""
        array: torch.Tensor = self._array(name, self._of_states)
        states = len(self._states.writes)
        wanted = (states, *array.shape[1:])
        assert rows.shape == wanted, f"states of {name!r} are given as {list(rows.shape)}, they are {list(wanted)}"
        self._after[name] = rows.to(array.dtype)

    def commit(self) -> None:
        """The layer has returned: what it gave for its sequences is written.

        A layer that memory does not let return leaves nothing, so that it may be computed again.
        """
        missing = [name for name in self._of_states if name not in self._after]
        assert not missing, (
            f"the layer has not called after() for {', '.join(missing)}: a state must be given in each call"
        )
        for name, rows in self._after.items():
            self._arrays[name].index_copy_(0, self._states.writes, rows)
        if self._made and self._rings is not None:
            self._rings.keep(self._made, {name: self._arrays[name] for name in self._made})

    def _array(self, name: str, known: list[str]) -> Any:
        assert name in known, f"the layer's cache has no such array {name!r}; it has {', '.join(known) or 'none'}"
        return self._arrays[name]


def _rounded(array: Array, arrays: Mapping[str, torch.Tensor]) -> RoundedArray:
    """An encoded array, whose fields lie among a layer's arrays."""
    return RoundedArray(array, {name: arrays[kept.name] for name, kept in array.fields.items()})


def _first(keys: Any, values: int) -> Any:
    """So many of the first numbers of each key."""
    return replace(keys, width=values) if isinstance(keys, RoundedArray) else keys[..., :values]


def _like(mask: torch.Tensor, array: torch.Tensor) -> torch.Tensor:
    """[N, 1, ...]: a mask of rows as the array's rows are."""
    return mask.view(-1, *[1] * (array.dim() - 1))
