"""A step of one group, as data: what every rank needs to know to compute it, and what the last rank answers.

A step travels as the header, ahead of the hidden states. Knows no tensors, no devices and no MPI.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

from noria.limits import RUN_PAGES

PAGE_TOKENS = 16  # tokens in one page of the KV cache
NO_STATE = -1  # what a row reads that begins: zeros
NO_TOKEN = -1  # in a result: nothing could be sampled, because the model's logits are not finite
NONE_LEFT = -2  # the same, because the row's own settings leave no token


def pages_for(tokens: int) -> int:
    """Pages that are reserved for so many tokens: a multiple of RUN_PAGES."""
    return -(-tokens // (RUN_PAGES * PAGE_TOKENS)) * RUN_PAGES


class Word(IntEnum):
    """What a header asks for."""

    RUN = 0  # compute the step (nothing to do for a group without rows)
    STOP = 1  # the run is over for this group: forward the header and leave


@dataclass(frozen=True)
class Run:
    """`count` consecutive pages of the cache from page `start`."""

    start: int
    count: int


@dataclass(frozen=True)
class Admitted:
    """A sequence takes a slot: the pages reserved for it and how it is sampled (rows/sequence.py: sampler_settings)."""

    slot: int
    runs: tuple[Run, ...]
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Grown:
    """A sequence that outgrew its pages: all that it has now."""

    slot: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Span:
    """One sequence's part of a microbatch, as attention sees it.

    Its queries are rows `first .. first+count` of the microbatch; its keys are positions 0 .. length-1, the last `count`
    of them new; `runs` are the pages that hold them, in order.
    """

    first: int
    count: int
    length: int
    runs: tuple[Run, ...]


def _no(dtype: type) -> Any:
    return field(default_factory=lambda: np.empty(0, dtype))


_ARRAYS = (
    ("slots", np.int32),
    ("counts", np.int32),
    ("positions", np.int32),
    ("token_ids", np.int32),
    ("borders", np.int32),
    ("sample_rows", np.int32),
    ("sample_slots", np.int32),
    ("uniforms", np.float64),
    ("score_rows", np.int32),
    ("score_ids", np.int32),
    ("reads", np.int32),
    ("writes", np.int32),
    ("kept", np.int32),
)


@dataclass(frozen=True)
class Step:
    """One group's pass through all layers. R rows (sequences), T tokens, S samples, K microbatches, P scores.

    slots, counts, positions: [R] each row's slot, number of new tokens, position of the first of them.
    token_ids: [T] the new tokens, row after row; -1 - i: what the group's step before samples as its number i, which is not known
    yet on the host (on one rank, where a step is composed ahead). borders: [K+1] of the microbatches, in rows.
    sample_rows: [S] index in T of the hidden states to sample from; sample_slots: [S]; uniforms: [S] in [0, 1).
    score_rows: [P] index in T of the hidden states that predict a token of a prompt; score_ids: [P] that token.
    reads, writes: [R] the state that each row begins from (NO_STATE: zeros) and the one that it leaves; kept: [R] after how
    many of its new tokens. Empty where the family has no arrays per sequence.
    Changes of slots (`released` first, then `admitted`, then `grown`) apply before the step, in the order in which headers
    arrive.
    masked: what some of its samples may be follows in a message of its own (masks.py).
    """

    round: int
    group: int
    word: Word = Word.RUN
    released: tuple[int, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    slots: np.ndarray = _no(np.int32)
    counts: np.ndarray = _no(np.int32)
    positions: np.ndarray = _no(np.int32)
    token_ids: np.ndarray = _no(np.int32)
    borders: np.ndarray = _no(np.int32)
    sample_rows: np.ndarray = _no(np.int32)
    sample_slots: np.ndarray = _no(np.int32)
    uniforms: np.ndarray = _no(np.float64)
    score_rows: np.ndarray = _no(np.int32)
    score_ids: np.ndarray = _no(np.int32)
    reads: np.ndarray = _no(np.int32)
    writes: np.ndarray = _no(np.int32)
    kept: np.ndarray = _no(np.int32)
    masked: bool = False
    grown: tuple[Grown, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_samples(self) -> int:
        return len(self.sample_slots)

    @property
    def awaits(self) -> bool:
        """Whether it takes tokens that are not known yet on the host."""
        return bool((self.token_ids < 0).any())

    def told(self, sampled: np.ndarray) -> "Step":
        """The step with what the one before it sampled. A row that got no token there has ended: it has id 0."""
        if not self.awaits:
            return self
        ids = np.where(self.token_ids < 0, np.maximum(sampled[np.maximum(-1 - self.token_ids, 0)], 0), self.token_ids)
        return replace(self, token_ids=ids.astype(np.int32))

    def encode(self) -> bytes:
        """The header: 8-byte integers (round, group, word, masked, bytes of JSON, arrays' lengths), JSON of the changes of slots
        if there are any, then the arrays one after another."""
        changes = b""
        if self.released or self.admitted or self.grown:
            admitted = [[a.slot, _numbers(a.runs), a.sampling] for a in self.admitted]
            grown = [[one.slot, _numbers(one.runs)] for one in self.grown]
            changes = json.dumps([self.released, admitted, grown]).encode()
        arrays = [np.asarray(getattr(self, name), dtype) for name, dtype in _ARRAYS]
        words = [self.round, self.group, self.word, self.masked, len(changes), *map(len, arrays)]
        return b"".join([np.array(words, np.int64).tobytes(), changes, *(array.tobytes() for array in arrays)])

    @classmethod
    def decode(cls, header: bytes) -> "Step":
        """The step of a header that `encode` made."""
        round, group, word, masked, changed, *sizes = np.frombuffer(header, np.int64, 5 + len(_ARRAYS)).tolist()
        start = 8 * (5 + len(_ARRAYS))
        end = start + changed
        released, admitted, grown = json.loads(header[start:end]) if changed else ((), (), ())
        arrays = {}
        for (name, dtype), size in zip(_ARRAYS, sizes, strict=True):
            arrays[name] = np.frombuffer(header, dtype, size, end)
            end += arrays[name].nbytes
        return cls(
            round,
            group,
            Word(word),
            tuple(released),
            tuple(Admitted(slot, _runs(runs), sampling) for slot, runs, sampling in admitted),
            **arrays,
            masked=bool(masked),
            grown=tuple(Grown(slot, _runs(runs)) for slot, runs in grown),
        )


def _numbers(runs: Iterable[Run]) -> list[list[int]]:
    return [[run.start, run.count] for run in runs]


def _runs(numbers: Iterable[list[int]]) -> tuple[Run, ...]:
    return tuple(Run(*run) for run in numbers)


_RESULT = (
    ("token_ids", np.int64),
    ("logprobs", np.float64),
    ("top_ids", np.int64),
    ("top_logprobs", np.float64),
    ("prompt_logprobs", np.float64),
)


Array: TypeAlias = Any  # of numpy; a tensor of its device as long as the last rank makes the result


@dataclass(frozen=True)
class Result:
    """What the last virtual stage answers to a step: [S] sampled token ids, in the order of its samples.

    NO_TOKEN stands where the logits were not finite, NONE_LEFT where the row's settings leave no token. Where a row of the
    step asked for them: logprobs [S] of these tokens, top_ids and top_logprobs [S, top] (rows that did not ask have NaN and
    NO_TOKEN). prompt_logprobs: [P] of the step's score_ids. What nobody asked for is empty.
    """

    token_ids: Array
    logprobs: Array = _no(np.float64)
    top_ids: Array = field(default_factory=lambda: np.empty((0, 0), np.int64))
    top_logprobs: Array = field(default_factory=lambda: np.empty((0, 0), np.float64))
    prompt_logprobs: Array = _no(np.float64)

    def _arrays(self) -> list[Array]:
        return [getattr(self, name) for name, _ in _RESULT]

    def map(self, change: Callable[[Array], Array]) -> "Result":
        """The result with each of its arrays changed."""
        return Result(*map(change, self._arrays()))

    @staticmethod
    def joined(pieces: Iterable["Result"], join: Callable[[tuple[Array, ...]], Array]) -> "Result":
        """The results of one step's samples, piece after piece, as one."""
        return Result(*map(join, zip(*(piece._arrays() for piece in pieces), strict=True)))

    def encode(self) -> bytes:
        """Four 8-byte sizes (of token_ids, logprobs, a row of top_ids, prompt_logprobs), then the arrays in a row."""
        sizes = [len(self.token_ids), len(self.logprobs), self.top_ids.shape[1], len(self.prompt_logprobs)]
        arrays = [np.ascontiguousarray(getattr(self, name), dtype).tobytes() for name, dtype in _RESULT]
        return b"".join([np.array(sizes, np.int64).tobytes(), *arrays])

    @classmethod
    def decode(cls, message: bytes) -> "Result":
        """The result of a message that `encode` made."""
        num_samples, num_logprobs, top, num_scores = np.frombuffer(message, np.int64, 4).tolist()
        num_top = num_samples if top else 0
        shapes = [(num_samples,), (num_logprobs,), (num_top, top), (num_top, top), (num_scores,)]
        arrays, end = {}, 32
        for (name, dtype), shape in zip(_RESULT, shapes, strict=True):
            arrays[name] = np.frombuffer(message, dtype, math.prod(shape), end).reshape(shape)
            end += arrays[name].nbytes
        return cls(**arrays)
