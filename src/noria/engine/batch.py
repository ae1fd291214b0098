"""A step as the device's arrays: what a rank makes of a header, once for all its laps.

Knows slots, pages and tokens; what is computed with them is the stage's affair.
T tokens, S samples, P scores.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TypeAlias

import numpy as np
import torch

from noria.engine import states
from noria.engine.kv_cache import Staged, TierPages
from noria.engine.states import States
from noria.model import ModelShape
from noria.step import PAGE_TOKENS, Run, Span, Step

HeadRows: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]  # as activations.OnDevice.needed returns them
Placed: TypeAlias = tuple[list[Span], Staged | None]  # of a microbatch: as attention sees it, and what to move for that


@dataclass(frozen=True)
class Network:
    """What computes: `model` is a module of models/, `attention` one of attention/."""

    model: ModuleType
    attention: ModuleType
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
    microbatches: tuple[Microbatch, ...]
    borders: list[int]


class PageTable:
    """Which pages each slot holds, as rank 0 says in its headers."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[Run, ...]] = {}

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            del self._runs[slot]
        for admitted in step.admitted:
            self._runs[admitted.slot] = admitted.runs
        for grown in step.grown:
            self._runs[grown.slot] = grown.runs

    def spans(self, step: Step, first_row: int, last_row: int) -> list[Span]:
        """The rows `first_row .. last_row` of a step as attention sees them, counted from the first one's first token."""
        spans, first = [], 0
        for row in range(first_row, last_row):
            slot, count, position = int(step.slots[row]), int(step.counts[row]), int(step.positions[row])
            spans.append(Span(first, count, position + count, self._runs[slot]))
            first += count
        return spans


class Batches:
    """Makes the batches of steps. `elsewhere`: the pages of the cache that are not on the device."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device, elsewhere: Sequence[TierPages] = ()):
        self._network, self._dtype, self._device, self._elsewhere = network, dtype, device, list(elsewhere)
        self._pages = PageTable()

    def make(self, step: Step, borders: list[int], needed: HeadRows) -> Batch:
        """Takes over the step's changes of slots and puts its arrays on the device, cut at these borders."""
        self._pages.apply(step)
        placed, rows = self._placed(step, borders)
        of_head, *head_rows = needed
        arrays = [step.token_ids, positions_of(step), *head_rows, step.score_ids, of_head, *rows]
        ids, positions, sample_rows, score_rows, score_ids, needed_rows, *its_rows = to_device(arrays, self._device)
        head = sample_rows, score_rows, score_ids, of_head, needed_rows
        return Batch(step, ids, positions, *head, self._microbatches(positions, placed, its_rows), borders)

    def cut(self, batch: Batch, borders: list[int], kept: int) -> None:
        """Cuts the batch anew at these borders, but for the first `kept` microbatches, which stay."""
        placed, rows = self._placed(batch.step, borders[kept:])
        first, its_rows = batch.microbatches[kept].first, to_device(rows, self._device)
        finer = self._microbatches(batch.positions, placed, its_rows, first)
        batch.borders, batch.microbatches = borders, (*batch.microbatches[:kept], *finer)

    def _placed(self, step: Step, borders: list[int]) -> tuple[list[Placed], list[np.ndarray]]:
        """Of each microbatch its sequences as attention sees them, with what to move, and where its tokens belong."""
        placed: list[Placed] = []
        arrays: list[np.ndarray] = []
        for first, last in itertools.pairwise(borders):
            spans, staged = to_staging(self._pages.spans(step, first, last), self._elsewhere)
            placed.append((spans, states.moved(step, first, last, staged)))
            arrays += [cache_rows(spans), *states.arrays_of(step, first, last, staged)]
        return placed, arrays

    def _microbatches(
        self, positions: torch.Tensor, placed: list[Placed], arrays: list[torch.Tensor], first: int = 0
    ) -> tuple[Microbatch, ...]:
        """The microbatches from the step's token `first` on."""
        network, microbatches = self._network, []
        each = len(arrays) // max(len(placed), 1)
        for (spans, staged), place in zip(placed, range(0, len(arrays), each or 1), strict=True):
            its_rows, *of_states = arrays[place : place + each]
            last = first + len(its_rows)
            its_positions = positions[first:last]
            positional = network.model.positional(network.shape, its_positions, self._dtype)
            plan = network.attention.prepare(spans, self._device)
            its_states = states.on_device(of_states)
            microbatches.append(Microbatch(first, last, its_positions, its_rows, positional, plan, staged, its_states))
            first = last
        return tuple(microbatches)


def to_staging(spans: list[Span], elsewhere: Sequence[TierPages]) -> Placed:
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
        """Where a span's pages are in the slot: runs that several spans begin with are there once, all others are one run."""
        runs, own, before = list[Run](), Run(0, 0), 0
        for run in span.runs:
            tokens = min(run.count * PAGE_TOKENS, span.length - before)
            if tokens <= 0:
                break
            placed = shared.get(run) or self._add(run, span.length - span.count - before, tokens)
            if times[run] > 1:
                runs.append(shared.setdefault(run, placed))
            else:
                own = Run(own.start if own.count else placed.start, own.count + placed.count)
            before += run.count * PAGE_TOKENS
        return (*runs, own) if own.count else tuple(runs)

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


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as int64 tensors on the device, in one copy that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate([array.astype(np.int64) for array in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(packed.split([len(array) for array in arrays]))
