"""A step as the device's arrays: what a rank makes of a header, once for all its laps.

Knows slots, pages and tokens; what is computed with them is the stage's affair.
T tokens, S samples, P scores.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

from noria.engine import rings, states
from noria.engine.kv_cache import Staged, TierPages
from noria.engine.padding import Padded, Spare, padded
from noria.engine.page_table import PageTable
from noria.engine.rings import RingRows
from noria.engine.states import States
from noria.kernels.work import RaggedRows
from noria.limits import padded_rows
from noria.model import ModelShape
from noria.step import PAGE_TOKENS, Run, Span, Step

HeadRows: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]  # as activations.OnDevice.needed returns them
# Of a microbatch: as attention sees it, what to move for that, and where its rows lie in rings, by window.
Placed: TypeAlias = tuple[list[Span] | RaggedRows, Staged | None, dict[int, RingRows]]


_NONE = np.empty(0, np.int64)

Attention: TypeAlias = Any  # a module of attention/, or what has its two functions where the cache is encoded


@dataclass(frozen=True)
class Network:
    """What computes: `model` is a module of models/, `attention` one of attention/ or engine/rounding.py's."""

    model: ModuleType
    attention: Attention
    shape: ModelShape


@dataclass(frozen=True)
class Microbatch:
    """A step's part that one forward call computes: tokens `first .. last` of the step, ready on the device."""

    first: int
    last: int
    positions: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [T] int64: where in the cache the new keys and values belong
    positional: object
    attention_plan: object
    staged: Staged | None  # what of the cache to move, where its pages are not on the device
    states: States | None = None  # of its rows, where the family has arrays per sequence
    rings: Mapping[int, RingRows] = field(default_factory=dict)  # by window, where layers keep theirs alone


@dataclass
class Batch:
    """A step made ready once, for all laps. `borders` of its microbatches, in rows: finer ones where memory was short."""

    step: Step
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sample_rows: torch.Tensor  # [S] int64
    score_rows: torch.Tensor  # [P] int64
    score_ids: torch.Tensor  # [P] int64
    needed: np.ndarray  # where hidden states are in CPU memory: the rows of the step that the head needs, and
    needed_rows: torch.Tensor  # the same on the device; sample_rows and score_rows are then counted among them
    microbatches: tuple[Microbatch, ...]  # none yet where `padded` is there
    borders: list[int]
    padded: Padded | None = None  # what a graph may compute it with


class Batches:
    """Makes the batches of steps. `elsewhere`: the pages of the cache that are not on the device; `spare`: with it steps are
    padded where graphs may compute them."""

    def __init__(
        self,
        network: Network,
        dtype: torch.dtype,
        device: torch.device,
        elsewhere: Sequence[TierPages] = (),
        spare: Spare | None = None,
    ):
        self._network, self.dtype, self._device, self._elsewhere = network, dtype, device, list(elsewhere)
        self._by_rows = hasattr(network.attention, "of_rows")
        self.size_of = padded_rows  # of so many rows
        self._spare, self.pads = spare, spare is not None and self._by_rows
        self._pages = PageTable(None if spare is None else spare.page)

    def make(self, step: Step, borders: list[int], needed: HeadRows) -> Batch:
        """Takes over the step's changes of slots and puts its arrays on the device, cut at these borders.

        What may be computed by a graph is padded, and not cut before it is known that none does.
        """
        self._pages.apply(step)
        whole = self._padded(step, borders)
        placed, rows = ([], []) if whole is not None else self._placed(step, borders)
        numbers = [_NONE] if whole is None else self._numbers(whole, slice(None))
        of_head, *head_rows = needed
        arrays = [
            step.token_ids,
            positions_of(step),
            *head_rows,
            step.score_ids,
            of_head,
            *rows,
            np.concatenate(numbers),
        ]
        ids, positions, sample_rows, score_rows, score_ids, needed_rows, *rest, padding = to_device(
            arrays, self._device
        )
        head = sample_rows, score_rows, score_ids, of_head, needed_rows
        batch = Batch(step, ids, positions, *head, self._microbatches(positions, placed, rest), borders)
        if whole is not None and self._spare is not None:
            batch.padded = Padded(step.num_tokens, len(whole.slots), padding, self._plans(whole), self._spare)
        return batch

    def cut(self, batch: Batch, borders: list[int], kept: int = 0) -> None:
        """Cuts the batch anew at these borders, but for the first `kept` microbatches, which stay."""
        placed, rows = self._placed(batch.step, borders[kept:])
        first = batch.microbatches[kept - 1].last if kept else 0
        finer = self._microbatches(batch.positions, placed, to_device(rows, self._device), first)
        batch.borders, batch.microbatches = borders, (*batch.microbatches[:kept], *finer)

    def _padded(self, step: Step, borders: list[int]) -> Step | None:
        """The step with rows of nobody, if all that it does is one microbatch of rows with a token each, on the device."""
        rows = len(step.slots)
        alike = 0 < rows == step.num_tokens and len(borders) == 2 and not len(step.score_rows)
        alike = alike and not rings.turns(self._network.shape, step)
        if self._spare is None or not self.pads or not alike or rows > self._spare.rows or self._stages(step, 0):
            return None
        return padded(step, self._spare, self.size_of(rows))

    def _plans(self, whole: Step) -> dict[int, object]:
        """Attention's plans of a padded step: of pages as 0, and of rings by window."""
        in_pages = self._plan(self._ragged(whole, slice(None)))
        return {0: in_pages, **rings.plans_of(self._network.shape, whole, self._plan)}

    def _stages(self, step: Step, row: int) -> bool:
        """Whether a row's pages are elsewhere. Those of a microbatch are all in one tier."""
        return bool(self._elsewhere) and self._pages.first_page(int(step.slots[row])) >= self._elsewhere[0].first

    def _placed(self, step: Step, borders: list[int]) -> tuple[list[Placed], list[np.ndarray]]:
        """Of each microbatch its sequences as attention sees them, with what to move, and where its tokens belong."""
        placed: list[Placed] = []
        arrays: list[np.ndarray] = []
        for first, last in itertools.pairwise(borders):
            if self._by_rows and last > first and not self._stages(step, first):
                placed.append((self._ragged(step, slice(first, last)), None, self._rings(step, first, last, None)))
                arrays += self._numbers(step, slice(first, last))[1:]
                continue
            spans, staged = to_staging(self._pages.spans(step, first, last), self._elsewhere)
            staged = rings.stored(self._network.shape, step, first, last, states.moved(step, first, last, staged))
            placed.append((spans, staged, self._rings(step, first, last, staged)))
            arrays += [cache_rows(spans), *states.arrays_of(step, first, last, staged)]
        return placed, arrays

    def _ragged(self, step: Step, rows: slice) -> RaggedRows:
        slots, counts, positions = (array[rows].astype(np.int64) for array in (step.slots, step.counts, step.positions))
        return self._pages.ragged(slots, counts, positions)

    def _numbers(self, step: Step, rows: slice) -> list[np.ndarray]:
        """Of these rows' tokens positions and places in the cache, then the arrays of states."""
        slots, counts, positions = (array[rows].astype(np.int64) for array in (step.slots, step.counts, step.positions))
        first, last, _ = rows.indices(len(step.slots))
        if not (counts == 1).all():
            starts = np.cumsum(counts) - counts
            positions = np.repeat(positions - starts, counts) + np.arange(counts.sum())
            slots = np.repeat(slots, counts)
        places = self._pages.cache_rows(slots, positions)
        return [positions, places, *states.arrays_of(step, first, last, None)]

    def _microbatches(
        self, positions: torch.Tensor, placed: list[Placed], arrays: list[torch.Tensor], first: int = 0
    ) -> tuple[Microbatch, ...]:
        """The microbatches from the step's token `first` on."""
        network, microbatches = self._network, []
        each = len(arrays) // max(len(placed), 1)
        for (rows, staged, in_rings), place in zip(placed, range(0, len(arrays), each or 1), strict=True):
            its_rows, *of_states = arrays[place : place + each]
            last = first + len(its_rows)
            its_positions = positions[first:last]
            positional = network.model.positional(network.shape, its_positions, self.dtype)
            plan = self._plan(rows)
            its_states = states.on_device(of_states)
            microbatches.append(
                Microbatch(first, last, its_positions, its_rows, positional, plan, staged, its_states, in_rings)
            )
            first = last
        return tuple(microbatches)

    def _rings(self, step: Step, first: int, last: int, staged: Staged | None) -> dict[int, RingRows]:
        """Of rows `first .. last` of a step, where they lie in the rings of windowed layers, or will in a staging slot."""
        put = partial(to_device, device=self._device)
        return rings.of_step(self._network.shape, step, first, last, staged, plan=self._plan, put=put)

    def _plan(self, rows: list[Span] | RaggedRows) -> object:
        """Attention's plan of a microbatch."""
        if isinstance(rows, RaggedRows) and not self._by_rows:
            rows = rings.spans_of(rows)
        if isinstance(rows, RaggedRows):
            return self._network.attention.of_rows(rows, self._device)
        return self._network.attention.prepare(rows, self._device)


def to_staging(spans: list[Span], elsewhere: Sequence[TierPages]) -> tuple[list[Span], Staged | None]:
    """The spans with their pages where attention will find them, and what to move for that (None: nothing).

    The spans of a microbatch are all in one tier.
    """
    first = spans[0].runs[0].start if spans else -1
    held = next((held for held in reversed(elsewhere) if first >= held.first), None)
    if held is None:
        return spans, None
    slot, times = _Slot(held), Counter(run for span in spans for run in span.runs)
    shared: dict[Run, Run] = {}
    moved = [replace(span, runs=slot.place(span, times, shared)) for span in spans]
    return moved, Staged(held, slot.num_pages, {"token": tuple(slot.loads)}, {"token": tuple(slot.stores)})


class _Slot:
    """What a staging slot is filled with, page after page."""

    def __init__(self, held: TierPages):
        self._held, self.num_pages = held, 0
        self.loads: list[tuple[int, int, int]] = []
        self.stores: list[tuple[int, int, int]] = []

    def place(self, span: Span, times: Mapping[Run, int], shared: dict[Run, Run]) -> tuple[Run, ...]:
        """Where a span's pages are in the slot, in their order: runs that several spans have are there once and stay apart, all
        others that follow one another are one."""
        runs, before, own = list[Run](), 0, False
        for run in span.runs:
            tokens = min(run.count * PAGE_TOKENS, span.length - before)
            if tokens <= 0:
                break
            placed = shared.get(run) or self._add(run, span.length - span.count - before, tokens)
            alone = times[run] == 1
            if alone and own:
                runs[-1] = Run(runs[-1].start, runs[-1].count + placed.count)
            else:
                runs.append(placed if alone else shared.setdefault(run, placed))
            own = alone
            before += run.count * PAGE_TOKENS
        return tuple(runs)

    def _add(self, run: Run, old: int, tokens: int) -> Run:
        """The first tokens of a run of pages, of which `old` are there already and the others are computed."""
        held, old = self._held, min(max(old, 0), tokens)
        assert held.first <= run.start and run.start + run.count <= held.first + held.num_pages, run
        there, here = (run.start - held.first) * PAGE_TOKENS, self.num_pages * PAGE_TOKENS
        self.loads += [(there, here, old)] if old else []
        self.stores += [(there + old, here + old, tokens - old)] if tokens > old else []
        placed = Run(self.num_pages, -(-tokens // PAGE_TOKENS))
        self.num_pages += placed.count
        return placed


def cache_rows(spans: list[Span]) -> np.ndarray:
    """[T] where in the cache each new token's key and value belong: page * 16 + token."""
    pieces = []
    for span in spans:
        positions = np.arange(span.length - span.count, span.length)
        if len(span.runs) == 1:
            pieces.append(positions + span.runs[0].start * PAGE_TOKENS)
        else:
            pages = np.concatenate([np.arange(run.start, run.start + run.count) for run in span.runs])
            pieces.append(pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS)
    return np.concatenate(pieces)


def positions_of(step: Step) -> np.ndarray:
    """[T] the position of each new token in its sequence."""
    starts = np.cumsum(step.counts) - step.counts
    return np.repeat(step.positions - starts, step.counts) + np.arange(step.num_tokens)


def fed(token_ids: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """[T] the ids of a step, those below 0 from what the step before has drawn [S]: see Step.token_ids. A row that got none there
    has ended: it computes id 0."""
    which = (-1 - token_ids).clamp_(min=0)
    return torch.where(token_ids < 0, drawn[which].clamp_(min=0), token_ids)


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as int64 tensors on the device, in one copy that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate([array.astype(np.int64) for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(packed.split([len(array) for array in arrays]))
