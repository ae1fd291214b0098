"""Which pages of the KV cache are free, and how many sequences hold each of the others; the same of states.

Ids are global: rank 0 gives them out, and they mean the same on all ranks and layers. Knows neither tensors nor sequences.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from noria.step import Run


class Pages:
    """`num_pages` reference-counted pages from page `first` on, of which `num_free` are free. A pool of states is one too.

    Free runs are maximal (two are never neighbours) and kept three ways: by size for the search, by start and by end
    for merging. A reservation takes the smallest free run that holds it (best fit, lowest start): long ones stay whole.
    """

    def __init__(self, num_pages: int, first: int = 0):
        assert num_pages >= 0
        self.num_pages, self._first = num_pages, first
        self.num_free = 0
        self._holders = np.zeros(num_pages, np.int32)
        self._by_size: list[tuple[int, int]] = []  # (count, start), sorted
        self._count_at: dict[int, int] = {}  # start -> count
        self._start_at: dict[int, int] = {}  # end -> start
        if num_pages:
            self._add(first, num_pages)

    @property
    def longest(self) -> int:
        """Pages of the longest free run."""
        return self._by_size[-1][0] if self._by_size else 0

    def reserve(self, count: int) -> tuple[Run, ...] | None:
        """`count` free pages with one holder each: one run where a free run holds them, else several, longest first.

        None, and nothing is taken, when fewer than `count` pages are free.
        """
        assert count >= 0
        if count > self.num_free:
            return None
        runs = []
        while count:
            place = bisect_left(self._by_size, (count, -1))
            size, start = self._by_size[min(place, len(self._by_size) - 1)]
            run = Run(start, min(size, count))
            self._remove(start, size)
            if size > run.count:
                self._add(start + run.count, size - run.count)
            self._holders[start - self._first : start - self._first + run.count] = 1
            runs.append(run)
            count -= run.count
        return tuple(runs)

    def extend(self, run: Run, most: int) -> Run:
        """The run with up to `most` of the free pages behind it, which get one holder each."""
        start = run.start + run.count
        size = self._count_at.get(start, 0)
        if count := min(size, most):
            self._remove(start, size)
            if size > count:
                self._add(start + count, size - count)
            self._holders[start - self._first : start - self._first + count] = 1
        return Run(run.start, run.count + count)

    def share(self, runs: Iterable[Run]) -> None:
        """One more holder for every page of these runs, which must be held already."""
        for run in runs:
            holders = self._held(run)
            holders += 1

    def release(self, runs: Iterable[Run]) -> None:
        """One holder less for every page of these runs; pages without a holder are free again."""
        for run in runs:
            holders = self._held(run)
            holders -= 1
            if not holders.any():
                self._free(run.start, run.count)
            elif not holders.all():
                # Borders between held and free pages: the run is freed piece by piece.
                borders = np.flatnonzero(np.diff(holders == 0, prepend=False, append=False)) + run.start
                for start, end in zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True):
                    self._free(start, end - start)

    def _held(self, run: Run) -> np.ndarray:
        start = run.start - self._first
        assert 0 <= start and run.count >= 0 and start + run.count <= self.num_pages, f"no such pages: {run}"
        holders = self._holders[start : start + run.count]
        assert holders.all(), f"pages of {run} are free already"
        return holders

    def _free(self, start: int, count: int) -> None:
        """Pages become free and join the free runs beside them."""
        if count == 0:
            return
        before = self._start_at.get(start)
        if before is not None:
            self._remove(before, start - before)
            start, count = before, count + start - before
        after = self._count_at.get(start + count)
        if after is not None:
            self._remove(start + count, after)
            count += after
        self._add(start, count)

    def _add(self, start: int, count: int) -> None:
        insort(self._by_size, (count, start))
        self._count_at[start] = count
        self._start_at[start + count] = start
        self.num_free += count

    def _remove(self, start: int, count: int) -> None:
        del self._by_size[bisect_left(self._by_size, (count, start))]
        del self._count_at[start]
        del self._start_at[start + count]
        self.num_free -= count
