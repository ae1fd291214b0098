"""The next layer's weights and cache load during this layer; a layer's other microbatches load when their turn comes."""

from collections.abc import Iterator, Sequence

from noria.schedules import Actions, Cell


def schedule(layers: int, microbatches: int, loads: Sequence[float] = ()) -> Iterator[Actions]:
    """The actions of a visit: with one microbatch load_weight(j+1) | load_cache(j+1) | compute(j) | store_cache(j-1)."""
    last = microbatches - 1
    before: tuple[Cell, ...] = ()
    for layer in range(layers):
        for microbatch in range(microbatches):
            cell = (layer, microbatch)
            own = (cell,) if cell == (0, 0) or microbatch else ()
            ahead = ((layer + 1, 0),) if microbatch == last and layer + 1 < layers else ()
            yield Actions(cell, None if microbatch else layer + 1, own + ahead, before, waits=microbatch > 0)
            before = (cell,)
    yield Actions(store_cache=before)
