"""What one rank computes: the layers of its virtual stages for the microbatches of a step.

Knows the model, its weights and its cache; nothing of the ring, of rounds or of other ranks.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from noria import blocks
from noria.borders import halved, largest, refined
from noria.engine import kv_cache
from noria.engine.activations import Embedding, InHost, OnDevice
from noria.engine.kv_cache import KvCache, Staged
from noria.engine.sampler import Sampled, Sampler
from noria.engine.shortage import is_shortage
from noria.engine.trace import OFF, Tracing
from noria.engine.weights import Weights
from noria.limits import LOGITS_ROWS
from noria.model import ModelShape
from noria.models._attend import Attend
from noria.schedules import Actions, Cell
from noria.step import Span, Step
from noria.streams import Event, Streams
from noria.tools.text import nbytes_words

Spans: TypeAlias = tuple[list[Span], Staged | None]  # of a microbatch: as attention sees it, and what to move for that
T = TypeVar("T")
SAID_NBYTES = 1 << 30  # of page-locked memory: what takes time to give back


@dataclass(frozen=True)
class Microbatch:
    """A step's part that one forward call computes: tokens `first .. last` of the step, ready on the device."""

    first: int
    last: int
    positions: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [T] int64: where in the cache the new keys and values belong
    positional: object
    attention_plan: object
    staged: Staged | None  # what of the cache to move, where its pages are not on the device


@dataclass
class Prepared:
    """A step made ready once, for all laps. `borders` of its microbatches, in rows: finer ones where memory was short."""

    step: Step
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sample_rows: torch.Tensor  # [S] int64
    score_rows: torch.Tensor  # [P] int64
    score_ids: torch.Tensor  # [P] int64
    needed: np.ndarray  # where hidden states are in CPU memory: the rows of the step that the head needs, and
    needed_rows: torch.Tensor  # the same on the device; sample_rows and score_rows are then counted among them
    microbatches: tuple[Microbatch, ...]
    borders: list[int]


class Stage:
    """The layers of this rank. `model` is a module of models/, `attention` one of attention/, `schedule` of schedules/.

    Where memory does not suffice for a microbatch, this rank cuts its steps finer from then on, and says so by `report`.
    """

    def __init__(
        self,
        model: ModuleType,
        attention: ModuleType,
        shape: ModelShape,
        weights: Weights,
        cache: KvCache,
        sampler: Sampler,
        schedule: ModuleType,
        dtype: torch.dtype,
        streams: Streams,
        report: Callable[[str], None] = lambda message: None,
        trace: Tracing = OFF,
        activations: OnDevice | InHost | None = None,
    ):
        self._model, self._attention, self._shape = model, attention, shape
        self._weights, self._cache, self._sampler = weights, cache, sampler
        self._schedule, self._streams = schedule.schedule, streams
        self._dtype, self._device, self._report = dtype, streams.device, report
        self._activations = activations or OnDevice()
        self._trace, self._at = trace, (0, 0, 0)  # the round, lap and group of the visit
        self._most_tokens: int | None = None  # of a microbatch, where memory has been short
        self._head_rows = LOGITS_ROWS

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
            self._report(f"gave {nbytes_words(nbytes)} of page-locked memory back in {seconds:.1f} s")

    @property
    def stored(self) -> Event | None:
        """The event after which what `forward` returned last is in host memory; None where it is on the device."""
        return self._activations.stored

    def prepare(self, step: Step) -> Prepared:
        """Takes over the step's changes of slots and puts its index tensors on the device."""
        self._cache.apply(step)
        self._sampler.apply(step)
        borders = refined(step.borders.tolist(), step.counts.tolist(), self._most_tokens)
        spans, rows = self._spans(step, borders)
        needed, *head_rows = self._activations.needed(step.sample_rows, step.score_rows)
        parts = [step.token_ids, positions_of(step), *head_rows, step.score_ids, needed, *rows]
        ids, positions, sample_rows, score_rows, score_ids, needed_rows, *its_rows = self._to_device(parts)
        of_head = sample_rows, score_rows, score_ids, needed, needed_rows
        return Prepared(step, ids, positions, *of_head, self._microbatches(positions, spans, its_rows), borders)

    def _spans(self, step: Step, borders: list[int]) -> tuple[list[Spans], list[np.ndarray]]:
        """Of each microbatch its sequences as attention sees them, with what to move, and where its tokens belong."""
        pairs = itertools.pairwise(borders)
        spans = [self._cache.to_staging(self._cache.spans(step, first, last)) for first, last in pairs]
        return spans, [kv_cache.cache_rows(part) for part, _ in spans]

    def _microbatches(
        self, positions: torch.Tensor, spans: list[Spans], rows: list[torch.Tensor]
    ) -> tuple[Microbatch, ...]:
        microbatches, first = [], 0
        for (part, staged), its_rows in zip(spans, rows, strict=True):
            last = first + len(its_rows)
            its_positions = positions[first:last]
            positional = self._model.positional(self._shape, its_positions, self._dtype)
            plan = self._attention.prepare(part, self._device)
            microbatches.append(Microbatch(first, last, its_positions, its_rows, positional, plan, staged))
            first = last
        return tuple(microbatches)

    def embed(self, prepared: Prepared) -> torch.Tensor | Embedding:
        """[T, E] hidden states of the step's tokens, gathered where the table lives; in CPU memory, how to gather them."""
        on_device = self._weights.wait("embed")["tokens"].device == self._device
        if isinstance(self._activations, InHost):
            return Embedding(lambda first, last: self._gather(prepared, slice(first, last)), not on_device)
        hidden = self._gather(prepared, slice(None))
        return hidden if on_device else hidden.to(self._device, non_blocking=True)

    def _gather(self, prepared: Prepared, tokens: slice) -> torch.Tensor:
        """Hidden states of these tokens, on the device or in page-locked host memory: where the table lives."""
        parameters, step = self._weights.wait("embed"), prepared.step
        if parameters["tokens"].device == self._device:
            return self._model.embed(self._shape, parameters, prepared.token_ids[tokens], prepared.positions[tokens])
        ids, positions = (
            torch.from_numpy(array[tokens].astype(np.int64)) for array in (step.token_ids, positions_of(step))
        )
        return self._model.embed(self._shape, parameters, ids, positions).pin_memory()

    def forward(
        self,
        prepared: Prepared,
        layers: range,
        hidden: torch.Tensor | Embedding,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, E] after these layers; each layer's weights serve all microbatches of the step.

        Where hidden states are in CPU memory they are in `output` once `stored` has completed; without one, what the head
        needs of them stays on the device.
        """
        self._activations.begin(prepared, len(layers), hidden, output)
        start = 0
        while start < len(layers):
            start = self._pass(prepared, layers, start)
        return self._activations.end()

    def _pass(self, prepared: Prepared, layers: range, start: int) -> int:
        """Goes through the layers from `start` on as the schedule says. Returns how far it came.

        Where memory does not suffice that is the layer that was begun, with its microbatches cut finer. It may be
        computed again: it writes only to the cache, and there the same values.
        """
        microbatches = len(prepared.microbatches)
        for actions in self._schedule(len(layers) - start, microbatches):
            self._move(prepared, layers, start, actions)
            if actions.compute is None:
                continue
            layer, microbatch = start + actions.compute[0], actions.compute[1]
            part = self._compute(prepared, layers[layer], microbatch, self._activations.take(layer, microbatch))
            if part is None:
                self._cache.drop()
                self._cut_finer(prepared)
                return layer
            self._activations.put(layer, microbatch, part)
            self._store(prepared, layers, start, [cell for cell in actions.store_cache if cell == actions.compute])
            if microbatch == microbatches - 1:
                self._weights.done(blocks.layer_name(layers[layer]))
        return len(layers)

    def _move(self, prepared: Prepared, layers: range, start: int, actions: Actions) -> None:
        """Sends the loads and stores of a row of the schedule, whose layers count from `start` on, on their way."""
        self._store(prepared, layers, start, [cell for cell in actions.store_cache if cell != actions.compute])
        if actions.load_weight is not None and start + actions.load_weight < len(layers):
            self._weights.load(blocks.layer_name(layers[start + actions.load_weight]))
        after = [self._streams.event()] if actions.waits and actions.load_cache else ()
        for layer, microbatch in actions.load_cache:
            self._activations.load(start + layer, microbatch, after)
            self._cache.load(layers[start + layer], microbatch, prepared.microbatches[microbatch].staged, after)

    def _store(self, prepared: Prepared, layers: range, start: int, cells: Iterable[Cell]) -> None:
        for layer, microbatch in cells:
            self._activations.store(start + layer, microbatch)
            self._cache.store(layers[start + layer], microbatch, prepared.microbatches[microbatch].staged)

    def _compute(self, prepared: Prepared, layer: int, microbatch: int, part: torch.Tensor) -> torch.Tensor | None:
        """A microbatch's part after a layer; None if memory did not suffice."""
        parameters, its = self._weights.wait(blocks.layer_name(layer)), prepared.microbatches[microbatch]
        attend = self._attend(its, *self._cache.tensors(layer, microbatch, its.staged))
        begin = self._trace.mark()
        try:
            hidden = self._model.layer(self._shape, layer, parameters, part, its.positional, attend)
            self._trace.compute("layer", begin, *self._at, layer, microbatch)
            return hidden
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            if len(halved(prepared.borders)) == len(prepared.borders):
                its_rows = largest(prepared.borders, prepared.step.counts.tolist())
                self._report(
                    f"out of memory with a row in each microbatch, {its_rows} tokens at most: lower"
                    " pipeline.microbatch_tokens, of which a prompt's pieces have no more, or placement.gpu_memory"
                )
                raise
            return None

    def _cut_finer(self, prepared: Prepared) -> None:
        """Cuts each microbatch of the step in two."""
        step, counts = prepared.step, prepared.step.counts.tolist()
        before = largest(prepared.borders, counts)
        old, prepared.borders = prepared.microbatches, halved(prepared.borders)
        spans, rows = self._spans(step, prepared.borders)
        prepared.microbatches = self._microbatches(prepared.positions, spans, self._to_device(rows))
        self._most_tokens = largest(prepared.borders, counts)
        self._report(
            f"out of memory with {before} tokens in a microbatch: this rank goes on with {len(prepared.microbatches)}"
            f" microbatches of at most {self._most_tokens} tokens (lower pipeline.microbatch_tokens to begin so)"
        )
        self._give_back()
        self._activations.cut(old, prepared.microbatches)

    def _give_back(self) -> None:
        """Lets go of memory that torch keeps for later: what had too little may be a library beside it."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def sample(self, prepared: Prepared, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What step.Result holds, on the device, for the step's hidden states: [T, E], or what is needed of them.

        Logits are computed for sampled rows, and for prompts whose tokens are scored, alone.
        """
        step, sampler = prepared.step, self._sampler
        self._weights.wait("head")  # also where no row is sampled: it is in the cycle of loads
        sampler.count(step)
        top, positions = sampler.top(step.sample_slots), positions_of(step)[step.sample_rows] + 1

        def draw(chunk: slice, logits: torch.Tensor) -> Sampled:
            begin = self._trace.mark()
            drawn = sampler.sample(logits, step.sample_slots[chunk], step.uniforms[chunk], positions[chunk], top)
            self._trace.compute("sample", begin, *self._at)
            return drawn

        def score(chunk: slice, logits: torch.Tensor) -> torch.Tensor:
            return sampler.score(logits, prepared.score_ids[chunk])

        pieces = self._of_logits(hidden, prepared.sample_rows, draw)
        scores = self._of_logits(hidden, prepared.score_rows, score)
        self._weights.done("head")
        result = {"token_ids": torch.empty(0, dtype=torch.int64, device=self._device)}
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            if pieces and getattr(pieces[0], name) is not None:
                result[name] = torch.cat([getattr(piece, name) for piece in pieces])
        return result | ({"prompt_logprobs": torch.cat(scores)} if scores else {})

    def _of_logits(self, hidden: torch.Tensor, rows: torch.Tensor, use: Callable[[slice, torch.Tensor], T]) -> list[T]:
        """What `use(rows, logits [_, V])` returns for the hidden states at these places, LOGITS_ROWS at a time.

        Fewer where memory does not suffice: `use` must not mind to be called again.
        """
        found: list[T] = []
        start = 0
        while start < len(rows):
            count = min(self._head_rows, len(rows) - start)
            chunk = slice(start, start + count)
            try:
                found.append(use(chunk, self._head(hidden, rows[chunk])))
                start += count
                continue
            except (RuntimeError, MemoryError) as error:
                if count == 1 or not is_shortage(error):
                    raise
            self._head_rows = count // 2
            self._report(f"out of memory: logits of {self._head_rows} rows at a time from now on")
            self._give_back()
        return found

    def _head(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [_, V] of these rows of hidden."""
        parameters, begin = self._weights.wait("head"), self._trace.mark()
        logits = self._model.head(self._shape, parameters, hidden[rows])
        self._trace.compute("head", begin, *self._at)
        return logits

    def _attend(self, microbatch: Microbatch, key_cache: torch.Tensor, value_cache: torch.Tensor) -> Attend:
        def attend(
            queries: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            *,
            scale: float | None = None,
            window: int | None = None,
        ) -> torch.Tensor:
            key_cache.index_copy_(0, microbatch.rows, keys)
            value_cache.index_copy_(0, microbatch.rows, values)
            scale = queries.shape[-1] ** -0.5 if scale is None else scale
            return self._attention.attention(microbatch.attention_plan, queries, key_cache, value_cache, scale, window)

        return attend

    def _to_device(self, arrays: list[np.ndarray]) -> list[torch.Tensor]:
        """The arrays as int64 tensors on the device, in one copy that the host does not wait for."""
        packed = torch.from_numpy(np.concatenate([array.astype(np.int64) for array in arrays]))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        return list(packed.split([len(array) for array in arrays]))


def positions_of(step: Step) -> np.ndarray:
    """[T] the position of each new token in its sequence."""
    starts = np.cumsum(step.counts) - step.counts
    return np.repeat(step.positions - starts, step.counts) + np.arange(step.num_tokens)
