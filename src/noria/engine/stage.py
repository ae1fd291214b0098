"""What one rank computes: the layers of its virtual stages for the microbatches of a step.

Knows the model, its weights and its cache; nothing of the ring, of rounds or of other ranks.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch

from noria import blocks
from noria.borders import largest, refined, rest_refined
from noria.engine.activations import InHost, OnDevice
from noria.engine.batch import Batch, Batches, Network, fed, positions_of
from noria.engine.graphs import Graphs
from noria.engine.kv_cache import KvCache
from noria.engine.layer_cache import LayerCache
from noria.engine.layers import Layers
from noria.engine.logits import Logits
from noria.engine.sampler import Sampler
from noria.engine.shortage import give_back, is_shortage
from noria.engine.timing import Meters
from noria.engine.weights import Weights
from noria.masks import Masks
from noria.ring.messages import Answer, Arrays, Hidden
from noria.schedules import Actions, Cell, resumed
from noria.step import Result, Step
from noria.streams import Streams
from noria.tools.text import nbytes_words

SAID_NBYTES = 1 << 30  # of page-locked memory: what takes time to give back


@dataclass(frozen=True)
class Moved:
    """What a visit loads and stores: weights, the cache, and hidden states between layers."""

    weights: Weights
    cache: KvCache
    activations: OnDevice | InHost


class Stage:
    """The layers of this rank. `schedule` is a module of schedules/.

    Where memory does not suffice for a microbatch, this rank cuts its steps finer from then on, and says so.
    """

    def __init__(
        self,
        network: Network,
        batches: Batches,
        moved: Moved,
        sampler: Sampler,
        schedule: ModuleType,
        streams: Streams,
        meters: Meters,
    ):
        self._layers, self._attention = Layers(network), network.attention
        self._batches, self._sampler = batches, sampler
        self._weights, self._cache, self._activations = moved.weights, moved.cache, moved.activations
        self._schedule, self._streams, self._device = schedule.schedule, streams, streams.device
        self._trace, self._gauge, self._say = meters.trace, meters.gauge, meters.say
        self._at = 0, 0, 0  # the round, lap and group of the visit
        self._drawn = sampler.nothing.token_ids  # [S] what was sampled last, on the device
        self._most_tokens: int | None = None  # of a microbatch, where memory has been short
        self._logits = Logits(self._head, self._device, self._say)
        self._graphs = Graphs(network, batches.dtype, moved.weights, moved.cache, streams, meters)
        batches.size_of = self._graphs.size_of

    @property
    def feeds(self) -> bool:
        """Whether a step may take tokens that are known on the device alone: it gathers their hidden states, beside the host."""
        gathers = (
            isinstance(self._activations, OnDevice) and self._weights.wait("embed")["tokens"].device == self._device
        )
        return self._device.type == "cuda" and gathers

    def begin(self, round: int, lap: int, group: int, tokens: int) -> None:
        """A visit of a step of so many tokens begins, or is passed over because the group has nothing to compute."""
        self._at = round, lap, group
        self._weights.begin(round, lap, group, tokens)

    def close(self) -> None:
        """Lets go of the tiers, when nothing is to be computed any more; says how long that took where they were large."""
        began = time.perf_counter()
        for line in self._graphs.words():
            self._say(line)
        nbytes = self._weights.close() + self._cache.close()
        self._activations.close()
        if nbytes >= SAID_NBYTES:
            seconds = time.perf_counter() - began
            self._say(f"gave {nbytes_words(nbytes)} of page-locked memory back in {seconds:.1f} s")

    def prepare(self, step: Step) -> Batch:
        """Takes over the step's changes of slots and puts its arrays on the device."""
        self._sampler.apply(step)
        needed = self._activations.needed(step.sample_rows, step.score_rows)
        borders = refined(step.borders.tolist(), step.counts.tolist(), self._most_tokens)
        batch = self._batches.make(step, borders, needed)
        batch.token_ids = fed(batch.token_ids, self._drawn) if step.awaits else batch.token_ids
        return batch

    def embed(self, batch: Batch) -> Hidden:
        """The hidden states of the step's tokens, gathered where the table lives; in CPU memory, how to gather them."""
        on_device = self._weights.wait("embed")["tokens"].device == self._device
        if isinstance(self._activations, InHost):
            return Hidden(gather=lambda first, last: self._gather(batch, slice(first, last)), in_host=not on_device)
        arrays = self._gather(batch, slice(None))
        return Hidden(tuple(array.to(self._device, non_blocking=True) for array in arrays))

    def _gather(self, batch: Batch, tokens: slice) -> Arrays:
        """Hidden states of these tokens, on the device or in page-locked host memory: where the table lives."""
        parameters, step = self._weights.wait("embed"), batch.step
        if parameters["tokens"].device == self._device:
            return self._layers.embed(parameters, batch.token_ids[tokens], batch.positions[tokens])
        arrays = (array[tokens].astype(np.int64) for array in (step.token_ids, positions_of(step)))
        ids, positions = map(torch.from_numpy, arrays)
        return tuple(array.pin_memory() for array in self._layers.embed(parameters, ids, positions))

    def expect(self, batch: Batch, layers: range) -> None:
        """Does what can be done for these layers before the step's hidden states are there."""
        if batch.padded is not None:
            self._graphs.expect(batch.padded, layers)

    def forward(self, batch: Batch, layers: range, hidden: Hidden, output: Arrays | None = None) -> Hidden:
        """The step after these layers; each layer's weights serve all microbatches of the step.

        Where hidden states are in CPU memory it comes in `output`; without one, what the head needs of it stays on the
        device.
        """
        if batch.padded is not None:
            arrays = self._graphs.forward(batch.padded, layers, hidden.arrays, self._at)
            if arrays is not None:
                return Hidden(arrays)
            if not batch.microbatches:
                self._batches.cut(batch, batch.borders)
            self._batches.pads = not self._graphs.off
        self._activations.begin(batch, layers, hidden, output)
        first: Cell | None = (0, 0)
        while first is not None:
            first = self._pass(batch, layers, first)
        return self._activations.end()

    def _pass(self, batch: Batch, layers: range, first: Cell) -> Cell | None:
        """Goes through the layers from cell `first` on as the schedule says.

        Where memory does not suffice for a cell, the microbatches from there on are cut finer, and the cell is returned:
        it is where to go on, and what is done is not done again.
        """
        microbatches = len(batch.microbatches)
        for actions in resumed(self._schedule(len(layers), microbatches, self._loads(batch)), first):
            self._move(batch, layers, actions)
            if actions.compute is None:
                continue
            layer, microbatch = actions.compute
            part = self._compute(batch, layers[layer], microbatch, self._activations.take(layer, microbatch))
            if part is None:
                self._cache.drop()
                self._cut_finer(batch, microbatch)
                return actions.compute
            self._activations.put(layer, microbatch, part)
            self._store(batch, layers, [cell for cell in actions.store_cache if cell == actions.compute])
            if microbatch == microbatches - 1:
                self._weights.done(blocks.layer_name(layers[layer]))
        self._weights.load()
        return None

    def _loads(self, batch: Batch) -> list[float]:
        """Bytes that each microbatch loads in a layer beside streamed weights, as parts of their largest block."""
        largest = self._weights.largest
        if not largest:
            return []
        cache, activations = self._cache.load_nbytes, self._activations.load_nbytes
        return [(cache(m.staged) + activations(m)) / largest for m in batch.microbatches]

    def _move(self, batch: Batch, layers: range, actions: Actions) -> None:
        """Sends the loads and stores of a row of the schedule on their way."""
        self._store(batch, layers, [cell for cell in actions.store_cache if cell != actions.compute])
        if (ahead := actions.load_weight) is not None:
            self._weights.load(blocks.layer_name(layers[ahead]) if ahead < len(layers) else None, actions.share)
        after = [self._streams.event()] if actions.waits and actions.load_cache else ()
        for layer, microbatch in actions.load_cache:
            self._activations.load(layer, microbatch, after)
            self._cache.load(layers[layer], microbatch, batch.microbatches[microbatch].staged, after)

    def _store(self, batch: Batch, layers: range, cells: Iterable[Cell]) -> None:
        for layer, microbatch in cells:
            self._activations.store(layer, microbatch)
            self._cache.store(layers[layer], microbatch, batch.microbatches[microbatch].staged)

    def _compute(self, batch: Batch, layer: int, microbatch: int, part: Arrays) -> Arrays | None:
        """A microbatch's part after a layer; None if memory did not suffice."""
        parameters, its = self._weights.wait(blocks.layer_name(layer)), batch.microbatches[microbatch]
        arrays = self._cache.tensors(layer, microbatch, its.staged)
        cache = LayerCache(self._attention, its, arrays, *self._layers.entry(layer))
        begin, mark, began = self._trace.mark(), self._gauge.mark(), time.perf_counter()
        try:
            after = self._layers.layer(layer, parameters, part, its, cache)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            counts = batch.step.counts.tolist()
            if rest_refined(batch.borders, counts, microbatch) == batch.borders:
                self._say(
                    "out of memory with a row in each microbatch,"
                    f" {largest(batch.borders[microbatch:], counts)} tokens at most: lower"
                    " pipeline.microbatch_tokens, which also limits the pieces of a prompt, or placement.gpu_memory"
                )
                raise
            return None
        cache.commit()  # outside of what is tried again: it is done once
        self._gauge.took("launches", time.perf_counter() - began)
        self._gauge.computed(mark)
        self._trace.compute("layer", begin, *self._at, layer, microbatch)
        return after

    def _cut_finer(self, batch: Batch, failed: int) -> None:
        """Cuts the microbatches of the step finer, from the one on that memory did not hold."""
        old, counts, borders = batch.microbatches, batch.step.counts.tolist(), batch.borders
        self._batches.cut(batch, rest_refined(borders, counts, failed), failed)
        most = largest(batch.borders[failed:], counts)
        self._most_tokens = min(self._most_tokens or most, most)
        self._say(
            f"out of memory with {largest(borders[failed : failed + 2], counts)} tokens in a microbatch: this rank"
            f" continues with {len(batch.microbatches) - failed} microbatches of at most {most} tokens"
            " (lower pipeline.microbatch_tokens to start like that)"
        )
        give_back(self._device)
        self._activations.cut(old, batch.microbatches, failed)

    def sample(self, batch: Batch, hidden: Hidden, masks: Masks | None = None) -> Answer:
        """The step's result, for all of the step's hidden states or what is needed of them.

        Logits are computed for sampled rows, and for prompts whose tokens are scored, alone. `masks`: of the step's samples.
        """
        step, sampler = batch.step, self._sampler
        self._weights.wait("head")  # also where no row is sampled: it is in the cycle of loads
        sampler.count(step)
        top, positions = sampler.top(step.sample_slots), positions_of(step)[step.sample_rows] + 1

        def draw(chunk: slice, logits: torch.Tensor) -> Result:
            begin, mark = self._trace.mark(), self._gauge.mark()
            its = None if masks is None else masks.within(chunk.start, chunk.stop)
            drawn = sampler.sample(logits, step.sample_slots[chunk], step.uniforms[chunk], positions[chunk], top, its)
            self._gauge.computed(mark)
            self._trace.compute("sample", begin, *self._at)
            return drawn

        pieces = self._logits.of(hidden.arrays, batch.sample_rows, draw) or [sampler.nothing]
        score = lambda chunk, logits: sampler.score(logits, batch.score_ids[chunk])  # noqa: E731
        scores = self._logits.of(hidden.arrays, batch.score_rows, score)
        self._weights.done("head")
        self._weights.load()
        result = pieces[0] if len(pieces) == 1 else Result.joined(pieces, torch.cat)
        result = replace(result, prompt_logprobs=torch.cat(scores)) if scores else result
        self._drawn = result.token_ids
        return Answer(result.map(_to_host), self._streams.event())

    def _head(self, hidden: Arrays) -> torch.Tensor:
        """Logits [_, V] of hidden states, all of them."""
        parameters, begin, mark = self._weights.wait("head"), self._trace.mark(), self._gauge.mark()
        logits = self._layers.head(parameters, hidden)
        self._gauge.computed(mark)
        self._trace.compute("head", begin, *self._at)
        return logits


def _to_host(values: torch.Tensor) -> np.ndarray:
    """A copy in host memory, complete when an event recorded now is."""
    if values.device.type == "cpu" or not values.numel():
        return values.cpu().numpy()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True).numpy()
