"""As single_batch, and microbatch k+1's cache loads, and k-1's is stored, while k is computed."""

from collections.abc import Iterator, Sequence

from noria.schedules import Actions


def schedule(layers: int, microbatches: int, loads: Sequence[float] = ()) -> Iterator[Actions]:
    """The actions of a visit: load_weight(j+1) | load_cache(j, k+1) | compute(j, k) | store_cache(j, k-1).

    Where microbatches load something, a layer's block sets out in parts: whole, all that comes behind it would wait for it.
    """
    cells = [(layer, microbatch) for layer in range(layers) for microbatch in range(microbatches)]
    shares = level([*loads[1:], loads[0]]) if any(loads) else []
    for place, cell in enumerate(cells):
        first = cells[:1] if place == 0 else []
        ahead, before = cells[place + 1 : place + 2], cells[max(place - 1, 0) : place]
        weight = cell[0] + 1 if shares or not cell[1] else None
        share = shares[cell[1]] if shares else None
        yield Actions(cell, weight, (*first, *ahead), tuple(before), share=share)
    yield Actions(store_cache=(cells[-1],))


def level(loads: Sequence[float]) -> list[float]:
    """Parts of 1 that make these loads as level as may be: the least ones are filled up to one height."""
    lowest, height = sorted(loads), 0.0
    for count in range(len(loads), 0, -1):
        height = (1 + sum(lowest[:count])) / count
        if height >= lowest[count - 1]:
            break
    return [max(height - one, 0.0) for one in loads]
