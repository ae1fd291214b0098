"""Which sequences are in flight: admits prompts into slots, composes each group's step, takes results in.

Rank 0 alone has one. Knows slots, pages and tokens; nothing of devices, messages or files.
"""

from array import array
from collections import deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from noria.errors import InputError
from noria.rows.composing import compose
from noria.rows.ends import finish_reason
from noria.rows.pages import Pages
from noria.rows.prompts import Prompt
from noria.rows.sequence import Family, Sequence, sampler_settings, whole_pages
from noria.rows.tokenizer import Tokenizer
from noria.rows.waiting import Line, num_pages, num_pages_soon
from noria.sampling import RULES, Sampling
from noria.step import NO_TOKEN, NONE_LEFT, PAGE_TOKENS, Admitted, Result, Run, Step, Word

# A row in several runs of pages has its keys and values copied together in every layer of every step: while less of a
# tier than this is free, the first in line waits for a run that holds its prompt and the first half of what it may
# generate. Few rows need more: waiting for all of it would keep more pages idle.
WHOLE_RUNS_BELOW = 0.15
# Keys that may leave a row no token.
EXCLUDING = (
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True)
class Limits:
    """What admission may fill: see plan.planner, which chooses these numbers.

    `tier_pages`: how many of the pages each tier has, the device's first (empty: all are the device's). A sequence has its
    pages in one tier; in one beyond the device at most `slot_pages`, as its microbatch has.
    """

    groups: int
    num_pages: int
    step_tokens: int
    microbatch_tokens: int
    microbatches: int
    max_positions: int
    vocab_size: int = 2**31
    tier_pages: tuple[int, ...] = ()
    slot_pages: int = 0
    end_words: str = ""

    @property
    def tiers(self) -> tuple[int, ...]:
        return self.tier_pages or (self.num_pages,)

    @property
    def most_pages(self) -> int:
        """Pages that one sequence can have."""
        device, *others = self.tiers
        return max(device, *(min(pages, self.slot_pages) for pages in others)) if others else device


@dataclass
class Counted:
    """Tokens since somebody last looked and set them to 0."""

    tokens: int = 0
    prompt_tokens: int = 0


class Admission:
    """The sequences of all groups and those that wait.

    `num_prompts` is how many of the prompts have samples to generate: groups are kept equally full. `finished` is
    called with every sequence that ended, whatever its end; `begun` gives a new one the tokens that an earlier job
    generated for it; `done` has the (row, sample) that an earlier job finished; `tokenizer` finds stop texts (None: there
    is none); `rules` are those of output/agreement.py.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        num_prompts: int,
        tokenize: Callable[[Prompt], list[int]],
        sampling: Sampling,
        end_token_ids: frozenset[int],
        limits: Limits,
        finished: Callable[[Sequence], None],
        begun: Callable[[Sequence], None] = lambda sequence: None,
        done: Container[tuple[int, int]] = frozenset(),
        tokenizer: Tokenizer | None = None,
        rules: int = RULES,
    ):
        self._line = Line(prompts, num_prompts, tokenize, sampling, limits, finished, begun, done, tokenizer, rules)
        self._end_token_ids = frozenset(token_id for token_id in end_token_ids if token_id < limits.vocab_size)
        self._limits, self._finished = limits, finished
        firsts = accumulate(limits.tiers, initial=0)
        self._pages = [Pages(count, first) for count, first in zip(limits.tiers, firsts, strict=False)]
        self._free_slots = [deque(_slots_of(group, limits.step_tokens)) for group in range(limits.groups)]
        self._active: list[dict[int, Sequence]] = [{} for _ in range(limits.groups)]
        self._pages_of_group = [[0] * len(self._pages) for _ in range(limits.groups)]
        self._released: list[list[int]] = [[] for _ in range(limits.groups)]
        self.counted = Counted()
        self._stopping = False
        self._over = False

    @property
    def samples(self) -> "array[int]":
        """Of each prompt read so far, in order, how many rows the output has of it."""
        return self._line.samples

    @property
    def num_rows(self) -> int:
        """How many rows the output has of the prompts read so far."""
        return self._line.num_rows

    @property
    def num_active(self) -> int:
        return sum(len(active) for active in self._active)

    @property
    def done(self) -> bool:
        """No sequence is in flight and none waits."""
        return self.num_active == 0 and (self._stopping or self._line.first() is None)

    @property
    def exhausted(self) -> bool:
        """No sequence is in flight, none waits, and no prompt is left that could run."""
        return self.num_active == 0 and self._line.first() is None

    def admit_no_more(self) -> None:
        """Sequences in flight go on to their ends; those that wait are left for another job."""
        self._stopping = True

    def stop(self) -> list[Sequence]:
        """Admits nothing more and drops what is in flight. Returns the unfinished sequences with their tokens so far."""
        self._stopping = True
        unfinished = [sequence for active in self._active for sequence in active.values()]
        for group, active in enumerate(self._active):
            for sequence in list(active.values()):
                self._leave(group, sequence)
        return unfinished

    def compose(self, round: int, group: int) -> Step:
        """The group's next step: a token for each decoding row, then chunks of prompts, then new prompts, in this budget.

        The run ends with whole rounds: when group 0 finds nothing left, all steps of that round say STOP.
        """
        if group == 0:
            self._over = self.done
        if self._over:
            return Step(round, group, Word.STOP)
        budget = self._limits.step_tokens
        active = self._active[group].values()
        rows = [(sequence, 1) for sequence in active if sequence.num_tokens - sequence.cached == 1]
        budget -= len(rows)
        for sequence in active:
            if budget > 0 and sequence.num_tokens - sequence.cached > 1:
                rows.append((sequence, self._take_chunk(sequence, budget)))
                budget -= rows[-1][1]
        admitted = []
        while budget > 0 and not self._stopping and (new := self._admit(group)):
            admitted.append(Admitted(new.slot, new.runs, sampler_settings(new, self._end_token_ids)))
            rows.append((new, self._take_chunk(new, budget)))
            budget -= rows[-1][1]
        rows.sort(key=lambda row: row[0].tier)  # a microbatch's pages are in one tier
        released, self._released[group] = tuple(self._released[group]), []
        return compose(round, group, released, tuple(admitted), rows, self._limits)

    def apply(self, step: Step, result: Result) -> None:
        """Takes the sampled tokens of a step in; sequences that end leave their slots and pages."""
        active = self._active[step.group]
        if len(step.score_rows):
            self._take_scores(step, result)
        sampled = zip(step.sample_slots.tolist(), result.token_ids.tolist(), strict=True)
        for place, (slot, token_id) in enumerate(sampled):
            sequence = active.get(slot)
            if sequence is None:
                continue  # dropped by stop() while its step was under way
            if sequence.family is not None:
                self._prompt_computed(sequence)
            if token_id == NO_TOKEN:
                sequence.error = f"logits are not finite after {len(sequence.token_ids)} tokens"
            elif token_id == NONE_LEFT:
                sequence.error = _none_left(sequence)
            else:
                self._take_token(sequence, token_id, result, place)
            if sequence.error or sequence.finish_reason != "none":
                self._end(step.group, sequence)
        if len(step.slots) > step.num_samples:
            for slot in step.slots.tolist():
                sequence = active.get(slot)
                if sequence and sequence.sampling.max_new_tokens == 0 and sequence.cached == sequence.num_tokens:
                    sequence.finish_reason = "length"
                    self._end(step.group, sequence)

    def _take_token(self, sequence: Sequence, token_id: int, result: Result, place: int) -> None:
        """A new token of a sequence, with its log-probabilities, and whether it ends the sequence."""
        sampling = sequence.sampling
        sequence.token_ids.append(token_id)
        self.counted.tokens += 1
        if sampling.logprobs is not None:
            sequence.logprobs.append(float(result.logprobs[place]))
            if sampling.logprobs:
                top = slice(0, sampling.logprobs)
                # copies: a view would keep the whole step's result, which is often page-locked
                sequence.top.append((result.top_ids[place, top].copy(), result.top_logprobs[place, top].copy()))
        limit = self._limits.max_positions
        prompt_length = len(sequence.prompt_token_ids)
        reason = finish_reason(sequence.token_ids, sampling, self._end_token_ids, prompt_length, limit)
        if sequence.stop_texts and reason != "stop":
            try:
                sequence.text_end = sequence.stop_texts.find(sequence.token_ids)
            except InputError as error:
                sequence.error = str(error)
            reason = reason if sequence.text_end is None else "stop"
        sequence.finish_reason = reason

    def _take_scores(self, step: Step, result: Result) -> None:
        """Log-probabilities of prompts: of each row, those of the tokens after the ones that this step computed."""
        ends = np.searchsorted(step.score_rows, np.cumsum(step.counts)).tolist()
        rows = zip(step.slots.tolist(), step.positions.tolist(), [0, *ends], ends, strict=False)
        for slot, position, start, end in rows:
            sequence = self._active[step.group].get(slot)
            if sequence is not None and sequence.prompt_logprobs is not None and end > start:
                values = result.prompt_logprobs[start:end]
                sequence.prompt_logprobs[position + 1 : position + 1 + end - start] = values
                if np.isnan(values).any():
                    sequence.error = f"logits are not finite in the prompt, before token {position + end - start}"

    def _prompt_computed(self, sequence: Sequence) -> None:
        """After the first answer to a family's leader every rank has the prompt's pages: the others may share them."""
        family, sequence.family = sequence.family, None
        if family is not None and family.leader is sequence and family.waiting:
            self._line.computed(family)

    def _end(self, group: int, sequence: Sequence) -> None:
        self._leave(group, sequence)
        self._finished(sequence)

    def _take_chunk(self, sequence: Sequence, budget: int) -> int:
        """How many of its tokens a sequence computes in this step; those of its prompt are counted."""
        count = min(sequence.num_tokens - sequence.cached, budget, self._limits.microbatch_tokens)
        left = len(sequence.prompt_token_ids) - sequence.cached
        alone = left - count == 1 and not sequence.token_ids  # the last one, which the next step takes as a decoded row
        self.counted.prompt_tokens += max(0, min(count, left)) + alone
        return count

    def _admit(self, group: int) -> Sequence | None:
        """Gives the first waiting sequence a slot and pages of this group, if there is room: its equal share of both."""
        sequence = self._line.first()
        if sequence is None:
            return None
        limits, active = self._limits, self._active[group]
        known = self.num_active + self._line.num_left
        if not self._free_slots[group] or len(active) >= -(-known // limits.groups):
            return None
        leader = sequence.family.leader if sequence.family is not None else sequence
        shared = sequence.family.shared if sequence.family is not None and leader is not sequence else ()
        count = num_pages(sequence, limits.max_positions) - sum(run.count for run in shared)
        tiers = range(len(self._pages)) if leader is sequence else [leader.tier]
        soon = num_pages_soon(sequence, limits.max_positions) - sum(run.count for run in shared)
        tier = next((tier for tier in tiers if self._has_room(group, tier, count, soon, shared)), None)
        if tier is None or (runs := self._pages[tier].reserve(count)) is None:
            return None
        self._pages[tier].share(shared)
        sequence.slot, sequence.num_own_pages, sequence.tier = self._free_slots[group].popleft(), count, tier
        sequence.runs = (*shared, *runs)
        sequence.cached = sum(run.count for run in shared) * PAGE_TOKENS
        self._pages_of_group[group][tier] += count
        active[sequence.slot] = sequence
        self._line.take()
        if sequence.family is not None:
            self._hold(sequence, sequence.family)
        return sequence

    def _has_room(self, group: int, tier: int, count: int, soon: int, shared: tuple[Run, ...]) -> bool:
        """Whether a sequence of this group may take `count` pages of a tier, of which it fills `soon` first: the group's equal
        share, or all if it is empty."""
        pages = self._pages[tier]
        if tier and count + sum(run.count for run in shared) > self._limits.slot_pages:
            return False
        share = max(pages.num_pages // self._limits.groups, 1)
        fair = not self._active[group] or self._pages_of_group[group][tier] + count <= share
        return fair and count <= pages.num_free and not self._waits_for_a_run(pages, soon)

    def _waits_for_a_run(self, pages: Pages, soon: int) -> bool:
        """Whether no free run holds so many pages, and one may later: pages are short, and sequences in flight free some."""
        short = pages.num_free < WHOLE_RUNS_BELOW * pages.num_pages
        return short and pages.longest < soon and self.num_active > 0

    def _hold(self, sequence: Sequence, family: Family) -> None:
        """A family holds the pages of its prompt from its leader's admission to that of its last sample.

        That never keeps the first in line waiting for ever: while the samples of a computed prompt wait, no other
        leader is admitted. So all families of which samples wait had their leaders in flight at once, each with pages
        for itself.
        """
        if family.leader is sequence:
            family.shared = whole_pages(sequence)
            self._pages[sequence.tier].share(family.shared)
        elif not family.waiting:
            self._pages[sequence.tier].release(family.shared)
            family.shared = ()

    def _leave(self, group: int, sequence: Sequence) -> None:
        del self._active[group][sequence.slot]
        self._pages[sequence.tier].release(sequence.runs)
        self._pages_of_group[group][sequence.tier] -= sequence.num_own_pages
        self._released[group].append(sequence.slot)
        self._free_slots[group].append(sequence.slot)


def _none_left(sequence: Sequence) -> str:
    """What is said of a row whose own settings leave no token: those that can, by name."""
    default, sampling = Sampling(), sequence.sampling
    named = [name for name in EXCLUDING if getattr(sampling, name, None) != getattr(default, name, None)]
    given = ", ".join(f"{name} {str(getattr(sampling, name))[:40]}" for name in named) or "the settings of the row"
    return (
        f"no token is left after {len(sequence.token_ids)} tokens: {given}: they exclude all, or make logits infinite"
    )


def _slots_of(group: int, per_group: int) -> range:
    return range(group * per_group, (group + 1) * per_group)
