"""The order of the loads of streamed blocks, against the order in which visits use them."""

import random

import pytest

from noria.engine.cycle import Cycle, once


def take(cycle, count):
    return [cycle.next() for _ in range(count)]


def test_a_lap_whose_blocks_fit_is_loaded_once_a_round_for_all_groups():
    assert take(Cycle([["a", "b"], ["c"]], groups=3, slots=3), 7) == ["a", "b", "c", "a", "b", "c", "a"]


def test_a_lap_whose_blocks_do_not_fit_is_loaded_for_each_group():
    assert take(Cycle([["a", "b", "c"], ["d"]], groups=2, slots=3), 8) == ["a", "b", "c", "a", "b", "c", "d", "a"]


def test_one_group_needs_each_block_once_whatever_the_slots():
    assert once(100, 1, 1) and not once(3, 2, 3) and once(2, 2, 3)


def test_a_group_with_nothing_to_compute_is_left_out_of_its_round_alone():
    cycle = Cycle([["a", "b"]], groups=3, slots=2)
    cycle.skip(0)
    assert take(cycle, 5) == ["a", "b", "a", "b", "a"]
    cycle.skip(1)
    cycle.skip(1)
    assert take(cycle, 3) == ["b", "a", "b"]  # round 1 had begun: its one visit, then round 2


def test_a_round_in_which_nothing_is_computed_loads_nothing():
    cycle = Cycle([["a"], ["b"]], groups=2, slots=2)
    cycle.skip(0)
    cycle.skip(0)
    cycle.skip(1)
    assert take(cycle, 2) == ["a", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_what_visits_use_comes_in_the_order_of_the_cycle_with_few_loads_in_vain(seed):
    """Loads run ahead by the slots; a visit drops what comes before the block that it needs."""
    draw = random.Random(seed)
    visits = [[f"{lap}.{i}" for i in range(draw.randint(0, 3))] for lap in range(draw.randint(1, 3))] + [["end"]]
    groups, slots = draw.randint(1, 4), draw.randint(1, 4)
    cycle, ahead, wasted, skips = Cycle(visits, groups, slots), [], 0, 0
    for round in range(30):
        empty = {group for group in range(groups) if draw.random() < 0.1}
        for lap, names in enumerate(visits):
            for group in range(groups):
                if lap == 0 and group in empty:
                    cycle.skip(round)
                    skips += 1
                active = sorted(set(range(groups)) - empty)
                if group in empty or (cycle.once[lap] and group != active[0]):
                    continue
                for name in names:
                    while True:
                        ahead += take(cycle, slots - len(ahead))
                        found = ahead.pop(0)
                        if found == name:
                            break
                        wasted += 1
                        assert wasted < 1000
    assert wasted <= skips * (slots + max(map(len, visits)))
