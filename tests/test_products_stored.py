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
from noria.blocks import lay_out
from noria.kernels import as_stored
from noria.launch import few_rows
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


def layer_of(*names, biased=()):
    """A layer of weights in these of FORMS, each of two parts."""
    its = {f"w{place}": stored_weights.parameter_of(name, (40, 130), 72) for place, name in enumerate(names)}
    shapes = {name: one.shape for name, one in its.items()} | {f"{name}_bias": (170,) for name in biased}
    return lay_out("layers/0000", shapes, "float16", {name: one.encoded for name, one in its.items()})


def chosen(layer, linear=products.product):
    return few_rows.chosen([layer, layer], torch.device("cpu"), torch.float16, linear, rows=64)


def test_each_kind_of_weight_is_tried_once_in_its_own_shape_and_serves_where_its_bits_are_right():
    found, lines = chosen(layer_of(*FORMS, biased=("w0", "w3")))
    assert {has_bias for _, has_bias in found} == {True, False} and len(found) == len(FORMS) and not lines
    assert {outputs for (_, _, outputs, _), _ in found} == {(40, 130)}


def test_a_kernel_of_other_bits_does_not_serve(monkeypatch):
    layer, product = layer_of("int4", "mxfp4", "int4 of 128"), as_stored.product
    doubled = lambda hidden, its, bias: product(hidden, its, bias) * (1 + (its.form.group == 64))  # noqa: E731
    monkeypatch.setattr(as_stored, "product", doubled)
    found, lines = chosen(layer)
    assert len(found) == 2
    assert lines == [
        "int4 is decoded for products of few rows too, slower than as it is stored: it gives other bits with 170 x 72"
    ]
    monkeypatch.setattr(as_stored, "product", product)
    assert chosen(layer, lambda *its: products.product(*its) * 1.01)[0] == frozenset()  # of torch, which adds otherwise


def test_what_no_kernel_takes_and_what_cannot_be_built_is_said(monkeypatch):
    def fails(*given):
        raise RuntimeError("no compiler\nhere")

    settings = {"group_size": 48, "symmetric": True, "permuted": False, "scale_dtype": "bfloat16"}
    monkeypatch.setitem(FORMS, "odd", ("int4", settings))
    monkeypatch.setitem(FORMS, "in another order", ("int8", settings | {"group_size": 64, "permuted": True}))
    found, lines = chosen(layer_of("odd", "in another order"))
    ways = "is decoded for products of few rows too, slower than as it is stored"
    assert not found and lines == [
        f"{name} {ways}: no kernel takes such groups of inputs, or so many numbers" for name in ("int4", "int8")
    ]
    monkeypatch.setattr(as_stored, "product", fails)
    assert chosen(layer_of("mxfp4"))[1] == [f"mxfp4 {ways}: it cannot be built: no compiler"]


def test_without_memory_nothing_is_chosen(monkeypatch):
    def fails(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(few_rows, "wrong", fails)
    found, (line,) = chosen(layer_of("nvfp4"))
    assert not found and line.endswith("no memory to try it with 170 x 72")
