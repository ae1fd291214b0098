"""The order of a step's microbatches: those that load a cache from elsewhere stand apart, so that what others compute hides it.

Knows no rows and no devices.
"""

from collections.abc import Sequence

MUCH = 2  # what loads more than one in so many of the most is spread


def spread(loads: Sequence[float]) -> list[int]:
    """The numbers of microbatches that load so much, in the order in which they are computed: those that load much at even
    distances, and both kinds in their own order. As they are where all load alike."""
    much = [number for number, load in enumerate(loads) if MUCH * load > max(loads)]
    little = [number for number, load in enumerate(loads) if MUCH * load <= max(loads)]
    places = {place * len(loads) // len(much) for place in range(len(much))} if little else set()
    those, others = iter(much), iter(little)
    return [next(those if place in places or not little else others) for place in range(len(loads))]
