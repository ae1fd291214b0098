"""How many tokens of cache a row reserves: its prompt, and as many new ones as most rows of the run have needed.

Knows neither pages nor slots.
"""

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from noria.limits import RUN_PAGES
from noria.rows.sequence import Sequence
from noria.step import PAGE_TOKENS

ENOUGH = 32  # rows that have ended, before others are judged by them
REMEMBERED = 1024  # of them, the last ones: a run's later rows may be of another kind
QUANTILE = 0.9  # of the rows, which need no more than what a row reserves
GROWTH_TOKENS = 4 * RUN_PAGES * PAGE_TOKENS  # that a row which outgrows it takes at a time


class Reservations:
    """What rows reserve in a context of `max_positions` tokens."""

    def __init__(self, max_positions: int):
        self._max_positions = max_positions
        self._ended: deque[int] = deque(maxlen=REMEMBERED)
        self._num_unseen = 0
        self.usual: int | None = None  # new tokens of a row; None: all that it may generate

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
        self._num_unseen += 1
        if len(self._ended) >= ENOUGH and self._num_unseen >= ENOUGH // 2:
            self._num_unseen = 0
            self.usual = needed(np.array(self._ended), np.fromiter(running, np.int64), QUANTILE)


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
