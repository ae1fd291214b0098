"""The lists of attention's work, executed query by query: what the kernel does, slowly and plainly.

`Keys` follows which keys a query has met, section by section; `Sums` computes, a block at a time in numpy.
"""

from dataclasses import dataclass, field

import numpy as np

from noria.kernels.work import KEY_BLOCK, NONE, SECTION, Item, Merge


def execute(its_work, algebra, window=None):
    """token -> what `algebra` makes of its keys. Each wave reads only what waves before it left; its merges read its own."""
    slots, results = {}, {}
    for wave in its_work.waves:
        before = dict(slots)
        for launch in wave.launches:
            for item in launch.items:
                for index in range(item[Item.COUNT]):
                    _execute_item(its_work, launch, item, index, algebra, window, before, slots, results)
        for merge in wave.merges[wave.merges[:, Merge.PLACE] != NONE]:
            _execute_merge(its_work, merge, algebra, slots, results)
    return results


def _execute_item(its_work, launch, item, index, algebra, window, before, slots, results):
    place = item[Item.FIRST] + index
    token, position = int(its_work.order[place]), int(its_work.positions[place])
    assert item[Item.LOWEST] <= position <= item[Item.HIGHEST]

    def slot(column):
        return NONE if item[column] == NONE else int(item[column]) + index

    def held(column):
        return algebra.empty(token) if slot(column) == NONE else before[slot(column)]

    total, section, piece = held(Item.TOTAL_FROM), held(Item.SECTION_FROM), item[Item.PIECE]
    while piece < item[Item.LAST_PIECE]:
        border = min(piece + its_work.pieces[piece][3], item[Item.LAST_PIECE])
        if max(its_work.pieces[piece][1], item[Item.START]) % SECTION == 0:
            assert launch.many or (algebra.is_empty(total) and algebra.is_empty(section))
            total, section = algebra.fold(total, section), algebra.empty(token)
        else:
            assert piece == item[Item.PIECE], "a section goes on only where the item begins"
        for row, at, keys, _ in its_work.pieces[piece:border]:
            low, high = max(at, item[Item.START]), min(at + keys, item[Item.STOP])
            for block in range(low, high, KEY_BLOCK):
                positions = np.arange(block, min(block + KEY_BLOCK, high))
                seen = (positions <= position) & (window is None or positions > position - (window or 0))
                if seen.any():
                    section = algebra.meet(token, section, positions[seen], (row + positions - at)[seen])
        piece = border
    if slot(Item.SECTION_TO) != NONE:
        assert launch.partial and slot(Item.SECTION_TO) not in slots
        slots[slot(Item.SECTION_TO)] = section
        if slot(Item.TOTAL_TO) != NONE:
            assert slot(Item.TOTAL_TO) not in slots and launch.many | algebra.is_empty(total)
            slots[slot(Item.TOTAL_TO)] = total
        else:
            assert algebra.is_empty(total), "a total that nobody takes over"
    else:
        assert token not in results
        results[token] = algebra.finish(algebra.fold(total, section))


def _execute_merge(its_work, merge, algebra, slots, results):
    token = int(its_work.order[merge[Merge.PLACE]])
    state = algebra.empty(token)
    parts = [int(merge[Merge.FIRST] + number * merge[Merge.STRIDE]) for number in range(merge[Merge.COUNT])]
    for slot in (merge[Merge.TOTAL], merge[Merge.SECTION], *parts):
        if slot != NONE:
            state = algebra.fold(state, slots[int(slot)])
    if merge[Merge.TO] != NONE:
        assert merge[Merge.TO] not in slots
        slots[int(merge[Merge.TO])] = state
    else:
        assert token not in results
        results[token] = algebra.finish(state)


class Keys:
    """A partial result is the sections that it holds, each the stretches of keys that were met: (position, cache row, keys)."""

    def empty(self, token):
        return ()

    def is_empty(self, state):
        return state == ()

    def meet(self, token, section, positions, cache_rows):
        return (joined(section[0] if section else (), int(positions[0]), int(cache_rows[0]), len(positions)),)

    def fold(self, total, section):
        return total + section

    def finish(self, state):
        return state


def joined(stretches, position, cache_row, keys):
    """The stretches and one more, joined to the last one if it goes on there."""
    if stretches:
        last_position, last_row, last_keys = stretches[-1]
        if (last_position + last_keys, last_row + last_keys) == (position, cache_row):
            return (*stretches[:-1], (last_position, last_row, last_keys + keys))
    return (*stretches, (position, cache_row, keys))


@dataclass
class Sums:
    """A partial result is sums [H, V], maximum [H] and weight [H], in the dtype of the queries."""

    queries: np.ndarray  # [T, H, D]
    keys: np.ndarray  # [rows, Hkv, D]
    values: np.ndarray  # [rows, Hkv, V]
    scale: float
    soft_cap: float | None = None
    sinks: np.ndarray | None = None  # [H]
    met: int = field(default=0)

    def empty(self, token):
        heads, width = self.queries.shape[1], self.values.shape[2]
        zeros = np.zeros(heads, self.queries.dtype)
        return np.zeros((heads, width), self.queries.dtype), np.full_like(zeros, -1e38), zeros

    def is_empty(self, state):
        return not state[2].any()

    def meet(self, token, section, positions, cache_rows):
        group = self.queries.shape[1] // self.keys.shape[1]
        keys, values = (np.repeat(cache[cache_rows], group, axis=1) for cache in (self.keys, self.values))
        scores = np.einsum("hd,nhd->hn", self.queries[token], keys) * self.scale
        if self.soft_cap is not None:
            scores = np.tanh(scores / self.soft_cap) * self.soft_cap
        top = scores.max(axis=1)
        weights = np.exp(scores - top[:, None])
        return self.fold(section, (np.einsum("hn,nhv->hv", weights, values), top, weights.sum(axis=1)))

    def fold(self, total, section):
        top = np.maximum(total[1], section[1])
        old, new = np.exp(total[1] - top), np.exp(section[1] - top)
        return total[0] * old[:, None] + section[0] * new[:, None], top, total[2] * old + section[2] * new

    def finish(self, state):
        if self.sinks is not None:
            state = self.fold(state, (np.zeros_like(state[0]), self.sinks, np.ones_like(state[2])))
        return state[0] / state[2][:, None]
