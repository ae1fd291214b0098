import pytest
from hypothesis import given
from hypothesis import strategies as st

from noria.config import InputError
from noria.plan.placement import blocks_of, partition, stages_of


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
