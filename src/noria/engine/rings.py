"""Where the keys and values of layers lie that keep their windows alone: a ring of cache rows for each row in flight.

A token at position p has place p % ring. A token that decodes, and what a ring holds without turning over, is written and
attended to there. A longer chunk lies beside the rings while a layer is computed, behind what its first query sees; what the
next query will see goes to the ring when the layer has returned, so that a layer never writes what it reads.
T tokens and R rows of a microbatch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from noria.arrays import BLOCK_TOKENS
from noria.engine import states
from noria.engine.kv_cache import Staged
from noria.kernels.work import NONE, RaggedRows
from noria.limits import BESIDE_RINGS
from noria.model import ModelShape
from noria.models import _fused
from noria.models._rotary import Rotary
from noria.step import PAGE_TOKENS, Run, Span, Step

Name = TypeVar("Name")
Put: TypeAlias = Callable[[list[np.ndarray]], list[torch.Tensor]]  # arrays onto the device
Views: TypeAlias = Mapping[str, torch.Tensor]
Planned: TypeAlias = Callable[[RaggedRows], Any]  # attention's plan of rows


@dataclass(frozen=True)
class RowsInRings:
    """[R] rows of a microbatch: new tokens, the position of the first, and the rings that they read (-1: none) and write."""

    counts: np.ndarray
    positions: np.ndarray
    reads: np.ndarray
    writes: np.ndarray

    def of(self, rows: np.ndarray) -> "RowsInRings":
        """Some of them."""
        return RowsInRings(self.counts[rows], self.positions[rows], self.reads[rows], self.writes[rows])


@dataclass(frozen=True)
class RingPart:
    """Rows that attend together. tokens: [n] theirs of the microbatch; places: [n] where these lie in the rings, or where they do
    beside them, in memory of `size` tokens, whose rows `into` have what the rings have at `before`."""

    plan: Any
    tokens: torch.Tensor
    places: torch.Tensor
    size: int = 0
    before: torch.Tensor | None = None
    into: torch.Tensor | None = None


@dataclass(frozen=True)
class RingRows:
    """The rows of a microbatch.

    places: [T] where new tokens lie in the rings, with the plan of all rows; none where some lie beside them: then `parts`.
    What these leave: tokens `kept` of the microbatch at `kept_at`, and what the rings have at `old` at `old_at`.
    """

    places: torch.Tensor
    plan: Any
    parts: tuple[RingPart, ...] = ()
    kept: torch.Tensor | None = None
    kept_at: torch.Tensor | None = None
    old: torch.Tensor | None = None
    old_at: torch.Tensor | None = None

    def attend(
        self,
        queries: torch.Tensor,
        new: Views,
        rings: Views,
        attention: Callable[[Any, torch.Tensor, Views], torch.Tensor],
    ) -> torch.Tensor:
        """[T, H, Dv]: part by part. new: [T, ...] of each array; rings: the arrays; attention(plan, queries, arrays) attends."""
        attended = None
        for part in self.parts:
            arrays = rings if part.size == 0 else {name: _beside(part, ring) for name, ring in rings.items()}
            for name, array in arrays.items():
                array.index_copy_(0, part.places, new[name].index_select(0, part.tokens))
            found = attention(part.plan, queries.index_select(0, part.tokens), arrays)
            attended = found.new_empty(len(queries), *found.shape[1:]) if attended is None else attended
            attended.index_copy_(0, part.tokens, found)
        assert attended is not None, "a microbatch without rows"
        return attended

    def keep(self, new: Views, rings: Views) -> None:
        """Writes what later steps read of rows that lay beside: the layer has returned."""
        assert self.kept is not None and self.kept_at is not None and self.old is not None and self.old_at is not None
        for name, ring in rings.items():
            for old, at in zip(self.old.split(len(new[name])), self.old_at.split(len(new[name])), strict=True):
                ring.index_copy_(0, at, ring.index_select(0, old))
            ring.index_copy_(0, self.kept_at, new[name].index_select(0, self.kept))


def _beside(part: RingPart, ring: torch.Tensor) -> torch.Tensor:
    """Memory beside the rings with what is read of them."""
    assert part.before is not None and part.into is not None
    memory = ring.new_empty(part.size, *ring.shape[1:])
    return memory.index_copy_(0, part.into, ring.index_select(0, part.before))


def made_apart(
    queries: torch.Tensor, rotary: Rotary, new: Mapping[Name, torch.Tensor]
) -> tuple[torch.Tensor, dict[Name, torch.Tensor]]:
    """Queries [T, H, D] as they attend, and what is new of each token [T, Hkv, D] as the cache has it, in memory of its own."""
    made = {
        name: queries.new_empty(len(its), *its.shape[1:] if its.dim() == 3 else (1, its.shape[1]))
        for name, its in new.items()
    }
    every = torch.arange(len(queries), device=queries.device)
    return _fused.rotate_and_write(queries, rotary, [*new.values()], [*made.values()], every), made


def of_step(
    shape: ModelShape, step: Step, first: int, last: int, staged: Staged | None, plan: Planned, put: Put
) -> dict[int, RingRows]:
    """Rows `first .. last` of a step in layers of each window; where they are staged, the rings are in their slot."""
    if not shape.rings or first == last:
        return {}
    rows = _rows(step, first, last, staged)
    return {window: in_rings(window, ring, rows, plan, put) for window, ring in shape.rings.items()}


def stored(shape: ModelShape, step: Step, first: int, last: int, staged: Staged | None) -> Staged | None:
    """What to move, where new tokens alone are stored of the rings of rows `first .. last`; all of one that a chunk wrote, or
    that has what another had."""
    if staged is None or not shape.rings:
        return staged
    rows, held = _rows(step, first, last, None), staged.held
    one, ids = (rows.counts == 1) & (rows.reads == rows.writes), rows.writes - held.first_state
    found = {}
    for window, ring in shape.rings.items():
        at, places = np.where(one, rows.positions % ring, 0), np.arange(len(ids))
        numbers = np.stack([ids * ring + at, places * ring + at, np.where(one, 1, ring)], axis=1)
        found[window] = [*map(tuple, numbers.tolist())]
    return replace(staged, ring_stores=found)


def plans_of(shape: ModelShape, step: Step, plan: Planned) -> dict[int, Any]:
    """Attention's plans of a step, all of whose rows are in their rings, in layers of each window."""
    rows = _rows(step, 0, len(step.slots), None) if shape.rings else None
    return {window: plan(seen(rows, window, ring)) for window, ring in shape.rings.items() if rows is not None}


def turns(shape: ModelShape, step: Step) -> bool:
    """Whether some row reads another ring than it writes."""
    return bool(shape.rings) and bool(((step.reads != step.writes) & (step.reads >= 0)).any())


def _rows(step: Step, first: int, last: int, staged: Staged | None) -> RowsInRings:
    counts, positions = (array[first:last].astype(np.int64) for array in (step.counts, step.positions))
    _, _, reads, writes = states.arrays_of(step, first, last, staged)
    return RowsInRings(counts, positions, reads.astype(np.int64), writes.astype(np.int64))


def in_rings(window: int, ring: int, rows: RowsInRings, plan: Planned, put: Put) -> RingRows:
    """The rows of a microbatch in layers of this window, which have rings of so many tokens."""
    inside = ((rows.reads == rows.writes) | (rows.reads < 0)) & (
        (rows.counts == 1) | (rows.positions + rows.counts <= ring)
    )
    if inside.all():
        (places,) = put([_places(rows, ring)])
        return RingRows(places, plan(seen(rows, window, ring)))
    parts, every, sizes = list[RingPart](), np.arange(len(rows.counts)), _sizes(rows, window)
    if inside.any():
        its = rows.of(inside)
        tokens, places = put([_numbers(rows.counts, every[inside]), _places(its, ring)])
        parts.append(RingPart(plan(seen(its, window, ring)), tokens, places))
    most = int(rows.counts.sum()) + ring + BESIDE_RINGS
    for some in _together(every[~inside], sizes, most):
        parts.append(_part(rows.of(some), _numbers(rows.counts, some), window, ring, plan, put))
    none = torch.empty(0, dtype=torch.int64)
    left = _left(rows.of(~inside), _numbers(rows.counts, every[~inside]), window, ring)
    return RingRows(none, None, tuple(parts), *put(left))


def seen(rows: RowsInRings, window: int, ring: int) -> RaggedRows:
    """Rows whose keys lie in their rings, from the block of the first that a query sees on: a run, or two where it turns over."""
    first = _first_seen(rows.positions, window)
    at, room = first % ring, _blocks(rows.positions + rows.counts - first)
    before = np.minimum(ring - at, room)
    runs = np.stack([rows.writes * ring + at, rows.writes * ring], axis=1)
    keys, positions = np.stack([before, room - before], axis=1), np.stack([first, first + before], axis=1)
    return _ragged(rows, runs, positions, keys)


def spans_of(rows: RaggedRows) -> list[Span]:
    """The rows for kinds of attention that know spans: to a window it is all one where tokens are counted from."""
    spans, first = [], 0
    runs = [
        Run(*run)
        for run in zip((rows.run_rows // PAGE_TOKENS).tolist(), (rows.run_keys // PAGE_TOKENS).tolist(), strict=True)
    ]
    held = (rows.lengths - rows.run_positions[rows.offsets[:-1]]).tolist()
    for count, length, start, stop in zip(rows.counts.tolist(), held, rows.offsets[:-1], rows.offsets[1:], strict=True):
        spans.append(Span(first, count, length, tuple(runs[start:stop])))
        first += count
    return spans


def _ragged(rows: RowsInRings, runs: np.ndarray, positions: np.ndarray, keys: np.ndarray) -> RaggedRows:
    """Rows with up to K runs each, [R, K] of cache rows, positions and keys; those without keys are none."""
    held, none = keys > 0, np.zeros(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(held.sum(axis=1))])
    alone = np.full(len(rows.counts), NONE)
    return RaggedRows(
        rows.counts, rows.positions + rows.counts, offsets, runs[held], positions[held], keys[held], alone, none, none
    )


def _part(rows: RowsInRings, tokens: np.ndarray, window: int, ring: int, plan: Planned, put: Put) -> RingPart:
    """These rows, which have `tokens` of the microbatch, beside the rings, one after another."""
    first, sizes = _first_seen(rows.positions, window), _sizes(rows, window)
    starts, before = np.cumsum(sizes) - sizes, rows.positions - first
    ragged = _ragged(rows, starts[:, None], first[:, None], sizes[:, None])
    read = np.repeat(first, before) + _within(before)
    arrays = [
        tokens,
        np.repeat(starts + before, rows.counts) + _within(rows.counts),
        np.repeat(rows.reads * ring, before) + read % ring,
        np.repeat(starts, before) + _within(before),
    ]
    tokens_there, places, at, into = put(arrays)
    return RingPart(plan(ragged), tokens_there, places, int(sizes.sum()), at, into)


def _left(rows: RowsInRings, tokens: np.ndarray, window: int, ring: int) -> list[np.ndarray]:
    """What these rows, which have `tokens` of the microbatch, leave for the next query: the last four of RingRows."""
    first = _first_seen(rows.positions + rows.counts, window)
    kept = np.repeat(rows.positions - first, rows.counts) + _within(rows.counts) >= 0
    old = np.where(rows.reads != rows.writes, np.maximum(rows.positions - first, 0), 0)
    places = (np.repeat(first, old) + _within(old)) % ring
    rings = (np.repeat(of * ring, old) + places for of in (rows.reads, rows.writes))
    return [tokens[kept], _places(rows, ring)[kept], *rings]


def _places(rows: RowsInRings, ring: int) -> np.ndarray:
    """[T] where each token lies in the rings."""
    positions = np.repeat(rows.positions, rows.counts) + _within(rows.counts)
    places: np.ndarray = np.repeat(rows.writes * ring, rows.counts) + positions % ring
    return places


def _numbers(counts: np.ndarray, some: np.ndarray) -> np.ndarray:
    """The numbers of the tokens of some rows among those of all."""
    starts = np.cumsum(counts) - counts
    numbers: np.ndarray = np.repeat(starts[some], counts[some]) + _within(counts[some])
    return numbers


def _sizes(rows: RowsInRings, window: int) -> np.ndarray:
    """[R] the tokens that each row takes beside the rings: whole blocks."""
    return _blocks(rows.positions + rows.counts - _first_seen(rows.positions, window))


def _first_seen(positions: np.ndarray, window: int) -> np.ndarray:
    """The first key of the block with the first key that a query at these positions sees."""
    return np.maximum(positions - window + 1, 0) // BLOCK_TOKENS * BLOCK_TOKENS


def _blocks(tokens: np.ndarray) -> np.ndarray:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def _together(rows: np.ndarray, sizes: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """These rows in parts of at most `most` tokens beside the rings."""
    ends, first = np.cumsum(sizes[rows]), 0
    while first < len(rows):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + most, "right"))
        assert last > first, f"a row takes {sizes[rows[first]]} tokens beside its ring, there is room for {most}"
        yield rows[first:last]
        first = last


def _within(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for each count, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
