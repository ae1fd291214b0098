"""The steps of a group, walked through without tokens: rows of one length begin, are computed in chunks and decode as
rows/admission.py composes them, so that it is known how many rounds that takes and what is in them.

Knows no plan, no rank and no rate.
"""

from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from noria.limits import GATHERED

NEVER = 1 << 60, 0  # a round, rows
SMALL = 0.5  # of the tokens of the round before: fewer are a rest of prompts
STEPS = 60  # are walked, before later rows are taken to go on like the last half of those that have begun
LONG = 1024  # steps of a wave that is looked at before it is over


@dataclass(frozen=True)
class Group:
    """What a group has to do: `rows`, at most so many of them at once, each with so many tokens of a prompt to compute and
    `after` more, each in a step of its own; tokens of a step, and of a chunk of one row.

    late: a step is composed before the result of the one before is there, so that a place goes free a round later.
    gathers: see rows/gathering.py.
    """

    rows: int
    most: int
    prompt: int
    after: int
    step_tokens: int
    chunk: int
    late: bool = False
    gathers: bool = False


@dataclass(slots=True)
class Walked:
    """Rounds with chunks and those without; tokens of rows that decode in both; chunks; rows that end in a round with chunks.

    small: of the rounds with chunks, those with a rest of prompts, each by what it lacks of the one before.
    """

    prefill_rounds: float = 0
    small: float = 0
    decode_rounds: float = 0
    beside: float = 0
    alone: float = 0
    chunks: float = 0
    early: float = 0

    def numbers(self) -> tuple[float, ...]:
        return self.prefill_rounds, self.small, self.decode_rounds, self.beside, self.alone, self.chunks, self.early

    def plus(self, since: tuple[float, ...], times: int) -> "Walked":
        """With what has come `since` so many times more."""
        pairs = zip(self.numbers(), since, strict=True)
        return Walked(*(value + times * (value - before) for value, before in pairs))


@lru_cache(2**14)
def walked(group: Group) -> Walked:
    """The rounds in which the group does all that."""
    return _Walk(group).run()


class _Walk:
    """filling: (tokens of a prompt that are left, how many rows have so many); ends, leaves: (the round from which on rows decode
    no longer, or have left their places; how many), behind them one that never comes."""

    def __init__(self, group: Group):
        self._group, self._round, self._walked = group, 0, Walked()
        self._waiting, self._free, self._decoding = group.rows, min(group.most, group.rows), 0
        self._filling: list[tuple[int, int]] = []
        self._ends, self._leaves = deque([NEVER]), deque([NEVER])
        self._left: int | None = None  # rows, since there was no room for another
        self._seen: list[tuple[object, int, tuple[float, ...]]] = []
        self._steps = 0
        self._computed = 0  # tokens of chunks in the last round that had any
        self._looks_at, self._looks_after = group.rows - group.most, LONG  # rows that wait, steps; -1: never again

    def run(self) -> Walked:
        ends, leaves = self._ends, self._leaves
        while self._waiting or self._filling or len(leaves) > 1:
            while ends[0][0] <= self._round:
                self._decoding -= ends.popleft()[1]
            while leaves[0][0] <= self._round:
                count = leaves.popleft()[1]
                self._free += count
                if self._left is not None:
                    self._left += count
            if self._waiting and (self._waiting <= self._looks_at or self._steps == self._looks_after):
                self._look()
            self._step()
        return self._walked

    def _look(self) -> None:
        """Once a wave, or more often where that is long: if all is as it was before, or enough has been walked, what came between
        is taken as often as it fits."""
        now, group, waiting = self._round, self._group, self._waiting
        ahead = (tuple((at - now, count) for at, count in queue if count) for queue in (self._ends, self._leaves))
        state = tuple(self._filling), *ahead, self._free, self._left
        same = next((seen for seen in self._seen if seen[0] == state), None)
        if same is None and self._steps > STEPS and len(self._seen) > 1:
            same = self._seen[len(self._seen) // 2]
        self._seen.append((state, waiting, self._walked.numbers()))
        self._looks_at, self._looks_after = waiting - group.most, self._steps + LONG
        if same is not None and same[1] > waiting:
            _, before, since = same
            often = waiting // (before - waiting)
            self._waiting -= often * (before - waiting)
            self._walked = self._walked.plus(since, often)
            self._looks_at = self._looks_after = -1

    def _step(self) -> None:
        """This round, and those after it that are like it."""
        group, alike, begun, chunks = self._group, 1, 0, 0
        budget = room = group.step_tokens - self._decoding
        filling: list[tuple[int, int]] = []
        for left, count in self._filling:
            number, budget = _take(filling, left, count, group.chunk, budget)
            chunks += number
            if number < count:
                filling.append((left, count - number))
        if budget > 0 and self._waiting and (chunks or self._left is None or self._opens()):
            if self._free:
                least = min(self._waiting, self._free)
                begun, budget = _take(filling, group.prompt, least, group.chunk, budget)
                self._waiting, self._free, chunks = self._waiting - begun, self._free - begun, chunks + begun
            if budget and self._waiting:
                self._left = 0 if group.gathers else None
        if not begun:
            alike, filling = self._alike(filling)
        self._count(chunks, room - budget, alike)
        self._round, self._steps, self._filling = self._round + alike, self._steps + 1, filling
        if filling and not all(left for left, _ in filling):
            self._begin(sum(count for left, count in filling if not left))
            self._filling = [one for one in filling if one[0]]

    def _alike(self, filling: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
        """How many rounds are like this one, in which no row begins; and what is left of the prompts after them."""
        before, until = self._filling, min(self._ends[0][0], self._leaves[0][0]) - self._round
        if not before or until == 1 or filling == before:
            return until, filling
        (left, count), (rest, _) = before[0], filling[0]
        if len(before) > 1 or count > 1:
            return 1, filling
        alike = max(min(until, (left - 1) // (left - rest)), 1)
        return alike, [(left - alike * (left - rest) if alike > 1 else rest, 1)]

    def _opens(self) -> bool:
        """Whether rows are admitted where none has a chunk yet: rows/gathering.py."""
        if self._decoding and (self._left or 0) < min(self._decoding // GATHERED, self._waiting):
            return False
        self._left = None
        return True

    def _begin(self, count: int) -> None:
        """The prompts of so many rows are computed: from this round on they decode."""
        ends = self._round + self._group.after
        if self._group.after:
            self._ends.insert(-1, (ends, count))
            self._decoding += count
        else:
            self._walked.early += count
        self._leaves.insert(-1, (ends + self._group.late, count))

    def _count(self, chunks: int, tokens: int, rounds: int) -> None:
        """So many rounds, each with so many chunks of so many tokens together."""
        walked = self._walked
        if chunks:
            walked.prefill_rounds += rounds
            walked.small += 1 - tokens / self._computed if tokens < SMALL * self._computed else 0.0
            walked.beside += rounds * self._decoding
            walked.chunks += rounds * chunks
            if self._ends[0][0] == self._round + rounds:
                walked.early += self._ends[0][1]
            self._computed = tokens
        elif self._decoding:
            walked.decode_rounds += rounds
            walked.alone += rounds * self._decoding


def _take(filling: list[tuple[int, int]], left: int, count: int, chunk: int, budget: int) -> tuple[int, int]:
    """Of so many rows with so much of their prompts left, how many compute a chunk, and what is left of the budget."""
    chunk = min(left, chunk)
    whole = budget // chunk
    if whole > count:
        whole = count
    if whole:
        filling.append((left - chunk, whole))
        budget -= whole * chunk
    if whole == count or not budget:
        return whole, budget
    filling.append((left - budget, 1))
    return whole + 1, 0
