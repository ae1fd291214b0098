"""Products of fixed order on a CUDA device: the bits of torch's unsplit products, one row's bits in any batch, how fast."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs triton")

from noria.kernels import in_order, products
from noria.launch.exact import products_in_one_order

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [
    (4096, 14336),
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (5120, 13824),
    (3584, 18944),
    (1024, 3072),
    (100, 70),
]
TILES = [*products.FEW_ROWS.values(), products.MANY_ROWS]
OTHERS = [(64, 16, 128, 4, 5), (64, 32, 128, 4, 6), (64, 32, 64, 4, 6), (64, 64, 64, 4, 5)]


def tensors(outputs, inputs, rows, dtype, of_weights=None):
    draw = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, inputs, device=DEVICE, generator=draw).to(dtype)
    weight = torch.randn(outputs, inputs, device=DEVICE, generator=draw) * inputs**-0.5
    return hidden, weight.to(of_weights or dtype), torch.randn(outputs, device=DEVICE, generator=draw).to(dtype)


def test_it_serves_half_precisions():
    assert [in_order.refuses(DEVICE, dtype) for dtype in HALVES] == ["", ""]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_it_has_the_bits_of_torchs_products_that_are_not_split(outputs, inputs, dtype):
    hidden, weight, bias = tensors(outputs, inputs, 100, dtype)
    with products_in_one_order(dtype) as can:
        assert can
        for its_bias in (None, bias):
            expected = F.linear(hidden, weight, its_bias)
            for its in TILES:
                assert torch.equal(products.product(hidden, weight, its_bias, its=its), expected), its
            for rows in (1, 16, 33, 64):
                assert torch.equal(products.product(hidden[:rows], weight, its_bias), expected[:rows]), rows


@pytest.mark.parametrize("of_weights", [None, torch.float32])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_router_gives_a_row_the_same_bits_in_any_batch_and_is_right(dtype, of_weights):
    for outputs, inputs in ((128, 2048), (64, 2880), (8, 4096), (256, 7168)):
        hidden, weight, _ = tensors(outputs, inputs, 9000, dtype, of_weights)
        whole = products.product(hidden, weight, None, torch.float32)
        for rows in (1, 7, 64, 65, 300, 1024, 4096):
            assert torch.equal(products.product(hidden[:rows], weight, None, torch.float32), whole[:rows]), rows
        exact = hidden.double() @ weight.double().t()
        assert (whole - exact).abs().max() < 5e-5  # of sums of about 1: tensor cores cut what they add


def milliseconds(function, *given, repeats: int = 9) -> float:
    found = []
    for _ in range(repeats + 2):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(500_000)
        before.record()
        function(*given)
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return round(sorted(found[2:])[repeats // 2], 4)


def times_of(outputs: int, inputs: int, rows: int) -> dict[str, float]:
    hidden, weight, _ = tensors(outputs, inputs, rows, torch.bfloat16)
    found = {"read_at_copy_rate": milliseconds(torch.empty_like(weight).copy_, weight) / 2}
    found["split"] = milliseconds(F.linear, hidden, weight)
    with products_in_one_order(torch.bfloat16):
        found["unsplit"] = milliseconds(F.linear, hidden, weight)
    found["ours"] = milliseconds(products.product, hidden, weight)
    for sizes in OTHERS if rows == 16 else ():
        given = hidden, weight, None, None, products.ProductTile(*sizes)
        try:
            found[" ".join(map(str, sizes))] = milliseconds(products.product, *given)
        except Exception:  # noqa: BLE001 -- a tile that does not fit on this device
            continue
    return found


def times_of_router(rows: int, of_weights: torch.dtype) -> dict[str, float]:
    hidden, weight, _ = tensors(128, 2048, rows, torch.bfloat16, of_weights)
    wide, float32 = weight.float(), torch.float32
    found = {"torch": milliseconds(lambda: F.linear(hidden.float(), wide))}
    return found | {"ours": milliseconds(products.product, hidden, weight, None, float32)}


@pytest.mark.slow
@pytest.mark.alone
def test_few_rows_of_long_inputs_are_multiplied_near_the_rate_of_the_memory():
    cases = [(*shape, rows) for shape in SHAPES[:-1] for rows in (1, 16, 32, 48, 64)]
    found = {case: times_of(*case) for case in cases}
    for case, line in found.items():
        print(json.dumps({"bench": "few rows", "outputs, inputs, rows": case} | line), flush=True)
    for rows in (16, 512, 16384):
        for of_weights in (torch.bfloat16, torch.float32):
            line = {"bench": "router", "rows": rows, "weights": str(of_weights)}
            print(json.dumps(line | times_of_router(rows, of_weights)), flush=True)
    assert found[4096, 14336, 16]["ours"] <= 0.1


def test_what_routers_need_is_built_from_few_numbers():
    for dtype in HALVES:
        for of_router in (dtype, torch.float32):
            in_order.build(
                dtype, torch.zeros(128, 2048, dtype=of_router, device=DEVICE), torch.zeros(128, device=DEVICE)
            )
