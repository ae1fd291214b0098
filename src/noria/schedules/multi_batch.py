"""As single_batch, and microbatch k+1's cache loads, and k-1's is stored, while k is computed."""

from collections.abc import Iterator

from noria.schedules import Actions


def schedule(layers: int, microbatches: int) -> Iterator[Actions]:
    """The actions of a visit: load_weight(j+1) | load_cache(j, k+1) | compute(j, k) | store_cache(j, k-1)."""
    cells = [(layer, microbatch) for layer in range(layers) for microbatch in range(microbatches)]
    for place, cell in enumerate(cells):
        first = cells[:1] if place == 0 else []
        ahead, before = cells[place + 1 : place + 2], cells[max(place - 1, 0) : place]
        yield Actions(cell, None if cell[1] else cell[0] + 1, (*first, *ahead), tuple(before))
    yield Actions(store_cache=(cells[-1],))
