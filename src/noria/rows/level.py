"""Steps of nearly equal time on the ranks of a pipeline: how many tokens of prompts a group computes beside its decoding rows,
and which group gives its rows to the others at a run's end.

A rank that has a long step of one group waits for nobody, but others wait for it, unless the steps of the other groups take as
long together. Knows costs as numbers of prompt tokens; nothing of devices, layers or messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 128  # of prompts in a step, where there are any: rows that wait for their prompts decode nothing
SHARE = 0.7  # of the time of the other groups' last steps: their next ones are shorter or longer
GAIN = 0.97  # of a round's time: what is left of it where a group's rows are worth moving
GROWTH = 1.25  # times the others' mean: where all groups have prompts, all steps get longer together


@dataclass(frozen=True)
class StepCosts:
    """What a step costs, in tokens of prompts that take as long: `step`, whatever is in it, and `row`, each row that decodes.

    ranks: that a step passes one after another; turn: what passes between a group's steps, whatever other groups do.
    """

    ranks: int
    step: float
    row: float
    turn: float = 0.0


class Level:
    """The costs of the groups' last steps, and how many tokens a next one may have so that no rank waits for it.

    A step of time B passes N ranks one after another, in which each of them has the steps of the others to compute: it is
    waited for where N x B is more than B and those of the others together. Without `costs` a step may have any size.
    """

    def __init__(self, groups: int, costs: StepCosts | None):
        self._costs = costs
        self._last = [0.0] * groups
        self._most_rows = 0  # that decode in a step, so far

    def most(self, group: int, rows: int, step_tokens: int) -> int:
        """Tokens of a group's next step in which so many rows decode, of at most so many."""
        others = [cost for other, cost in enumerate(self._last) if cost and other != group]
        if self._costs is None or not others:
            return step_tokens
        longest = max(SHARE * sum(others) / (self._costs.ranks - 1), GROWTH * sum(others) / len(others))
        prompts = max(int(longest - self._cost(self._costs, rows, rows)), LEAST_TOKENS)
        return min(step_tokens, rows + prompts)

    def took(self, group: int, tokens: int, rows: int) -> None:
        """The group's step that was just composed has so many tokens, of which so many are rows that decode."""
        self._most_rows = max(self._most_rows, rows)
        if self._costs is not None:
            self._last[group] = self._cost(self._costs, tokens, rows) if tokens else 0.0

    def spread(self, group: int, rows: Sequence[int]) -> list[int]:
        """How many of its rows a group gives to each group, where all decode and none follows; empty: a round takes less time if
        it keeps them. rows: of each group.

        No step gets more rows than one had before: what is planned for them suffices.
        """
        others = [count for other, count in enumerate(rows) if count and other != group]
        if self._costs is None or not rows[group] or not others:
            return []
        level = next(level for level in range(max(others) + rows[group] + 1) if _room(others, level) >= rows[group])
        given, left = [0] * len(rows), rows[group]
        for other, count in enumerate(rows):
            if count and other != group:
                given[other] = min(max(level - count, 0), left)
                left -= given[other]
        after = [0 if other == group else count + given[other] for other, count in enumerate(rows)]
        gains = self._round(self._costs, after) < GAIN * self._round(self._costs, rows)
        return given if gains and max(after) <= self._most_rows else []

    def _round(self, costs: StepCosts, rows: Sequence[int]) -> float:
        """The time of a round in which so many rows of each group decode: a rank has all steps to compute, a step all ranks to
        pass."""
        steps = [self._cost(costs, count, count) for count in rows if count]
        return max(sum(steps), costs.ranks * max(steps) + costs.turn)

    def _cost(self, costs: StepCosts, tokens: int, rows: int) -> float:
        return costs.step + tokens - rows + costs.row * rows


def _room(rows: Sequence[int], level: int) -> int:
    """How many more rows make so many of each."""
    return sum(max(level - count, 0) for count in rows)
