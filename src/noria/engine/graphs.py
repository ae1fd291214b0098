"""Decode-only steps of layers that stay on the device, as graphs: what the host queued once is queued again by one call.

A step is padded to one of a few numbers of rows; what it differs by lies in memory that is fixed for the run. A graph is
captured when its size has come before, not ahead of the run: which sizes come, and which launches attention's lists need,
the rows decide. What it captures is one function, which is also what runs first to warm it up.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from noria import kinds
from noria.attention import HeldPlan
from noria.blocks import layer_name
from noria.engine import states
from noria.engine.batch import Microbatch, Network
from noria.engine.capturing import capturer_of
from noria.engine.kv_cache import KvCache
from noria.engine.layer_cache import LayerCache
from noria.engine.layers import Layers
from noria.engine.padding import Padded
from noria.engine.rings import RingRows
from noria.engine.timing import Meters
from noria.engine.weights import Weights
from noria.limits import padded_rows
from noria.ring.messages import Arrays
from noria.streams import Streams
from noria.tools.text import nbytes_words, plural

FEW = 64  # rows cost what fewer do: what reading weights costs
SEEN = 1  # times that a size but the first must have come before it is captured: what comes once may never come again
# The same where a larger graph serves, of so many times the rows of the step or of FEW: what it takes longer in so many steps is
# what a capture takes. Without a graph a step takes the host longer than most larger ones take the device, and a size that is
# new has kernels to be loaded: where rows end one after another, steps come once each.
SERVED = {2: 32, 8: 8}


@dataclass
class Graph:
    """One size of one visit: where what its steps differ by lies, and what computes them."""

    numbers: torch.Tensor  # as Padded.numbers
    hidden: Arrays
    lists: dict[int, HeldPlan]  # as Padded.plans
    after: Arrays | None = None
    replay: Callable[[], None] | None = None
    holds: Padded | None = None  # the step whose numbers and lists it has
    outgrown: bool = False  # these have other memory than what was captured: it is to be captured anew


def refused(kind: Any, weights: Weights, layers: Iterable[int], streams: Streams) -> str:
    """Why no steps through these layers are captured, with this kind of attention; empty where they are."""
    if capturer_of(streams) is None:
        return "the device has none"
    if not hasattr(kind, "held"):
        return (
            f"attention {kinds.name_of(kind)} has none"
            if isinstance(kind, ModuleType)
            else "the cache is decoded before attention"
        )
    return "" if weights.stay(map(layer_name, layers)) else "weights are loaded in each step"


class Graphs:
    """The graphs of one rank. Where one cannot be captured there are none from then on, and `say` tells why."""

    def __init__(
        self,
        network: Network,
        dtype: torch.dtype,
        weights: Weights,
        cache: KvCache,
        streams: Streams,
        meters: Meters,
    ):
        self._network, self._dtype, self._layers = network, dtype, Layers(network)
        self._weights, self._cache, self._device, self._say = weights, cache, streams.device, meters.say
        self._gauge, self._trace = meters.gauge, meters.trace
        self._capturer = capturer_of(streams)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._came: Counter[int] = Counter()  # how many steps of a size
        self._seconds, self._captured, self._replayed, self._plain = 0.0, 0, 0, 0
        self.off = False

    def size_of(self, rows: int) -> int:
        """The size to which a step of so many rows is padded: of the next larger graph, until its own has been captured."""
        own = padded_rows(rows)
        self._came[own] += 1
        larger = min((size for _, size in self._graphs if size >= own), default=own)
        near = (most for times, most in SERVED.items() if larger <= times * max(own, FEW))
        return larger if self._came[own] <= next(near, 0) else own

    def expect(self, padded: Padded, layers: range) -> None:
        """Queues what can be queued for a visit before its hidden states are there: for these most ranks wait, and one copy and
        one call are left when they come."""
        graph = self._graphs.get((layers.start, padded.size))
        if graph is not None:
            self._try(padded, lambda: self._fill(graph, padded))

    def forward(self, padded: Padded, layers: range, hidden: Arrays, at: tuple[int, int, int]) -> Arrays | None:
        """What these layers make of hidden states in a visit (round, lap, group), valid until the next one; None: the step is
        to go another way."""
        began, captured = time.perf_counter(), self._captured
        graph = self._ready(padded, layers, hidden)
        if graph is None:
            return None
        assert graph.replay is not None and graph.after is not None
        begin, mark = self._trace.mark(), self._gauge.mark()
        graph.replay()
        self._weights.forget()
        self._plain, self._replayed = self._plain - 1, self._replayed + 1
        if self._captured == captured:
            self._gauge.took("launches", time.perf_counter() - began)
        self._gauge.computed(mark)
        self._trace.compute("graph", begin, *at, layers.start)
        return tuple(array[: padded.tokens] for array in graph.after)

    def _ready(self, padded: Padded, layers: range, hidden: Arrays) -> Graph | None:
        """The graph of these layers for a step, with all that the step differs by where it finds it; None: there is none."""
        self._plain += 1
        name = layers.start, padded.size
        is_new = bool(self._graphs) and name not in self._graphs
        if self.off or (is_new and self._came[padded.size] <= SEEN):
            return None
        return self._graphs[name] if self._try(padded, lambda: self._put(padded, layers, hidden)) else None

    def _put(self, padded: Padded, layers: range, hidden: Arrays) -> None:
        name = layers.start, padded.size
        graph = self._graphs.get(name) or self._graphs.setdefault(name, self._begun(padded, hidden))
        for held, array in zip(graph.hidden, hidden, strict=True):
            held[: len(array)].copy_(array)
        self._fill(graph, padded)
        if graph.outgrown or graph.replay is None:
            self._capture(graph, padded, layers)
        graph.holds = None  # its memory may be another step's from now on

    def _fill(self, graph: Graph, padded: Padded) -> None:
        """What the step differs by, but for hidden states, goes where the graph finds it."""
        if graph.holds is not padded:
            took = [lists.take(padded.plans[window]) for window, lists in graph.lists.items()]
            graph.outgrown |= not all(took)
            graph.numbers.copy_(padded.numbers)
            graph.holds = padded

    def _try(self, padded: Padded, do: Callable[[], None]) -> bool:
        """Whether it could be done. If not there are no more graphs, and steps go the other way: whatever torch, Triton and the
        driver raise."""
        try:
            do()
            return True
        except Exception as error:  # noqa: BLE001
            words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._say(f"no more graphs: {plural(padded.size, 'row')} could not be captured: {words}")
            self.off = True
            self._graphs.clear()
            return False

    def words(self) -> list[str]:
        """What was done, for people; nothing where there was nothing to do."""
        if self._capturer is None or not self._plain + self._replayed:
            return []
        how = f"{plural(self._captured, 'graph')} captured in {self._seconds:.1f} s"
        memory = nbytes_words(self._capturer.nbytes)
        return [f"graphs: {self._replayed} of {self._replayed + self._plain} decode visits; {how}, {memory}"]

    def _begun(self, padded: Padded, hidden: Arrays) -> Graph:
        """Memory for a size. What rows that pad it hold is zeros, or what other steps left."""
        its_hidden = tuple(array.new_zeros(padded.size, *array.shape[1:]) for array in hidden)
        lists = {window: self._network.attention.held(self._device) for window in padded.plans}
        return Graph(torch.empty_like(padded.numbers), its_hidden, lists)

    def _capture(self, graph: Graph, padded: Padded, layers: range) -> None:
        began = time.perf_counter()
        graph.numbers.copy_(padded.aside)
        assert self._capturer is not None
        graph.replay = self._capturer.capture(lambda: self._compute(graph, padded, layers))
        graph.numbers.copy_(padded.numbers)
        graph.outgrown = False
        self._captured += 1
        self._seconds += time.perf_counter() - began

    def _compute(self, graph: Graph, padded: Padded, layers: range) -> None:
        """The layers, from `hidden` to `after`: nothing here depends on what a step is, but for its size.

        Encoded weights are decoded here too, each time: those that so many rows do not take as they are stored.
        """
        self._weights.forget()
        its, part = self._microbatch(graph, padded), graph.hidden
        for layer in layers:
            part = self._layer(layer, its, part)
        if graph.after is None:
            graph.after = tuple(torch.empty_like(array) for array in part)
        for held, array in zip(graph.after, part, strict=True):
            held.copy_(array)

    def _microbatch(self, graph: Graph, padded: Padded) -> Microbatch:
        size, network = padded.size, self._network
        sizes = [size] * 2 + ([size + 1] + [size] * 3) * padded.has_states
        positions, rows, *of_states = graph.numbers.split(sizes)
        positional = network.model.positional(network.shape, positions, self._dtype)
        its_states = states.on_device(of_states)
        rings = {
            window: RingRows(its_states.writes * ring + positions % ring, graph.lists[window])
            for window, ring in network.shape.rings.items()
            if its_states is not None
        }
        return Microbatch(0, size, positions, rows, positional, graph.lists[0], None, its_states, rings)

    def _layer(self, layer: int, its: Microbatch, part: Arrays) -> Arrays:
        parameters, entry = self._weights.wait(layer_name(layer)), self._layers.entry(layer)
        cache = LayerCache(self._network.attention, its, self._cache.layer(layer), *entry)
        after = self._layers.layer(layer, parameters, part, its, cache)
        cache.commit()
        return after
