"""A family that does not return what it says is told so, before what it returned travels."""

from types import SimpleNamespace

import pytest
import torch

from noria.arrays import Array
from noria.engine.batch import Network
from noria.engine.layers import Layers
from noria.model import ModelShape

COUNT, WEIGHT = Array("count", (2,), dtype="int32"), Array("weight", (), dtype="float32")
SHAPE = ModelShape("any", 1, 4, 2, 1, 2, 10, 64, False, bundle=((), (COUNT, WEIGHT)))
HIDDEN, COUNTS, WEIGHTS = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3)


def after(shape, hidden, returned):
    """What travels after a layer that returns this."""
    model = SimpleNamespace(layer=lambda *_: returned)
    return Layers(Network(model, None, shape)).layer(0, {}, (hidden,), SimpleNamespace(positional=None), None)


def test_arrays_travel_in_the_order_of_the_bundle_and_are_wide_where_the_run_is():
    returned = {"weight": WEIGHTS, "hidden": HIDDEN, "count": COUNTS}
    assert all(
        one is other for one, other in zip(after(SHAPE, HIDDEN, returned), (HIDDEN, COUNTS, WEIGHTS), strict=True)
    )
    wide = {"hidden": HIDDEN.double(), "count": COUNTS, "weight": WEIGHTS.double()}
    assert [array.dtype for array in after(SHAPE, HIDDEN.double(), wide)] == [torch.float64, torch.int32, torch.float64]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": COUNTS.long()}, r"count is torch.int64 \[3, 2\], what travels is torch.int32 \[3, 2\]"),
        ({"count": COUNTS[:, :1]}, r"count is torch.int32 \[3, 1\], what travels is torch.int32 \[3, 2\]"),
        ({"weight": WEIGHTS[:2]}, r"weight is torch.float32 \[2\]"),
        ({"weight": WEIGHTS.double()}, r"weight is torch.float64 \[3\], what travels is torch.float32 \[3\]"),
        ({"hidden": HIDDEN[:2], "count": COUNTS[:2], "weight": WEIGHTS[:2]}, r"hidden is torch.float32 \[2, 4\]"),
        ({"more": WEIGHTS}, "hidden, count, weight, more at border 1: hidden, count, weight travel"),
    ],
)
def test_an_array_of_another_name_shape_or_dtype_is_named(changes, words):
    with pytest.raises(AssertionError, match=words):
        after(SHAPE, HIDDEN, {"hidden": HIDDEN, "count": COUNTS, "weight": WEIGHTS} | changes)


def test_what_is_missing_is_named():
    with pytest.raises(AssertionError, match="^hidden at border 1: hidden, count, weight travel"):
        after(SHAPE, HIDDEN, {"hidden": HIDDEN})
    with pytest.raises(AssertionError, match="no dict of arrays at border 1: hidden, count, weight travel"):
        after(SHAPE, HIDDEN, HIDDEN)


def test_hidden_states_alone_keep_their_dtype():
    alone = ModelShape("any", 1, 4, 2, 1, 2, 10, 64, False)
    assert after(alone, HIDDEN, HIDDEN)[0] is HIDDEN
    with pytest.raises(AssertionError, match="hidden is torch.float64"):
        after(alone, HIDDEN, HIDDEN.double())
