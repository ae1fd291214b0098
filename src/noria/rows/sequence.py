"""A sequence, in line or in flight, and what the last rank must know of a row.

Knows token ids and pages; nothing of slots' order, budgets or devices.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from noria.rows.beginnings import Lead, PromptBlock
from noria.rows.ends import StopTexts
from noria.rows.guides import Guide, steers
from noria.rows.prompts import Prompt
from noria.rows.randomness import uniform
from noria.rows.reasoning import AnswerStops
from noria.sampling import Sampling
from noria.step import NO_STATE, PAGE_TOKENS, Run

_DEFAULT = Sampling().override({})


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt with the tokens generated so far. `cached` tokens of it are in the KV cache or on their way there.

    Its fields stand by who sets them: the maker, the results of steps, the line and the slots.
    """

    # What is asked, of the maker.
    prompt: Prompt
    sampling: Sampling
    prompt_token_ids: list[int]
    sample: int = 0
    drawn_as: int | None = None  # the row number by which its random numbers are drawn; None: its own
    num_cut: int = 0  # tokens of the prompt that truncate_prompt_tokens cut off
    bad_words: list[list[int]] = field(default_factory=list)  # each as token ids
    stop_texts: StopTexts | AnswerStops | None = None
    guide: Guide | None = None  # what steers it beside its settings
    # What it has made, of the results of its steps, and of an earlier job.
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # one a token generated, where the row asks for it
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # their top_ids and top_logprobs
    prompt_logprobs: np.ndarray | None = None  # [prompt tokens], where the row asks for it
    # Characters of the text (of its answer, where it thinks) up to the stop text that ended it.
    text_end: int | None = None
    finish_reason: str = "none"
    error: str = ""
    # Its place in the line.
    order: int = -1  # in which sequences were admitted first: the youngest is the last one
    returned: bool = False  # because pages were short: it reserves all that it may need from then on
    # Of its prompt, while it is in line: those that it may share.
    blocks: list[PromptBlock] = field(default_factory=list)
    cached_tokens: int = 0  # of its prompt, which were computed before it was admitted
    # What it holds in flight, of the slots.
    cached: int = 0
    slot: int = -1
    runs: tuple[Run, ...] = ()
    room: int = 0  # tokens that these pages hold
    num_own_pages: int = 0
    tier: int = 0  # in which its pages are, counted as in Capacity.tier_pages
    state: int = NO_STATE  # its own, where the family has arrays per sequence
    reads: int = NO_STATE  # what its next step begins from
    beginning: PromptBlock | None = None  # the last block that it shares
    lead: Lead | None = None  # what it computes for others too
    place: tuple[int, ...] = ()  # among the rows of a step: tier, shared runs of pages

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
        self.beginning = self.lead = None
        self.hold(())

    @property
    def scores(self) -> bool:
        """It fetches the prompt's log-probabilities, and so computes all of it."""
        return self.prompt_logprobs is not None

    @property
    def to_border(self) -> int:
        """Tokens up to the next place where it leaves a state for others; 0: there is none."""
        stops = self.lead.stops if self.lead is not None else ()
        return next((end - self.cached for end, _ in stops if end > self.cached), 0)

    def next_states(self, count: int) -> tuple[int, int]:
        """The states that its next step reads and writes, which computes `count` tokens; the one after reads what it wrote."""
        reads, writes = self.reads, self.state
        if self.lead is not None and count == self.to_border:
            writes = dict(self.lead.stops)[self.cached + count]
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


def sampler_settings(sequence: Sequence, end_token_ids: Iterable[int]) -> dict[str, Any]:
    """What the last rank must know of a row, for the header; keys that stand at their default are left out.

    The keys of config.Sampling that concern logits; `bad_words`: token ids that may not be sampled one after another;
    `masked`: masks may come with its steps (masks.py); `allowed`: ids that alone may be sampled; `banned`: ids that may not
    be sampled before min_new_tokens; `prompt_length`; `shared`: the tokens that the row's steps will not carry, where
    penalties or bad words must know them.
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
        settings["banned"] = sorted({*ends, *sampling.stop_ids})
        settings["min_new_tokens"] = sampling.min_new_tokens
    settings["prompt_length"] = len(sequence.prompt_token_ids)
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    if sequence.cached and (
        sequence.bad_words or any(getattr(sampling, name) != getattr(default, name) for name in penalties)
    ):
        settings["shared"] = (sequence.prompt_token_ids + sequence.token_ids)[: sequence.cached]
    return settings
