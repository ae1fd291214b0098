"""Which sequences are in flight: admits prompts into slots, composes each group's step, takes results in.

Rank 0 alone has one. Knows slots, pages and tokens; nothing of devices, messages or files.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from noria.config import Sampling
from noria.rows.pages import Pages
from noria.rows.prompts import Prompt
from noria.rows.randomness import uniform
from noria.rows.stopping import finish_reason
from noria.step import NO_TOKEN, PAGE_TOKENS, Admitted, Result, Run, Step, Word


@dataclass
class Sequence:
    """A prompt with the tokens generated so far. `cached` tokens of it are in the KV cache or on their way there."""

    prompt: Prompt
    sampling: Sampling
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "none"
    error: str = ""
    cached: int = 0
    slot: int = -1
    runs: tuple[Run, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def pending(self, count: int) -> list[int]:
        """The next `count` token ids that are not in the cache yet."""
        known = len(self.prompt_token_ids)
        if self.cached >= known:
            return self.token_ids[self.cached - known : self.cached - known + count]
        return (self.prompt_token_ids[self.cached :] + self.token_ids)[:count]


@dataclass(frozen=True)
class Limits:
    """What admission may fill: see plan.planner, which chooses these numbers."""

    groups: int
    num_pages: int
    step_tokens: int
    microbatch_tokens: int
    microbatches: int
    max_positions: int


@dataclass
class Counted:
    """Tokens since somebody last looked and set them to 0."""

    tokens: int = 0
    prompt_tokens: int = 0


class Admission:
    """The sequences of all groups and those that wait.

    `num_prompts` is how many the iterable will give: groups are kept equally full. `finished` is called with every sequence
    that ended, whatever its end; `begun` gives a new one the tokens that an earlier job generated for it.
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
    ):
        self._prompts, self._left = iter(prompts), num_prompts
        self._tokenize, self._sampling, self._end_token_ids = tokenize, sampling, end_token_ids
        self._limits, self._finished, self._begun = limits, finished, begun
        self._pages = Pages(limits.num_pages)
        self._free_slots = [deque(_slots_of(group, limits.step_tokens)) for group in range(limits.groups)]
        self._active: list[dict[int, Sequence]] = [{} for _ in range(limits.groups)]
        self._pages_of_group = [0] * limits.groups
        self._released: list[list[int]] = [[] for _ in range(limits.groups)]
        self._waiting: Sequence | None = None
        self.counted = Counted()
        self._stopping = False
        self._over = False

    @property
    def num_active(self) -> int:
        return sum(len(active) for active in self._active)

    @property
    def done(self) -> bool:
        """No sequence is in flight and none waits."""
        return self.num_active == 0 and (self._stopping or self._next() is None)

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
                rows.append((sequence, self._chunk(sequence, budget)))
                budget -= rows[-1][1]
        admitted = []
        while budget > 0 and not self._stopping and (sequence := self._admit(group)):
            admitted.append(Admitted(sequence.slot, sequence.runs, asdict(sequence.sampling)))
            rows.append((sequence, self._chunk(sequence, budget)))
            budget -= rows[-1][1]
        released, self._released[group] = tuple(self._released[group]), []
        return self._step(round, group, released, tuple(admitted), rows)

    def apply(self, step: Step, result: Result) -> None:
        """Takes the sampled tokens of a step in; sequences that end leave their slots and pages."""
        active = self._active[step.group]
        for slot, token_id in zip(step.sample_slots.tolist(), result.token_ids.tolist(), strict=True):
            sequence = active.get(slot)
            if sequence is None:
                continue  # dropped by stop() while its step was under way
            if token_id == NO_TOKEN:
                sequence.error = f"logits are not finite after {len(sequence.token_ids)} tokens"
            else:
                sequence.token_ids.append(token_id)
                self.counted.tokens += 1
                sequence.finish_reason = finish_reason(
                    sequence.token_ids,
                    sequence.sampling,
                    self._end_token_ids,
                    len(sequence.prompt_token_ids),
                    self._limits.max_positions,
                )
            if sequence.error or sequence.finish_reason != "none":
                self._leave(step.group, sequence)
                self._finished(sequence)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        return min(sequence.num_tokens - sequence.cached, budget, self._limits.microbatch_tokens)

    def _next(self) -> Sequence | None:
        """The sequence that waits first. Prompts that cannot run are finished here, with their error."""
        while self._waiting is None:
            prompt = next(self._prompts, None)
            if prompt is None:
                return None
            self._left -= 1
            sequence = self._sequence(prompt)
            if sequence.error:
                self._finished(sequence)
            else:
                self._waiting = sequence
        return self._waiting

    def _sequence(self, prompt: Prompt) -> Sequence:
        sequence = Sequence(prompt, self._sampling, [], error=prompt.error or "")
        if sequence.error:
            return sequence
        try:
            sequence.sampling = self._sampling.override(prompt.sampling)
            sequence.prompt_token_ids = self._tokenize(prompt)
        except ValueError as error:
            sequence.error = str(error)
            return sequence
        self._begun(sequence)
        length, limit = len(sequence.prompt_token_ids), self._limits.max_positions
        pages = self._num_pages(sequence)
        if length >= limit:
            sequence.error = f"the prompt has {length} tokens, the model's context {limit}: shorten it"
        elif pages > self._limits.num_pages:
            room = self._limits.num_pages * PAGE_TOKENS
            sequence.error = (
                f"prompt and max_new_tokens need {pages * PAGE_TOKENS} tokens of cache, there is room for {room}:"
                " lower max_new_tokens or raise placement.gpu_memory"
            )
        return sequence

    def _num_pages(self, sequence: Sequence) -> int:
        tokens = len(sequence.prompt_token_ids) + sequence.sampling.max_new_tokens
        return -(-min(tokens, self._limits.max_positions) // PAGE_TOKENS)

    def _admit(self, group: int) -> Sequence | None:
        """Gives the first waiting sequence a slot and pages of this group, if there is room: its equal share of both."""
        sequence = self._next()
        if sequence is None:
            return None
        limits, active = self._limits, self._active[group]
        known = self.num_active + 1 + self._left
        count = self._num_pages(sequence)
        share = max(limits.num_pages // limits.groups, 1)
        if not self._free_slots[group] or len(active) >= -(-known // limits.groups):
            return None
        if active and self._pages_of_group[group] + count > share:
            return None
        runs = self._pages.reserve(count)
        if runs is None:
            return None
        sequence.slot, sequence.runs = self._free_slots[group].popleft(), runs
        self._pages_of_group[group] += count
        active[sequence.slot] = sequence
        self.counted.prompt_tokens += len(sequence.prompt_token_ids)
        self._waiting = None
        return sequence

    def _leave(self, group: int, sequence: Sequence) -> None:
        del self._active[group][sequence.slot]
        self._pages.release(sequence.runs)
        self._pages_of_group[group] -= sum(run.count for run in sequence.runs)
        self._released[group].append(sequence.slot)
        self._free_slots[group].append(sequence.slot)

    def _step(self, round: int, group: int, released: tuple, admitted: tuple, rows: list[tuple[Sequence, int]]) -> Step:
        token_ids: list[int] = []
        positions, sampled = [], []
        for sequence, count in rows:
            positions.append(sequence.cached)
            token_ids += sequence.pending(count)
            sequence.cached += count
            if sequence.cached == sequence.num_tokens:
                sampled.append((len(token_ids) - 1, sequence))
        counts = [count for _, count in rows]
        return Step(
            round,
            group,
            Word.RUN,
            released,
            admitted,
            np.array([sequence.slot for sequence, _ in rows], np.int32),
            np.array(counts, np.int32),
            np.array(positions, np.int32),
            np.array(token_ids, np.int32),
            np.array(cut(counts, self._limits.microbatch_tokens, self._limits.microbatches), np.int32),
            np.array([row for row, _ in sampled], np.int32),
            np.array([sequence.slot for _, sequence in sampled], np.int32),
            np.array([_uniform(sequence) for _, sequence in sampled], np.float64),
        )


def cut(counts: list[int], microbatch_tokens: int, least: int) -> list[int]:
    """Borders [K+1] that cut rows of these token counts into microbatches of at most `microbatch_tokens` tokens.

    At least `least` of them where there are as many rows; a row is never cut.
    """
    if not counts:
        return [0]
    target = min(microbatch_tokens, -(-sum(counts) // least))
    borders, tokens = [0], 0
    for row, count in enumerate(counts):
        rows_left, cuts_left = len(counts) - row, least - len(borders)
        if row > borders[-1] and (tokens + count > target or rows_left <= cuts_left):
            borders.append(row)
            tokens = 0
        tokens += count
    return [*borders, len(counts)]


def _slots_of(group: int, per_group: int) -> range:
    return range(group * per_group, (group + 1) * per_group)


def _uniform(sequence: Sequence) -> float:
    """The random number of the sequence's next token; a greedy row needs none."""
    if sequence.sampling.temperature == 0:
        return 0.0
    return uniform(sequence.sampling.seed, sequence.prompt.row, 0, len(sequence.token_ids))
