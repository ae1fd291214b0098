"""The order of the loads of streamed blocks, against the order in which visits use them."""

from noria.engine.cycle import Cycle
from noria.limits import loaded_once


def take(cycle, count):
    return [cycle.next() for _ in range(count)]


def test_a_lap_whose_blocks_fit_is_loaded_once_a_round_for_all_groups():
    assert take(Cycle([["a", "b"], ["c"]], groups=3, slots=3), 7) == ["a", "b", "c", "a", "b", "c", "a"]


def test_a_lap_whose_blocks_do_not_fit_is_loaded_for_each_group():
    assert take(Cycle([["a", "b", "c"], ["d"]], groups=2, slots=3), 8) == ["a", "b", "c", "a", "b", "c", "d", "a"]


def test_one_group_needs_each_block_once_whatever_the_slots():
    assert loaded_once(100, 1, 1) and not loaded_once(3, 2, 3) and loaded_once(2, 2, 3)


def test_loads_for_a_group_with_nothing_to_compute_serve_the_group_after_it():
    cycle = Cycle([["a", "b"], ["c", "d"]], groups=3, slots=2)
    assert take(cycle, 3) == ["a", "b", "a"]
    assert cycle.skip(0, 1, ["a"])
    assert take(cycle, 6) == ["b", "c", "d", "c", "d", "a"]


def test_a_last_group_with_nothing_to_compute_leaves_loads_in_vain():
    cycle = Cycle([["a", "b"], ["c", "d"]], groups=2, slots=2)
    assert take(cycle, 3) == ["a", "b", "a"]
    assert not cycle.skip(0, 1, ["a"])
    assert take(cycle, 6) == ["c", "d", "a", "b", "a", "b"]


def test_with_one_lap_no_load_is_in_vain():
    cycle = Cycle([["a", "b"], []], groups=2, slots=2)
    assert take(cycle, 3) == ["a", "b", "a"]
    assert cycle.skip(0, 1, ["a"])
    assert take(cycle, 5) == ["b", "a", "b", "a", "b"]


def test_a_round_in_which_nothing_is_computed_loads_nothing():
    cycle = Cycle([["a"], ["b"]], groups=2, slots=2)
    assert take(cycle, 2) == ["a", "b"]
    assert cycle.skip(0, 0, ["a", "b"]) and cycle.skip(0, 1, ["a", "b"])
    assert take(cycle, 2) == ["a", "b"]
