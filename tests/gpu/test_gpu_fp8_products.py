"""Products in fp8 on a GPU: the kernel beside torch, rows in any company, and runs whose weights stay, stream, or are graphs'."""

# ruff: noqa: F811 -- the folder of test_fp8_products is a fixture here
import pytest
import torch

from noria.kernels import fp8
from test_fp8_products import alone, made  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_is_right_and_a_row_has_its_bits_in_any_company(dtype, block):
    assert fp8.wrong(torch.device("cuda", 0), dtype, block, inputs=4096, rows=1000) == ""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "powers", "channels", "experts"])
def test_rows_are_the_same_to_the_bit_wherever_weights_are_and_whatever_is_beside_them(made, form):
    keys = {"products": "fp8", "dtype": "bfloat16", "device": "cuda", "max_new_tokens": 12}
    found = [
        alone(made[0], form, f"{form}-{name}", **keys, **more)
        for name, more in {
            "stay": {"weights": {"gpu": 100}},
            "stream": {"weights": {"cpu": 100}, "step_tokens": 8, "microbatch_tokens": 8},
            "plain": {"weights": {"gpu": 100}, "graphs": False, "groups": 2},
        }.items()
    ]
    for others in found[1:]:
        for row, other in zip(found[0], others, strict=True):
            assert (
                row.token_ids.tolist() == other.token_ids.tolist() and row.logprobs.tolist() == other.logprobs.tolist()
            )
