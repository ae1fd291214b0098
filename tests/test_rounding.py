"""A cache in fewer bits: what is rounded, against numpy; which rows are decoded together; attention over them, dense."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import dense
import rounded
from counts import count
from noria import kinds
from noria.arrays import ENCODINGS, Array, encoded, keys_and_values, stored
from noria.attention import sdpa
from noria.attention._ragged import ragged
from noria.encodings import _cached
from noria.encodings._cached import settings_of
from noria.engine.batch import Microbatch, cache_rows
from noria.engine.layer_cache import LayerCache
from noria.engine.parameters import FIELD_DTYPES
from noria.engine.rounding import RoundedArray, RoundedAttention, RoundedRows
from noria.kernels import lists
from noria.kernels.work import Packing
from noria.step import PAGE_TOKENS, Run, Span

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
KINDS = sorted(ENCODINGS)


def opened(kind, array, pages):
    """An encoded array with room for so many pages, full of whatever."""
    (its,) = encoded((array,), ENCODINGS[kind])
    fields = {
        name: torch.full((pages * PAGE_TOKENS, *one.row), 77, dtype=FIELD_DTYPES[one.computed("float64")])
        for name, one in its.fields.items()
    }
    return RoundedArray(its, fields)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 5, 8, 64, 80, 128, 576])
@pytest.mark.parametrize("of", ["key", "value"])
def test_a_row_comes_back_as_the_format_rounds_it(kind, size, of):
    entry = encoded(keys_and_values(2, size), ENCODINGS[kind])
    array = entry[of == "value"]
    fields = {
        name: torch.zeros(48, *one.row, dtype=FIELD_DTYPES[one.computed("")]) for name, one in array.fields.items()
    }
    its, random = RoundedArray(array, fields), torch.Generator().manual_seed(size)
    new = torch.randn(9, 2, size, generator=random, dtype=torch.float64) * 10.0 ** torch.arange(-4, 5)[:, None, None]
    new[3] = 0
    new[4, 0].abs_()
    new[4, 1].abs_().neg_()
    places = torch.tensor([40, 3, 17, 18, 19, 2, 0, 47, 33])
    its.write(places, new)
    found = torch.zeros(48, 2, size, dtype=torch.float64)
    its.decode(torch.tensor([2, 0, 1]), found)
    back = found.view(3, 16, 2, size)[[1, 2, 0]].view(48, 2, size)[places]
    np.testing.assert_allclose(back, rounded.rounded(new.numpy(), kind, of), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [(3, 80), (1, 64), (576,), (2, 7)])
def test_what_a_token_takes_is_what_its_encoding_has(kind, row):
    for array in encoded((Array("key", row), Array("value", row)), ENCODINGS[kind]):
        matrix = (1, *row)[-2:]
        told = kinds.load("encodings", ENCODINGS[kind]).fields(matrix, "bfloat16", settings_of(array))
        found = {name: ((1, *one.row)[-2:], one.computed("float64")) for name, one in array.fields.items()}
        assert found == told
        assert array.nbytes("float32") == sum(one.nbytes("float32") for one in stored((array,)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_none_makes_its_own_group_none_and_no_other(kind, wrong):
    its = opened(kind, Array("key", (2, 128)), 1)
    new = torch.randn(3, 2, 128, dtype=torch.float64)
    new[1, 0, 5] = wrong
    its.write(torch.arange(3), new)
    found = torch.zeros(16, 2, 128, dtype=torch.float64)
    its.decode(torch.tensor([0]), found)
    sick = ~torch.isfinite(found[:3])
    assert sick[1, 0, :64].any() and sick.sum() == sick[1, 0, :64].sum()


def some_spans(random, rows):
    """Rows with runs of pages of their own, some of which begin with the same."""
    shared, page = [Run(0, 8), Run(8, 4)], 12
    spans, first = [], 0
    for _ in range(rows):
        begin = shared[: random.integers(0, 3)]
        runs = [*begin]
        for _ in range(random.integers(1, 3)):
            runs.append(Run(page, 4 * int(random.integers(1, 3))))
            page += runs[-1].count
        before = sum(run.count for run in begin) * PAGE_TOKENS
        length = before + int(random.integers(1, sum(run.count for run in runs) * PAGE_TOKENS - before + 1))
        new = int(random.integers(1, length - before + 1))
        spans.append(Span(first, new, length, tuple(runs)))
        first += new
    return spans, page


class Recording:
    """A kind of attention whose plans are what it was given."""

    def __init__(self, arrays=True):
        if arrays:
            self.of_rows = lambda rows, device: rows

    @staticmethod
    def prepare(spans, device):
        return spans


def test_rows_are_cut_so_that_each_part_finds_room_and_no_page_lies_twice_in_one():
    parts = []
    for case in range(count(400)):
        random = np.random.default_rng(case)
        spans, _ = some_spans(random, 9)
        most = int(random.integers(28, 60))
        over = RoundedAttention(Recording(arrays=False), most, 1, torch.uint8, CPU)
        assert not hasattr(over, "of_rows")
        parts = over.prepare(spans, CPU).of(None)
        rest, first = iter(spans), 0
        for part in parts:
            pages = part.pages.tolist()
            assert len(pages) == len({*pages}) <= most
            assert [one.first for one in part.plan] == list(np.cumsum([0, *(one.count for one in part.plan[:-1])]))
            assert (part.first, part.last) == (first, first := first + sum(one.count for one in part.plan))
            for one, span in zip(part.plan, rest, strict=False):
                assert replace(one, first=0, runs=()) == replace(span, first=0, runs=())
                found = [pages[page] for run in one.runs for page in range(run.start, run.start + run.count)]
                whole = [page for run in span.runs for page in range(run.start, run.start + run.count)]
                assert found == whole[: -(-span.length // PAGE_TOKENS)]
        assert next(rest, None) is None
        # no part could have had a row more
        for part, following in itertools.pairwise(parts):
            own = [(run.start, run.count) for run in following.plan[0].runs]
            more = {page for start, number in own for page in following.pages.tolist()[start : start + number]}
            assert len({*part.pages.tolist()} | more) > most
    assert len(parts) > 1


def test_rows_that_are_arrays_are_cut_as_spans_are():
    for case in range(count(200)):
        random = np.random.default_rng(case)
        spans, _ = some_spans(random, 9)
        most = int(random.integers(28, 60))
        over, plain = (RoundedAttention(Recording(arrays), most, 1, torch.uint8, CPU) for arrays in (True, False))
        both = (its.of(None) for its in (plain.prepare(spans, CPU), over.of_rows(ragged(spans), CPU)))
        for part, other in zip(*both, strict=True):
            assert (part.first, part.last, part.pages.tolist()) == (other.first, other.last, other.pages.tolist())
            rows, whole = ragged(part.plan), other.plan
            assert (rows.counts == whole.counts).all() and (rows.lengths == whole.lengths).all()
            for row, its in enumerate(itertools.pairwise(rows.offsets)):
                held, used = slice(*its), int(its[1] - its[0])  # runs without tokens are left out of spans
                there = slice(whole.offsets[row], whole.offsets[row] + used)
                assert (rows.run_rows[held] == whole.run_rows[there]).all()
                assert (rows.run_positions[held] == whole.run_positions[there]).all()
            lists.make(whole, Packing(2, 2, 8))  # checks them
            shared = [np.append(one.shared, 0)[one.prefixes].tolist() for one in (rows, whole)]
            assert shared[0] == shared[1]


def test_a_kind_that_decodes_in_its_tiles_gets_the_rows_whose_keys_are_read_a_few_times():
    def chunk(count, length, page):
        return Span(0, count, length, (Run(page, 8 * 16),))

    own, held = Recording(), object()
    own.held = held
    over, before = (RoundedAttention(own, 1000, 1, torch.uint8, CPU, in_tiles) for in_tiles in (True, False))
    assert over.held is held and not hasattr(before, "held")  # which graphs need
    many = [chunk(1, 900, page * 128) for page in range(40)]
    for spans, ahead in (
        ([chunk(1, 900, 0)], False),
        ([chunk(96, 1000, 0)], False),
        ([chunk(97, 1000, 0)], True),
        ([chunk(1000, 1000, 0)], True),
        ([*many, chunk(1000, 1000, 40 * 128)], False),
    ):
        rows = ragged(spans)
        for plan in (over.of_rows(rows, CPU), over.prepare(spans, CPU)):
            assert isinstance(plan, RoundedRows) == ahead
        assert isinstance(before.of_rows(rows, CPU), RoundedRows)


def test_what_no_query_sees_is_not_decoded():
    fewer = 0
    for case in range(count(200)):
        random = np.random.default_rng(case)
        spans, _ = some_spans(random, 9)
        window = int(random.integers(1, 90))
        for arrays in (True, False):
            over = RoundedAttention(Recording(arrays), 200, 1, torch.uint8, CPU)
            ((whole,), (part,)) = (over.prepare(spans, CPU).of(seen) for seen in (None, window))
            wanted = set()
            for span in spans:
                first = max(span.length - span.count - window + 1, 0)
                first -= first % (64 if arrays else 16)
                pages = [page for run in span.runs for page in range(run.start, run.start + run.count)]
                wanted |= {*pages[first // 16 : -(-span.length // 16)]}
            assert {*part.pages.tolist()} == wanted  # what is seen from different places on lies there more than once
            fewer += len(part.pages) < len(whole.pages)
    assert fewer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pages", [28, 1000])
@pytest.mark.parametrize("window", [None, 30])
def test_queries_attend_to_rounded_keys_and_values_those_of_their_own_step_too(kind, pages, window):
    spans, num_pages = some_spans(np.random.default_rng(3), 8)
    queries, keys, values = dense.tensors(spans, 4, 2, 80, torch.float64, pages=num_pages)
    tokens, entry = sum(span.count for span in spans), encoded(keys_and_values(2, 80), ENCODINGS[kind])
    arrays = {
        one.name: torch.zeros(num_pages * 16, *one.row, dtype=FIELD_DTYPES[one.computed("")]) for one in stored(entry)
    }
    for array, its in zip(entry, (keys, values), strict=True):
        whole = RoundedArray(array, {name: arrays[one.name] for name, one in array.fields.items()})
        whole.write(torch.arange(num_pages * 16), its)
    over, rows = RoundedAttention(sdpa, pages, 2 * 2 * 80 * 8, torch.float64, CPU), torch.from_numpy(cache_rows(spans))
    microbatch = Microbatch(0, tokens, torch.arange(tokens), rows, None, over.prepare(spans, CPU), None)
    new = torch.randn(2, tokens, 2, 80, dtype=torch.float64)
    cache = LayerCache(over, microbatch, arrays, entry)
    found = cache.attend(queries, scale=0.3, window=window, key=new[0], value=new[1])
    keys[rows], values[rows] = new
    back = [torch.from_numpy(rounded.rounded(its.numpy(), kind, of)) for its, of in ((keys, "key"), (values, "value"))]
    expected = dense.attention(spans, queries, *back, 0.3, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_lie_within_keys_are_rounded_with_them(kind):
    spans, num_pages = some_spans(np.random.default_rng(4), 5)
    tokens, entry = sum(span.count for span in spans), encoded((Array("latent", (96,)),), ENCODINGS[kind])
    latent = torch.randn(num_pages * 16, 96, dtype=torch.float64)
    arrays = {
        one.name: torch.zeros(num_pages * 16, 1, *one.row, dtype=FIELD_DTYPES[one.computed("")])
        for one in stored(entry)
    }
    RoundedArray(entry[0], {name: arrays[one.name] for name, one in entry[0].fields.items()}).write(
        torch.arange(num_pages * 16), latent[:, None]
    )
    over, rows = RoundedAttention(sdpa, 40, 96 * 8, torch.float64, CPU), torch.from_numpy(cache_rows(spans))
    microbatch = Microbatch(0, tokens, torch.arange(tokens), rows, None, over.prepare(spans, CPU), None)
    queries, new = torch.randn(tokens, 4, 96, dtype=torch.float64), torch.randn(tokens, 96, dtype=torch.float64)
    found = LayerCache(over, microbatch, arrays, entry).attend(queries, scale=0.3, values=64, latent=new)
    latent[rows] = new
    back = torch.from_numpy(rounded.rounded(latent.numpy(), kind, "key"))[:, None]
    values = back.clone()
    values[..., 64:] = 0
    expected = dense.attention(spans, queries, back, values, 0.3, None)
    torch.testing.assert_close(found, expected[..., :64], rtol=0, atol=1e-12)


def test_an_encoding_of_a_cache_is_one_of_parameters_too():
    for kind in KINDS:
        (key,) = encoded((Array("key", (1, 128)),), ENCODINGS[kind])
        encoding = kinds.load("encodings", key.encoding)
        fields = {name: its[None] for name, its in encoding.quick(torch.randn(5, 128), settings_of(key)).items()}
        encoding.check(fields, (5, 128), settings_of(key))


def test_kernels_that_cannot_be_there_are_done_without_and_the_reason_is_said_once():
    arrays = encoded(keys_and_values(2, 64), "int8")
    (said,) = _cached.without_kernels([arrays], CPU, torch.bfloat16)
    assert said.startswith("the cache is rounded and decoded by torch") and said.endswith(
        "CUDA device, this is the CPU"
    )
