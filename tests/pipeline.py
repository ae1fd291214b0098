"""A discrete simulation of ranks that compute the steps of a real admission: when each is busy, and what its steps were.

Nothing is computed: a stage takes a + b x tokens + c x decoding rows, and results are the token 0.
"""

from dataclasses import dataclass, field

import numpy as np

from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.slots import Capacity
from noria.sampling import Sampling
from noria.step import Result, Word


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage: of a step, of each of its tokens, and of each row that decodes."""

    step: float
    token: float
    row: float

    def of(self, tokens: int, rows: int) -> float:
        return self.step + self.token * tokens + self.row * rows if tokens else 0.0


@dataclass
class Course:
    """What became of a run. steps: (round, group, tokens, decoding rows, end on each stage, seconds on each stage)."""

    steps: list = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max(ends[-1] for *_, ends, _ in self.steps)

    def idle(self, first: float = 0.0, last: float = 1.0) -> float:
        """The share of the stages' time that they had nothing to do between these shares of the run."""
        begin, end = first * self.seconds, last * self.seconds
        stages = len(self.steps[0][-1])
        busy = 0.0
        for *_, ends, seconds in self.steps:
            spans = zip(ends, seconds, strict=True)
            busy += sum(max(0.0, min(at, end) - max(at - took, begin)) for at, took in spans)
        return 1 - busy / (stages * (end - begin))


def simulate(lengths, capacity: Capacity, costs: list[Cost], hop: float = 0.0, host: float = 0.0):
    """The course of rows of these (prompt, new) tokens on a stage for each cost, one lap.

    A step begins on rank 0 when its group's last result is there; every rank takes steps in the order of rounds and groups.
    host: rank 0's seconds for a step; hop: a message's.
    """
    prompts = [
        Prompt(row, str(row), "", [1] * length, {"max_new_tokens": new}, "", None)
        for row, (length, new) in enumerate(lengths)
    ]
    source = Source(prompts, len(prompts), lambda prompt: prompt.token_ids, lambda sequence: None)
    admission = Admission(source, Sampling(), frozenset(), capacity)
    free, done, under_way, course = [0.0] * len(costs), [0.0] * capacity.groups, [None] * capacity.groups, Course()
    now = 0.0  # of rank 0's host
    for round in range(100_000):
        words = set()
        for group in range(capacity.groups):
            if under_way[group] is not None:
                now = max(now, done[group])
                admission.apply(under_way[group], Result(np.zeros(under_way[group].num_samples, np.int64)))
            step = admission.compose(round, group)
            words.add(step.word)
            under_way[group] = step if step.num_tokens else None
            if not step.num_tokens:
                continue
            now += host
            at, ends, seconds = now, [], []
            rows = int((step.counts == 1).sum())
            for stage, cost in enumerate(costs):
                took = cost.of(step.num_tokens, rows)
                free[stage] = at = max(at, free[stage]) + took
                ends.append(at)
                seconds.append(took)
                at += hop
            done[group] = at
            course.steps.append((round, group, step.num_tokens, rows, ends, seconds))
        if words == {Word.STOP}:
            return course
    raise AssertionError("the run does not end")
