"""What one rank computes: the layers of its virtual stages for the microbatches of a step.

Knows the model, its weights and its cache; nothing of the ring, of rounds or of other ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from noria import blocks
from noria.engine import kv_cache
from noria.engine.kv_cache import KvCache
from noria.engine.sampler import Sampler
from noria.engine.weights import Weights
from noria.step import Step

HEAD_ROWS = 512  # logits of this many rows at a time: 512 x 128k ids in float32 are 256 MiB


@dataclass(frozen=True)
class Microbatch:
    """A step's part that one forward call computes: tokens `first .. last` of the step, ready on the device."""

    first: int
    last: int
    positions: torch.Tensor  # [T] int64
    rows: torch.Tensor  # [T] int64: where in the cache the new keys and values belong
    positional: object
    attention_plan: object


@dataclass(frozen=True)
class Prepared:
    """A step made ready once, for all laps."""

    step: Step
    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sample_rows: torch.Tensor  # [S] int64
    score_rows: torch.Tensor  # [P] int64
    score_ids: torch.Tensor  # [P] int64
    microbatches: tuple[Microbatch, ...]


class Stage:
    """The layers of this rank. `model` is a module of models/, `attention` one of attention/."""

    def __init__(self, model, attention, shape, weights: Weights, cache: KvCache, sampler: Sampler, dtype, device):
        self._model, self._attention, self._shape = model, attention, shape
        self._weights, self._cache, self._sampler = weights, cache, sampler
        self._dtype, self._device = dtype, device

    def prepare(self, step: Step) -> Prepared:
        """Takes over the step's changes of slots and puts its index tensors on the device."""
        self._cache.apply(step)
        self._sampler.apply(step)
        borders = zip(step.microbatches[:-1].tolist(), step.microbatches[1:].tolist(), strict=True)
        spans = [self._cache.spans(step, first, last) for first, last in borders]
        rows = [kv_cache.cache_rows(part) for part in spans]
        parts = [step.token_ids, positions_of(step), step.sample_rows, step.score_rows, step.score_ids, *rows]
        token_ids, positions, sample_rows, score_rows, score_ids, *rows = self._to_device(parts)
        microbatches, first = [], 0
        for part, its_rows in zip(spans, rows, strict=True):
            last = first + len(its_rows)
            its_positions = positions[first:last]
            positional = self._model.positional(self._shape, its_positions, self._dtype)
            plan = self._attention.prepare(part, self._device)
            microbatches.append(Microbatch(first, last, its_positions, its_rows, positional, plan))
            first = last
        return Prepared(step, token_ids, positions, sample_rows, score_rows, score_ids, tuple(microbatches))

    def embed(self, prepared: Prepared) -> torch.Tensor:
        """[T, E] hidden states of the step's tokens."""
        return self._model.embed(self._shape, self._weights.wait("embed"), prepared.token_ids, prepared.positions)

    def forward(self, prepared: Prepared, layers: range, hidden: torch.Tensor) -> torch.Tensor:
        """[T, E] after these layers; each layer's weights serve all microbatches of the step."""
        parts = [hidden[m.first : m.last] for m in prepared.microbatches]
        for layer in layers:
            parameters = self._weights.wait(blocks.layer_name(layer))
            keys, values = self._cache.layer(layer)
            for index, microbatch in enumerate(prepared.microbatches):
                attend = self._attend(microbatch, keys, values)
                positional = microbatch.positional
                parts[index] = self._model.layer(self._shape, layer, parameters, parts[index], positional, attend)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sample(self, prepared: Prepared, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What step.Result holds, on the device, for the step's hidden states [T, E].

        Logits are computed for sampled rows, and for prompts whose tokens are scored, alone.
        """
        step, sampler = prepared.step, self._sampler
        sampler.count(step)
        top, positions = sampler.top(step.sample_slots), positions_of(step)[step.sample_rows] + 1
        pieces = []
        for chunk, logits in self._logits(hidden, prepared.sample_rows):
            slots, uniforms = step.sample_slots[chunk], step.uniforms[chunk]
            pieces.append(sampler.sample(logits, slots, uniforms, positions[chunk], top))
        scores = [
            sampler.score(logits, prepared.score_ids[chunk])
            for chunk, logits in self._logits(hidden, prepared.score_rows)
        ]
        result = {"token_ids": torch.empty(0, dtype=torch.int64, device=self._device)}
        for name in ("token_ids", "logprobs", "top_ids", "top_logprobs"):
            if pieces and getattr(pieces[0], name) is not None:
                result[name] = torch.cat([getattr(piece, name) for piece in pieces])
        return result | ({"prompt_logprobs": torch.cat(scores)} if scores else {})

    def _logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, logits [_, V] of the hidden states at these places), HEAD_ROWS at a time."""
        for start in range(0, len(rows), HEAD_ROWS):
            chunk = slice(start, start + HEAD_ROWS)
            yield chunk, self._model.head(self._shape, self._weights.wait("head"), hidden[rows[chunk]])

    def _attend(self, microbatch: Microbatch, key_cache: torch.Tensor, value_cache: torch.Tensor):
        def attend(queries, keys, values, *, scale=None, window=None):
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
