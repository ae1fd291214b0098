"""Attention over work items on a CUDA device: right beside torch's own, and the same bits however a row is computed."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import item_checks
from item_cases import Heads
from noria.kernels.attend import packing, usable
from noria.kernels.scoring import Scoring

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALVES = [torch.float16, torch.bfloat16]
LLAMA = Heads(32, 8, 128, 128)
HEADS = [
    LLAMA,
    Heads(8, 2, 64, 64),
    Heads(6, 1, 80, 80),
    Heads(14, 2, 64, 64),
    Heads(6, 2, 192, 128),
    Heads(71, 1, 64, 64),
    Heads(4, 2, 256, 256),
]
LENGTH = 2055  # three sections, the last one of seven keys


def device():
    return torch.device("cuda", 0)


def some_scores(heads):
    sinks = torch.linspace(-2, 2, heads.heads, device=device())
    return [Scoring(0.1), Scoring(0.1, window=40), Scoring(0.1, window=150, sinks=sinks), Scoring(0.1, soft_cap=3.0)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("number", range(4))
def test_its_error_is_that_of_torchs_own_attention(heads, dtype, number):
    for programs in (1, 1 << 20):
        ours, theirs = item_checks.errors(heads, dtype, device(), some_scores(heads)[number], programs=programs)
        assert ours < 1.5 * theirs


@pytest.mark.parametrize("widest", [64, 128])
@pytest.mark.parametrize(
    ("heads", "dtype", "window"),
    [
        (LLAMA, torch.bfloat16, None),
        (LLAMA, torch.float16, 700),
        (HEADS[1], torch.float16, 700),
        (HEADS[-1], torch.bfloat16, None),
    ],
)
def test_a_row_has_the_same_bits_however_it_is_computed(heads, dtype, window, widest):
    scores = Scoring(0.1, window, sinks=None if window is None else torch.ones(heads.heads, device=device()))
    assert item_checks.other_bits(heads, dtype, device(), scores, LENGTH, widest=widest) == []


def test_it_says_what_it_computes_and_packs_wide_heads_into_narrow_tiles():
    assert usable(device(), torch.bfloat16, 32, 8, 128, 64)
    for dtype, heads, dim in (
        (torch.float32, 32, 128),
        (torch.float16, 32, 84),
        (torch.float16, 32, 264),
        (torch.float16, 1032, 64),
    ):
        assert not usable(device(), dtype, heads, 8, dim, 64)
    assert not usable(torch.device("cpu"), torch.bfloat16, 32, 8, 128, 128)
    assert packing(device(), 32, 8, 128, 128).widest == 128 and packing(device(), 8, 8, 256, 256).widest == 64
