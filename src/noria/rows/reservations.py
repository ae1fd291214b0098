"""How many tokens of cache a row reserves: its prompt, and as many new ones as most rows of the run have needed.

Knows neither pages nor slots.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from noria.limits import RUN_PAGES
from noria.rows.sequence import Sequence
from noria.step import PAGE_TOKENS

ENOUGH = 32  # rows that have ended, before others are judged by them
REMEMBERED = 1024  # of them, the last ones: a run's later rows may be of another kind
QUANTILE = 0.9  # of the rows, which need no more than what a row reserves
GROWTH_TOKENS = 4 * RUN_PAGES * PAGE_TOKENS  # that a row which outgrows it takes at a time


@dataclass(frozen=True, eq=False)
class EarlierLengths:
    """New tokens of rows in earlier jobs of a run: [E] of those that ended, the last of them last; [H] of those that stopped
    half-way, which go on from there; [L] of those that were in flight when their job was killed, which begin again."""

    ended: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    half_way: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    lost: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class Reservations:
    """What rows reserve in a context of `max_positions` tokens. `before`: what earlier jobs tell of it."""

    def __init__(self, max_positions: int, before: EarlierLengths | None = None):
        self._max_positions, before = max_positions, before or EarlierLengths()
        self._ended: deque[int] = deque(before.ended.tolist(), maxlen=REMEMBERED)
        self._before, self._num_ended = before, 0  # in this job
        self._num_unseen = 0  # that ended since they were looked at
        self.usual: int | None = None  # new tokens of a row; None: all that it may generate
        self._judge(before.half_way)  # from now on they are in flight themselves

    def most(self, sequence: Sequence) -> int:
        """Tokens that the row may have at last, prompt and new ones."""
        return min(len(sequence.prompt_token_ids) + sequence.sampling.most_new_tokens, self._max_positions)

    def first(self, sequence: Sequence) -> int:
        """Tokens that the row reserves when it is admitted: all, if it had to return to the line."""
        most = self.most(sequence)
        if self.usual is None or sequence.returned:
            return most
        return min(most, max(len(sequence.prompt_token_ids) + self.usual, sequence.num_tokens + GROWTH_TOKENS))

    def grown(self, sequence: Sequence) -> int:
        """Tokens that it reserves from now on, since it has outgrown those that it had."""
        return min(self.most(sequence), sequence.room + GROWTH_TOKENS)

    def ended(self, num_new: int, running: Iterable[int]) -> None:
        """A row has ended with so many new tokens; others are `running`, with so many each so far."""
        self._ended.append(num_new)
        self._num_ended, self._num_unseen = self._num_ended + 1, self._num_unseen + 1
        if self._num_unseen >= ENOUGH // 2:
            self._judge(running)

    def _judge(self, running: Iterable[int]) -> None:
        """Looks at the rows that have ended, if they are enough."""
        if len(self._ended) < ENOUGH:
            return
        self._num_unseen = 0
        known = np.concatenate([self._lost(), np.fromiter(running, np.int64)])
        self.usual = needed(np.array(self._ended), known, QUANTILE)

    def _lost(self) -> np.ndarray:
        """The rows that a killed job lost count beside those that ended in it, which are the short ones if it was a short job.
        They are forgotten as those are, an equal share of all lengths."""
        ended, lost = self._before.ended, np.sort(self._before.lost)
        kept = min(len(ended), max(REMEMBERED - self._num_ended, 0)) / max(len(ended), 1)
        return lost[evenly(len(lost), round(kept * len(lost)))]


def evenly(count: int, kept: int) -> np.ndarray:
    """[kept] of so many places, as far apart as one another."""
    return np.linspace(0, count, kept, endpoint=False).astype(np.int64)


def needed(ended: np.ndarray, running: np.ndarray, quantile: float) -> int:
    """The number of tokens that suffices for this share of all rows.

    Of those that are `running` it is known only that they need more than they have: the estimator of Kaplan and Meier (1958),
    in which the share of rows that need more than t is the product, over the lengths up to t at which rows ended, of the
    share that went on there. Where too many still run to say so, rows are taken to go on ending as often as they did.
    """
    lengths, ends = np.unique(ended, return_counts=True)
    every = np.sort(np.concatenate([ended, running]))
    at_risk = len(every) - np.searchsorted(every, lengths)
    more = np.cumprod(1 - ends / at_risk)
    found = np.flatnonzero(more <= 1 - quantile + 1e-12)
    if len(found):
        return int(lengths[found[0]])
    return math.ceil(max(int(every[-1]), 1) * math.log(1 - quantile) / math.log(more[-1]))
