"""One wave of attention's lists: its groups of queries cut into tiles, and these into sections where programs would idle.

A group is the queries that have the same keys to meet: those of a row, or of all rows of a prefix.
G groups, N tiles.
"""

from dataclasses import dataclass

import numpy as np

from noria.kernels.work import KEY_BLOCK, LEAST_TILE, NONE, SECTION, Item, Launch, Merge, Packing, RaggedRows, Wave

_NO_MERGES = np.empty((0, len(Merge)), np.int32)


@dataclass(frozen=True)
class Finder:
    """Finds pieces. keys: of each its row and position in one number, in order; None where each row has one piece."""

    keys: np.ndarray | None

    def pieces(self, row: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of rows that hold their keys at the positions `start .. stop`: the first, and the one behind the last."""
        if self.keys is None:
            return row, row + 1
        first = np.searchsorted(self.keys, row << 40 | start, side="right") - 1
        return first, np.searchsorted(self.keys, row << 40 | stop, side="left")


@dataclass(frozen=True)
class Groups:
    """Queries that have the same keys to meet in a wave: of a row, or of all rows of a prefix. Arrays [G]."""

    first: np.ndarray  # place of the first query
    count: np.ndarray
    row: np.ndarray  # in whose runs the keys are
    held: np.ndarray  # the position of the first key there
    start: np.ndarray  # positions of the keys
    stop: np.ndarray
    parent: np.ndarray  # the prefix whose sums they go on from, or NONE
    node: np.ndarray  # the prefix that they compute, or NONE: a row's own keys, which end in the result


@dataclass(frozen=True)
class State:
    """What the waves before leave: of each prefix, the slot of its queries' partial results less their place. [P]"""

    totals: np.ndarray
    sections: np.ndarray
    slots: int  # that are taken
    apart: int = 0  # of them, those of sections that are computed apart


@dataclass(frozen=True)
class _Tiles:
    """The groups' queries cut into tiles. Arrays [N], except `of_group`: [G] a group's first tile."""

    group: np.ndarray
    of_group: np.ndarray
    queries: np.ndarray  # [G] that a tile of this group holds
    rows: np.ndarray  # [G] of the tile
    first: np.ndarray
    count: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @property
    def sections(self) -> np.ndarray:
        return (self.stop - 1) // SECTION - self.start // SECTION + 1


@dataclass(frozen=True)
class _PartialSlots:
    """Where the groups' partial results are. Arrays [G]: the slot of a group's first query, or NONE."""

    total_in: np.ndarray
    section_in: np.ndarray
    total_out: np.ndarray
    section_out: np.ndarray
    split: np.ndarray  # bool: each section by an item of its own
    parts: np.ndarray  # the slots of these sections, `count` apart
    least: np.ndarray  # the first of these sections


def wave_of(
    groups: Groups, positions: np.ndarray, packing: Packing, state: State, finder: Finder
) -> tuple[Wave, State]:
    """The wave of these groups. `positions` by place; `finder`: finds the pieces of keys."""
    if len(groups.first) and (groups.count == 1).all() and (groups.node == NONE).all():
        launch = _one_query_each(groups, positions, packing, state, finder)
        if launch is not None:
            return Wave((launch,), _NO_MERGES), state
    tiles = _tiles(groups, positions, packing)
    slots, state = _slots(groups, tiles, packing, state)
    return Wave(_launches(groups, tiles, slots, finder), _merges(groups, tiles, slots)), state


def within(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for each count, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def groups_of(rows: RaggedRows, paths: np.ndarray, order: np.ndarray, places: np.ndarray, depth: int) -> Groups:
    """The prefixes at this depth and the rows that share `depth` prefixes."""
    if not paths.shape[1]:
        none, every = np.full(len(order), NONE), np.arange(len(order))
        held = rows.run_positions[rows.offsets[:-1]]
        return Groups(places, rows.counts, every, held, np.zeros_like(every), rows.lengths, none, none)
    level = paths[order, depth] if depth < paths.shape[1] else np.full(len(order), NONE)
    nodes, firsts, sizes = np.unique(level[level >= 0], return_index=True, return_counts=True)
    firsts = np.flatnonzero(level >= 0)[firsts]
    leaders, last = order[firsts], order[firsts + sizes - 1]
    depths = (paths >= 0).sum(axis=1)
    # One key, as rows of nobody have: the first wave is that of prefixes, however many of these there are.
    depths[rows.lengths == 1] = paths.shape[1]
    own = np.flatnonzero(depths == depth)
    parents = paths[:, depth - 1] if depth else np.full(len(order), NONE)
    parent = np.concatenate([parents[leaders], parents[own]])
    row = np.concatenate([leaders, own])
    return Groups(
        first=np.concatenate([places[leaders], places[own]]),
        count=np.concatenate([places[last] + rows.counts[last] - places[leaders], rows.counts[own]]),
        row=row,
        held=rows.run_positions[rows.offsets[row]],
        start=np.append(rows.shared, 0)[parent],
        stop=np.concatenate([rows.shared[nodes], rows.lengths[own]]),
        parent=parent,
        node=np.concatenate([nodes, np.full(len(own), NONE)]),
    )


def _one_query_each(
    groups: Groups, positions: np.ndarray, packing: Packing, state: State, finder: Finder
) -> Launch | None:
    """The launch of groups that are a row's own query each: what the rest of this file makes of them, in fewer steps.

    None where the sections of one are computed apart.
    """
    position = positions[groups.first]
    start, stop = np.maximum(groups.start, groups.held), np.minimum(groups.stop, position + 1)
    if packing.window is not None:
        start = np.maximum(start, (position - packing.window + 1) // KEY_BLOCK * KEY_BLOCK)
    sections = (stop - 1) // SECTION - start // SECTION + 1
    most = sections.max()
    if most > max(1.0, sections.sum() * packing.key_heads / packing.programs):
        return None
    items = np.empty((len(position), len(Item)), np.int32)
    items[:, Item.FIRST], items[:, Item.COUNT] = groups.first, 1
    items[:, Item.PIECE], items[:, Item.LAST_PIECE] = finder.pieces(groups.row, start, stop)
    items[:, Item.START], items[:, Item.STOP] = start, stop
    items[:, Item.LOWEST] = items[:, Item.HIGHEST] = position
    items[:, Item.TOTAL_FROM :] = NONE
    if not len(state.totals):
        return Launch(items[np.argsort(start - stop, kind="stable")], _least(packing), bool(most > 1), partial=False)
    items[:, Item.TOTAL_FROM], items[:, Item.SECTION_FROM] = _coming_in(groups, state)
    return _launch(items, _least(packing))


def _coming_in(groups: Groups, state: State) -> tuple[np.ndarray, np.ndarray]:
    """The slots of the merged sections, and of the last section, that groups go on from."""
    of_total, of_section = (
        np.where(groups.start > beyond, np.append(known, 0)[groups.parent] + groups.first, NONE)
        for beyond, known in ((SECTION, state.totals), (0, state.sections))
    )
    return of_total, of_section


def _least(packing: Packing) -> int:
    """Rows of the tile of few queries."""
    return LEAST_TILE if packing.group <= LEAST_TILE else packing.widest


def _tiles(groups: Groups, positions: np.ndarray, packing: Packing) -> _Tiles:
    """Rows of few queries in the least tile, others in the widest."""
    least = _least(packing)
    rows = np.where(groups.count * packing.group > least, packing.widest, least)
    queries = rows // packing.group
    tiles = -(-groups.count // queries)
    group, index = np.repeat(np.arange(len(tiles)), tiles), within(tiles)
    first = groups.first[group] + index * queries[group]
    count = np.minimum(queries[group], groups.count[group] - index * queries[group])
    borders, padded = np.stack([first, first + count], axis=1).ravel(), np.append(positions, 0)
    lowest = np.minimum.reduceat(padded, borders)[::2] if len(group) else group
    highest = np.maximum.reduceat(padded, borders)[::2] if len(group) else group
    start = np.maximum(groups.start, groups.held)[group]
    if packing.window is not None:  # what a prefix leaves is left whole
        seen = (lowest - packing.window + 1) // KEY_BLOCK * KEY_BLOCK
        start = np.where(groups.node[group] >= 0, start, np.maximum(start, seen))
    stop = np.minimum(groups.stop[group], highest + 1)
    return _Tiles(group, np.cumsum(tiles) - tiles, queries, rows, first, count, lowest, highest, start, stop)


def _slots(groups: Groups, tiles: _Tiles, packing: Packing, state: State) -> tuple[_PartialSlots, State]:
    """Where partial results come from and go to, after the slots that are taken; and what is known then."""
    leaves = groups.node >= 0
    total_in, section_in = _coming_in(groups, state)
    split, least, spread = _split(groups, tiles, packing, state.apart)
    of_total = np.where(leaves & (groups.stop > SECTION), groups.count, 0)
    of_section = np.where(leaves & ~split, groups.count, 0)
    apart = np.where(split, spread * groups.count, 0)
    sizes = of_total + of_section + apart
    total = state.slots + np.cumsum(sizes) - sizes
    section, parts = total + of_total, total + of_total + of_section
    last = parts + ((groups.stop - 1) // SECTION - least) * groups.count
    section_out = np.where(leaves, np.where(split, last, section), NONE)
    total_out = np.where(of_total > 0, total, NONE)
    totals, sections = state.totals.copy(), state.sections.copy()
    totals[groups.node[leaves]] = (total_out - groups.first)[leaves]
    sections[groups.node[leaves]] = (section_out - groups.first)[leaves]
    slots = _PartialSlots(total_in, section_in, total_out, section_out, split, parts, least)
    return slots, State(totals, sections, state.slots + int(sizes.sum()), state.apart + int(apart.sum()))


def _split(groups: Groups, tiles: _Tiles, packing: Packing, apart: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[G] whether a group's sections are computed apart, the first of them, and how many they are.

    They are where a program would otherwise do more than its share of the wave, the longest first while slots suffice,
    of which `apart` are taken.
    """
    if not len(groups.first):
        return np.zeros(0, bool), groups.first, groups.first
    sections = tiles.sections
    longest = np.maximum.reduceat(sections, tiles.of_group)
    least = np.minimum.reduceat(tiles.start, tiles.of_group) // SECTION
    spread = np.maximum.reduceat(tiles.stop - 1, tiles.of_group) // SECTION - least + 1
    split = longest > max(1.0, sections.sum() * packing.key_heads / packing.programs)
    by_length = np.argsort(-longest, kind="stable")
    taken = np.cumsum(np.where(split, spread * groups.count, 0)[by_length])
    split[by_length] &= apart + taken <= packing.most_slots
    return split, least, spread


def _launches(groups: Groups, tiles: _Tiles, slots: _PartialSlots, finder: Finder) -> tuple[Launch, ...]:
    """The tiles as items, by size of tile."""
    split = slots.split[tiles.group]
    parts = np.where(split, tiles.sections, 1)
    tile, part = np.repeat(np.arange(len(parts)), parts), within(parts)
    group, split = tiles.group[tile], split[tile]
    section = tiles.start[tile] // SECTION + part
    start = np.where(split & (part > 0), section * SECTION, tiles.start[tile])
    stop = np.where(split, np.minimum(tiles.stop[tile], (section + 1) * SECTION), tiles.stop[tile])
    ahead = tiles.first[tile] - groups.first[group]
    of_part = slots.parts[group] + (section - slots.least[group]) * groups.count[group]
    goes_on = ~split | ((part == 0) & (groups.start[group] % SECTION > 0))

    def shifted(slot: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
        return np.where(where & (slot >= 0), slot + ahead, NONE)

    items = np.empty((len(tile), len(Item)), np.int32)
    items[:, Item.FIRST], items[:, Item.COUNT] = tiles.first[tile], tiles.count[tile]
    items[:, Item.PIECE], items[:, Item.LAST_PIECE] = finder.pieces(groups.row[group], start, stop)
    items[:, Item.START], items[:, Item.STOP] = start, stop
    items[:, Item.LOWEST], items[:, Item.HIGHEST] = tiles.lowest[tile], tiles.highest[tile]
    items[:, Item.TOTAL_FROM] = shifted(slots.total_in[group], ~split)
    items[:, Item.SECTION_FROM] = shifted(slots.section_in[group], goes_on)
    items[:, Item.TOTAL_TO] = shifted(slots.total_out[group], ~split)
    items[:, Item.SECTION_TO] = shifted(np.where(split, of_part, slots.section_out[group]))
    return tuple(_launch(items[tiles.rows[group] == rows], int(rows)) for rows in np.unique(tiles.rows))


def _launch(items: np.ndarray, tile: int) -> Launch:
    items = items[np.argsort(items[:, Item.START] - items[:, Item.STOP], kind="stable")]
    several = (items[:, Item.STOP] - 1) // SECTION > items[:, Item.START] // SECTION
    merges = (items[:, Item.SECTION_FROM] >= 0) & (items[:, Item.START] % SECTION == 0)
    many = several.any() or merges.any() or (items[:, Item.TOTAL_FROM] >= 0).any()
    partial = (items[:, [Item.SECTION_FROM, Item.SECTION_TO]] >= 0).any()
    return Launch(items, tile, bool(many), bool(partial))


def _merges(groups: Groups, tiles: _Tiles, slots: _PartialSlots) -> np.ndarray:
    """A merge for each query of the groups whose sections are computed apart."""
    split = np.flatnonzero(slots.split)
    group, ahead = np.repeat(split, groups.count[split]), within(groups.count[split])
    tile = tiles.of_group[group] + ahead // tiles.queries[group]
    leaves = groups.node[group] >= 0
    whole = (slots.section_in[group] >= 0) & (groups.start[group] % SECTION == 0)
    merges = np.empty((len(group), len(Merge)), np.int32)
    merges[:, Merge.PLACE] = groups.first[group] + ahead
    merges[:, Merge.TO] = np.where(leaves, slots.total_out[group] + ahead, NONE)
    merges[:, Merge.TOTAL] = np.where(slots.total_in[group] >= 0, slots.total_in[group] + ahead, NONE)
    merges[:, Merge.SECTION] = np.where(whole, slots.section_in[group] + ahead, NONE)
    skipped = tiles.start[tile] // SECTION - slots.least[group]
    merges[:, Merge.FIRST] = slots.parts[group] + skipped * groups.count[group] + ahead
    merges[:, Merge.STRIDE] = groups.count[group]
    merges[:, Merge.COUNT] = tiles.sections[tile] - leaves
    return merges
