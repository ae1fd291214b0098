"""What one rank computes: the layers of its virtual stages for the microbatches of a step.

Knows the model, its weights and its cache; nothing of the ring, of rounds or of other ranks.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch

from noria import blocks
from noria.borders import halved, largest, refined
from noria.engine.activations import Embedding, InHost, OnDevice
from noria.engine.batch import Batch, Batches, Network, positions_of
from noria.engine.kv_cache import KvCache
from noria.engine.layer_cache import LayerCache
from noria.engine.sampler import Sampler
from noria.engine.shortage import is_shortage
from noria.engine.timing import Meters
from noria.engine.weights import Weights
from noria.limits import LOGITS_ROWS
from noria.masks import Masks
from noria.schedules import Actions, Cell
from noria.step import Result, Step
from noria.streams import Event, Streams
from noria.tools.text import nbytes_words

T = TypeVar("T")
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
        self._model, self._attention, self._shape = network.model, network.attention, network.shape
        self._batches, self._sampler = batches, sampler
        self._weights, self._cache, self._activations = moved.weights, moved.cache, moved.activations
        self._schedule, self._streams, self._device = schedule.schedule, streams, streams.device
        self._trace, self._say = meters.trace, meters.say
        self._at = (0, 0, 0)  # the round, lap and group of the visit
        self._most_tokens: int | None = None  # of a microbatch, where memory has been short
        self._logits_rows = LOGITS_ROWS

    def begin(self, round: int, lap: int, group: int, empty: bool) -> None:
        """A visit begins, or is passed over because the group has nothing to compute."""
        self._at = round, lap, group
        self._weights.begin(round, lap, group, empty)

    def close(self) -> None:
        """Lets go of the tiers, when nothing is to be computed any more; says how long that took where they were large."""
        began = time.perf_counter()
        nbytes = self._weights.close() + self._cache.close()
        self._activations.close()
        if nbytes >= SAID_NBYTES:
            seconds = time.perf_counter() - began
            self._say(f"gave {nbytes_words(nbytes)} of page-locked memory back in {seconds:.1f} s")

    @property
    def stored(self) -> Event | None:
        """The event after which what `forward` returned last is in host memory; None where it is on the device."""
        return self._activations.stored

    def prepare(self, step: Step) -> Batch:
        """Takes over the step's changes of slots and puts its arrays on the device."""
        self._sampler.apply(step)
        needed = self._activations.needed(step.sample_rows, step.score_rows)
        return self._batches.make(step, refined(step.borders.tolist(), step.counts.tolist(), self._most_tokens), needed)

    def embed(self, batch: Batch) -> torch.Tensor | Embedding:
        """[T, E] hidden states of the step's tokens, gathered where the table lives; in CPU memory, how to gather them."""
        on_device = self._weights.wait("embed")["tokens"].device == self._device
        if isinstance(self._activations, InHost):
            return Embedding(lambda first, last: self._gather(batch, slice(first, last)), not on_device)
        hidden = self._gather(batch, slice(None))
        return hidden if on_device else hidden.to(self._device, non_blocking=True)

    def _gather(self, batch: Batch, tokens: slice) -> torch.Tensor:
        """Hidden states of these tokens, on the device or in page-locked host memory: where the table lives."""
        parameters, step = self._weights.wait("embed"), batch.step
        if parameters["tokens"].device == self._device:
            return self._model.embed(self._shape, parameters, batch.token_ids[tokens], batch.positions[tokens])
        ids, positions = (
            torch.from_numpy(array[tokens].astype(np.int64)) for array in (step.token_ids, positions_of(step))
        )
        return self._model.embed(self._shape, parameters, ids, positions).pin_memory()

    def forward(
        self,
        batch: Batch,
        layers: range,
        hidden: torch.Tensor | Embedding,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, E] after these layers; each layer's weights serve all microbatches of the step.

        Where hidden states are in CPU memory they are in `output` once `stored` has completed; without one, what the head
        needs of them stays on the device.
        """
        self._activations.begin(batch, len(layers), hidden, output)
        start = 0
        while start < len(layers):
            start = self._pass(batch, layers, start)
        return self._activations.end()

    def _pass(self, batch: Batch, layers: range, start: int) -> int:
        """Goes through the layers from `start` on as the schedule says. Returns how far it came.

        Where memory does not suffice that is the layer that was begun, with its microbatches cut finer. It may be
        computed again: it writes only to the cache, and there the same values.
        """
        microbatches = len(batch.microbatches)
        for actions in self._schedule(len(layers) - start, microbatches):
            self._move(batch, layers, start, actions)
            if actions.compute is None:
                continue
            layer, microbatch = start + actions.compute[0], actions.compute[1]
            part = self._compute(batch, layers[layer], microbatch, self._activations.take(layer, microbatch))
            if part is None:
                self._cache.drop()
                self._cut_finer(batch)
                return layer
            self._activations.put(layer, microbatch, part)
            self._store(batch, layers, start, [cell for cell in actions.store_cache if cell == actions.compute])
            if microbatch == microbatches - 1:
                self._weights.done(blocks.layer_name(layers[layer]))
        return len(layers)

    def _move(self, batch: Batch, layers: range, start: int, actions: Actions) -> None:
        """Sends the loads and stores of a row of the schedule, whose layers count from `start` on, on their way."""
        self._store(batch, layers, start, [cell for cell in actions.store_cache if cell != actions.compute])
        if actions.load_weight is not None and start + actions.load_weight < len(layers):
            self._weights.load(blocks.layer_name(layers[start + actions.load_weight]))
        after = [self._streams.event()] if actions.waits and actions.load_cache else ()
        for layer, microbatch in actions.load_cache:
            self._activations.load(start + layer, microbatch, after)
            self._cache.load(layers[start + layer], microbatch, batch.microbatches[microbatch].staged, after)

    def _store(self, batch: Batch, layers: range, start: int, cells: Iterable[Cell]) -> None:
        for layer, microbatch in cells:
            self._activations.store(start + layer, microbatch)
            self._cache.store(layers[start + layer], microbatch, batch.microbatches[microbatch].staged)

    def _compute(self, batch: Batch, layer: int, microbatch: int, part: torch.Tensor) -> torch.Tensor | None:
        """A microbatch's part after a layer; None if memory did not suffice."""
        parameters, its = self._weights.wait(blocks.layer_name(layer)), batch.microbatches[microbatch]
        cache = LayerCache(self._attention, its, self._cache.tensors(layer, microbatch, its.staged))
        begin = self._trace.mark()
        try:
            hidden = self._model.layer(self._shape, layer, parameters, part, its.positional, cache)
            cache.commit()
            self._trace.compute("layer", begin, *self._at, layer, microbatch)
            return hidden
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            if len(halved(batch.borders)) == len(batch.borders):
                its_rows = largest(batch.borders, batch.step.counts.tolist())
                self._say(
                    f"out of memory with a row in each microbatch, {its_rows} tokens at most: lower"
                    " pipeline.microbatch_tokens, which also limits the pieces of a prompt, or placement.gpu_memory"
                )
                raise
            return None

    def _cut_finer(self, batch: Batch) -> None:
        """Cuts each microbatch of the step in two."""
        old, counts = batch.microbatches, batch.step.counts.tolist()
        before = largest(batch.borders, counts)
        self._batches.cut(batch, halved(batch.borders))
        self._most_tokens = largest(batch.borders, counts)
        self._say(
            f"out of memory with {before} tokens in a microbatch: this rank continues with {len(batch.microbatches)}"
            f" microbatches of at most {self._most_tokens} tokens (lower pipeline.microbatch_tokens to start like that)"
        )
        self._give_back()
        self._activations.cut(old, batch.microbatches)

    def _give_back(self) -> None:
        """Lets go of memory that torch keeps for later: what had too little may be a library beside it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def sample(self, batch: Batch, hidden: torch.Tensor, masks: Masks | None = None) -> Result:
        """The step's result as tensors of the device, for the step's hidden states: [T, E], or what is needed of them.

        Logits are computed for sampled rows, and for prompts whose tokens are scored, alone. `masks`: of the step's samples.
        """
        step, sampler = batch.step, self._sampler
        self._weights.wait("head")  # also where no row is sampled: it is in the cycle of loads
        sampler.count(step)
        top, positions = sampler.top(step.sample_slots), positions_of(step)[step.sample_rows] + 1

        def draw(chunk: slice, logits: torch.Tensor) -> Result:
            begin = self._trace.mark()
            its = None if masks is None else masks.within(chunk.start, chunk.stop)
            drawn = sampler.sample(logits, step.sample_slots[chunk], step.uniforms[chunk], positions[chunk], top, its)
            self._trace.compute("sample", begin, *self._at)
            return drawn

        def score(chunk: slice, logits: torch.Tensor) -> torch.Tensor:
            return sampler.score(logits, batch.score_ids[chunk])

        pieces = self._of_logits(hidden, batch.sample_rows, draw) or [sampler.nothing]
        scores = self._of_logits(hidden, batch.score_rows, score)
        self._weights.done("head")
        result = pieces[0] if len(pieces) == 1 else Result.joined(pieces, torch.cat)
        return replace(result, prompt_logprobs=torch.cat(scores)) if scores else result

    def _of_logits(self, hidden: torch.Tensor, rows: torch.Tensor, use: Callable[[slice, torch.Tensor], T]) -> list[T]:
        """What `use(rows, logits [_, V])` returns for the hidden states at these places, LOGITS_ROWS at a time.

        Fewer where memory does not suffice: `use` must not mind to be called again.
        """
        found: list[T] = []
        start = 0
        while start < len(rows):
            count = min(self._logits_rows, len(rows) - start)
            chunk = slice(start, start + count)
            try:
                found.append(use(chunk, self._head(hidden, rows[chunk])))
                start += count
                continue
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_shortage(error):
                    raise
            self._logits_rows = count // 2
            self._say(f"out of memory: logits of {self._logits_rows} rows at a time from now on")
            self._give_back()
        return found

    def _head(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [_, V] of these rows of hidden."""
        parameters, begin = self._weights.wait("head"), self._trace.mark()
        logits = self._model.head(self._shape, parameters, hidden[rows])
        self._trace.compute("head", begin, *self._at)
        return logits
