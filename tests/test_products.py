"""Products of fixed order in Triton's interpreter, beside float64; where they serve. gpu/test_products.py has their bits.

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
    from noria.kernels import products

from noria.kernels import in_order

CPU = torch.device("cpu")
TILES = [*products.FEW_ROWS.values(), products.MANY_ROWS]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("of_weights", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 200), (3, 256), (65, 70), (130, 128)])
def test_it_is_the_product_of_any_number_of_rows_and_inputs(rows, inputs, of_weights):
    assert in_order.error(CPU, torch.float16, of_weights, rows, inputs) < 1e-5


@pytest.mark.parametrize("its", TILES)
def test_tiles_of_any_size_give_one_result(its):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 300, generator=draw).half() for size in (70, 150))
    found = products.product(hidden[:, :290], weight[:, :290], None, torch.float32, its)  # rows with gaps
    assert torch.allclose(found, hidden[:, :290].float() @ weight[:, :290].float().t(), atol=1e-4)


@pytest.mark.parametrize("its", [*TILES, products.OF_FLOAT32])
def test_tiles_fit_into_99_kib_with_fewer_stages(its):
    fitted = products.fitted(its, 99 << 10, torch.float16)
    assert 2 <= fitted.stages <= its.stages and products.fitted(its, 228 << 10, torch.float16) == its
    assert fitted.stages * 2 * its.block * (its.rows + its.columns) <= 99 << 10


def test_a_product_goes_by_the_kernel_where_a_run_chose_it():
    hidden, weight, bias = torch.ones(3, 8).half(), torch.ones(5, 8).half(), torch.ones(5).half()
    assert not in_order.serves(hidden, weight, bias)
    with in_order.products_by_kernel({(5, 8, True): {1, 3}}):
        assert in_order.serves(hidden, weight, bias)
        assert not in_order.serves(hidden, weight, None) and not in_order.serves(hidden.float(), weight, bias)
        assert not in_order.serves(torch.ones(4, 8).half(), weight, bias)
    assert not in_order.serves(hidden, weight, bias)
