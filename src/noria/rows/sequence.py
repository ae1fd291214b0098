"""A sequence in flight, the samples that share a prompt, and what the last rank must know of a row.

Knows token ids and pages; nothing of slots' order, budgets or devices.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from noria.limits import RUN_PAGES
from noria.rows.ends import StopTexts
from noria.rows.guides import Guide, steers
from noria.rows.prompts import Prompt
from noria.rows.randomness import uniform
from noria.rows.reasoning import AnswerStops
from noria.sampling import Sampling
from noria.step import NO_STATE, PAGE_TOKENS, Run

_DEFAULT = Sampling().override({})


@dataclass(eq=False)
class Sequence:
    """A prompt with the tokens generated so far. `cached` tokens of it are in the KV cache or on their way there.

    logprobs: one a token generated; top: their top_ids and top_logprobs; prompt_logprobs [prompt tokens], each where
    the row asks for it. `drawn_as`: the row number by which its random numbers are drawn (None: its own).
    `text_end`: characters of the text (of its answer, where it thinks) up to the stop text that ended it (None: no such
    text). `num_cut`: tokens of the prompt that truncate_prompt_tokens cut off. `bad_words`: each as token ids. `guide`: what
    steers it beside its settings.
    """

    prompt: Prompt
    sampling: Sampling
    prompt_token_ids: list[int]
    sample: int = 0
    drawn_as: int | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "none"
    error: str = ""
    cached: int = 0
    slot: int = -1
    runs: tuple[Run, ...] = ()
    room: int = 0  # tokens that these pages hold
    num_own_pages: int = 0
    order: int = -1  # in which sequences were admitted first: the youngest is the last one
    returned: bool = False  # to the line, because pages were short: it reserves all that it may need from then on
    state: int = NO_STATE  # its own, where the family has arrays per sequence
    reads: int = NO_STATE  # what its next step begins from
    tier: int = 0  # in which its pages are, counted as in Capacity.tier_pages
    samples: "Samples | None" = None
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    prompt_logprobs: np.ndarray | None = None
    stop_texts: StopTexts | AnswerStops | None = None
    text_end: int | None = None
    num_cut: int = 0
    bad_words: list[list[int]] = field(default_factory=list)
    guide: Guide | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def hold(self, runs: tuple[Run, ...]) -> None:
        """These are its pages from now on."""
        self.runs, self.room = runs, sum(run.count for run in runs) * PAGE_TOKENS

    def give_back(self) -> None:
        """It is out of flight, with nothing but its tokens: it reserves all that it may need when it is admitted again."""
        self.returned = True
        self.cached, self.num_own_pages, self.state, self.reads = 0, 0, NO_STATE, NO_STATE
        self.hold(())

    @property
    def scores(self) -> bool:
        """The prompt's log-probabilities are this sequence's to fetch: once for all samples of a prompt."""
        return self.prompt_logprobs is not None and (self.samples is None or self.samples.leader is self)

    @property
    def to_border(self) -> int:
        """Tokens up to the end of what it computes for other samples too, where it leaves a state for them; 0: no more."""
        if self.samples is None or self.samples.leader is not self or self.samples.state == NO_STATE:
            return 0
        return max(sum(run.count for run in self.samples.shared) * PAGE_TOKENS - self.cached, 0)

    def next_states(self, count: int) -> tuple[int, int]:
        """The states that its next step reads and writes, which computes `count` tokens; the one after reads what it wrote."""
        reads, writes = self.reads, self.state
        if self.samples is not None and count == self.to_border:
            writes = self.samples.state
        self.reads = writes
        return reads, writes

    def pending(self, count: int) -> list[int]:
        """The next `count` token ids that are not in the cache yet."""
        known = len(self.prompt_token_ids)
        if self.cached >= known:
            return self.token_ids[self.cached - known : self.cached - known + count]
        return (self.prompt_token_ids[self.cached :] + self.token_ids)[:count]

    def uniform(self) -> float:
        """The random number of the next token; a greedy row needs none."""
        if not self.sampling.temperature:
            return 0.0
        row = self.prompt.row if self.drawn_as is None else self.drawn_as
        return uniform(self.sampling.seed or 0, row, self.sample, len(self.token_ids))


@dataclass(eq=False)
class Samples:
    """The samples of one prompt. The leader computes it; the others wait until it has, and share its whole pages.

    The page that the prompt fills in part is not shared: what it holds, a token at least, each sample computes anew.
    `shared` are held by all of them together as long as one waits; so is `state`, which the leader leaves at their end,
    where the family has arrays per sequence: all begin from it, and nobody writes it again.
    """

    leader: Sequence
    waiting: list[Sequence]
    shared: tuple[Run, ...] = ()
    state: int = NO_STATE


def num_whole_pages(sequence: Sequence) -> int:
    """How many pages the prompt fills, in whole multiples of RUN_PAGES, without those that hold its last token."""
    return (len(sequence.prompt_token_ids) - 1) // (RUN_PAGES * PAGE_TOKENS) * RUN_PAGES


def whole_pages(sequence: Sequence) -> tuple[Run, ...]:
    """The pages that the prompt fills, without the one that holds its last token."""
    count, runs = num_whole_pages(sequence), []
    for run in sequence.runs:
        if count:
            runs.append(Run(run.start, min(run.count, count)))
            count -= runs[-1].count
    return tuple(runs)


def sampler_settings(sequence: Sequence, end_token_ids: Iterable[int]) -> dict[str, Any]:
    """What the last rank must know of a row, for the header; keys that stand at their default are left out.

    The keys of config.Sampling that concern logits; `bad_words`: token ids that may not be sampled one after another;
    `masked`: masks may come with its steps (masks.py); `allowed`: ids that alone may be sampled; `banned`: ids that may not
    be sampled before min_new_tokens; `prompt_length`; `shared`: the tokens that the row's steps will not carry, where
    penalties must know them.
    """
    sampling, default = sequence.sampling, _DEFAULT
    settings: dict[str, Any] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs"):
        if getattr(sampling, name) != getattr(default, name):
            settings[name] = getattr(sampling, name)
    if sampling.logit_bias:
        settings["logit_bias"] = sampling.logit_bias
    if steers(sampling):
        settings["masked"] = True
    if sequence.bad_words:
        settings["bad_words"] = sequence.bad_words
    if sampling.allowed_token_ids:
        settings["allowed"] = sampling.allowed_token_ids
    if sampling.min_new_tokens:
        ends = () if sampling.ignore_eos else end_token_ids
        settings["banned"] = sorted({*ends, *(sampling.stop_token_ids or ())})
        settings["min_new_tokens"] = sampling.min_new_tokens
    settings["prompt_length"] = len(sequence.prompt_token_ids)
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    if any(getattr(sampling, name) != getattr(default, name) for name in penalties):
        settings["shared"] = sequence.prompt_token_ids[: sequence.cached]
    return settings
