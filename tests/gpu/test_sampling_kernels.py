"""Kernels that draw tokens on a CUDA device: the plain sampler's tokens, the same bits in any batch, how fast."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import sampling_cases
from noria.kernels import drawing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCAB = 128_256


def settings_of(rows: int) -> torch.Tensor:
    """Of rows of every kind, by turns."""
    its = [[*(sampling_cases.KEYS | keys).values(), 0.0] for keys in sampling_cases.SETTINGS]
    settings = torch.tensor([its[row % len(its)] for row in range(rows)], dtype=torch.float64, device=DEVICE)
    settings[:, 4] = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return settings


def logits_of(rows: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator(DEVICE).manual_seed(0)
    return (torch.randn(rows, VOCAB, device=DEVICE, generator=draw) * 3).to(dtype)


def test_it_serves_half_precisions():
    for vocab in (VOCAB, 50_257):
        assert drawing.refuses(DEVICE, torch.bfloat16, vocab) == "" == drawing.refuses(DEVICE, torch.float16, vocab)
    assert drawing.refuses(DEVICE, torch.float32, VOCAB)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", sampling_cases.VOCABS)
def test_a_row_gets_the_token_of_the_plain_sampler(vocab, dtype):
    assert sampling_cases.otherwise_drawn(vocab, dtype, DEVICE) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_are_those_of_log_softmax(dtype):
    assert sampling_cases.error_of_logprobs(dtype, DEVICE) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_sampler_draws_by_kernels_what_it_draws_without(dtype):
    sampling_cases.check_sampler(DEVICE, dtype, 64, 32_000)


def test_a_row_has_the_same_bits_alone_and_in_any_company():
    rows = 600
    logits, settings = logits_of(rows, torch.bfloat16), settings_of(rows)

    def drawn(which: torch.Tensor) -> list[torch.Tensor]:
        its, count = logits[which].contiguous(), len(which)
        ids = torch.empty(count, dtype=torch.int64, device=DEVICE)
        drawing.draw(its, settings[which].contiguous(), ids)
        logprobs, top_logprobs = (
            torch.empty(*size, dtype=torch.float64, device=DEVICE) for size in ((count,), (count, 3))
        )
        top_ids = torch.empty(count, 3, dtype=torch.int64, device=DEVICE)
        drawing.log_probabilities(
            its, torch.arange(count, dtype=torch.int32, device=DEVICE), ids, logprobs, top_ids, top_logprobs
        )
        return [ids, logprobs, top_ids, top_logprobs]

    whole = drawn(torch.arange(rows, device=DEVICE))
    for which in ([5], [17, 3, 599], list(range(100, 233)), list(range(599, 0, -2))):
        index = torch.tensor(which, device=DEVICE)
        assert all(torch.equal(mine, its[index]) for mine, its in zip(drawn(index), whole, strict=True)), len(which)


def test_draws_can_be_captured_in_a_graph():
    logits, settings = logits_of(16, torch.bfloat16), settings_of(16)
    ids, expected = torch.zeros(16, dtype=torch.int64, device=DEVICE), torch.zeros(16, dtype=torch.int64, device=DEVICE)
    drawing.draw(logits, settings, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawing.draw(logits, settings, ids)
    graph.replay()
    assert torch.equal(ids, expected)


def milliseconds(function, repeats: int = 7) -> float:
    found = []
    for _ in range(repeats + 2):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        function()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return sorted(found[2:])[repeats // 2]


TIMED = {
    "greedy": {"temperature": 0.0},
    "all ids": {},
    "top_p": {"top_p": 0.95},
    "top_p, flat": {"top_p": 0.9, "temperature": 3.0},
    "min_p": {"min_p": 0.05},
    "top_k 50": {"top_k": 50},
    "top_k 1024, top_p": {"top_k": 1024, "top_p": 0.9},
}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 1000), (torch.bfloat16, 16), (torch.float32, 1000)])
def test_a_thousand_rows_are_drawn_in_five_milliseconds(dtype, rows):
    logits = logits_of(rows, dtype)
    ids, other = torch.empty(rows, dtype=torch.int64, device=DEVICE), torch.empty_like(logits)
    line = {"bench": "sampling", "rows": rows, "dtype": str(dtype).removeprefix("torch.")}
    line["read_at_copy_rate"] = round(milliseconds(lambda: other.copy_(logits)) / 2, 3)
    for name, keys in TIMED.items():
        its = [*(sampling_cases.KEYS | keys).values(), 0.5]
        settings = torch.tensor([its] * rows, dtype=torch.float64, device=DEVICE)
        line[name] = round(milliseconds(lambda settings=settings: drawing.draw(logits, settings, ids)), 3)
    of_rows, logprobs = torch.arange(rows, dtype=torch.int32, device=DEVICE), settings[:, 0].clone()
    tops = (
        torch.empty(rows, 5, dtype=torch.int64, device=DEVICE),
        torch.empty(rows, 5, dtype=torch.float64, device=DEVICE),
    )
    its = of_rows, ids, logprobs
    line["5 logprobs"] = round(milliseconds(lambda: drawing.log_probabilities(logits, *its, *tops)), 3)
    print(json.dumps(line), flush=True)
    assert dtype == torch.float32 or max(line[name] for name in TIMED) < 5
