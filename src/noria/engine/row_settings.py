"""What the last rank knows of a row beside its logits: its settings, the tokens it has had, and what they do to logits.

Knows nothing of drawing, slots or steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

# Changes flat scores [C * V] in place; its second argument puts an array on their device.
Put: TypeAlias = Callable[[np.ndarray], torch.Tensor]
Edit: TypeAlias = Callable[[torch.Tensor, Put], None]


class Counts:
    """The different tokens of a row, and how often each of them was generated (0: it is in the prompt alone)."""

    def __init__(self, prompt_length: int):
        self._prompt_length = prompt_length
        self._length = 0
        self._place: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._generated = np.zeros(64, np.int64)

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._place)]

    @property
    def generated(self) -> np.ndarray:
        return self._generated[: len(self._place)]

    def add(self, token_ids: list[int], position: int) -> None:
        """The tokens from this position of the sequence on; those that were given before count once."""
        assert position <= self._length, "tokens between are missing: every later one would be counted as another"
        fresh = token_ids[self._length - position :]
        for place, token_id in enumerate(fresh, self._length):
            index = self._place.setdefault(token_id, len(self._place))
            if index == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._generated = np.concatenate([self._generated, np.zeros_like(self._generated)])
            self._ids[index] = token_id
            self._generated[index] += place >= self._prompt_length
        self._length += len(fresh)


class BadWords:
    """Sequences of token ids that a row must not generate, and the end of what it has generated."""

    def __init__(self, words: list[list[int]], prompt_length: int):
        self._words = [np.array(word, np.int64) for word in words]
        self._keep = max(map(len, words)) - 1
        self._next = prompt_length  # place in the sequence of the next generated token
        self._last = np.empty(0, np.int64)

    def add(self, token_ids: list[int], position: int) -> None:
        """The tokens from this position of the sequence on; those of the prompt and those given before do not count."""
        assert self._next >= position or not token_ids, "tokens between are missing"
        fresh = token_ids[self._next - position :]
        self._next += len(fresh)
        if self._keep and fresh:
            self._last = np.concatenate([self._last, np.array(fresh, np.int64)])[-self._keep :]

    def banned(self) -> np.ndarray:
        """The ids that would end one of the words now: the last of each whose other ids were generated just before."""
        ends = [word[-1] for word in self._words if self._follows(word[:-1])]
        return np.unique(np.array(ends, np.int64))

    def _follows(self, before: np.ndarray) -> bool:
        return len(before) <= len(self._last) and np.array_equal(self._last[len(self._last) - len(before) :], before)


@dataclass(eq=False)
class RowSettings:
    """How one row is sampled; see rows/sequence.py: sampler_settings. `logprobs`: how many of the likely ids; -1: no
    log-probabilities. `edited`: its logits are changed before it is drawn. `greedy`: its token is the most likely one of the
    raw logits."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    prompt_length: int
    min_new_tokens: int
    banned: np.ndarray
    bias_ids: np.ndarray
    biases: np.ndarray
    allowed: np.ndarray
    counts: Counts | None = None
    bad_words: BadWords | None = None
    edited: bool = False
    greedy: bool = True

    @classmethod
    def from_header(cls, settings: Mapping[str, Any]) -> "RowSettings":
        bias = settings.get("logit_bias", {})
        row = cls(
            settings["temperature"],
            settings.get("top_k", 0),
            settings.get("top_p", 1.0),
            settings.get("min_p", 0.0),
            settings.get("repetition_penalty", 1.0),
            settings.get("presence_penalty", 0.0),
            settings.get("frequency_penalty", 0.0),
            settings.get("logprobs", -1),
            settings.get("prompt_length", 0),
            settings.get("min_new_tokens", 0),
            np.array(settings.get("banned", []), np.int64),
            np.array([int(token_id) for token_id in bias], np.int64),
            np.array(list(bias.values()), np.float64),
            np.unique(np.array(settings.get("allowed", []), np.int64)),
        )
        if row.repetition_penalty != 1 or row.presence_penalty or row.frequency_penalty:
            row.counts = Counts(row.prompt_length)
        if settings.get("bad_words"):
            row.bad_words = BadWords(settings["bad_words"], row.prompt_length)
        row.add(settings.get("shared", []), 0)
        edits = len(bias), len(row.banned), len(row.allowed), row.follows, settings.get("masked")
        row.edited = any(edits)
        row.greedy = row.temperature == 0 and not row.edited
        return row

    @property
    def follows(self) -> bool:
        """Whether the row's tokens must be told to `add`."""
        return self.counts is not None or self.bad_words is not None

    def add(self, token_ids: list[int], position: int) -> None:
        """Tokens of the row, prompt and generated, from this position of its sequence on."""
        for one in (self.counts, self.bad_words):
            if one is not None:
                one.add(token_ids, position)


class SlotColumns:
    """What rows are drawn by, by slot, as kernels take it: temperature, top_k, top_p and min_p. Slots of none are greedy."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # slots may be any numbers
        self._free: list[int] = []
        self._values = np.zeros((64, 4))  # the first is no slot's

    def put(self, slot: int, row: RowSettings) -> None:
        self.drop(slot)
        place = self._places[slot] = self._free.pop() if self._free else len(self._places) + 1
        if place == len(self._values):
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        self._values[place] = row.temperature, row.top_k, row.top_p, row.min_p

    def drop(self, slot: int) -> None:
        if slot in self._places:
            self._free.append(self._places.pop(slot))

    def of(self, slots: np.ndarray) -> np.ndarray:
        """[S, 4] float64 of these slots [S]."""
        return self._values[[self._places.get(slot, 0) for slot in slots.tolist()]]


def edits_of(settings: list[RowSettings], positions: np.ndarray, vocab_size: int) -> Iterator[Edit]:
    """What the rows' settings do to their logits, in transformers' order: logit_bias, penalties, min_new_tokens; then
    bad_words and allowed_token_ids, which leave no other ids whatever stands before them.

    positions [C]: of each row, the place in its sequence of the token that is sampled now.
    """

    def places(ids: Iterable[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        return [row * vocab_size + ids_of_row for row, ids_of_row in ids]

    counted = [(row, one, one.counts) for row, one in enumerate(settings) if one.counts is not None]
    if any(len(one.biases) for one in settings):
        yield _add(places((row, one.bias_ids) for row, one in enumerate(settings)), [one.biases for one in settings])
    repeated = [(row, one, counts) for row, one, counts in counted if one.repetition_penalty != 1]
    if repeated:
        factors = [np.full(len(counts.ids), one.repetition_penalty) for _, one, counts in repeated]
        yield _penalise(places((row, counts.ids) for row, _, counts in repeated), factors)
    openai = [(row, one, counts) for row, one, counts in counted if one.presence_penalty or one.frequency_penalty]
    if openai:
        values = [-_openai(one, counts.generated) for _, one, counts in openai]
        yield _add(places((row, counts.ids) for row, _, counts in openai), values)
    banned = [
        (row, one.banned)
        for row, one in enumerate(settings)
        if len(one.banned) and positions[row] - one.prompt_length < one.min_new_tokens
    ]
    banned += [(row, one.bad_words.banned()) for row, one in enumerate(settings) if one.bad_words is not None]
    if any(len(ids) for _, ids in banned):
        yield _ban(places(banned))
    allowing = [row for row, one in enumerate(settings) if len(one.allowed)]
    if allowing:
        yield allow(np.array(allowing), places((row, settings[row].allowed) for row in allowing), vocab_size)


def _openai(row: RowSettings, generated: np.ndarray) -> np.ndarray:
    """What presence and frequency penalties take from the logits of a row's tokens.

    OpenAI's formula (API reference, "frequency and presence penalties"), over generated tokens alone:
    mu[j] -> mu[j] - c[j] * frequency_penalty - (c[j] > 0) * presence_penalty.
    """
    return generated * row.frequency_penalty + (generated > 0) * row.presence_penalty


def _add(places: list[np.ndarray], values: list[np.ndarray]) -> Edit:
    """logit_bias as in transformers' SequenceBiasLogitsProcessor for single tokens, and what is taken for penalties."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        index = put(np.concatenate(places))
        scores[index] = (scores[index] + put(np.concatenate(values))).to(scores.dtype)

    return edit


def _penalise(places: list[np.ndarray], factors: list[np.ndarray]) -> Edit:
    """repetition_penalty, over prompt and generated tokens: transformers' RepetitionPenaltyLogitsProcessor (CTRL,
    Keskar et al. 2019): negative logits are multiplied by it, the others divided."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        index, factor = put(np.concatenate(places)), put(np.concatenate(factors))
        values = scores[index]
        scores[index] = torch.where(values < 0, values * factor, values / factor).to(scores.dtype)

    return edit


def _ban(places: list[np.ndarray]) -> Edit:
    """min_new_tokens: transformers' MinNewTokensLengthLogitsProcessor. bad_words: its NoBadWordsLogitsProcessor, over
    generated tokens alone, as in vLLM."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        scores.index_fill_(0, put(np.concatenate(places)), -torch.inf)  # an assignment would wait for the device

    return edit


def allow(rows: np.ndarray, places: list[np.ndarray], vocab_size: int) -> Edit:
    """allowed_token_ids, as in vLLM, and forced tokens: all other ids of these rows are impossible."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        index = put(np.concatenate(places))
        kept = scores[index]
        scores.view(-1, vocab_size).index_fill_(0, put(rows), -torch.inf)
        scores[index] = kept

    return edit
