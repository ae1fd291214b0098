"""Products in fp8 in Triton's interpreter, beside torch's in float32. test_fp8_products.py has whole runs.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6).
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
    from noria.kernels import products_fp8

from noria.kernels import fp8

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def weight_of(sizes, inputs, block, powers=False):
    """Random codes of matrices with so many outputs, under scales of about 1."""
    draw, matrices = torch.Generator().manual_seed(1), []
    for outputs in sizes:
        codes = (torch.randn(outputs, inputs, generator=draw)).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = torch.rand(-(-outputs // block[0]), -(-inputs // block[1]), generator=draw) + 0.5
        if powers:
            scales = torch.randint(124, 130, scales.shape, generator=draw).to(torch.uint8)
        matrices.append(fp8.Fp8Matrix(codes, scales))
    return fp8.Fp8Weight(tuple(matrices), block)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 0)])
def test_the_kernel_is_right_and_a_row_has_its_bits_in_any_company(block):
    assert fp8.wrong(CPU, torch.float16, block, rows=71) == ""


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "block"), [(1, 200, (1, 200)), (3, 300, (128, 128)), (65, 70, (32, 64))])
def test_weights_of_several_matrices_fill_their_columns(rows, inputs, block, powers):
    weight, draw = weight_of((40, 130), inputs, block, powers), torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, inputs + 8, generator=draw).half()[:, :inputs]  # rows with gaps
    bias = torch.randn(170, generator=draw).half()
    found = products_fp8.product(hidden, weight, bias).float()
    exact = fp8.reference(hidden.float(), weight, bias.float())
    assert torch.allclose(found, exact, atol=0.05, rtol=2e-3)


def test_codes_of_activations_are_those_of_torch_to_the_bit():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 300, generator=draw).half() * torch.tensor([1e-4, 1.0, 100.0, 0.0, 1.0])[:, None].half()
    hidden[4, 7], hidden[4, 200] = torch.inf, torch.nan
    for columns in (128, 300):
        codes, scales = products_fp8.round_hidden(hidden, columns)
        spread = scales.repeat_interleave(columns, 1)[:, :300] if scales.shape[1] > 1 else scales
        found = codes.view(torch.float8_e4m3fn).float() * spread
        wanted = fp8.rounded(hidden.float(), columns)
        sick = torch.isnan(wanted)
        assert torch.equal(torch.isnan(found), sick) and sick.any() and not sick.all()
        assert torch.equal(found[~sick], wanted[~sick])


@pytest.mark.parametrize(
    "its", [*products_fp8.FEW_ROWS.values(), products_fp8.SOME_ROWS, products_fp8.MANY_ROWS, products_fp8.WIDE_ROWS]
)
def test_tiles_of_any_size_give_one_result(its):
    weight, draw = weight_of((150,), 300, (128, 128)), torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 300, generator=draw).half()
    assert torch.equal(products_fp8.product(hidden, weight, its=its), products_fp8.product(hidden, weight))
