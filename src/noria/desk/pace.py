"""How long the rounds of a run take, and whether a row is still worth beginning before the job's time is over."""

import time

from noria.plan.plan import Plan
from noria.plan.rounds import Workload
from noria.tools.work_left import Expected

ROUNDS_WORTH_IT = 20  # with less time left than these rounds take, a row would hardly be begun when it has to stop


class Pace:
    """The time of a step, a mean over the last ones. `seconds_left` are those until the run is stopped."""

    def __init__(self, groups: int):
        self._groups, self._step_seconds = groups, 0.0
        self._last: float | None = None
        self._seconds = 0.0  # that were left when the first step was made

    @property
    def round_seconds(self) -> float:
        return self._step_seconds * self._groups

    def step(self, seconds_left: float) -> bool:
        """Called once a step. Whether what is left is worth a row's prefill."""
        now = time.monotonic()
        if self._last is None:
            self._last, self._seconds = now, seconds_left
            return True
        self._step_seconds += (now - self._last - self._step_seconds) / 8
        self._last = now
        return seconds_left >= min(ROUNDS_WORTH_IT * self._groups * self._step_seconds, self._seconds / 10)


def expected(plan: Plan, load: Workload) -> Expected:
    """What a row takes, as the plan predicts it: rounds with chunks for its prompt, those that decode alone for new tokens."""
    rounds = plan.predicted.get("rounds")
    if rounds is None:
        return Expected(load.prompt_tokens, load.new_tokens, groups=plan.groups)
    seconds = {
        phase: rounds[phase] * plan.predicted[phase]["round_seconds"] / max(load.num_rows, 1) for phase in rounds
    }
    prompt, new = seconds["prefill"] / max(load.prompt_tokens, 1.0), seconds["decode"] / max(load.new_tokens, 1.0)
    return Expected(load.prompt_tokens, load.new_tokens, prompt, new, plan.groups)
