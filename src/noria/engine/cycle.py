"""The order in which a rank's streamed blocks are loaded: one endless cycle over rounds, laps and groups.

Names alone: no memory, no stream.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from noria.limits import loaded_once


class Cycle:
    """`visits`: the streamed blocks of each lap, in the order in which a visit uses them.

    A lap's blocks are loaded once a round for all groups where they fit in the slots and leave one free for what comes
    next, or where there is one group; otherwise once for each group.
    """

    def __init__(self, visits: Sequence[Sequence[str]], groups: int, slots: int):
        self._visits, self._groups, self.slots = [tuple(names) for names in visits], groups, slots
        self.once = [loaded_once(len(names), groups, slots) for names in self._visits]
        self._round, self._empty = -1, 0
        self._names = self._order(0, groups)

    def next(self) -> str:
        """The block to load next."""
        return next(self._names)

    def lets_go(self, lap: int, group: int) -> bool:
        """Whether a block that this visit has used is not needed again before it is loaded again."""
        return not self.once[lap] or group == self._groups - 1

    def skip(self, round: int, group: int, ahead: Sequence[str]) -> bool:
        """A group turns out to have nothing to compute in this round, on lap 0: the order goes on with the group after it.

        Whether that is what the loads `ahead` are for; if not they are in vain, and the order goes on as without them.
        """
        self._empty = self._empty + 1 if round == self._round else 1
        self._round = round
        came, full = group + 1 - self._empty, self._groups - self._empty
        self._names = self._order(came, full)
        if list(islice(self._names, len(ahead))) == list(ahead):
            return True
        self._names = self._order(came, full)
        return False

    def _order(self, came: int, full: int) -> Iterator[str]:
        """The blocks to load from where `came` of the `full` groups that compute in this round have been on lap 0."""
        while True:
            for lap, names in enumerate(self._visits):
                for _ in range(self._times(lap, full) - self._times(lap, came)):
                    yield from names
                came = 0
            full = self._groups

    def _times(self, lap: int, groups: int) -> int:
        return min(groups, 1) if self.once[lap] else groups
