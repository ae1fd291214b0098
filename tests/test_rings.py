"""Rows whose keys lie in rings attend as over all their keys, however they are cut into steps and whoever computed what they begin with."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dense
from counts import count
from noria.arrays import Array, keys_and_values, ring_of, ringed
from noria.attention import sdpa
from noria.engine.batch import to_device
from noria.engine.kv_cache import Staged, TierPages
from noria.engine.rings import RowsInRings, in_rings, seen, spans_of, stored
from noria.kernels.scoring import Scoring
from noria.model import ModelShape
from noria.step import Run, Span, Step

CPU = torch.device("cpu")
PUT = partial(to_device, device=CPU)
NONE = -1


def plan(rows):
    return sdpa.prepare(spans_of(rows), CPU)


class Layer:
    """A windowed layer of one key head: what its rings hold, and beside it all keys of each row."""

    def __init__(self, window, rings, seed):
        self.window, self.ring, self.draw = window, ring_of(window), np.random.default_rng(seed)
        self.held = {
            name: torch.full((rings * self.ring, 1, 4), torch.nan, dtype=torch.float64) for name in ("key", "value")
        }
        self.written = {name: {} for name in self.held}  # of a ring, all that its row has had

    def step(self, counts, positions, reads, writes):
        """The rows attend, and each query gives what it would over all keys of its row."""
        rows = RowsInRings(*(np.array(one, np.int64) for one in (counts, positions, reads, writes)))
        new = {name: self.random(sum(counts)) for name in self.held}
        queries, scores, at = (
            self.random(sum(counts), 2),
            Scoring(0.7, self.window),
            in_rings(self.window, self.ring, rows, plan, PUT),
        )
        before = {name: array.clone() for name, array in self.held.items()}
        attend = lambda plan, queries, arrays: sdpa.attention(plan, queries, arrays["key"], arrays["value"], scores)  # noqa: E731
        if at.parts:
            found = at.attend(queries, new, self.held, attend)
            again = at.attend(queries, new, self.held, attend)  # memory failed, and the layer is computed again
            torch.testing.assert_close(found, again, rtol=0, atol=0)
            at.keep(new, self.held)
        else:
            for name, array in self.held.items():
                array[at.places] = new[name]
            found = attend(at.plan, queries, self.held)
        every = [self.all_of(row, new, counts, positions, reads, writes) for row in range(len(counts))]
        first = np.cumsum(counts) - counts
        for row, (keys, values) in enumerate(every):
            span = Span(0, counts[row], len(keys), (Run(0, -(-len(keys) // 16)),))
            wanted = dense.attention(
                [span], queries[first[row] : first[row] + counts[row]], keys, values, 0.7, self.window
            )
            torch.testing.assert_close(found[first[row] : first[row] + counts[row]], wanted, rtol=0, atol=1e-12)
        untouched = sorted({*range(len(before["key"]) // self.ring)} - {*writes})
        for ring in untouched:
            rows_of = slice(ring * self.ring, (ring + 1) * self.ring)
            torch.testing.assert_close(
                self.held["key"][rows_of], before["key"][rows_of], rtol=0, atol=0, equal_nan=True
            )

    def all_of(self, row, new, counts, positions, reads, writes):
        first, found = sum(counts[:row]), []
        for name, of_ring in self.written.items():
            old = of_ring[reads[row]][: positions[row]] if positions[row] else new[name][:0]
            of_ring[writes[row]] = torch.cat([old, new[name][first : first + counts[row]]])
            found.append(of_ring[writes[row]])
        return found

    def random(self, count, heads=1):
        return torch.from_numpy(self.draw.standard_normal((count, heads, 4)))


@pytest.mark.slow
@settings(max_examples=count(500), deadline=None)
@given(st.data())
def test_every_query_sees_its_window_however_rows_are_cut_and_whatever_they_begin_with(data):
    window = data.draw(st.sampled_from([1, 9, 63, 64, 65, 100, 128, 130]))
    rings, layer = 6, Layer(window, 6, data.draw(st.integers(0, 99)))
    ends = {}  # of each ring that is written, where its row is
    lengths = st.one_of(st.just(1), st.integers(1, 200), st.integers(150, 400))
    for _ in range(data.draw(st.integers(1, 6))):
        writes = data.draw(st.lists(st.integers(0, rings - 1), min_size=1, max_size=4, unique=True))
        others = [ring for ring in ends if ring not in writes]
        reads = [data.draw(st.sampled_from([NONE, *others, *([ring] if ring in ends else [])])) for ring in writes]
        positions = [ends.get(ring, 0) if ring != NONE else 0 for ring in reads]
        new = [data.draw(lengths) for _ in writes]
        layer.step(new, positions, reads, writes)
        ends |= dict(zip(writes, map(sum, zip(positions, new, strict=True)), strict=True))


def test_a_decoding_row_goes_round_its_ring_many_times():
    layer = Layer(70, 2, 1)
    layer.step([150, 3], [0, 0], [NONE, NONE], [1, 0])
    for number in range(450):
        layer.step([1, 1], [150 + number, 3 + number], [1, 0], [1, 0])


def test_a_ring_holds_whole_blocks_of_keys_and_one_more():
    assert [ring_of(window) for window in (1, 64, 65, 128, 512, 1024, 4096)] == [128, 128, 192, 192, 576, 1088, 4160]


def test_the_runs_of_a_row_begin_at_blocks_of_its_own_keys():
    rows = RowsInRings(*(np.array(one) for one in ([1, 1, 40], [1000, 63, 20], [3, 1, 0], [3, 1, 0])))
    found = seen(rows, 100, 192)
    assert found.offsets.tolist() == [0, 2, 3, 4]
    assert found.run_positions.tolist() == [896, 960, 0, 0] and found.run_keys.tolist() == [64, 64, 64, 64]
    assert found.run_rows.tolist() == [3 * 192 + 128, 3 * 192, 192, 0]


def test_layers_that_others_read_and_what_is_encoded_keep_all():
    whole, windowed = keys_and_values(2, 8), keys_and_values(2, 8, 100)
    encoded = tuple(Array(name, (2, 8), window=100, encoding="int8") for name in ("key", "value"))
    state = Array("state", (4,), "sequence")
    cache = ringed((windowed, whole, windowed, 2, (*windowed, state), encoded))
    assert [[array.ring for array in entry] for entry in (*cache[:3], *cache[4:])] == [
        [192, 192], [0, 0], [0, 0], [192, 192, 0], [0, 0],
    ]  # fmt: skip
    assert cache[3] == 2


def test_a_ring_is_counted_as_what_a_sequence_leaves():
    (key, value), (whole, _) = ringed((keys_and_values(2, 8, 100),))[0], keys_and_values(2, 8)
    assert (key.kept, value.kept, whole.kept) == ("sequence", "sequence", "token")
    assert key.nbytes("bfloat16") == 192 * 2 * 8 * 2 and whole.nbytes("bfloat16") == 2 * 8 * 2


@pytest.mark.parametrize("window", [9, 64, 1000])
def test_a_ring_takes_no_more_than_a_block_beside_its_window(window):
    assert window + 64 <= ring_of(window) < window + 128


def test_of_a_ring_that_is_staged_new_tokens_alone_are_stored_but_all_of_what_a_chunk_wrote():
    shape = ModelShape("llama", 1, 8, 2, 2, 8, 32, 512, False, cache=(keys_and_values(2, 8, 100),)).with_rings()
    step = Step(0, 0, slots=np.arange(4), counts=np.array([1, 7, 1, 1]), positions=np.array([400, 0, 300, 5]))
    step = replace(step, reads=np.array([11, -1, 13, 14]), writes=np.array([11, 12, 16, 14]), kept=step.counts)
    staged = Staged(TierPages(0, 0, None, (), (), 10, 9), 0, {}, {})
    found = stored(shape, step, 0, 4, staged).ring_stores[100]
    assert found == [
        (192 + 400 % 192, 400 % 192, 1),
        (2 * 192, 192, 192),
        (6 * 192, 2 * 192, 192),
        (4 * 192 + 5, 3 * 192 + 5, 1),
    ]
    assert stored(shape, step, 0, 4, None) is None
