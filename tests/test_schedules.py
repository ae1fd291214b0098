"""The schedules as tables, and what every table must keep to."""

import pytest

from noria import kinds
from noria.schedules import resumed, table

NAMES = kinds.names("schedules")


def rows(name, layers, microbatches, *loads):
    return list(kinds.load("schedules", name).schedule(layers, microbatches, *loads))


def test_sequential_does_one_thing_after_the_other():
    assert table(rows("sequential", 2, 2)) == [
        "load_weight(0) | load_cache(0,0) | compute(0,0) | store_cache(0,0)",
        " | load_cache(0,1) | compute(0,1) | store_cache(0,1)",
        "load_weight(1) | load_cache(1,0) | compute(1,0) | store_cache(1,0)",
        " | load_cache(1,1) | compute(1,1) | store_cache(1,1)",
    ]


def test_single_batch_loads_the_next_layer_beside_this_one():
    assert table(rows("single_batch", 3, 1)) == [
        "load_weight(1) | load_cache(0,0) load_cache(1,0) | compute(0,0) |",
        "load_weight(2) | load_cache(2,0) | compute(1,0) | store_cache(0,0)",
        "load_weight(3) |  | compute(2,0) | store_cache(1,0)",
        " |  |  | store_cache(2,0)",
    ]


def test_single_batch_loads_the_other_microbatches_of_a_layer_when_their_turn_comes():
    waiting = [row.compute for row in rows("single_batch", 2, 3) if row.waits]
    assert waiting == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(row.compute in row.load_cache for row in rows("single_batch", 2, 3) if row.waits)


def test_multi_batch_loads_the_next_microbatch_and_stores_the_one_before():
    assert table(rows("multi_batch", 2, 2)) == [
        "load_weight(1) | load_cache(0,0) load_cache(0,1) | compute(0,0) |",
        " | load_cache(1,0) | compute(0,1) | store_cache(0,0)",
        "load_weight(2) | load_cache(1,1) | compute(1,0) | store_cache(0,1)",
        " |  | compute(1,1) | store_cache(1,0)",
        " |  |  | store_cache(1,1)",
    ]


@pytest.mark.parametrize(
    ("loads", "shares"),
    [
        ([0.0, 0.0, 0.0], []),
        ([0.5, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]),
        ([0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]),  # a row loads the next one's cache
        ([0.2, 0.5, 0.0], [0.0667, 0.5667, 0.3667]),
        ([9.0], [1.0]),
    ],
)
def test_multi_batch_sends_a_block_in_parts_that_make_level_what_its_rows_load(loads, shares):
    found = rows("multi_batch", 2, len(loads), loads)[:-1]
    if not shares:
        assert [row.load_weight for row in found] == [1, None, None, 2, None, None]
        assert {row.share for row in found} == {None}
        return
    assert [row.load_weight for row in found] == [1] * len(loads) + [2] * len(loads)
    for first in (0, len(loads)):
        its = [row.share for row in found[first : first + len(loads)]]
        assert its == pytest.approx(shares, abs=1e-3) and sum(its) == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_every_cell_is_loaded_before_it_is_computed_and_stored_after_it_in_at_most_three_buffers(
    name, layers, microbatches
):
    cells = [(layer, microbatch) for layer in range(layers) for microbatch in range(microbatches)]
    for first in cells:
        weights = check(name, resumed(rows(name, layers, microbatches), first), cells[cells.index(first) :])
        if first == (0, 0):
            assert weights == (list(range(layers)) if name == "sequential" else list(range(1, layers + 1)))


def check(name, resumed_rows, cells):
    """Each of these cells, and no other, is loaded, computed and stored once; the weights that are loaded."""
    buffers, most, computed, stored, weights = set(), 0, [], [], []
    for row in resumed_rows:
        before = row.store_cache if name != "sequential" else ()
        for cell in before:  # engine.stage stores what a row stores before it loads what the row loads
            buffers.remove(cell)
        assert not buffers & set(row.load_cache) and set(row.load_cache) <= set(cells)
        buffers |= set(row.load_cache)
        most = max(most, len(buffers))
        weights += [row.load_weight] * (row.load_weight is not None)
        if row.compute is not None:
            assert row.compute in buffers
            computed.append(row.compute)
        for cell in row.store_cache:
            assert cell in computed
            stored.append(cell)
        if name == "sequential":
            buffers -= set(row.store_cache)
    assert computed == stored == cells and not buffers
    assert most <= (1 if name == "sequential" else 3)
    return weights
