"""Steps of nearly equal time on the ranks of a pipeline: how many tokens of prompts a group computes beside its decoding rows.

A rank that has a long step of one group waits for nobody, but others wait for it, unless the steps of the other groups take as
long together. Knows costs as numbers of prompt tokens; nothing of devices, layers or messages.
"""

from dataclasses import dataclass

LEAST_TOKENS = 128  # of prompts in a step, where there are any: rows that wait for their prompts decode nothing
SHARE = 0.7  # of the time of the other groups' last steps: their next ones are shorter or longer
GROWTH = 1.25  # times the others' mean: where all groups have prompts, all steps get longer together


@dataclass(frozen=True)
class StepCosts:
    """What a step costs, in tokens of prompts that take as long: `step`, whatever is in it, and `row`, each row that decodes.

    ranks: that a step passes one after another.
    """

    ranks: int
    step: float
    row: float


class Level:
    """The costs of the groups' last steps, and how many tokens a next one may have so that no rank waits for it.

    A step of time B passes N ranks one after another, in which each of them has the steps of the others to compute: it is
    waited for where N x B is more than B and those of the others together. Without `costs` a step may have any size.
    """

    def __init__(self, groups: int, costs: StepCosts | None):
        self._costs = costs
        self._last = [0.0] * groups

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
        if self._costs is not None:
            self._last[group] = self._cost(self._costs, tokens, rows) if tokens else 0.0

    def _cost(self, costs: StepCosts, tokens: int, rows: int) -> float:
        return costs.step + tokens - rows + costs.row * rows
