"""Attention over work items in Triton's interpreter, which runs the kernel on the CPU, against dense softmax.

Needs triton, which a CPU's torch does not bring, and a numpy that its interpreter knows (below 2.4 for triton 3.6). Where
there is a GPU, gpu/test_items.py runs the compiled kernel. The interpreter cannot multiply bfloat16.
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
    import item_checks
    from noria.kernels import attend

import dense
from item_cases import Heads
from noria.attention import items
from noria.kernels.scoring import HeadShape, Scoring
from noria.kernels.work import Packing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


HEADS = [
    Heads(8, 2, 16, 16),
    Heads(3, 1, 24, 40),
    Heads(7, 1, 8, 16),
    Heads(66, 1, 16, 16),
    Heads(20, 1, 40, 32, within=True),
]
# Positions around the borders of blocks, sections and beginnings.
ONES = [0, 1, 63, 64, 100, 1023, 1024, 1087, 1088, 1100, 1159]


def some_scores(heads):
    sinks = torch.linspace(-2, 2, heads.heads)
    return [
        Scoring(0.2),
        Scoring(0.2, window=1),
        Scoring(0.2, window=150, sinks=sinks),
        Scoring(0.2, window=1100, soft_cap=3.0),
        Scoring(0.2, soft_cap=2.0, sinks=sinks),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 1 << 20])
@pytest.mark.parametrize("heads", HEADS)
def test_it_is_dense_softmax_for_rows_of_every_kind_in_one_step(heads, programs):
    for scores in some_scores(heads):
        ours, _ = item_checks.errors(heads, torch.float32, CPU, scores, programs=programs)
        assert ours < 1e-6, scores
    ours, theirs = item_checks.errors(heads, torch.float16, CPU, some_scores(heads)[0], programs=programs)
    assert ours < 1.5 * theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "scores"),
    [
        (Heads(1, 1, 16, 16), Scoring(0.25)),
        (Heads(1, 1, 16, 16), Scoring(0.25, window=700, sinks=torch.ones(1))),
        (Heads(1, 1, 24, 16, within=True), Scoring(0.25)),
    ],
)
def test_a_row_has_the_same_bits_however_it_is_computed(heads, scores):
    assert item_checks.other_bits(heads, torch.float16, CPU, scores, 1160, programs=(1, 1 << 20), ones=ONES) == []


@pytest.fixture
def few_programs(monkeypatch):
    def packing(device, heads, window=None):
        return Packing(heads.group, heads.num_key_heads, 3, window=window)

    monkeypatch.setattr(attend, "packing", packing)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("case", ["prompts beside decoding rows", "everything at once"])
def test_the_kind_attends_to_microbatches_as_softmax_does(case):
    heads, sinks = (6, 2, 8), torch.linspace(-2, 4, 6)
    for spans in (dense.in_blocks(dense.CASES[case]), dense.behind_beginnings(dense.CASES[case])):
        for window, soft_cap, its_sinks in ((None, None, None), (70, 1.5, sinks.bfloat16())):
            given = dense.tensors(spans, *heads, torch.float32, pages=dense.most_pages(spans), width=16)
            found = items.attention(items.prepare(spans, CPU), *given, Scoring(0.3, window, soft_cap, its_sinks))
            expected = dense.attention(spans, *given, 0.3, window, soft_cap, its_sinks)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
def test_lists_in_memory_that_stays_give_the_same_bits_though_the_form_of_other_steps_fills_them():
    short, long = (1, 70, [(0, 5)]), (1, 1100, [(8, 72)])
    behind = [(1, 128 + own, [(80, 8), (88 + 4 * own, 4)]) for own in (3, 40)]
    steps = [dense.spans_of(*rows) for rows in ([short] * 3, [short, *behind], [short, long, short])]
    held, heads = items.held(CPU), (6, 2, 8)
    for number, spans in enumerate((*steps, *steps)):
        given = dense.tensors(spans, *heads, torch.float32, pages=260, width=16)
        plan = items.prepare(spans, CPU)
        found = [items.attention(plan, *given, Scoring(0.3))]
        assert held.take(items.prepare(spans, CPU)) or number in (1, 2)
        found.append(items.attention(held, *given, Scoring(0.3)))
        assert found[0].equal(found[1])


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("num_heads", [6, 64, 80, 128])
def test_values_within_keys_are_read_with_them_by_heads_in_parts_of_at_most_64(num_heads, monkeypatch):
    seen, launch = [], attend.attend
    monkeypatch.setattr(
        attend,
        "attend",
        lambda lists, queries, keys, *more: launch(lists, queries, seen.append(keys.shape[1]) or keys, *more),
    )
    spans = dense.behind_beginnings(dense.CASES["prompts beside decoding rows"])
    queries, keys, _ = dense.tensors(spans, num_heads, 1, 24, torch.float32, pages=dense.most_pages(spans))
    given = queries, keys, keys[..., :16]
    found = items.attention(items.prepare(spans, CPU), *given, Scoring(0.3))
    torch.testing.assert_close(found.double(), dense.attention(spans, *given, 0.3, None), rtol=0, atol=1e-5)
    assert seen == [{6: 1, 64: 1, 80: 2, 128: 2}[num_heads]]
    built = items._unbuilt.__wrapped__(
        CPU, torch.float16, HeadShape(num_heads, 1, 24, 16, within=True), frozenset([None])
    )
    assert built == ""


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
def test_the_kind_builds_what_it_launches_and_finds_it_right():
    assert items._unbuilt.__wrapped__(CPU, torch.float16, HeadShape(6, 2, 8, 16), frozenset([None, 7])) == ""
