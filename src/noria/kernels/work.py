"""Attention's work as data: which queries meet which keys in one program, and in which order their results are merged.

Arrays of numpy: knows no tensors, models or pages. The order is the contract that keeps a row's bits. Keys come in blocks
of KEY_BLOCK; a row's first token begins its first block and its first section of SECTION keys. Within a section block
follows block; sections are merged one after another, whatever is computed by one program or by many.
R rows of a step, T queries (new tokens), K runs of cache rows, P prefixes.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

KEY_BLOCK = 64  # keys of one product; every run of a row but its last holds a multiple of it
SECTION = 1024  # keys whose sums one maximum serves
LEAST_TILE = 64  # rows of a product's tile: fewer would take another instruction, with other bits
PIECE_COLUMNS = 4
WIDE_TILE = 128  # of rows with more queries than the least tile holds

NONE = -1


class Item(IntEnum):
    """Columns of an item. Slots hold a partial result of one query each; those of an item's queries follow one another."""

    FIRST = 0  # its queries: COUNT places of the order from FIRST on
    COUNT = 1
    PIECE = 2  # its keys: pieces PIECE .. LAST_PIECE, and of them the positions START .. STOP
    LAST_PIECE = 3
    START = 4
    STOP = 5
    LOWEST = 6  # positions of its queries
    HIGHEST = 7
    TOTAL_FROM = 8  # slots that it goes on from, or NONE: of merged sections, and
    SECTION_FROM = 9  # of the section before its first key, whole or not
    TOTAL_TO = 10  # slots that it leaves, or NONE
    SECTION_TO = 11  # without it the item ends in the result


class Merge(IntEnum):
    """Columns of a merge, of one query: TOTAL, SECTION, then COUNT slots from FIRST on, STRIDE apart."""

    PLACE = 0
    TO = 1  # a slot, or NONE for the result
    TOTAL = 2
    SECTION = 3
    FIRST = 4
    STRIDE = 5
    COUNT = 6


@dataclass(frozen=True)
class RaggedRows:
    """The rows of a step and where their keys lie, run after run. What a row's window has left behind may be missing.

    A prefix is the first `shared` keys (a multiple of KEY_BLOCK) of all rows that name it; a longer prefix may go on from
    its parent. Its keys are read in the runs of one of its rows.
    """

    counts: np.ndarray  # [R] queries: the last `count` of the row's keys
    lengths: np.ndarray  # [R] keys
    offsets: np.ndarray  # [R + 1] the runs of row r are `offsets[r] .. offsets[r + 1]`
    run_rows: np.ndarray  # [K] first cache row of a run
    run_positions: np.ndarray  # [K] and its position in the row, a multiple of KEY_BLOCK
    run_keys: np.ndarray  # [K] keys it has room for
    prefixes: np.ndarray  # [R] the prefix that the row begins with, or NONE
    shared: np.ndarray  # [P] keys of a prefix, those of its parents counted
    parents: np.ndarray  # [P] the prefix that this one goes on from, or NONE


@dataclass(frozen=True)
class Packing:
    """How queries are packed into programs; nothing here changes a result."""

    group: int  # query heads that share a key head
    key_heads: int
    programs: int  # that the device has in flight: rows whose sections are more than a program's share are split
    most_slots: int = 1 << 14  # slots that sections computed apart may take, and as many that shared prefixes may
    widest: int = WIDE_TILE  # of the tiles
    window: int | None = None  # of all layers that use the lists, to leave out keys that no query sees


@dataclass(frozen=True)
class Launch:
    """Items of one kernel call, the longest first."""

    items: np.ndarray  # [I, columns of Item] int32
    tile: int
    many: bool  # some item has keys of several sections
    partial: bool  # some item goes on from slots or leaves some


@dataclass(frozen=True)
class Wave:
    """What needs nothing but the waves before: its launches in any order, then its merges."""

    launches: tuple[Launch, ...]
    merges: np.ndarray  # [M, columns of Merge] int32


@dataclass(frozen=True)
class Work:
    """All that one attention call computes, for any layer of the step."""

    order: np.ndarray  # [T] int32: the token row at each place
    positions: np.ndarray  # [T] int32: its position
    # [N, 4] int32: first cache row, its position, keys, how many pieces follow in the section, itself too
    pieces: np.ndarray
    waves: tuple[Wave, ...]
    slots: int
