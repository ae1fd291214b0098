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


@dataclass(eq=False)
class RowSettings:
    """How one row is sampled; see rows/sequence.py: sampler_settings. `logprobs`: how many of the likely ids; -1: no
    log-probabilities. `greedy`: its token is the most likely one of the raw logits."""

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
    counts: Counts | None = None
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
        )
        if row.repetition_penalty != 1 or row.presence_penalty or row.frequency_penalty:
            row.counts = Counts(row.prompt_length)
            row.counts.add(settings.get("shared", []), 0)
        row.greedy = row.temperature == 0 and row.counts is None and not len(row.banned) and not bias
        return row


def edits_of(settings: list[RowSettings], positions: np.ndarray, vocab_size: int) -> Iterator[Edit]:
    """What the rows' settings do to their logits, in transformers' order: logit_bias, penalties, min_new_tokens.

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
    if banned:
        yield _ban(places(banned))


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
        scores[index] = scores[index] + put(np.concatenate(values))

    return edit


def _penalise(places: list[np.ndarray], factors: list[np.ndarray]) -> Edit:
    """repetition_penalty, over prompt and generated tokens: transformers' RepetitionPenaltyLogitsProcessor (CTRL,
    Keskar et al. 2019): negative logits are multiplied by it, the others divided."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        index, factor = put(np.concatenate(places)), put(np.concatenate(factors))
        values = scores[index]
        scores[index] = torch.where(values < 0, values * factor, values / factor)

    return edit


def _ban(places: list[np.ndarray]) -> Edit:
    """min_new_tokens: transformers' MinNewTokensLengthLogitsProcessor."""

    def edit(scores: torch.Tensor, put: Put) -> None:
        scores.index_fill_(0, put(np.concatenate(places)), -torch.inf)  # an assignment would wait for the device

    return edit
