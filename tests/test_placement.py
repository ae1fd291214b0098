import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noria.errors import InputError
from noria.plan.placement import blocks_of, parted, partition, stages_of
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


def tied(draw):
    """A model, its stages, ranks, and groups of tied layers."""
    num_ranks, laps = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_layers = draw(st.integers(min(num_ranks * laps, 9), 9))
    layers, ties = draw(st.permutations(range(num_layers))), []
    for size in draw(st.lists(st.integers(2, 3), max_size=3)):
        ties += [tuple(sorted(layers[:size]))] * (len(layers) >= size)
        layers = layers[size:]
    return num_layers, min(num_ranks * laps, num_layers), num_ranks, ties


@given(st.data(), st.sampled_from([("greedy", (0.0, 0.0)), ("balanced", (0.0, 1.5)), ("balanced", (0.3, 2.0))]))
def test_tied_layers_are_on_one_rank_in_the_most_equal_cut_that_there_is(data, how):
    num_layers, num_stages, num_ranks, ties = tied(data.draw)
    (kind, extra), best = how, None
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):  # every cut there is
        counts = [last - first for first, last in itertools.pairwise([0, *cuts, num_layers])]
        ranks = [stage % num_ranks for stage, count in enumerate(counts) for _ in range(count)]
        if all(len({ranks[layer] for layer in layers}) == 1 for layers in ties):
            weights = [float(count) for count in counts]
            weights[0] += extra[0]
            weights[-1] += extra[1]
            found = max(weights), sum(weight * weight for weight in weights)
            best = min(best or found, found)
    if best is None:
        with pytest.raises(InputError, match=f"no cut of {num_layers} layers into {num_stages} virtual stages"):
            partition(num_layers, num_stages, kind, extra, ties, num_ranks)
        return
    stages = partition(num_layers, num_stages, kind, extra, ties, num_ranks)
    counts = [len(stage) for stage in stages]
    assert parted(counts, num_ranks, ties) is None and [layer for stage in stages for layer in stage] == list(
        range(num_layers)
    )
    weights = [count + extra[0] * (stage == 0) for stage, count in enumerate(counts)]
    weights[-1] += extra[1]
    assert max(weights) == pytest.approx(best[0])
    if parted([len(stage) for stage in partition(num_layers, num_stages, kind, extra)], num_ranks, ties):
        assert sum(weight * weight for weight in weights) == pytest.approx(best[1])


def test_numbers_that_part_tied_layers_are_refused_with_the_nearest_that_do_not():
    with pytest.raises(InputError) as refused:
        partition(8, 4, [2, 2, 2, 2], ties=[(0, 5), (1, 2)], num_ranks=2)
    assert str(refused.value) == (
        "pipeline.partition 2,2,2,2 puts layer 1 on rank 0 and layer 2, which reads its cache, on rank 1: they must be on one"
        " rank, as in 3,2,2,1; or leave pipeline.partition out"
    )
    assert [len(stage) for stage in partition(8, 4, [3, 2, 2, 1], ties=[(0, 5), (1, 2)], num_ranks=2)] == [3, 2, 2, 1]
