"""No overlap: load, wait, compute, store, a layer and a microbatch after the other. The reference of the others."""

from collections.abc import Iterator, Sequence

from noria.schedules import Actions


def schedule(layers: int, microbatches: int, loads: Sequence[float] = ()) -> Iterator[Actions]:
    """The actions of a visit."""
    for layer in range(layers):
        for microbatch in range(microbatches):
            cell = (layer, microbatch)
            yield Actions(cell, None if microbatch else layer, (cell,), (cell,), waits=True)
