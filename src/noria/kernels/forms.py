"""The form of attention's lists: how many launches, of how many programs. Lists of one form are launched alike.

What was recorded once serves every step whose lists its form holds: what they lack is filled with items and merges of
nothing, whose programs return at once. Arrays of numpy.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from noria.kernels.work import NONE, PIECE_COLUMNS, Item, Launch, Merge, Wave, Work

LEAST = 16  # places of a list that may grow


@dataclass(frozen=True)
class LaunchForm:
    """Of a launch: its tile, how it is compiled, and for how many items it has room."""

    tile: int
    many: bool
    partial: bool
    items: int


@dataclass(frozen=True)
class ListsForm:
    """Of the lists of so many queries: for how many pieces, slots, items and merges there is room. `waves`: launches, merges."""

    queries: int
    pieces: int
    slots: int
    waves: tuple[tuple[tuple[LaunchForm, ...], int], ...]


EMPTY: tuple[tuple[LaunchForm, ...], int] = ((), 0)


def joined(form: ListsForm | None, work: Work) -> ListsForm:
    """The form itself if it holds the work; else one that holds both, with some room to grow."""
    form = form or ListsForm(len(work.order), 0, 0, ())
    assert form.queries == len(work.order), f"{len(work.order)} queries in lists for {form.queries}"
    waves = zip_longest(form.waves, work.waves, fillvalue=None)
    return ListsForm(
        form.queries,
        _room(form.pieces, len(work.pieces)),
        _room(form.slots, work.slots),
        tuple(_joined(of_form or EMPTY, wave) for of_form, wave in waves),
    )


def padded(work: Work, form: ListsForm) -> Work:
    """The work in lists of this form, which holds it: what is computed is the same."""
    waves = zip_longest(form.waves, work.waves, fillvalue=None)
    pieces = _filled(work.pieces, form.pieces, np.zeros(PIECE_COLUMNS, np.int32))
    its_waves = tuple(_padded(wave, of_form or EMPTY) for of_form, wave in waves)
    return replace(work, pieces=pieces, slots=form.slots, waves=its_waves)


def _room(room: int, needed: int) -> int:
    """The room if it suffices; else what is needed, rounded up to a quarter of a power of two."""
    if needed <= room:
        return room
    step = max(LEAST, 1 << max(needed.bit_length() - 3, 0))
    return -(-needed // step) * step


def _joined(form: tuple[tuple[LaunchForm, ...], int], wave: Wave | None) -> tuple[tuple[LaunchForm, ...], int]:
    if wave is None:
        return form
    launches = {launch.tile: launch for launch in form[0]}
    for launch in wave.launches:
        old = launches.get(launch.tile, LaunchForm(launch.tile, False, False, 0))
        flags = old.many or launch.many, old.partial or launch.partial
        launches[launch.tile] = LaunchForm(launch.tile, *flags, _room(old.items, len(launch.items)))
    return tuple(launches[tile] for tile in sorted(launches)), _room(form[1], len(wave.merges))


def _padded(wave: Wave | None, form: tuple[tuple[LaunchForm, ...], int]) -> Wave:
    given = {launch.tile: launch.items for launch in wave.launches} if wave is not None else {}
    merges = wave.merges if wave is not None else np.empty((0, len(Merge)), np.int32)
    launches = (
        Launch(_filled(given.get(its.tile, _NO_ITEMS), its.items, _NOTHING), its.tile, its.many, its.partial)
        for its in form[0]
    )
    return Wave(tuple(launches), _filled(merges, form[1], np.full(len(Merge), NONE, np.int32)))


def _filled(rows: np.ndarray, count: int, row: np.ndarray) -> np.ndarray:
    """`count` rows: these, and then the same row again and again."""
    if len(rows) == count:
        return rows
    filled = np.empty((count, len(row)), np.int32)
    filled[: len(rows)], filled[len(rows) :] = rows, row
    return filled


def _item_of_nothing(columns: Iterable[Item]) -> np.ndarray:
    slots = {Item.TOTAL_FROM, Item.SECTION_FROM, Item.TOTAL_TO, Item.SECTION_TO}
    return np.array([NONE if column in slots else 0 for column in columns], np.int32)


_NOTHING = _item_of_nothing(Item)
_NO_ITEMS = np.empty((0, len(Item)), np.int32)
