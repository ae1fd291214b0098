"""Makes sequences of prompts, and says what is wrong with those that cannot run. Knows no line, slots or pages."""

from array import array
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from noria.errors import InputError, require
from noria.rows.ends import with_special_stops
from noria.rows.guides import Guides
from noria.rows.prompts import Prompt
from noria.rows.reasoning import stops_of
from noria.rows.reservations import EarlierLengths
from noria.rows.sequence import Sequence
from noria.rows.tokenizer import Tokenizer
from noria.sampling import OLD_RULES, OPEN, OPEN_IN_REQUESTS, RULES, Sampling
from noria.step import PAGE_TOKENS, pages_for


class Room(Protocol):
    """What a sequence is held against: rows.slots.Capacity, or desk.validation.ModelLimits where there are no ranks."""

    @property
    def max_positions(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def most_pages(self) -> int: ...

    @property
    def end_words(self) -> str: ...  # why the context ends there, where the model's config.json says so


@dataclass(frozen=True)
class Source:
    """The prompts of a run, what makes sequences of them, and who is told of them.

    num_prompts: how many of the prompts have samples that are not `done`; finished: called with every sequence that
    ended, whatever its end; tokenizer: reads texts, with `encode` and without (None: the checkpoint has none); begun:
    gives a new sequence the tokens that an earlier job generated for it; done: the (row, sample) that an earlier job
    finished; lengths: of rows in earlier jobs.
    """

    prompts: Iterable[Prompt]
    num_prompts: int
    encode: Callable[[Prompt], list[int]]
    finished: Callable[[Sequence], None]
    tokenizer: Tokenizer | None = None
    begun: Callable[[Sequence], None] = lambda sequence: None
    done: Container[tuple[int, int]] = frozenset()
    lengths: EarlierLengths = EarlierLengths()


class Maker:
    """Sequences of a run's prompts.

    Where the source has a tokenizer stop texts are found; one that is a special token is that token, because texts do not
    show it. `rules` are those of output/agreement.py. `samples`: of each prompt so far, in order, how many rows it has (an
    error too: one for each sample); `num_rows` their sum.
    """

    def __init__(self, source: Source, sampling: Sampling, limits: Room, rules: int = RULES):
        self._source, self._sampling, self._limits, self._rules = source, sampling, limits, rules
        self._plain = [of_row({}, request, sampling, rules) for request in (False, True)]  # rows without own keys
        tokenizer = source.tokenizer
        self._tokenizer = tokenizer if tokenizer and tokenizer.vocab_size else None
        self._special_ids = tokenizer.special_ids if tokenizer else {}
        self.guides = Guides(tokenizer, limits.vocab_size, sampling)
        self.samples, self.num_rows = array("i"), 0
        self._num_left = source.num_prompts

    def of(self, prompt: Prompt) -> list[Sequence]:
        """The samples of a prompt that are to be generated. Those of one that cannot run are finished here, with their error."""
        sampling, error = self._settings(prompt)
        self.samples.append(sampling.n)
        self.num_rows += sampling.n
        numbers = [sample for sample in range(sampling.n) if (prompt.row, sample) not in self._source.done]
        if not numbers:
            return []
        self._num_left = max(0, self._num_left - 1)
        first = self._sequence(prompt, sampling, error)
        sequences = [self._sample(first, sample) for sample in numbers]
        if not first.error:
            return sequences
        for sequence in sequences:
            self._source.finished(sequence)
        return []

    @property
    def num_unread(self) -> int:
        """Sequences that are still in the prompts, as far as that can be known."""
        return self._num_left * self._sampling.n

    def _settings(self, prompt: Prompt) -> tuple[Sampling, str]:
        """How the prompt is sampled (the run's way, if its own keys are wrong) and what is wrong with it."""
        if prompt.error:
            return self._sampling, prompt.error
        sampling = self._sampling
        try:
            own, request = prompt.sampling, prompt.request
            sampling = of_row(own, request, self._sampling, self._rules) if own else self._plain[request]
            return with_special_stops(sampling.check(), self._special_ids), ""
        except ValueError as error:
            return sampling, str(error)

    def _sample(self, first: Sequence, sample: int) -> Sequence:
        """Another sequence like the first one of a prompt."""
        sampling = first.sampling
        drawn_as = 0 if self._rules > OLD_RULES and "seed" in first.prompt.sampling else None
        sequence = Sequence(first.prompt, sampling, first.prompt_token_ids, sample, drawn_as, error=first.error)
        sequence.num_cut, sequence.bad_words = first.num_cut, first.bad_words
        if sequence.error:
            return sequence
        if sampling.scores_prompt:
            sequence.prompt_logprobs = np.full(len(first.prompt_token_ids), np.nan)
        self._source.begun(sequence)
        return sequence

    def steer(self, sequence: Sequence) -> None:
        """Gives a sequence that is admitted what looks at its tokens, told of those that it has. Tokens of an earlier job that
        a constraint does not take (by another version of its library) are generated anew."""
        sampling, prompt = sequence.sampling, sequence.prompt_token_ids
        reasoning = self.guides.reasoning(sampling, prompt, bool(sequence.prompt.beside.get("continue_final_message")))
        if sampling.stop_texts:
            assert self._tokenizer is not None, "stop texts without a tokenizer are the row's error"
            sequence.stop_texts = stops_of(sampling, self._tokenizer, prompt, reasoning)
        sequence.guide = self.guides.guide(sampling, reasoning)
        if sequence.guide is not None and not sequence.guide.told(sequence.token_ids):
            sequence.token_ids, sequence.logprobs, sequence.top = [], [], []
            self.steer(sequence)

    def _sequence(self, prompt: Prompt, sampling: Sampling, error: str) -> Sequence:
        """A sequence of the prompt, or why it cannot run."""
        sequence = Sequence(prompt, sampling, [], error=error)
        if error:
            return sequence
        try:
            ids = self._source.encode(prompt)
            keep = kept_tokens(sampling, self._limits.max_positions)
            sequence.prompt_token_ids = ids if keep is None else ids[-keep:]
            sequence.num_cut = len(ids) - len(sequence.prompt_token_ids)
            sequence.bad_words = bad_words(sampling, self._tokenizer, self._limits.vocab_size)
            self.guides.check(sampling, sequence.prompt_token_ids)
        except ValueError as wrong:
            sequence.error = str(wrong)
        else:
            sequence.error = self._too_long(sequence) or unknown_ids(sampling, self._limits.vocab_size) or ""
            if sampling.stop_texts and self._tokenizer is None:
                sequence.error = "stop: the checkpoint has no tokenizer to read texts with: give stop_token_ids"
        return sequence

    def _too_long(self, sequence: Sequence) -> str | None:
        length, limit = len(sequence.prompt_token_ids), self._limits.max_positions
        pages = num_pages(sequence, limit)
        if length + (sequence.sampling.most_new_tokens > 0) > limit:
            why = f" ({self._limits.end_words})" if self._limits.end_words else ""
            return f"the prompt has {length} tokens, the model's context {limit}{why}: shorten it"
        if pages > self._limits.most_pages:
            room = self._limits.most_pages * PAGE_TOKENS
            return (
                f"prompt and max_new_tokens need {pages * PAGE_TOKENS} tokens of cache, there is room for {room}:"
                " lower max_new_tokens, or give the cache more room (placement.cache, or the memory of its tier)"
            )
        return None


def kept_tokens(sampling: Sampling, max_positions: int) -> int | None:
    """How many of a prompt's last tokens are kept at most; None: all. Raises InputError where the context leaves none.

    A request that says no max_new_tokens leaves room for as many as a row that says none.
    """
    if sampling.truncate_prompt_tokens != -1:
        return sampling.truncate_prompt_tokens
    most = sampling.most_new_tokens
    most = int(OPEN["max_new_tokens"]) if most == OPEN_IN_REQUESTS["max_new_tokens"] else most
    require(
        most < max_positions,
        f"truncate_prompt_tokens is -1, and max_new_tokens ({most}) leaves nothing of the model's context of"
        f" {max_positions} for the prompt: lower max_new_tokens",
    )
    return max_positions - most


def bad_words(sampling: Sampling, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """The token ids of each of the row's bad words: alone, after a space, and at the beginning of a line, where they differ.

    vLLM takes the second only where it has as many tokens as the first, so that a word which is one token after a space
    and several alone is generated there; it lacks the third, which tokenizers that begin every text with a space write
    otherwise. Spaces that a word begins with say nothing, as there. Raises InputError for a text without tokens.
    """
    found: list[list[int]] = []
    for text in sampling.bad_texts:
        if tokenizer is None or not tokenizer.vocab_size:
            raise InputError("bad_words: the checkpoint has no tokenizer to read texts with: give logit_bias")
        word = text.lstrip(" ") or text
        alone, spaced, line, begun = (
            tokenizer.encode(one, add_special_tokens=False) for one in (word, f" {word}", "\n", f"\n{word}")
        )
        require(alone, f"bad_words has {text!r}: the tokenizer makes no tokens of it")
        begun = begun[len(line) :] if begun[: len(line)] == line else []
        found += [ids for ids in (alone, spaced, begun) if ids]
    # Ids that the model lacks are never generated.
    return [ids for place, ids in enumerate(found) if ids not in found[:place] and max(ids) < vocab_size]


def of_row(own: Mapping[str, Any], request: bool, sampling: Sampling, rules: int = RULES) -> Sampling:
    """How a row is sampled: by its own keys, else the run's (which have the model's), else by the defaults of its kind.

    `request`: it is a line of OpenAI's batch format. Raises InputError for a wrong value.
    """
    return sampling.override(own, OPEN_IN_REQUESTS if request and rules > OLD_RULES else {})


def unknown_ids(sampling: Sampling, vocab_size: int) -> str | None:
    """What is said if a key names a token that the model does not have."""
    named = {"stop_token_ids": sampling.stop_token_ids, "logit_bias": map(int, sampling.logit_bias or ())}
    named["allowed_token_ids"] = sampling.allowed_token_ids
    for name, ids in named.items():
        for token_id in ids or ():
            if token_id >= vocab_size:
                return f"{name} has {token_id}: the model's vocabulary has {vocab_size} token ids, from 0"
    return None


def num_pages(sequence: Sequence, max_positions: int) -> int:
    """Pages for the prompt and all tokens that may follow."""
    tokens = len(sequence.prompt_token_ids) + sequence.sampling.most_new_tokens
    return pages_for(min(tokens, max_positions))
