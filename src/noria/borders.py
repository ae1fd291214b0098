"""Finer borders of a step's microbatches, where memory did not suffice for those that it came with. Plain numbers."""

import itertools
from collections.abc import Sequence


def halved(borders: Sequence[int]) -> list[int]:
    """Borders [K+1], in rows, with every microbatch of two rows or more in two."""
    finer = list(borders[:1])
    for first, last in itertools.pairwise(borders):
        finer += [(first + last) // 2] * (last - first > 1) + [last]
    return finer


def refined(borders: Sequence[int], counts: Sequence[int], most: int | None) -> list[int]:
    """Borders whose microbatches have at most `most` tokens (None: as they are), or one row. counts: tokens of each row."""
    finer = list(borders)
    while finer and most is not None:
        pairs = itertools.pairwise(finer)
        cut = [finer[0], *(border for pair in pairs for border in _cut(pair, counts, most))]
        if cut == finer:
            break
        finer = cut
    return finer


def largest(borders: Sequence[int], counts: Sequence[int]) -> int:
    """Tokens of the largest microbatch."""
    return max((sum(counts[first:last]) for first, last in itertools.pairwise(borders)), default=0)


def _cut(pair: tuple[int, int], counts: Sequence[int], most: int) -> list[int]:
    """The borders after the first one of a microbatch, cut in two if it has more than `most` tokens."""
    return halved(pair)[1:] if sum(counts[slice(*pair)]) > most else [pair[1]]
