"""The rows of a step by index expressions over the pages of slots, beside what loops over spans make of them."""

from dataclasses import replace

import numpy as np
import pytest

from counts import count
from noria.attention._ragged import ragged
from noria.engine.batch import cache_rows
from noria.engine.padding import Spare, padded
from noria.engine.page_table import NOBODY, PageTable
from noria.limits import padded_rows
from noria.step import PAGE_TOKENS, Admitted, Grown, Run, Step

KEYS = 4 * PAGE_TOKENS  # of a run that others follow


class Slots:
    """Slots that are admitted, grow and are released, some with the beginnings of others."""

    def __init__(self, choose):
        self._choose, self._free, self.runs = choose, 0, {}
        self._beginnings = [()]
        for _ in range(4):
            self._beginnings.append((*choose.choice(np.array(self._beginnings, object)), self._run()))

    def _run(self):
        run = Run(self._free, 4 * int(self._choose.integers(1, 5)))
        self._free += run.count + int(self._choose.integers(0, 3))
        return run

    def step(self, round):
        choose = self._choose
        released = tuple(slot for slot in self.runs if choose.integers(4) == 0)
        for slot in released:
            del self.runs[slot]
        grown = {slot: (*runs, self._run()) for slot, runs in self.runs.items() if choose.integers(4) == 0}
        free = [slot for slot in range(12) if slot not in self.runs]
        begins = {slot: self._beginnings[choose.integers(len(self._beginnings))] for slot in free if choose.integers(2)}
        new = {slot: (*runs, self._run()) for slot, runs in begins.items()}
        self.runs |= grown | new
        slots = choose.permutation([slot for slot in self.runs if choose.integers(4)]).astype(np.int32)
        lengths = [sum(run.count for run in self.runs[slot]) * PAGE_TOKENS for slot in slots]
        positions = np.array([choose.integers(0, length) for length in lengths], np.int32)
        counts = [min(choose.choice([1, 1, 5, 90]), length - at) for at, length in zip(positions, lengths, strict=True)]
        its_admitted = tuple(Admitted(slot, runs, {}) for slot, runs in new.items())
        its_grown = tuple(Grown(slot, runs) for slot, runs in grown.items())
        arrays = {"slots": slots, "counts": np.array(counts, np.int32), "positions": positions}
        return Step(round, 0, released=released, admitted=its_admitted, grown=its_grown, **arrays)

    def decoding(self, step):
        """The same rows with a token each: now and then all of them in their last runs."""
        lengths = [sum(run.count for run in self.runs[slot]) * PAGE_TOKENS for slot in step.slots.tolist()]
        least = [
            length - self.runs[slot][-1].count * PAGE_TOKENS
            for slot, length in zip(step.slots.tolist(), lengths, strict=True)
        ]
        if self._choose.integers(3) == 0:
            least = [0] * len(least)
        positions = np.array([*map(self._choose.integers, least, lengths)], np.int32)
        return replace(step, positions=positions, counts=np.ones_like(step.counts))


def sharing(rows):
    """Of each row the keys of the prefixes that it begins with, and which rows begin with them."""
    paths = []
    for prefix in rows.prefixes.tolist():
        path = []
        while prefix >= 0:
            path.append(prefix)
            prefix = int(rows.parents[prefix])
        paths.append(path)
    return [[(int(rows.shared[one]), [one in other for other in paths]) for one in path] for path in paths]


def check(table, step, runs):
    spans = table.spans(step, 0, len(step.slots))
    assert [span.runs for span in spans] == [runs[slot] for slot in step.slots.tolist()]
    tokens = np.repeat(step.slots, step.counts)
    starts = np.cumsum(step.counts) - step.counts
    positions = np.repeat(step.positions - starts, step.counts) + np.arange(len(tokens))
    found = table.ragged(*(array.astype(np.int64) for array in (step.slots, step.counts, step.positions)))
    expected = ragged(spans)
    for name in ("counts", "lengths", "offsets", "run_rows", "run_positions", "run_keys"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert sharing(found) == sharing(expected)
    assert table.cache_rows(tokens, positions).tolist() == cache_rows(spans).tolist()
    assert (found.parents < np.arange(len(found.parents))).all()


@pytest.mark.parametrize("seed", range(count(300)))
def test_arrays_hold_what_spans_say(seed):
    choose = np.random.default_rng(seed)
    slots, table = Slots(choose), PageTable(1000)
    for round in range(12):
        step = slots.step(round)
        table.apply(step)
        if not len(step.slots):
            continue
        for same in (step, slots.decoding(step), slots.decoding(step), step):
            check(table, same, slots.runs)
    assert len(table._known) == len({name for names in table._names.values() for name in names})


def test_rows_of_nobody_stand_behind_a_steps_own_on_the_page_that_is_spared():
    table = PageTable(7)
    table.apply(Step(0, 0, admitted=(Admitted(5, (Run(0, 4), Run(12, 4)), {}),)))
    numbers = {name: np.full(17, value, np.int32) for name, value in {"slots": 5, "counts": 1, "positions": 70}.items()}
    step = Step(1, 0, **numbers, reads=np.arange(17), writes=np.arange(17), kept=np.ones(17, np.int32))
    whole = padded(step, Spare(7, 30, 64), 24)
    assert whole.slots.tolist() == [5] * 17 + [NOBODY] * 7 and whole.positions.tolist() == [70] * 17 + [0] * 7
    assert whole.writes.tolist() == [*range(17)] + [30] * 7 and whole.reads.tolist() == [*range(17)] + [-1] * 7
    assert table.cache_rows(whole.slots, whole.positions).tolist() == [12 * 16 + 6] * 17 + [7 * 16] * 7
    rows = table.ragged(*(array.astype(np.int64) for array in (whole.slots, whole.counts, whole.positions)))
    assert rows.lengths.tolist() == [71] * 17 + [1] * 7 and rows.prefixes.tolist() == [0] * 17 + [-1] * 7


def test_sizes_are_few_and_waste_little():
    sizes = [padded_rows(rows) for rows in range(1, 1025)]
    assert sorted({*sizes})[:12] == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80] and len({*sizes}) == 27
    assert all(rows <= size <= max(8, 1.25 * rows, rows + 7) for rows, size in enumerate(sizes, 1))
