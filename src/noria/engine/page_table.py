"""Which pages each slot holds, as rank 0 says in its headers: as arrays by slot, from which a step's rows are indexed.

S slots, K runs that a slot has at most, R rows of a step, T tokens.
"""

from collections.abc import Sequence

import numpy as np

from noria.kernels.work import NONE, RaggedRows
from noria.step import PAGE_TOKENS, Run, Span, Step

NOBODY = -1  # the slot of rows that pad a step
BEYOND = 1 << 40  # the position of a run that a slot does not have
PrefixName = tuple[int, int, int]  # its parent's number, and its last run


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
        if spare is not None:
            self._put(NOBODY, (Run(spare, 1),))

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            del self._runs[slot]
            self._forget(slot)
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
        slots = slots + 1
        its_positions = self._positions[slots]
        run = (its_positions <= positions[:, None]).sum(axis=1) - 1 if its_positions.shape[1] > 1 else 0
        rows: np.ndarray = self._rows[slots, run] + positions - self._positions[slots, run]
        return rows

    def ragged(self, slots: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> RaggedRows:
        """A step's rows, which have `counts` new tokens from `positions` on, as attention's lists are made of them. [R] each."""
        slots, width = slots + 1, self._keys.shape[1]
        num = self._num[slots]
        held = np.arange(width) < num[:, None]
        firsts, keys = self._positions[slots], self._keys[slots]
        whole = (np.arange(width) < num[:, None] - 1) & (firsts + keys <= positions[:, None])
        offsets = np.concatenate([[0], np.cumsum(num)])
        runs = self._rows[slots][held], firsts[held], keys[held]
        return RaggedRows(counts, positions + counts, offsets, *runs, *self._shared(slots, whole, firsts + keys))

    def _shared(self, slots: np.ndarray, whole: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of each row the last prefix before its new tokens, counted anew; of each prefix its keys and its parent.

        whole: [R, K] which runs lie before the row's new tokens and are not its last; ends: [R, K] where they end.
        """
        none = np.full(len(slots), NONE)
        if not whole.any():
            return none, np.zeros(0, np.int64), np.zeros(0, np.int64)
        numbers = self._prefixes[slots]
        known, first = np.unique(numbers[whole], return_index=True)
        before = np.concatenate([none[:, None], numbers[:, :-1]], axis=1)
        parents = before[whole][first]
        last = whole.sum(axis=1) - 1
        of_row = np.where(last >= 0, numbers[np.arange(len(slots)), last], NONE)
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
