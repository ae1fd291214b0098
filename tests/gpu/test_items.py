"""Attention over work items on a CUDA device: right beside torch's own, and the same bits however a row is computed."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import triton

import dense
import item_checks
from item_cases import Heads
from noria import attention
from noria.attention import items, sdpa
from noria.kernels.attend import packing
from noria.kernels.scoring import HeadShape, Scoring, ScoringKind

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
    Heads(64, 1, 576, 512, within=True),
    Heads(16, 1, 320, 256, within=True),
]
LATENT = HEADS[-2]
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
        (HEADS[6], torch.bfloat16, None),
    ],
)
def test_a_row_has_the_same_bits_however_it_is_computed(heads, dtype, window, widest):
    scores = Scoring(0.1, window, sinks=None if window is None else torch.ones(heads.heads, device=device()))
    assert item_checks.other_bits(heads, dtype, device(), scores, LENGTH, widest=widest) == []


def test_a_row_has_the_same_bits_however_it_attends_to_latents():
    assert (
        item_checks.other_bits(
            LATENT, torch.bfloat16, device(), Scoring(0.1), LENGTH, ones=[0, 63, 64, 1023, 1024, 2054]
        )
        == []
    )


def test_heads_of_latents_are_computed_in_parts_of_64():
    for num_heads in (20, 128):
        heads = HeadShape(num_heads, 1, 576, 512, within=True)
        assert attention.choose(device(), torch.bfloat16, {heads: [ScoringKind()]})[0] is items


@pytest.mark.parametrize(
    "kind", [ScoringKind(), ScoringKind(128, sinks=True), ScoringKind(capped=True), ScoringKind(100, True, True)]
)
def test_what_a_way_of_scoring_launches_is_compiled_where_it_is_tried(kind, monkeypatch):
    heads = HeadShape(24, 3, 96, 96)  # which no other test has
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **more: compiled.append(more["repr"]))
    assert items._unbuilt.__wrapped__(device(), torch.bfloat16, heads, frozenset([kind])) == ""
    its_own, sinks = len(compiled), torch.zeros(24, dtype=torch.bfloat16, device=device()) if kind.sinks else None
    scores = Scoring(0.1, kind.window, 3.0 if kind.capped else None, sinks)
    for case in dense.CASES:
        spans = dense.in_blocks(dense.CASES[case])
        given = dense.tensors(spans, 24, 3, 96, torch.bfloat16, device(), pages=dense.most_pages(spans))
        items.attention(items.prepare(spans, device()), *given, scores)
    assert its_own > 0 and compiled[its_own:] == []


def test_wide_heads_are_packed_into_narrow_tiles():
    assert packing(device(), HeadShape(32, 8, 128, 128)).widest == 128
    assert packing(device(), HeadShape(8, 8, 256, 256)).widest == 64


def test_it_is_chosen_for_half_precisions_and_sdpa_for_the_rest():
    for dtype, heads, kind in (
        (torch.bfloat16, HeadShape(32, 8, 128, 64), items),
        (torch.float16, HeadShape(6, 6, 80, 80), items),
        (torch.float32, HeadShape(32, 8, 128, 128), sdpa),
        (torch.bfloat16, HeadShape(32, 8, 84, 84), sdpa),
    ):
        assert attention.choose(device(), dtype, {heads: [ScoringKind(), ScoringKind(40)]})[0] is kind


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 8), (32, 8, 128)])
@pytest.mark.parametrize(("kind", "dtype"), [(items, torch.bfloat16), (items, torch.float16), (sdpa, torch.bfloat16)])
def test_microbatches_of_every_kind_are_dense_softmax_and_never_wait_for_the_device(kind, dtype, heads, case):
    sinks = torch.linspace(-2, 2, heads[0], device=device())
    for spans in (dense.in_blocks(dense.CASES[case]), dense.behind_beginnings(dense.CASES[case])):
        for window, soft_cap, its_sinks in ((None, None, None), (5, None, None), (70, 1.5, sinks)):
            scores = Scoring(heads[2] ** -0.5, window, soft_cap, its_sinks)
            with torch.inference_mode():
                given = dense.tensors(spans, *heads, dtype, device(), pages=dense.most_pages(spans))
                torch.cuda.set_sync_debug_mode("error")
                try:
                    found = kind.attention(kind.prepare(spans, device()), *given, scores)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            expected = dense.attention(spans, *given, scores.scale, window, soft_cap, its_sinks)
            torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=3e-2)
