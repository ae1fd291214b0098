"""Attention on a CUDA device: torch's flash kernels and sdpa against dense softmax, without waiting for the device."""

import pytest
import torch

import dense
from noria import attention
from noria.attention import sdpa, varlen
from noria.kernels.scoring import Scoring

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HEADS = [(8, 8, 64), (8, 2, 128), (6, 1, 80)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
KINDS = [(varlen, torch.bfloat16), (varlen, torch.float16), *((sdpa, dtype) for dtype in TOLERANCES)]


def device():
    return torch.device("cuda", 0)


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("window", [None, 5])
def test_it_is_dense_softmax_and_never_waits_for_the_device(kind, dtype, heads, case, window):
    spans = dense.CASES[case]
    with torch.inference_mode():
        queries, keys, values = dense.tensors(spans, *heads, dtype, device())
        expected = dense.attention(spans, queries, keys, values, heads[2] ** -0.5, window)
        assert kind.usable(device(), dtype, heads[2])
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan = kind.prepare(spans, device())
            found = kind.attention(plan, queries, keys, values, Scoring(heads[2] ** -0.5, window))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=TOLERANCES[dtype])


def test_flash_is_chosen_for_half_precisions_and_sdpa_for_the_rest():
    assert attention.choose(device(), torch.bfloat16, 128) is varlen
    assert attention.choose(device(), torch.float16, 80) is varlen
    assert attention.choose(device(), torch.float32, 128) is sdpa
    assert attention.choose(device(), torch.float64, 128) is sdpa
    assert attention.choose(device(), torch.bfloat16, 36) is sdpa


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_mixed_lengths_in_a_full_cache_are_dense_softmax(kind, dtype, seed):
    spans = dense.full_cache(num_pages=500, rounds=60, seed=seed, most=700)
    assert len(spans) > 15 and sum(len(span.runs) > 1 for span in spans) > 4
    with torch.inference_mode():
        queries, keys, values = dense.tensors(spans, 8, 2, 128, dtype, device(), pages=500)
        found = kind.attention(kind.prepare(spans, device()), queries, keys, values, Scoring(128**-0.5))
    expected = dense.attention(spans, queries, keys, values, 128**-0.5, None)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("count", [1, 300])
def test_long_sequences_in_a_large_cache_are_read_at_their_own_rows(count):
    spans = dense.spans_of((count, 900, ((0, 60),)), (count, 1300, ((100, 90),)))
    with torch.inference_mode():
        queries, keys, values = dense.tensors(spans, 2, 1, 128, torch.bfloat16, device(), pages=200)
        found = varlen.attention(varlen.prepare(spans, device()), queries, keys, values, Scoring(0.1))
    expected = dense.attention(spans, queries, keys, values, 0.1, None)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=3e-2)
