"""When new rows are admitted where steps that only decode are cheap: several at once, not each as soon as there is room for it.

A step with prompts is not replayed as a graph, and costs a job of few rows about as much as two that are. So where rows end
one by one, some of them are let go first. Knows rows as numbers; nothing of pages, prompts or devices.
"""

from noria.limits import GATHERED


class Gathering:
    """Of each group, how many rows have left it since there was no room for another. `worth`: whether any are waited for."""

    def __init__(self, groups: int, worth: bool):
        self._worth = worth
        self._left: list[int | None] = [None] * groups  # None: there was room

    def full(self, group: int) -> None:
        """The group had no room for the row that waits first."""
        self._left[group] = 0

    def left(self, group: int) -> None:
        """A row has left the group."""
        count = self._left[group]
        if count is not None:
            self._left[group] = count + 1

    def opens(self, group: int, decoding: int, prompts: bool, waiting: int) -> bool:
        """Whether rows are admitted in the group's next step, in which so many rows decode, and `prompts` are computed anyway;
        `waiting`: rows that are still to come."""
        count = self._left[group]
        if not self._worth or count is None or prompts or not decoding:
            return True
        if count < min(decoding // GATHERED, waiting):
            return False
        self._left[group] = None
        return True
