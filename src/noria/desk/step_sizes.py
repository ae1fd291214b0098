"""Sizes of steps that adapt where prefill is not as fast as planned: the size is kept that computes the most tokens a second.

Sizes change how prompts are cut into steps, never what comes out. Knows the plan's prediction; nothing of memory but that there
is room for steps of the planned size.
"""

import time
from collections.abc import Callable
from typing import Protocol

from noria.config import Config
from noria.masks import Pending
from noria.plan.plan import Plan, rate_words
from noria.step import Result, Step

OFF = 0.25  # of the plan's speed of prefill: from there on other sizes are tried
BETTER = 1.03  # times as fast, for a smaller size to be kept
SLOWER = 0.9  # times as fast as the best, from where on still smaller sizes are not tried
FULL = 0.9  # of a round's tokens: smaller ones say nothing
ROUNDS, SECONDS = 3, 1.0  # full rounds of a size, and their time, before its speed is known
LEAST_TOKENS = 256  # of a step that is tried


class Steps(Protocol):
    """A source of steps."""

    def compose(self, round: int, group: int) -> Step: ...

    def apply(self, step: Step, result: Result) -> None: ...

    def masks(self, group: int) -> Pending: ...

    def mask(self, step: Step) -> Step: ...


class Sized(Steps, Protocol):
    """One whose size may be set: the admission."""

    step_tokens: int


class StepSizes:
    """The steps of an admission: at first of the planned size; where that is off twice in a row, since first steps of a run
    are slow, then of halves of it, until one is slower, or two are no faster, than the best.

    Rank 0 calls `compose` for group 0 of a round when the results of that group's last step are there: so long a round takes.
    """

    def __init__(
        self, admission: Sized, plan: Plan, say: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ):
        self._admission, self._say, self._clock = admission, say, clock
        self._groups, self._planned = plan.groups, plan.predicted["prefill"]["tokens_per_second"]
        self._best = admission.step_tokens
        self._speeds: dict[int, float] = {}  # of the sizes that were tried
        self._settled, self._doubted = False, False
        self._began: float | None = None  # of the round that is under way
        self._tokens = self._rows = 0  # in it; rows that decode
        self._begin_size()

    def _begin_size(self) -> None:
        """Counts begin anew; the round that is under way still has steps of the size before."""
        self._rounds, self._seconds, self._counted, self._passed = 0, 0.0, 0, False

    def compose(self, round: int, group: int) -> Step:
        if group == 0 and not self._settled:
            self._end_round()
        step = self._admission.compose(round, group)
        self._tokens += step.num_tokens
        self._rows += int((step.counts == 1).sum()) if not self._settled else 0
        return step

    def apply(self, step: Step, result: Result) -> None:
        self._admission.apply(step, result)

    def masks(self, group: int) -> Pending:
        return self._admission.masks(group)

    def mask(self, step: Step) -> Step:
        return self._admission.mask(step)

    def _end_round(self) -> None:
        """The round before is over: counts it if it was full, and looks whether its size's speed is known now."""
        now = self._clock()
        full = self._tokens >= FULL * self._groups * self._admission.step_tokens > self._rows
        if self._began is not None and full and self._passed:
            self._rounds, self._seconds = self._rounds + 1, self._seconds + now - self._began
            self._counted += self._tokens
        self._passed = self._passed or full  # the first full round loads ahead for all others
        decoding = self._rows / self._groups
        self._began, self._tokens, self._rows = now, 0, 0
        if self._rounds >= ROUNDS and self._seconds >= SECONDS:
            self._judge(self._counted / self._seconds, decoding)

    def _judge(self, speed: float, decoding: float) -> None:
        """`speed`: of the present size, in steps of which so many tokens are rows that decode."""
        size = self._admission.step_tokens
        self._speeds[size] = speed
        as_planned = abs(speed / self._planned - 1) <= OFF
        if len(self._speeds) == 1 and (as_planned or not self._doubted):
            self._doubted = not as_planned
            self._begin_size()
            return
        if speed > BETTER * self._speeds[self._best]:
            self._best = size
        is_slower = speed < SLOWER * self._speeds[self._best]
        if not is_slower and size // 2 >= max(LEAST_TOKENS, 2 * decoding, self._best // 4):
            self._admission.step_tokens = size // 2
            self._begin_size()
            return
        self._settled, self._admission.step_tokens = True, self._best
        tried = ", ".join(f"{rate_words(speed)} with {size:,}" for size, speed in self._speeds.items())
        self._say(
            f"steps of {self._best:,} tokens from now on: prefill does {tried} a step (tok/s), where"
            f" {rate_words(self._planned)} were predicted"
        )


def adapting(config: Config, plan: Plan, say: Callable[[str], None]) -> Callable[[Sized], Steps]:
    """What makes an admission's steps adapt, unless the user has asked for a size."""
    return lambda admission: admission if config.pipeline.step_tokens else StepSizes(admission, plan, say)
