"""Which layers live where: the cut of the model into virtual stages, and the blocks of each rank.

Virtual stage s is the ring's s-th visit of a step; it lives on rank s mod N. Pure arithmetic.
"""

from collections.abc import Sequence
from itertools import accumulate

from noria.blocks import layer_name
from noria.errors import InputError


def partition(
    num_layers: int, num_stages: int, how: str | Sequence[int], extra: tuple[float, float] = (0.0, 0.0)
) -> list[range]:
    """The layers of each virtual stage.

    `how`: "greedy" (equal, the first `num_layers mod num_stages` get one more), "balanced" (the heaviest stage as light as can
    be, where the first carries `extra[0]` and the last `extra[1]` more, in layers), or the numbers of layers themselves.
    Raises InputError if there are more stages than layers, or the numbers do not fit.
    """
    if num_stages > num_layers:
        raise InputError(
            f"{num_stages} virtual stages (ranks x laps) for {num_layers} layers: use at most {num_layers} ranks x laps"
        )
    if isinstance(how, str):
        counts = _balanced(num_layers, num_stages, extra) if how == "balanced" else _greedy(num_layers, num_stages)
    else:
        counts = list(how)
        if len(counts) != num_stages or sum(counts) != num_layers:
            raise InputError(
                f"pipeline.partition has {len(counts)} numbers with sum {sum(counts)}:"
                f" it needs {num_stages} (ranks x laps) with sum {num_layers} (layers)"
            )
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def stages_of(rank: int, num_ranks: int, stages: list[range]) -> list[range]:
    """The rank's virtual stages, one a lap."""
    return stages[rank::num_ranks]


def blocks_of(rank: int, num_ranks: int, stages: list[range]) -> list[str]:
    """The names of the blocks that the rank holds: the first rank the embedding, the last one the head."""
    names = [layer_name(layer) for stage in stages_of(rank, num_ranks, stages) for layer in stage]
    return ["embed"] * (rank == 0) + names + ["head"] * (rank == num_ranks - 1)


def _greedy(num_layers: int, num_stages: int) -> list[int]:
    return [num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages)]


def _balanced(num_layers: int, num_stages: int, extra: tuple[float, float]) -> list[int]:
    """Gives each layer to the stage that is lightest so far; every stage has at least one."""
    counts = [1] * num_stages
    weight = [1.0] * num_stages
    weight[0] += extra[0]
    weight[-1] += extra[1]
    for _ in range(num_layers - num_stages):
        lightest = weight.index(min(weight))
        counts[lightest] += 1
        weight[lightest] += 1.0
    return counts
