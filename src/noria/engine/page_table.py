"""Which pages each slot holds, as rank 0 says in its headers: as arrays by slot, from which a step's rows are indexed.

S slots, K runs that a slot has at most, R rows of a step, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from noria.kernels.work import NONE, RaggedRows
from noria.step import PAGE_TOKENS, Run, Span, Step

NOBODY = -1  # the slot of rows that pad a step
BEYOND = 1 << 40  # the position of a run that a slot does not have
PrefixName = tuple[int, int, int]  # its parent's number, and its last run


@dataclass(frozen=True)
class _Laid:
    """What of some rows [R] stays as it is until slots change, where all that they have computed before is beyond their
    last run's first key: decoding rows, step after step."""

    first: np.ndarray  # [R] the position of the last run's first key
    zeroth: np.ndarray  # [R] the cache row that position 0 would have in the last run
    runs: tuple[np.ndarray, ...]  # offsets, and the runs, as RaggedRows has them
    shared: tuple[np.ndarray, ...]  # prefixes, and what is known of them


class PageTable:
    """The runs of pages of each slot.

    A prefix is the runs that a slot has before its last one; those of the same runs have one number, in the order in which
    they came. Slot NOBODY has the page `spare`, if there is one.
    """

    def __init__(self, spare: int | None = None) -> None:
        self._runs: dict[int, tuple[Run, ...]] = {}
        self._names: dict[int, list[PrefixName]] = {}  # of each slot's prefixes
        self._known: dict[PrefixName, list[int]] = {}  # its number, and how many slots have it
        self._numbered = 0
        self._num = np.zeros(0, np.int64)  # [1 + S] runs, of slot NOBODY first
        self._rows, self._positions, self._keys, self._prefixes = (np.zeros((0, 1), np.int64) for _ in range(4))
        self._laid: dict[bytes, _Laid] = {}  # by the rows' slots
        if spare is not None:
            self._put(NOBODY, (Run(spare, 1),))

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            del self._runs[slot]
            self._forget(slot)
        if step.released or step.admitted or step.grown:
            self._laid.clear()
        changes = [(one.slot, one.runs) for one in step.admitted] + [(one.slot, one.runs) for one in step.grown]
        for slot, runs in changes:
            self._runs[slot] = runs
            self._forget(slot)
            self._put(slot, runs)

    def spans(self, step: Step, first_row: int, last_row: int) -> list[Span]:
        """The rows `first_row .. last_row` of a step as attention sees them, counted from the first one's first token."""
        spans, first = [], 0
        for row in range(first_row, last_row):
            slot, count, position = int(step.slots[row]), int(step.counts[row]), int(step.positions[row])
            spans.append(Span(first, count, position + count, self._runs[slot]))
            first += count
        return spans

    def first_page(self, slot: int) -> int:
        """The first page of a slot, all of whose pages are in one tier."""
        return self._runs[slot][0].start

    def cache_rows(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[T] where in the cache the key and value of each token belong: page * 16 + token. slots, positions: [T]."""
        slots = slots.astype(np.int64, copy=False)
        laid = self._laid.get(slots.tobytes())
        if laid is not None and (positions >= laid.first).all():
            places: np.ndarray = laid.zeroth + positions
            return places
        slots = slots + 1
        its_positions = self._positions[slots]
        run = (its_positions <= positions[:, None]).sum(axis=1) - 1 if its_positions.shape[1] > 1 else 0
        rows: np.ndarray = self._rows[slots, run] + positions - self._positions[slots, run]
        return rows

    def ragged(self, slots: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> RaggedRows:
        """A step's rows, which have `counts` new tokens from `positions` on, as attention's lists are made of them. [R] each."""
        slots = slots.astype(np.int64, copy=False)
        laid = self._laid.get(slots.tobytes()) or self._lay(slots)
        shared = laid.shared if (positions >= laid.first).all() else self._shared(slots + 1, positions)
        return RaggedRows(counts, positions + counts, *laid.runs, *shared)

    def _lay(self, slots: np.ndarray) -> _Laid:
        at, width = slots + 1, self._keys.shape[1]
        num, firsts = self._num[at], self._positions[at]
        held, every = np.arange(width) < num[:, None], np.arange(len(at))
        runs = self._rows[at][held], firsts[held], self._keys[at][held]
        offsets, first = np.concatenate([[0], np.cumsum(num)]), firsts[every, num - 1]
        laid = _Laid(first, self._rows[at, num - 1] - first, (offsets, *runs), self._shared(at, first))
        self._laid[slots.tobytes()] = laid
        return laid

    def _shared(self, at: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of the rows at these places of the arrays, with new tokens from `positions` on: of each the last prefix before them,
        counted anew; of each prefix its keys and its parent."""
        ends = self._positions[at] + self._keys[at]
        whole = (np.arange(ends.shape[1]) < self._num[at][:, None] - 1) & (ends <= positions[:, None])
        none = np.full(len(at), NONE)
        if not whole.any():
            return none, np.zeros(0, np.int64), np.zeros(0, np.int64)
        numbers = self._prefixes[at]
        known, first = np.unique(numbers[whole], return_index=True)
        before = np.concatenate([none[:, None], numbers[:, :-1]], axis=1)
        parents = before[whole][first]
        last = whole.sum(axis=1) - 1
        of_row = np.where(last >= 0, numbers[np.arange(len(at)), last], NONE)
        of_row, parents = (np.where(of >= 0, np.searchsorted(known, of), NONE) for of in (of_row, parents))
        return of_row, ends[whole][first], parents

    def _put(self, slot: int, runs: Sequence[Run]) -> None:
        self._make_room(slot + 1, len(runs))
        at, held = slot + 1, slice(len(runs))
        counts = np.array([run.count for run in runs], np.int64) * PAGE_TOKENS
        self._num[at], self._positions[at], self._keys[at] = len(runs), BEYOND, 0
        self._rows[at, held] = [run.start * PAGE_TOKENS for run in runs]
        self._positions[at, held], self._keys[at, held] = np.cumsum(counts) - counts, counts
        parent, names = NONE, []
        for index, run in enumerate(runs[:-1]):
            names.append((parent, run.start, run.count))
            parent = self._prefixes[at, index] = self._number(names[-1])
        self._names[slot] = names

    def _number(self, name: PrefixName) -> int:
        if name not in self._known:
            self._known[name] = [self._numbered, 0]
            self._numbered += 1
        self._known[name][1] += 1
        return self._known[name][0]

    def _forget(self, slot: int) -> None:
        for name in self._names.pop(slot, ()):
            self._known[name][1] -= 1
            if not self._known[name][1]:
                del self._known[name]

    def _make_room(self, row: int, runs: int) -> None:
        """For this row of the arrays, and so many runs."""
        rows, width = self._rows.shape
        if row < rows and runs <= width:
            return
        more = (0, 2 * row + 1 - rows if row >= rows else 0), (0, max(runs - width, 0))
        self._num = np.pad(self._num, more[0])
        self._rows, self._keys, self._prefixes = (
            np.pad(array, more) for array in (self._rows, self._keys, self._prefixes)
        )
        self._positions = np.pad(self._positions, more, constant_values=BEYOND)
