"""The lists of a step's attention, made from its rows by index expressions; work.py says what they are.

numpy alone. Here: what is checked, where keys lie, and which rows share a beginning. _waves.py makes the items.
"""

import numpy as np

from noria.kernels import _waves
from noria.kernels._waves import within
from noria.kernels.work import KEY_BLOCK, LEAST_TILE, NONE, SECTION, Packing, RaggedRows, Work


def make(rows: RaggedRows, packing: Packing) -> Work:
    """The lists of a step. Raises ValueError for runs or prefixes that a kernel could not follow to the bit."""
    _check(rows)
    paths = _paths(rows, packing)
    order_of_rows = np.lexsort(paths.T[::-1]) if paths.shape[1] else np.arange(len(rows.counts))
    places, order, positions = _places(rows, order_of_rows)
    pieces, owners = _pieces(rows)
    finder = _waves.Finder(None if owners is None else owners << 40 | pieces[:, 1])

    unknown = np.zeros(len(rows.shared), np.int64)
    waves, state = [], _waves.State(unknown, unknown, 0)
    for depth in range(paths.shape[1] + 1):
        groups = _waves.groups_of(rows, paths, order_of_rows, places, depth)
        wave, state = _waves.wave_of(groups, positions, packing, state, finder)
        waves.append(wave)
    arrays = [array.astype(np.int32) for array in (order, positions, pieces)]
    return Work(arrays[0], arrays[1], arrays[2], tuple(waves), state.slots)


def _places(rows: RaggedRows, order_of_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R] the place of each row's first query, [T] the token row at each place, and its position."""
    places = np.empty_like(order_of_rows)
    if (rows.counts == 1).all():
        places[order_of_rows] = np.arange(len(places))
        return places, order_of_rows, rows.lengths[order_of_rows] - 1
    counts = rows.counts[order_of_rows]
    places[order_of_rows] = np.cumsum(counts) - counts
    tokens = np.cumsum(rows.counts) - rows.counts
    order = np.repeat(tokens[order_of_rows], counts) + within(counts)
    positions = np.repeat((rows.lengths - rows.counts)[order_of_rows], counts) + within(counts)
    return places, order, positions


def _check(rows: RaggedRows) -> None:
    """Raises ValueError where blocks would not begin where the row's own do, or keys would be missing."""
    ends, lasts = rows.run_positions + rows.run_keys, rows.offsets[1:] - 1
    if (lasts < rows.offsets[:-1]).any() or (ends[lasts] < rows.lengths).any():
        raise ValueError("a row has more keys than its runs have room for")
    goes_on = ends[:-1] == rows.run_positions[1:]
    goes_on[lasts[:-1]] = True  # a row's last run need not
    if (rows.run_positions % KEY_BLOCK).any() or not goes_on.all():
        raise ValueError(f"a run does not begin where the one before ends, at a multiple of {KEY_BLOCK} keys")
    if not len(rows.shared):
        return
    if (rows.shared % KEY_BLOCK).any() or (rows.parents >= np.arange(len(rows.parents))).any():
        raise ValueError(f"a prefix has a length that is no multiple of {KEY_BLOCK}, or comes before its parent")
    named = rows.prefixes >= 0
    if (rows.shared[rows.prefixes[named]] > (rows.lengths - rows.counts)[named]).any():
        raise ValueError("a row has queries within its prefix")
    if (np.append(rows.shared, 0)[rows.parents] >= rows.shared).any():
        raise ValueError("a prefix is no longer than its parent")


def _pieces(rows: RaggedRows) -> tuple[np.ndarray, np.ndarray | None]:
    """[N, 4] the runs cut where sections begin, without what lies beyond a row's length; and [N] the row of each (None: each
    row has one)."""
    if len(rows.run_keys) == len(rows.counts) and rows.lengths.max(initial=0) <= SECTION:  # a run and a section each
        keys = rows.lengths - rows.run_positions
        return np.array([rows.run_rows, rows.run_positions, keys, np.ones_like(keys)]).T, None
    owner = np.repeat(np.arange(len(rows.counts)), np.diff(rows.offsets))
    first = rows.run_positions
    stop = np.minimum(first + rows.run_keys, rows.lengths[owner])
    counts = np.where(stop > first, (stop - 1) // SECTION - first // SECTION + 1, 0)
    run = np.repeat(np.arange(len(counts)), counts)
    section = first[run] // SECTION + within(counts)
    position = np.maximum(first[run], section * SECTION)
    keys = np.minimum(stop[run], (section + 1) * SECTION) - position
    of_section = owner[run] << 32 | section
    left = np.searchsorted(of_section, of_section, side="right") - np.arange(len(run))
    return np.stack([rows.run_rows[run] + position - first[run], position, keys, left], axis=1), owner[run]


def _paths(rows: RaggedRows, packing: Packing) -> np.ndarray:
    """[R, depth] the prefixes that a row shares in this step, the shortest first, then NONE.

    A row whose queries fill a tile reads all its keys itself: it would gain nothing. So does the only row of a prefix,
    and a row for which no slots are left: two a query and prefix.
    """
    paths = np.full((len(rows.counts), 0), NONE)
    if len(rows.shared):
        ancestors = _ancestors(rows.parents)
        sharing = (rows.prefixes >= 0) & (rows.counts * packing.group < LEAST_TILE)
        paths = np.where(sharing[:, None], ancestors[rows.prefixes], NONE)
        members = np.bincount(paths[paths >= 0], minlength=len(rows.shared))
        paths = np.where((paths >= 0) & (members[paths] > 1), paths, NONE)
        slots = np.cumsum(2 * rows.counts * (paths >= 0).sum(axis=1))
        paths = np.where((slots <= packing.most_slots)[:, None], paths, NONE)
    return paths[:, (paths >= 0).any(axis=0)]


def _ancestors(parents: np.ndarray) -> np.ndarray:
    """[P, depth] each prefix's path from the shortest of its parents to itself, then NONE."""
    upward = [np.arange(len(parents))]
    while (upward[-1] >= 0).any():
        upward.append(np.where(upward[-1] >= 0, parents[upward[-1]], NONE))
    paths = np.array(upward[:-1])
    index = (paths >= 0).sum(axis=0) - 1 - np.arange(len(paths))[:, None]
    return np.where(index >= 0, np.take_along_axis(paths, np.maximum(index, 0), axis=0), NONE).T
