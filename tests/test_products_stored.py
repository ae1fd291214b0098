"""Products with weights as they are stored in Triton's interpreter: the bits of decoded weights in the kernel of fixed order.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_products_stored.py runs the compiled kernels. The interpreter cannot multiply bfloat16.
"""

import importlib.util
import sys

import numpy as np
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0" or "noria.kernels.items" in sys.modules:
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:  # what is imported now is interpreted
    patch.setenv("TRITON_INTERPRET", "1")
    from noria.kernels import products, products_stored

import stored_weights
from stored_cases import FORMS

# Outputs of parts, inputs, rows: whole tiles; parts and inputs that are none; more rows than a tile has.
SHAPES = [((64,), 128, 1), ((70, 33, 9), 200, 5), ((32, 32), 72, 70)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def expected(hidden, decoded, bias, its):
    """By the plain kernel in as large a tile, which adds in the same order."""
    return products.product(hidden, decoded, bias, its=its)


@pytest.mark.parametrize(("parts", "inputs", "rows"), SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_a_stored_weight_is_multiplied_to_the_bits_of_its_decoded_numbers(name, parts, inputs, rows):
    hidden, stored, decoded, bias = stored_weights.made(name, parts, inputs, rows, torch.float16)
    for its_bias in (None, bias):
        its = products_stored.tile_of(sum(parts))
        found = products_stored.product(hidden, stored, its_bias)
        assert torch.equal(found, expected(hidden, decoded, its_bias, its))


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("depth", [64, 128])
def test_tiles_of_any_size_give_one_result(columns, depth):
    hidden, stored, decoded, bias = stored_weights.made("int4", (70, 130), 320, 3, torch.float16)
    its = products.ProductTile(64, columns, depth, 4, 3)
    found = products_stored.product(hidden, stored, bias, its)
    assert torch.equal(found, expected(hidden, decoded, bias, its))


def test_rows_with_gaps_are_multiplied_and_none_give_none():
    hidden, stored, decoded, bias = stored_weights.made("mxfp4", (40,), 96, 6, torch.float16)
    wide = torch.zeros(6, 200, dtype=torch.float16)
    wide[:, 50:146] = hidden
    its = products_stored.tile_of(40)
    found = products_stored.product(wide[:, 50:146], stored, bias)
    assert torch.equal(found, expected(hidden, decoded, bias, its))
    assert products_stored.product(hidden[:0], stored).shape == (0, 40)


def test_numbers_that_are_none_stay_none_and_touch_no_other_row():
    hidden, stored, _, _ = stored_weights.made("fp8 blocks", (40, 8), 72, 4, torch.float16)
    whole = products_stored.product(hidden, stored)
    hidden[1] = torch.nan
    spoilt = products_stored.product(hidden, stored)
    assert spoilt[1].isnan().all() and torch.equal(spoilt[[0, 2, 3]], whole[[0, 2, 3]])


@pytest.mark.parametrize("its", products_stored.TILES)
def test_tiles_have_as_many_rows_as_one_instruction_takes_and_fit_into_99_kib(its):
    fitted = products.fitted(its, 99 << 10, torch.float16)
    assert its.rows >= products.LEAST_ROWS and 2 <= fitted.stages <= its.stages
