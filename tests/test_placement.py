import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noria.errors import InputError
from noria.plan.placement import blocks_of, partition, stages_of
from noria.plan.shares import Uncovered, by_budget, by_share


@given(
    st.integers(1, 100), st.integers(1, 16), st.sampled_from(["greedy", "balanced"]), st.floats(0, 5), st.floats(0, 5)
)
def test_every_layer_is_in_exactly_one_stage_and_in_order(num_layers, num_stages, how, first, last):
    if num_stages > num_layers:
        return
    stages = partition(num_layers, num_stages, how, (first, last))
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert len(stages) == num_stages and min(map(len, stages)) >= 1


def test_the_first_stages_get_the_remainder():
    assert [len(stage) for stage in partition(14, 4, "greedy")] == [4, 4, 3, 3]


def test_a_heavy_head_makes_the_last_stage_lighter():
    assert [len(stage) for stage in partition(14, 4, "balanced", (0.0, 2.0))] == [4, 4, 4, 2]


def test_laps_place_the_virtual_stages_round_the_ring():
    stages = partition(12, 6, "greedy")
    assert stages_of(1, 3, stages) == [range(2, 4), range(8, 10)]
    assert blocks_of(0, 3, stages)[0] == "embed" and "head" not in blocks_of(0, 3, stages)
    assert blocks_of(2, 3, stages)[-1] == "head"
    assert blocks_of(0, 1, partition(1, 1, "greedy")) == ["embed", "layers/0000", "head"]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "how", "said"),
    [
        (3, 4, "greedy", "4 virtual stages"),
        (6, 2, [3, 2], "has 2 numbers with sum 5: it needs 2 .* with sum 6"),
        (6, 3, [3, 3], "has 2 numbers with sum 6: it needs 3"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused_with_its_numbers(num_layers, num_stages, how, said):
    with pytest.raises(InputError, match=said):
        partition(num_layers, num_stages, how)


SHARES = (
    st.lists(st.integers(0, 100), min_size=2, max_size=2)
    .map(sorted)
    .map(lambda cuts: {"gpu": cuts[0], "cpu": cuts[1] - cuts[0], "disk": 100 - cuts[1]})
)


@given(st.integers(1, 100), SHARES)
def test_every_tier_gets_its_share_to_within_a_layer_at_every_point_of_the_way(num_layers, shares):
    chosen = by_share([7] * num_layers, shares)
    for end in range(1, num_layers + 1):
        for tier, share in shares.items():
            assert abs(chosen[:end].count(tier) - share / 100 * end) <= 1


def test_a_fifth_on_the_gpu_is_every_fifth_layer():
    chosen = by_share([1] * 20, {"gpu": 20, "cpu": 80})
    places = [place for place, tier in enumerate(chosen) if tier == "gpu"]
    assert len(places) == 4 and {after - before for before, after in itertools.pairwise(places)} == {5}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(0, 800), st.integers(0, 800), st.integers(0, 800)
)
def test_budgets_are_never_exceeded_and_cover_all_blocks_or_say_what_is_missing(sizes, gpu, cpu, disk):
    budgets = {"gpu": gpu, "cpu": cpu, "disk": disk}
    try:
        chosen = by_budget(sizes, budgets)
    except Uncovered as error:
        assert 0 < error.missing <= error.total == sum(sizes)
        return
    assert len(chosen) == len(sizes)
    for tier, budget in budgets.items():
        assert sum(size for size, at in zip(sizes, chosen, strict=True) if at == tier) <= budget


def test_budgets_are_filled_in_order_and_spread_evenly():
    chosen = by_budget([10] * 12, {"gpu": 49, "cpu": 1000, "disk": 1000})
    assert chosen.count("gpu") == 4 and "disk" not in chosen
    assert [place for place, tier in enumerate(chosen) if tier == "gpu"] == [1, 4, 7, 10]
