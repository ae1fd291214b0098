"""Every kind of attention against dense softmax; items by a plain execution of its lists (extra/attention/listed.py)."""

import pytest
import torch

import dense
from extra_kinds import extra_kinds
from noria import attention, kinds
from noria.attention import _scores, items, sdpa
from noria.kernels.scoring import HeadShape, Scoring, ScoringKind
from noria.kernels.work import KEY_BLOCK, Packing
from noria.limits import RUN_PAGES
from noria.step import PAGE_TOKENS, Run, Span

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HEADS = [(4, 4, 16), (6, 2, 8), (4, 1, 20)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def check(kind, case, heads, dtype, window=None, scale=0.3, soft_cap=None, sinks=None, width=None):
    spans = dense.CASES[case]
    queries, keys, values = dense.tensors(spans, *heads, dtype, width=width)
    plan = kind.prepare(spans, CPU)
    found = kind.attention(plan, queries, keys, values, Scoring(scale, window, soft_cap, sinks))
    assert found.shape == (*queries.shape[:2], width or heads[2])
    assert found.dtype == dtype
    expected = dense.attention(spans, queries, keys, values, scale, window, soft_cap, sinks)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_sdpa_is_dense_softmax_over_each_sequences_own_pages(case, heads, dtype):
    check(sdpa, case, heads, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sdpa_is_dense_softmax_over_rows_of_mixed_lengths_in_a_full_cache(dtype):
    spans = dense.full_cache(num_pages=200, rounds=30)
    assert len(spans) > 10 and sum(len(span.runs) > 1 for span in spans) > 2
    queries, keys, values = dense.tensors(spans, 4, 2, 16, dtype, pages=200)
    found = sdpa.attention(sdpa.prepare(spans, CPU), queries, keys, values, Scoring(0.3))
    expected = dense.attention(spans, queries, keys, values, 0.3, None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.usefixtures("two_threads")
def test_sdpa_is_the_same_on_two_threads(case, heads):
    check(sdpa, case, heads, torch.float64)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("window", [1, 2, 16, 17, 1000])
def test_a_window_shows_sdpa_the_last_tokens_alone(case, window, heads):
    check(sdpa, case, heads, torch.float64, window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", ["a whole prompt", "a chunk with a past", "pages in several runs"])
def test_a_chunk_longer_than_one_mask_is_computed_in_parts(case, window, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK_ROWS", 7)
    check(sdpa, case, (6, 2, 8), torch.float64, window)


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 5])
def test_sdpa_caps_scores_softly_and_lets_sinks_take_their_weight(case, heads, window):
    sinks = torch.linspace(-2, 4, heads[0])
    for soft_cap, its_sinks in ((1.5, None), (None, sinks), (1.5, sinks)):
        check(sdpa, case, heads, torch.float64, window, 0.7, soft_cap, its_sinks)


@pytest.mark.parametrize("case", ["prompts beside decoding rows", "everything at once"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_capped_scores_are_summed_in_float32_at_least(case, dtype):
    check(sdpa, case, (6, 2, 8), dtype, 5, 0.7, 1.5, torch.linspace(-2, 4, 6))


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("capped", [False, True])
def test_values_may_be_narrower_or_wider_than_keys(case, width, capped):
    more = {"soft_cap": 2.0, "sinks": torch.linspace(-1, 1, 6)} if capped else {}
    for window, dtype in ((None, torch.float64), (7, torch.float64), (None, torch.bfloat16)):
        check(sdpa, case, (6, 2, 16), dtype, window, width=width, **more)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("case", ["a whole prompt", "a chunk with a past", "decoding rows"])
@pytest.mark.usefixtures("two_threads")
def test_capped_scores_are_computed_in_parts_that_bound_their_memory(case, window, monkeypatch):
    for most in (1, 6 * 50 * 7):
        monkeypatch.setattr(_scores, "MOST_SCORES", most)
        check(sdpa, case, (6, 2, 8), torch.float64, window, soft_cap=2.0, sinks=torch.linspace(-1, 1, 6))


@pytest.fixture(scope="module")
def listed():
    with extra_kinds():
        yield kinds.load("attention", "listed")


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", HEADS[1:])
def test_lists_made_of_the_spans_cover_every_token_with_its_own_keys(listed, case, heads):
    sinks = torch.linspace(-2, 4, heads[0])
    for spans in (dense.in_blocks(dense.CASES[case]), dense.behind_beginnings(dense.CASES[case])):
        for window, soft_cap, its_sinks in ((None, None, None), (5, None, None), (70, 1.5, sinks)):
            queries, keys, values = dense.tensors(spans, *heads, torch.float64, pages=dense.most_pages(spans))
            plan = listed.prepare(spans, CPU)
            found = listed.attention(plan, queries, keys, values, Scoring(0.3, window, soft_cap, its_sinks))
            expected = dense.attention(spans, queries, keys, values, 0.3, window, soft_cap, its_sinks)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            assert list(plan.made) == [(HeadShape(*heads, heads[2]), window)]


def test_rows_whose_first_runs_are_the_same_share_them_and_a_longer_beginning_goes_on_from_a_shorter():
    short, long, other = Run(0, 8), Run(40, 4), Run(60, 4)
    own = iter(range(100, 200, 4))
    rows = [(1, 200, (short, long)), (1, 150, (short,)), (1, 70, (other,)), (3, 201, (short, long)), (1, 71, (other,))]
    rows += [(40, 140, (short,)), (7, 7, ()), (1, 200, (short, other))]  # within it, alone, another after the same
    spans = dense.spans_of(
        *((count, length, [(r.start, r.count) for r in (*runs, Run(next(own), 4))]) for count, length, runs in rows)
    )
    ragged = items.prepare(spans, CPU).rows
    assert ragged.prefixes.tolist() == [1, 0, 2, 1, 2, -1, -1, 3]
    assert ragged.shared.tolist() == [128, 192, 64, 192] and ragged.parents.tolist() == [-1, 0, -1, 0]
    assert ragged.run_positions.tolist() == [0, 128, 192, 0, 128, 0, 64, 0, 128, 192, 0, 64, 0, 128, 0, 0, 128, 192]
    assert ragged.run_rows[:4].tolist() == [0, 640, 1600, 0] and ragged.run_keys[:3].tolist() == [128, 64, 64]


def test_a_run_that_begins_within_a_block_of_keys_is_refused_and_pages_are_given_otherwise(listed):
    plan = listed.prepare(dense.CASES["pages in several runs"], CPU)
    with pytest.raises(ValueError, match="at a multiple of 64"):
        listed.attention(
            plan, *dense.tensors(dense.CASES["pages in several runs"], 4, 2, 8, torch.float64), Scoring(0.3)
        )
    assert RUN_PAGES * PAGE_TOKENS % KEY_BLOCK == 0


def test_sdpa_takes_decoding_rows_together_only_where_one_view_holds_their_keys():
    plan = sdpa.prepare(dense.CASES["decoding rows of one length, evenly spaced, then not"], CPU)
    assert [(part.span.first, part.num, part.stride) for part in plan] == [
        (0, 3, 48), (3, 1, 0), (4, 1, 0), (5, 1, 0), (6, 1, 0), (7, 1, 0), (8, 1, 0)
    ]  # fmt: skip


def test_a_microbatch_without_rows_is_no_call(listed):
    tensors = torch.empty(0, 4, 8), *torch.empty(2, 16, 2, 8)
    for kind in (sdpa, listed):
        assert kind.attention(kind.prepare([], CPU), *tensors, Scoring(1.0)).shape == (0, 4, 8)


def test_every_kind_has_the_same_functions_and_the_order_names_all():
    assert {*attention.ORDER} == {*kinds.names("attention")} - {"listed"}
    for name in attention.ORDER:
        kind = kinds.load("attention", name)
        assert all(callable(getattr(kind, function)) for function in ("prepare", "attention", "refuses"))


CUDA = torch.device("cuda", 0)
LLAMA = HeadShape(32, 8, 128, 128)


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "why"),
    [
        (CPU, torch.bfloat16, LLAMA, "not items: it needs a CUDA device, this is the CPU"),
        (CUDA, torch.float32, LLAMA, "not items: it computes float16 and bfloat16, not float32"),
        (CUDA, torch.float64, LLAMA, "not items: it computes float16 and bfloat16, not float64"),
        (CUDA, torch.float16, HeadShape(32, 8, 100, 64), "in steps of 8, not 100 and 64"),
        (CUDA, torch.float16, HeadShape(32, 8, 64, 264), "head sizes of 8 to 256 in steps of 8, not 64 and 264"),
        (CUDA, torch.float16, HeadShape(129, 1, 64, 64), "it computes 128 heads to a key head, not 129"),
    ],
)
def test_what_items_does_not_compute_is_computed_by_sdpa_and_it_is_said_why(device, dtype, heads, why):
    kind, said = attention.choose(device, dtype, {heads: [ScoringKind()]})
    assert kind is sdpa and why in said


class Kernel:
    """A stand-in for noria.kernels.attend, which needs triton: lists are executed plainly, or a compiler fails."""

    def __init__(self, listed, fails=None, off=0.0):
        self._listed, self._fails, self._off = listed, fails, off
        self.built = []

    def packing(self, device, heads, window):
        return Packing(heads.group, heads.num_key_heads, 3, window=window)

    def build(self, device, dtype, heads, scored):
        self.built.append(scored)

    def attend(self, lists, queries, keys, values, scores):
        if self._fails:
            raise self._fails
        return self._listed.Execution(lists, queries, keys, values, scores).run() + self._off


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        ({}, ""),
        ({"off": 0.2}, "not items: it gives other results than sdpa"),
        ({"off": torch.nan}, "not items: it gives other results than sdpa"),
        (
            {"fails": RuntimeError("Failed to find C compiler\nand more")},
            "it cannot be built: Failed to find C compiler",
        ),
        ({"fails": PermissionError()}, "not items: it cannot be built: PermissionError"),
    ],
)
def test_items_is_tried_before_it_is_taken(listed, monkeypatch, kernel, why):
    stand_in = Kernel(listed, **kernel)
    monkeypatch.setattr(items, "_kernel", lambda: stand_in)
    heads = HeadShape(6, 2, 16, 24)
    said = items._unbuilt.__wrapped__(
        CPU, torch.bfloat16, heads, frozenset([ScoringKind(), ScoringKind(7, sinks=True)])
    )
    assert said == why.removeprefix("not items: ")
    assert {*stand_in.built} == (set() if "built" in why else {ScoringKind(), ScoringKind(7, sinks=True)})


def test_pieces_join_runs_that_touch_and_leave_out_pages_beyond_the_length():
    assert attention.pieces(Span(0, 1, 20, (Run(3, 1), Run(4, 5)))) == ((48, 68),)
    assert attention.pieces(Span(0, 1, 40, (Run(3, 1), Run(1, 2)))) == ((48, 64), (16, 40))
    assert attention.pieces(Span(0, 1, 16, (Run(3, 1), Run(1, 2)))) == ((48, 64),)
    with pytest.raises(AssertionError, match="lacks pages"):
        attention.pieces(Span(0, 1, 17, (Run(3, 1),)))
