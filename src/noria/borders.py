"""Borders of a step's microbatches, [K+1] in rows: as rank 0 cuts it, and finer where memory did not suffice. Numbers."""

import itertools
from collections.abc import Sequence

import numpy as np


def cut(
    counts: Sequence[int],
    microbatch_tokens: int,
    least: int,
    pages: Sequence[int] | None = None,
    shared: Sequence[int] = (),
    most_pages: int = 0,
    most_rows: int = 0,
) -> list[int]:
    """Borders [K+1] that cut rows of these token counts into microbatches of at most `microbatch_tokens` tokens.

    With `pages`, of each row, of which it has `shared` in common with the row before, a microbatch has at most `most_pages`
    different ones too, and `most_rows` rows (0: any number). At least `least` microbatches where there are as many rows; a
    row is never cut.
    """
    if not counts:
        return [0]
    target = min(microbatch_tokens, -(-sum(counts) // least))
    borders, tokens, held = [0], 0, 0
    for row, count in enumerate(counts):
        rows_left, cuts_left = len(counts) - row, least - len(borders)
        more = pages[row] - shared[row] if pages else 0
        full = tokens + count > target or held + more > most_pages or 0 < most_rows <= row - borders[-1]
        if row > borders[-1] and (full or rows_left <= cuts_left):
            borders.append(row)
            tokens, held = 0, 0
        more = pages[row] if pages and row == borders[-1] else more
        tokens, held = tokens + count, held + more
    return [*borders, len(counts)]


def cut_tokens(counts: np.ndarray, microbatch_tokens: int, least: int, most_rows: int) -> list[int]:
    """`cut` without pages, of counts [R]: a search for each microbatch, not a look at each row."""
    ends, borders = np.cumsum(counts), [0]
    target = min(microbatch_tokens, -(-int(ends[-1]) // least)) if len(counts) else 0
    while (first := borders[-1]) < len(counts):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + target, "right")), first + 1)
        borders.append(min(last, first + most_rows) if most_rows else last)
    if len(borders) <= min(least, len(counts)):  # the last ones are cut finer
        return cut(counts.tolist(), microbatch_tokens, least, most_rows=most_rows)
    return borders


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
        once_more = [finer[0], *(border for pair in pairs for border in _cut(pair, counts, most))]
        if once_more == finer:
            break
        finer = once_more
    return finer


def rest_refined(borders: Sequence[int], counts: Sequence[int], failed: int) -> list[int]:
    """Borders whose microbatches from number `failed` on, the one that memory did not hold, are cut finer: to its half.

    Where it is a single row: all the others from there on in two. The same borders where nothing can be cut.
    """
    done, rest = list(borders[:failed]), list(borders[failed:])
    if rest[1] - rest[0] == 1:
        return done + halved(rest)
    return done + refined(rest, counts, largest(halved(rest[:2]), counts))


def largest(borders: Sequence[int], counts: Sequence[int]) -> int:
    """Tokens of the largest microbatch."""
    return max((sum(counts[first:last]) for first, last in itertools.pairwise(borders)), default=0)


def _cut(pair: tuple[int, int], counts: Sequence[int], most: int) -> list[int]:
    """The borders after the first one of a microbatch, cut in two if it has more than `most` tokens."""
    return halved(pair)[1:] if sum(counts[slice(*pair)]) > most else [pair[1]]
