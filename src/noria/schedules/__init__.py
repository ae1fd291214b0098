"""Schedules: the order of one visit's loads, computing and stores, as data. One file each, a pure generator of `Actions`.

Knows no tensors, streams or files: engine/stage.py executes what they yield.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

Cell = tuple[int, int]  # (layer, microbatch), both counted from the start of the visit


@dataclass(frozen=True)
class Actions:
    """A row of the table: what happens beside each other.

    load_weight: the layer whose block should be on its way (the number of layers and more: those of the visits to come).
    load_cache, store_cache: cells. `waits`: the row's loads begin when everything computed before is done.
    share: before what else the row loads, so much of a block sets out at most; None: all that finds a slot.
    """

    compute: Cell | None = None
    load_weight: int | None = None
    load_cache: tuple[Cell, ...] = ()
    store_cache: tuple[Cell, ...] = ()
    waits: bool = False
    share: float | None = None


def resumed(rows: Iterable[Actions], first: Cell) -> Iterator[Actions]:
    """The rows of a schedule from cell `first` on: those before it are done and stored, and nothing else is on its way."""
    rows = iter(rows)
    loads: tuple[Cell, ...] = ()
    for row in rows:
        loads += tuple(cell for cell in row.load_cache if cell >= first)
        if row.compute is None or row.compute >= first:
            yield replace(row, load_cache=loads, store_cache=tuple(cell for cell in row.store_cache if cell >= first))
            break
    yield from rows


def table(rows: Iterable[Actions]) -> list[str]:
    """The rows as people read them: load_weight | load_cache | compute | store_cache."""

    def cells(name: str, which: Iterable[Cell]) -> str:
        return " ".join(f"{name}({layer},{microbatch})" for layer, microbatch in which)

    lines = []
    for row in rows:
        weight = "" if row.load_weight is None else f"load_weight({row.load_weight})"
        columns = [weight, cells("load_cache", row.load_cache), cells("compute", [row.compute] if row.compute else [])]
        lines.append(" | ".join([*columns, cells("store_cache", row.store_cache)]).rstrip())
    return lines
