"""The order in which a rank's streamed blocks are loaded: one endless cycle over rounds, laps and groups.

Names alone: no memory, no stream.
"""

from collections import Counter
from collections.abc import Iterator, Sequence


class Cycle:
    """`visits`: the streamed blocks of each lap, in the order in which a visit uses them.

    A lap's blocks are loaded once a round for all groups where they fit in the slots and leave one free for what comes
    next, or where there is one group; otherwise once for each group.
    """

    def __init__(self, visits: Sequence[Sequence[str]], groups: int, slots: int):
        self._visits, self._groups = [tuple(names) for names in visits], groups
        self.once = [once(len(names), groups, slots) for names in self._visits]
        self._empty: Counter = Counter()
        self._names = self._all()

    def next(self) -> str:
        """The block to load next."""
        return next(self._names)

    def skip(self, round: int) -> None:
        """A group has nothing to compute in this round: its loads that are not on their way yet are left out."""
        self._empty[round] += 1

    def _all(self) -> Iterator[str]:
        round = 0
        while True:
            for lap, names in enumerate(self._visits):
                visits = 0
                while visits < self._wanted(round, lap):
                    yield from names
                    visits += 1
            del self._empty[round]
            round += 1

    def _wanted(self, round: int, lap: int) -> int:
        groups = self._groups - self._empty[round]
        return min(groups, 1) if self.once[lap] else groups


def once(num_streamed: int, groups: int, slots: int) -> bool:
    """Whether a visit's streamed blocks are loaded once a round, for all groups."""
    return groups == 1 or num_streamed <= slots - 1
