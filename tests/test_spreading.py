"""The order in which microbatches of a step are computed: those that load much stand apart, and rows keep what is theirs."""

import numpy as np
import pytest

from noria.rows.composing import _in_order, _Rows
from noria.rows.spreading import spread


@pytest.mark.parametrize(
    ("loads", "order"),
    [
        ([], []),
        ([0, 0, 0], [0, 1, 2]),
        ([5, 5, 5], [0, 1, 2]),
        ([9, 8, 0, 0], [0, 2, 1, 3]),
        ([9, 9, 0, 0, 0, 0], [0, 2, 3, 1, 4, 5]),
        ([0, 0, 0, 9, 9, 9], [3, 0, 4, 1, 5, 2]),
        ([9, 9, 9, 9, 0], [0, 1, 2, 3, 4]),
        ([9, 9, 0, 9, 9, 9, 1], [0, 1, 3, 2, 4, 5, 6]),
        ([9, 4, 5, 0], [0, 1, 2, 3]),
    ],
)
def test_what_loads_much_stands_apart_and_each_kind_keeps_its_order(loads, order):
    found = spread(loads)
    assert sorted(found) == [*range(len(loads))]
    much = [number for number in found if loads[number] * 2 > max(loads)]
    assert much == sorted(much) and [one for one in found if one not in much] == sorted({*found} - {*much})
    assert found == order


def test_rows_in_another_order_keep_their_tokens_samples_and_states():
    counts, samples = np.array([1, 1, 5, 2, 3]), np.array([True, True, False, True, False])
    tokens = np.concatenate([10 * row + np.arange(count) for row, count in enumerate(counts)])
    drawn = np.arange(5)[samples] / 10
    rows = _Rows(np.arange(5), counts, np.arange(5) + 100, tokens, samples, drawn, np.arange(5) + 20, np.arange(0))
    found, borders = _in_order(rows, [0, 2, 3, 5], [1, 0, 2])
    assert borders == [0, 1, 3, 5] and found.slots.tolist() == [2, 0, 1, 3, 4]
    assert found.token_ids.tolist() == [20, 21, 22, 23, 24, 0, 10, 30, 31, 40, 41, 42]
    assert found.uniforms.tolist() == [0.0, 0.1, 0.3] and found.samples.tolist() == [False, True, True, True, False]
    assert found.reads.tolist() == [22, 20, 21, 23, 24] and not len(found.writes)
    assert (found.counts == counts[found.slots]).all() and (found.positions == found.slots + 100).all()
    assert _in_order(rows, [0, 2, 3, 5], [0, 1, 2]) == (rows, [0, 2, 3, 5])
