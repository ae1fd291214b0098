"""Attention that decodes a cache in fewer bits itself, in Triton's interpreter: the bits of what is decoded before.

Needs what test_items.py needs; where there is a GPU, gpu/test_encoded_cache.py runs what is compiled.
"""

import importlib.util

import numpy as np
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

with pytest.MonkeyPatch.context() as patch:  # what is imported now is interpreted
    patch.setenv("TRITON_INTERPRET", "1")
    import item_checks
    from noria.kernels import attend
    from noria.kernels import items as compiled
if type(compiled.attend_items).__name__ != "InterpretedFunction":
    pytest.skip("the kernels were imported before, to be compiled", allow_module_level=True)

import dense
import replays
import rounded
from item_cases import Heads, ragged
from noria.arrays import ENCODINGS, Array, encoded, stored
from noria.attention import items
from noria.engine.batch import Microbatch, cache_rows
from noria.engine.layer_cache import LayerCache
from noria.engine.parameters import FIELD_DTYPES
from noria.engine.rounding import RoundedArray, RoundedAttention, RoundedRows
from noria.kernels.coded import zeros
from noria.kernels.scoring import HeadShape, Scoring, ScoringKind
from noria.kernels.work import Packing
from noria.step import PAGE_TOKENS
from recorded import Recorder

CPU = torch.device("cpu")
KINDS = sorted(ENCODINGS)
HEADS = [Heads(8, 2, 64, 64), Heads(6, 1, 80, 80), Heads(4, 4, 96, 96), Heads(2, 1, 128, 128), Heads(3, 1, 192, 128)]
HEADS += [Heads(4, 2, 8, 40)]
# Two rows behind a beginning of beginnings, one alone, a chunk in two runs; positions in several sections.
SHARED = ragged(
    [1, 1, 1, 9],
    [1100, 1155, 77, 130],
    [[(0, 1088), (1088, 64)], [(0, 1088), (1152, 128)], [(1280, 128)], [(1472, 64), (1408, 64), (1344, 64)]],
    [1, 1, -1, -1],
    [64, 1088],
    [-1, 0],
)
STEPS = {"mixed": (item_checks.MIXED, item_checks.MIXED_ROWS), "shared": (SHARED, 1536)}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)


@pytest.fixture
def few_programs(monkeypatch):
    monkeypatch.setattr(attend, "packing", lambda _, heads, window=None: Packing(heads.group, 2, 3, window=window))


def both(heads, kind, rows, cache_rows, dtype):
    """Queries, and keys and values as they are decoded before, and coded. Rows that hold no key are of nothing that is a number."""
    queries, *new = item_checks.tensors(heads, int(rows.counts.sum()), cache_rows, dtype, CPU)
    shape, plain, codes = HeadShape(heads.heads, heads.key_heads, heads.dim, heads.width), [], []
    held = ~item_checks.unused_is_nan(rows, new[1])[0].isnan().all(2).all(1)
    for array, its in zip(attend.arrays(shape, ENCODINGS[kind]), new, strict=True):
        whole = RoundedArray(array, zeros(array, cache_rows, CPU).fields)
        for field in whole.fields.values():
            field.view(torch.uint8).fill_(255)
        whole.write(torch.where(held)[0], (its * torch.logspace(-2, 1, cache_rows)[:, None, None].to(dtype))[held])
        plain.append(torch.zeros_like(its))
        whole.decode(torch.arange(cache_rows // 16), plain[-1])
        plain[-1][~held] = 0
        codes.append(whole)
    return queries, plain, codes


def scores_of(number, heads):
    sinks = torch.linspace(-2, 2, heads.heads)
    return [Scoring(0.2), Scoring(0.2, window=150, sinks=sinks), Scoring(0.2, window=70, soft_cap=3.0)][number % 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", range(len(HEADS)))
def test_rows_attend_to_the_bits_of_what_is_decoded_before(kind, step, number):
    heads, (rows, cache_rows) = HEADS[number], STEPS[step]
    for more, dtype in enumerate((torch.float16, torch.float32)):
        queries, plain, codes = both(heads, kind, rows, cache_rows, dtype)
        scores, its_packing = scores_of(number + more, heads), item_checks.packing(heads, [1, 1 << 20][more])
        found, expected = (item_checks.attended(rows, its_packing, queries, *cache, scores) for cache in (codes, plain))
        assert expected.isfinite().all()
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("few_programs")
def test_a_layer_attends_alike_in_either_way_and_by_lists_that_stay(kind):
    spans, array = (
        dense.in_blocks(dense.CASES["everything at once"]),
        attend.arrays(HeadShape(4, 2, 80, 80), ENCODINGS[kind]),
    )
    pages, tokens = dense.most_pages(spans), sum(span.count for span in spans)
    queries, keys, values = dense.tensors(spans, 4, 2, 80, torch.float16, pages=pages)
    rows, found = torch.from_numpy(cache_rows(spans)), []
    for in_tiles in (False, True):
        over = RoundedAttention(items, pages, 2 * 2 * 80 * 2, torch.float16, CPU, in_tiles)
        arrays = {
            one.name: torch.zeros(pages * 16, *one.row, dtype=FIELD_DTYPES[one.computed("")]) for one in stored(array)
        }
        plans = [over.prepare(spans, CPU)]
        assert isinstance(plans[0], RoundedRows) != in_tiles
        if in_tiles:
            plans.append(over.held(CPU))
            plans[1].take(plans[0])
        for plan in plans:
            cache = LayerCache(over, Microbatch(0, tokens, rows, rows, None, plan, None), arrays, array)
            found.append(cache.attend(queries, scale=0.3, window=70, key=keys[rows], value=values[rows]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "window"), [*zip(KINDS, (None, 70, None), strict=True)])
@pytest.mark.usefixtures("few_programs")
def test_a_layer_that_is_replayed_leaves_the_bits_of_one_that_is_queued_anew(kind, window):
    recorder = Recorder()
    found, captures = replays.differences(
        HeadShape(4, 1, 80, 80), ENCODINGS[kind], torch.float16, CPU, recorder, window
    )
    assert not found and recorder.replays == replays.STEPS > captures == recorder.captures


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("few_programs")
def test_the_kind_builds_what_it_launches_and_finds_the_same_bits(kind):
    given = (
        CPU,
        torch.float16,
        HeadShape(6, 2, 80, 16),
        frozenset([ScoringKind(), ScoringKind(7, True, True)]),
        ENCODINGS[kind],
    )
    assert items.refuses_coded.__wrapped__(*given) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
def test_latents_are_decoded_before_and_then_read_once_as_keys_and_values(monkeypatch):
    within, launch = [], attend.attend

    def spy(lists, queries, keys, values, *more):
        within.append(HeadShape.of(queries, keys, values).within)
        return launch(lists, queries, keys, values, *more)

    monkeypatch.setattr(attend, "attend", spy)
    spans = dense.in_blocks(dense.CASES["prompts beside decoding rows"])
    tokens, rows = sum(span.count for span in spans), dense.most_pages(spans) * PAGE_TOKENS
    entry, latent = encoded((Array("latent", (40,), value=32),), "int8"), torch.randn(rows, 40)
    arrays = {one.name: torch.zeros(rows, 1, *one.row, dtype=FIELD_DTYPES[one.computed("")]) for one in stored(entry)}
    its = RoundedArray(entry[0], {name: arrays[one.name] for name, one in entry[0].fields.items()})
    its.write(torch.arange(rows), latent[:, None])
    over, places = RoundedAttention(items, 200, 160, torch.float32, CPU), torch.from_numpy(cache_rows(spans))
    microbatch = Microbatch(0, tokens, torch.arange(tokens), places, None, over.prepare(spans, CPU), None)
    queries, new = torch.randn(tokens, 4, 40), torch.randn(tokens, 40)
    found = LayerCache(over, microbatch, arrays, entry).attend(queries, scale=0.3, values=32, latent=new)
    latent[places] = new
    back = torch.from_numpy(rounded.rounded(latent.double().numpy(), "int8", "key"))[:, None]
    expected = dense.attention(spans, queries.double(), back, back[..., :32], 0.3, None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    assert within and all(within)
