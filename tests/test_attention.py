"""Every kind of attention against dense softmax; varlen with a kernel on the CPU that computes what flash promises."""

import types

import pytest
import torch

import dense
from noria import attention, kinds
from noria.attention import _scores, sdpa, varlen
from noria.kernels.scoring import Scoring
from noria.step import Run, Span

CPU = torch.device("cpu")
HEADS = [(4, 4, 16), (6, 2, 8), (4, 1, 20)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


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


def flash_on_the_cpu(queries, keys, values, query_starts, key_starts, max_queries, max_length, *rest, **options):
    """What torch's flash attention documents, a sequence at a time: causal and window end at the last key."""
    _, causal, _ = rest
    lengths, left, right = options["seqused_k"], options["window_size_left"], options["window_size_right"]
    assert query_starts.dtype == key_starts.dtype == lengths.dtype == torch.int32
    assert len(query_starts) == len(key_starts) == len(lengths) + 1
    assert (left == -1) == (right == -1)
    assert max_queries == int(query_starts.diff().max())
    assert max_length == int(lengths.max())
    attended = torch.full_like(queries, torch.nan)
    group = queries.shape[1] // keys.shape[1]
    for first, last, start, length in zip(
        query_starts[:-1].tolist(), query_starts[1:].tolist(), key_starts[:-1].tolist(), lengths.tolist(), strict=True
    ):
        own, own_values = (t[start : start + length].repeat_interleave(group, dim=1) for t in (keys, values))
        position = torch.arange(length - (last - first), length)[:, None]
        key = torch.arange(length)
        seen = (key <= position) if causal else torch.ones(last - first, length, dtype=torch.bool)
        if left >= 0:
            seen = seen & (key >= position - left) & (key <= position + right)
        scores = torch.einsum("qhd,khd->hqk", queries[first:last], own) * options["scale"]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended[first:last] = torch.einsum("hqk,khd->qhd", weights, own_values)
    return (attended,)


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_calls_of_varlen_cover_every_token_with_its_own_keys(case, heads, window, monkeypatch):
    monkeypatch.setattr(varlen, "flash", flash_on_the_cpu)
    check(varlen, case, heads, torch.float64, window)


def test_varlen_reads_keys_in_place_unless_they_lie_in_several_pieces():
    sorts = {case: [call.gather is None for call in varlen.prepare(spans, CPU)] for case, spans in dense.CASES.items()}
    assert sorts["decoding rows"] == [True]
    assert sorts["runs that touch, and pages not yet used"] == [True, True]
    assert sorts["prompts beside decoding rows"] == [True, True]
    assert sorts["pages in several runs"] == [False, False]
    assert len(sorts["everything at once"]) == 4


def test_sdpa_takes_decoding_rows_together_only_where_one_view_holds_their_keys():
    plan = sdpa.prepare(dense.CASES["decoding rows of one length, evenly spaced, then not"], CPU)
    assert [(part.span.first, part.num, part.stride) for part in plan] == [
        (0, 3, 48), (3, 1, 0), (4, 1, 0), (5, 1, 0), (6, 1, 0), (7, 1, 0), (8, 1, 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("", "", varlen),
        ("Tensor? alibi_slopes", "Tensor? other", varlen),
        ("float? scale=None", "float? scale", varlen),
        ("SymInt max_q, SymInt max_k", "SymInt max_k, SymInt max_q", sdpa),
        ("bool return_debug_mask, *", "bool return_debug_mask, Tensor? sink, *", sdpa),
        ("seqused_k", "used_k", sdpa),
        ("Tensor? alibi_slopes=None", "Tensor alibi_slopes", sdpa),
    ],
)
def test_a_torch_whose_kernel_takes_other_arguments_computes_by_sdpa(monkeypatch, old, new, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True, raising=False)
    schema = str(torch.ops.aten._flash_attention_forward.default._schema)
    assert old in schema
    changed = types.SimpleNamespace(_schema=torch._C.parse_schema(schema.replace(old, new) if old else schema))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", types.SimpleNamespace(default=changed))
    assert attention.choose(torch.device("cuda", 0), torch.bfloat16, 64) is kind


def test_a_torch_without_the_kernel_computes_by_sdpa(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", None)
    assert attention.choose(torch.device("cuda", 0), torch.bfloat16, 64) is sdpa


def test_a_microbatch_without_rows_is_no_call():
    assert varlen.prepare([], CPU) == ()
    assert sdpa.attention(
        sdpa.prepare([], CPU), torch.empty(0, 4, 8), *torch.empty(2, 16, 2, 8), Scoring(1.0)
    ).shape == (
        0,
        4,
        8,
    )


def test_every_kind_has_the_same_functions_and_the_order_names_all():
    assert sorted(attention.ORDER) == kinds.names("attention")
    for name in attention.ORDER:
        kind = kinds.load("attention", name)
        assert all(callable(getattr(kind, function)) for function in ("prepare", "attention", "usable"))


def test_sdpa_computes_on_the_cpu_and_varlen_never_does():
    for dtype in TOLERANCES:
        assert attention.choose(CPU, dtype, 64) is sdpa
    cuda = torch.device("cuda", 0)
    assert not varlen.usable(cuda, torch.float32, 64)
    assert not varlen.usable(cuda, torch.bfloat16, 20)
    assert not varlen.usable(cuda, torch.bfloat16, 512)


def test_pieces_join_runs_that_touch_and_leave_out_pages_beyond_the_length():
    assert attention.pieces(Span(0, 1, 20, (Run(3, 1), Run(4, 5)))) == ((48, 68),)
    assert attention.pieces(Span(0, 1, 40, (Run(3, 1), Run(1, 2)))) == ((48, 64), (16, 40))
    assert attention.pieces(Span(0, 1, 16, (Run(3, 1), Run(1, 2)))) == ((48, 64),)
    with pytest.raises(AssertionError, match="lacks pages"):
        attention.pieces(Span(0, 1, 17, (Run(3, 1),)))
