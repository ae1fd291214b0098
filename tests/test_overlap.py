"""How long rounds take whose weights and cache share a link, by a clock: how long computing waits for copies, and that it does."""

from types import SimpleNamespace

import pytest
import torch

from clocked_streams import ClockedStreams
from noria import kinds
from noria.arrays import Layout
from noria.blocks import lay_out, layer_name
from noria.engine.activations import OnDevice
from noria.engine.batch import Network
from noria.engine.cycle import Cycle
from noria.engine.kv_cache import KvCache, Staged, Staging, TierPages
from noria.engine.sampler import Sampler
from noria.engine.stage import Moved, Stage
from noria.engine.timing import Meters, Traffic
from noria.engine.trace import OFF
from noria.engine.weights import Home, Placed, Weights
from noria.model import ModelShape
from noria.ring.messages import Hidden
from noria.rows.spreading import spread
from noria.step import PAGE_TOKENS
from noria.tiers.cpu import Cpu

CPU, LAYERS, SLOTS, NEW = torch.device("cpu"), 8, 3, 16
SHAPE = ModelShape("llama", LAYERS, 8, 2, 1, 4, 10, 64, False)
ROW = 2 * 4 * 4  # bytes of a token's key and value
MB = 400  # bytes that stand for so many
RATE = 55 * MB  # bytes a ms: 55 GB/s
ROUNDS = 3


class Rank:
    """A stage of some layers, of which the first `streamed` come from CPU memory, `block` MB each, and so does the cache.

    microbatches: of each the MB that it loads in a layer, and the ms that it computes there.
    """

    def __init__(self, schedule, block, microbatches, streamed=LAYERS):
        self.streams, self.link = ClockedStreams(CPU, RATE), ("host_to_gpu",)
        self.old = [loads * MB // ROW for loads, _ in microbatches]
        parts = [{"first": number, "last": number + 1, "rings": {}} for number in range(len(microbatches))]
        its = [SimpleNamespace(**part, positional=(part["first"], microbatches[part["first"]][1])) for part in parts]
        self.batch = SimpleNamespace(microbatches=its, padded=None)
        moved = Moved(self._weights(block, streamed), self._cache(), OnDevice())
        network = Network(SimpleNamespace(layer=self._layer), None, SHAPE)
        batches, meters = SimpleNamespace(dtype=torch.float32), Meters(Traffic(), OFF, print)
        schedule = kinds.load("schedules", schedule)
        self.stage = Stage(network, batches, moved, Sampler(CPU), schedule, self.streams, meters)

    def _weights(self, block, streamed):
        """The numbers of a layer's block are all the layer's number + 1."""
        layout = lay_out("any", {"weight": (block * MB // 4,)}, "float32")
        memory = Cpu(LAYERS * layout.nbytes, self.streams)
        held, homes = memory.memory.view(torch.float32).view(LAYERS, -1), {}
        for layer in range(LAYERS):
            held[layer] = layer + 1
            homes[layer_name(layer)] = Home(layout, memory, layer * layout.nbytes, self.link)
        names = [*homes]
        stay = {name: {"weight": held[layer]} for layer, name in enumerate(names) if layer >= streamed}
        homes = {name: homes[name] for name in names[:streamed]}
        return Weights(Placed(stay, homes), Cycle([names[:streamed]], 1, SLOTS) if homes else None, self.streams)

    def _cache(self):
        """What a microbatch has in a layer is all one number, of both; new rows come behind."""
        pages = [-(-(old + NEW) // PAGE_TOKENS) for old in self.old]
        layout = Layout({layer: SHAPE.arrays(layer) for layer in range(LAYERS)}, "float32", sum(pages))
        tier = Cpu(layout.nbytes, self.streams)
        self.kept = tier.memory.view(torch.float32).zero_().view(LAYERS, 2, -1, 4)
        held, first = TierPages(0, sum(pages), tier, self.link, ("gpu_to_host",)), 0
        for number, (m, old) in enumerate(zip(self.batch.microbatches, self.old, strict=True)):
            loads, stores = [(first, 0, old)] * (old > 0), [(first + old, old, NEW)]
            m.staged = Staged(held, pages[number], {"token": loads}, {"token": stores})
            for layer in range(LAYERS):
                self.kept[layer, :, first : first + old] = _number(layer, number)
            first += pages[number] * PAGE_TOKENS
        staging = Staging((held,), SLOTS, max(pages))
        return KvCache(SHAPE, list(range(LAYERS)), (0, 0), "float32", self.streams, staging)

    def _layer(self, shape, layer, parameters, hidden, positional, cache):
        (number, ms), weight = positional, parameters["weight"]
        arrays, old = [*cache._arrays.values()], self.old[number]

        def holds():
            assert (weight == layer + 1).all(), f"weights of layer {layer} for microbatch {number}"
            assert all((array[:old] == _number(layer, number)).all() for array in arrays), f"cache of {layer}, {number}"

        def write():
            for array in arrays:
                array[old : old + NEW] = _number(layer, number)

        self.streams.compute(ms, holds, write)
        return hidden.clone()

    def round_ms(self):
        """Of a round in the middle of a run, in which everything was where it was read, and was kept."""
        ends, hidden = [], Hidden((torch.zeros(len(self.old), 8),))
        for round in range(ROUNDS):
            self.stage.begin(round, 0, 0, len(self.old))
            self.stage.forward(self.batch, range(LAYERS), hidden)
            ends.append(self.streams.now)
        self.streams.check()
        first = 0
        for number, m in enumerate(self.batch.microbatches):
            rows = self.kept[:, :, first : first + self.old[number] + NEW]
            assert all((rows[layer] == _number(layer, number)).all() for layer in range(LAYERS))
            first += m.staged.num_pages * PAGE_TOKENS
        return ends[-1] - ends[-2]


def _number(layer, microbatch):
    return layer * 100 + microbatch + 1


# The case of a prefill beside rows that decode: these four microbatches load their cache, six of chunks load nothing.
BLOCK, DECODING, CHUNKS = 436, (200, 0.6), (0, 4.0)  # MB, (MB, ms)
MIXED = [DECODING] * 4 + [CHUNKS] * 6
WEIGHT, CACHE = BLOCK * MB / RATE, DECODING[0] * MB / RATE  # ms on the link


def milliseconds(microbatches, schedule="multi_batch", streamed=LAYERS):
    """Of a round, those of them in which the link is busy, and those in which layers compute."""
    rank = Rank(schedule, BLOCK, microbatches, streamed)
    loads, computed = (LAYERS * sum(column) for column in zip(*microbatches, strict=True))
    return rank.round_ms(), (loads + streamed * BLOCK) * MB / RATE, computed


def test_weights_load_while_chunks_are_computed_that_load_nothing():
    """In one piece behind the last layer they stood before the caches of the second to the last decoding microbatch: 351 ms a
    round, where these caches, computing and a block at the end of the visit take 307."""
    found, _, computed = milliseconds(MIXED)
    assert found < computed + LAYERS * 3 * CACHE + WEIGHT
    half, _, _ = milliseconds(MIXED, streamed=LAYERS // 2)
    alone, _, _ = milliseconds(MIXED, streamed=0)
    assert half == pytest.approx(alone, rel=0.01), "the weights of half of the layers cost nothing beside that cache"


def test_weights_load_in_parts_where_every_microbatch_loads_something():
    """As hidden states in CPU memory, or earlier tokens of long prompts: the second microbatch of a layer waits for no block."""
    found, linked, computed = milliseconds([(30, 1.8)] * 7)
    assert computed > linked and found < computed + 2 * WEIGHT


@pytest.mark.parametrize("streamed", [0, LAYERS // 2, LAYERS])
@pytest.mark.parametrize("chunks", [4, 6, 8])
def test_what_chunks_compute_hides_the_caches_of_rows_that_decode_where_both_take_turns(chunks, streamed):
    """With those that decode one after another a round took 275 ms with six chunks, 1.3 times as long as computing."""
    mixed = [DECODING] * 4 + [CHUNKS] * chunks
    order = spread([load for load, _ in mixed])
    found, linked, computed = milliseconds([mixed[number] for number in order], streamed=streamed)
    assert found < 1.15 * max(linked, computed)


@pytest.mark.parametrize("schedule", ["single_batch", "multi_batch"])
@pytest.mark.parametrize("computing", [0.1, 1.2])
def test_weights_alone_take_as_long_as_the_link_or_computing(schedule, computing):
    found, linked, computed = milliseconds([(0, computing)] * 8, schedule)
    assert found == pytest.approx(max(linked, computed), rel=0.02)


@pytest.mark.parametrize("streamed", [0, LAYERS // 2, LAYERS])
def test_rows_that_decode_take_as_long_as_the_link(streamed):
    found, linked, _ = milliseconds([DECODING] * 5, streamed=streamed)
    assert found == pytest.approx(linked, rel=0.02)


def test_without_overlap_times_add_up():
    found, linked, computed = milliseconds(MIXED, "sequential")
    assert found == pytest.approx(linked + computed, rel=0.02)
