"""The lists of decode steps, made in few steps, are those that the way for all steps makes."""

import numpy as np
import pytest

from counts import count
from noria.kernels import _waves, lists
from noria.kernels.work import NONE, RaggedRows
from test_lists import RandomRows, random_packing


def decoding(rows):
    """The rows with their last query alone."""
    arrays = (getattr(rows, name) for name in list(RaggedRows.__dataclass_fields__)[1:])
    return RaggedRows(np.ones_like(rows.counts), *arrays)


@pytest.mark.parametrize("seed", range(count(500)))
def test_both_ways_make_the_same(seed, monkeypatch):
    choose = np.random.default_rng(seed)
    rows, packing = decoding(RandomRows(choose, None).rows()), random_packing(choose, int(choose.choice([5, 64, 1500])))
    found, short, direct = lists.make(rows, packing), [], _waves._one_query_each
    monkeypatch.setattr(_waves, "_one_query_each", lambda *given: short.append(direct(*given)))
    expected = lists.make(rows, packing)
    assert found.slots == expected.slots and len(found.waves) == len(expected.waves)
    for one, other in zip(found.waves, expected.waves, strict=True):
        assert one.merges.tolist() == other.merges.tolist()
        for its, others in zip(one.launches, other.launches, strict=True):
            assert (its.tile, its.many, its.partial) == (others.tile, others.many, others.partial)
            assert its.items.tolist() == others.items.tolist()
    assert short or (rows.prefixes != NONE).any()
