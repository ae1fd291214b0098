"""The lists of attention's work: every query meets every key that it sees once, in the order that keeps its bits."""

from dataclasses import replace

import numpy as np
import pytest

import item_cases
import items_twin
from counts import count
from item_cases import ragged
from noria import limits
from noria.kernels import lists
from noria.kernels.work import KEY_BLOCK, NONE, SECTION, Item, Packing
from noria.model import ModelShape
from noria.plan import memory

PACKING = Packing(group=4, key_heads=2, programs=1)


def items_of(work):
    return [(wave, launch, item) for wave in work.waves for launch in wave.launches for item in launch.items]


def expected(rows, window=None):
    """token -> its sections, each the stretches of keys that the query sees as (position, cache row, keys)."""
    found, token = {}, 0
    for row, num_queries in enumerate(rows.counts):
        for position in range(rows.lengths[row] - num_queries, rows.lengths[row]):
            first = 0 if window is None else max(0, position - window + 1)
            found[token] = _sections(rows, row, first, position + 1)
            token += 1
    return found


def _sections(rows, row, first, stop):
    sections = {}
    for run in range(rows.offsets[row], rows.offsets[row + 1]):
        begin, keys = int(rows.run_positions[run]), int(rows.run_keys[run])
        for border in range(begin // SECTION * SECTION, begin + keys, SECTION):
            low, high = max(begin, border, first), min(begin + keys, border + SECTION, stop)
            if low < high:
                met = sections.get(border, ())
                sections[border] = items_twin.joined(met, low, int(rows.run_rows[run]) + low - begin, high - low)
    return tuple(sections.values())


class RandomRows:
    """Rows of a step: decoding, in chunks, whole; in one run or several; some behind beginnings, or beginnings of those."""

    def __init__(self, choose, window):
        self._choose, self._window, self._free = choose, window, 0

    def rows(self):
        parents, shared = self._prefixes()
        beginnings = []
        for prefix, parent in enumerate(parents):
            before = shared[parent] if parent != NONE else 0
            beginnings.append(
                (beginnings[parent] if parent != NONE else []) + self._runs(shared[prefix] - before, whole=True)
            )
        rows = [self._row(shared, beginnings) for _ in range(self._choose.integers(1, 10))]
        return ragged(*map(list, zip(*rows, strict=True)), shared, parents)

    def _prefixes(self):
        parents, shared = [], []
        for number in range(self._choose.integers(0, 4)):
            parents.append(int(self._choose.integers(-1, number)) if number else NONE)
            before = shared[parents[-1]] if parents[-1] != NONE else 0
            shared.append(int(before + KEY_BLOCK * self._choose.choice([1, 2, 15, 16, 17, 40])))
        return parents, shared

    def _row(self, shared, beginnings):
        prefix = int(self._choose.integers(-1, len(shared)))
        own = int(self._choose.choice([1, 7, 64, 100, 200, 1100, 3000]))
        queries = min(own, int(self._choose.choice([1, 1, 1, 3, 16, 40, 130])))
        before = shared[prefix] if prefix != NONE else 0
        return queries, before + own, [*(beginnings[prefix] if prefix != NONE else []), *self._runs(own)], prefix

    def _runs(self, keys, whole=False):
        """Runs that hold at least so many keys, or just so many."""
        runs = []
        while keys > 0:
            held = -(-keys // KEY_BLOCK) * KEY_BLOCK
            if self._choose.integers(2):
                held = KEY_BLOCK * int(self._choose.integers(1, held // KEY_BLOCK + 1 + (not whole)))
            runs.append((self._free, held))
            self._free += held + KEY_BLOCK * int(self._choose.integers(0, 2))
            keys -= held
        return runs


def random_packing(choose, window):
    return Packing(
        group=int(choose.choice([1, 3, 4, 8, 71])),
        key_heads=int(choose.integers(1, 9)),
        programs=int(choose.choice([1, 30, 400, 1 << 20])),
        most_slots=int(choose.choice([0, 40, 1 << 16])),
        window=window if choose.integers(2) else None,
    )


@pytest.mark.parametrize("seed", range(count(1000)))
def test_each_query_meets_each_key_that_it_sees_once_and_in_order(seed):
    choose = np.random.default_rng(seed)
    window = int(choose.choice([1, 5, 64, 700, 1500])) if choose.integers(3) == 0 else None
    rows = RandomRows(choose, window).rows()
    packing = random_packing(choose, window)
    work = lists.make(rows, packing)
    assert items_twin.execute(work, items_twin.Keys(), window) == expected(rows, window)
    assert work.slots <= 2 * packing.most_slots
    for _, launch, item in items_of(work):
        assert launch.tile in (64, 128) and item[Item.COUNT] > 0
        assert item[Item.STOP] <= item[Item.HIGHEST] + 1, "keys that no query of the tile sees"


@pytest.mark.parametrize("window", [None, 300, 1500, 3000])
@pytest.mark.parametrize("beginning", [64, 1024, 1088, 2048])
def test_sections_that_are_computed_apart_behind_a_beginning_are_merged_in_order(beginning, window):
    lengths = [5000, 2100, 3073, 4096, 4097]
    runs = [[(0, beginning), (5120 * row + 2048, 5120)] for row in range(1, 6)]
    rows = ragged([9, 1, 5, 1, 1], lengths, runs, [0] * 5, [beginning], [NONE])
    for its_window in {None, window}:
        work = lists.make(rows, replace(PACKING, programs=1 << 20, window=its_window))
        assert items_twin.execute(work, items_twin.Keys(), window) == expected(rows, window)
    chunk = ragged(
        [40], [3000], [[(0, 3008)]]
    )  # whose first tile begins to see in an earlier section than its last one
    work = lists.make(chunk, replace(PACKING, programs=1 << 20, window=1950))
    assert len(work.waves[0].merges) == 40
    assert items_twin.execute(work, items_twin.Keys(), 1950) == expected(chunk, 1950)


def test_rows_of_beginnings_of_several_trees_stand_together_in_any_order():
    rows = decoding(
        [2000 + row for row in range(12)], 1984, [1, 3, 2, 0] * 3, [640, 1984, 640, 1984], [NONE, 0, NONE, 2]
    )
    work = lists.make(rows, PACKING)
    assert items_twin.execute(work, items_twin.Keys()) == expected(rows)
    assert [len(wave.launches[0].items) for wave in work.waves] == [2, 2 + 6, 6]


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_the_twin_of_the_kernel_is_dense_softmax(programs, window):
    """So the order is one that gives the right result."""
    random = np.random.default_rng(0)
    runs = [[(0, 1088), (2048, 512)], [(0, 1088), (1600, 64)], [(0, 1088), (1664, 64)], [(3000, 64)]]
    rows = ragged([20, 1, 1, 3], [1500, 1089, 1150, 64], runs, [0, 0, 0, NONE], [1088], [NONE])
    queries, keys, values, sinks = (
        random.standard_normal(size) for size in ((25, 4, 8), (3100, 2, 8), (3100, 2, 12), (4,))
    )
    work = lists.make(rows, replace(PACKING, group=2, programs=programs))
    found = items_twin.execute(work, items_twin.Sums(queries, keys, values, 0.3, 2.0, sinks), window)
    dense = item_cases.dense(rows, queries, keys, values, 0.3, window, 2.0, sinks)
    np.testing.assert_allclose(np.stack([found[token] for token in range(25)]), dense, rtol=1e-12, atol=1e-12)


def decoding(lengths, beginning, prefixes, shared, parents=()):
    """Rows of one query whose first `beginning` keys are the same cache rows."""
    runs = [[(0, beginning), (beginning + 512 * row, 512)] for row in range(len(lengths))]
    return ragged([1] * len(lengths), lengths, runs, prefixes, shared, parents or [NONE] * len(shared))


def reads(work, stop):
    """How often each key position below `stop` is read, by one key head."""
    times = np.zeros(stop, int)
    for _, _, item in items_of(work):
        times[item[Item.START] : min(item[Item.STOP], stop)] += 1
    return times


def test_a_shared_beginning_is_read_once_for_all_rows_of_a_step_that_have_it():
    rows = decoding([2000 + row for row in range(16)], 1984, [0] * 16, [1984])
    assert (reads(lists.make(rows, PACKING), 1984) == 1).all()
    assert (reads(lists.make(rows, replace(PACKING, programs=1 << 20)), 1984) == 1).all(), (
        "its sections by programs of their own"
    )
    assert (reads(lists.make(replace(rows, prefixes=rows.prefixes * 0 - 1), PACKING), 1984) == 16).all()


def test_a_beginning_of_beginnings_is_read_once_by_all_of_them():
    rows = decoding([2000 + row for row in range(12)], 1984, [1, 2, 1, 2, 0, 0] * 2, [640, 1984, 1984], [NONE, 0, 0])
    times = reads(lists.make(rows, PACKING), 1984)
    assert (times[:640] == 1).all()
    assert (times[640:] == 2 + 4).all(), (
        "once a longer beginning, and by each of the rows that share the short one alone"
    )


def test_a_row_reads_alone_what_no_other_row_of_the_step_shares_and_what_fills_a_tile():
    alone = decoding([2000, 2100], 1984, [0, 1], [1984, 1984])
    assert [len(wave.launches) for wave in lists.make(alone, PACKING).waves] == [1]
    runs = [[(0, 1984), (2048 + 64 * row, 64)] for row in range(3)]
    chunks = ragged([16, 16, 16], [2000, 2000, 2000], runs, [0, 0, 0], [1984], [NONE])
    assert [len(wave.launches) for wave in lists.make(chunks, PACKING).waves] == [1]
    assert len(lists.make(chunks, replace(PACKING, group=3)).waves) == 2


def test_queries_of_many_rows_of_a_beginning_are_packed_into_tiles():
    rows = decoding([2000] * 40, 1984, [0] * 40, [1984])
    first, _ = lists.make(rows, PACKING).waves
    (launch,) = first.launches
    assert launch.tile == 128 and launch.items[:, Item.COUNT].tolist() == [32, 8]


def test_few_long_rows_are_split_by_sections_while_slots_suffice_and_many_are_not():
    rows = ragged([1] * 4, [5000] * 4, [[(5120 * row, 5120)] for row in range(4)])
    split = lists.make(rows, replace(PACKING, programs=400))
    assert len(items_of(split)) == 4 * 5 and len(split.waves[0].merges) == 4 and split.slots == 20
    assert len(items_of(lists.make(rows, replace(PACKING, programs=2)))) == 4
    assert len(items_of(lists.make(rows, replace(PACKING, programs=400, most_slots=11)))) == 2 * 5 + 2


def test_rows_share_a_beginning_while_slots_suffice():
    rows = decoding([2000] * 40, 1984, [0] * 40, [1984])
    times = reads(lists.make(rows, replace(PACKING, most_slots=2 * 30)), 1984)
    assert (times == 1 + 10).all(), "once for thirty of them"


def test_runs_that_rows_have_for_themselves_take_no_slots():
    runs = [[(2048 * row, 1024), (2048 * row + 1024, 1024)] for row in range(40)] + [[(0, 1024), (99968, 1024)]]
    prefixes, shared = [*range(40), 0], [1024] * 40
    rows = ragged([1] * 41, [1500] * 41, runs, prefixes, shared, [NONE] * 40)
    times = reads(lists.make(rows, replace(PACKING, most_slots=4)), 1024)
    assert (times == 40).all(), "once by the two that share it"


@pytest.mark.parametrize("seed", range(count(200)))
def test_the_plan_counts_what_partial_results_take(seed):
    choose = np.random.default_rng(seed)
    rows = RandomRows(choose, None).rows()
    heads, longest = 8, int(rows.lengths.max())
    shape = ModelShape("llama", 2, 64, heads, 2, 24, 100, longest, False)
    counted = memory.attention_nbytes(shape, "bfloat16", int(rows.counts.sum()))
    slot = heads * (24 + 2) * 4
    for programs in (1, 1 << 20):
        packing = Packing(heads // 2, 2, programs, limits.PARTIAL_NBYTES // slot)
        assert lists.make(rows, packing).slots * slot <= counted
    assert memory.attention_nbytes(shape, "float32", 64) == 0


def test_keys_that_no_query_sees_are_left_out_with_a_window_and_may_be_gone():
    runs = [[(0, 128), (640, 64)]]
    rows = ragged([10], [5000 - 5], runs, firsts=[4864])
    ((_, _, item),) = items_of(lists.make(rows, replace(PACKING, window=100)))
    assert item[Item.START] == 4864, "the block of 4,985 - 99"
    assert items_twin.execute(lists.make(rows, PACKING), items_twin.Keys(), 100) == expected(rows, 100)


def test_a_step_without_rows_has_no_items():
    work = lists.make(ragged([], [], []), PACKING)
    assert items_of(work) == [] and work.slots == 0 and not len(work.order)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (ragged([1], [65], [[(0, 64)]]), "a row has more keys than its runs have room for"),
        (ragged([1], [100], [[(0, 60), (64, 64)]]), "does not begin where the one before ends, at a multiple of 64"),
        (
            ragged([1, 1], [99, 99], [[(0, 128)], [(0, 128)]], [0, 0], [50], [NONE]),
            "a length that is no multiple of 64",
        ),
        (ragged([1, 1], [99, 99], [[(0, 128)], [(0, 128)]], [0, 0], [64, 64], [1, NONE]), "comes before its parent"),
        (ragged([1, 1], [99, 99], [[(0, 128)], [(0, 128)]], [0, 1], [64, 64], [NONE, 0]), "no longer than its parent"),
        (
            ragged([1, 40], [99, 99], [[(0, 128)], [(0, 128)]], [0, 0], [64], [NONE]),
            "a row has queries within its prefix",
        ),
    ],
)
def test_what_the_kernel_could_not_follow_to_the_bit_is_refused(rows, says):
    with pytest.raises(ValueError, match=says):
        lists.make(rows, PACKING)
