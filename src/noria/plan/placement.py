"""Which layers live where: the cut of the model into virtual stages, and the blocks of each rank.

Virtual stage s is the ring's s-th visit of a step; it lives on rank s mod N. Tied layers, of which one reads another's cache,
are on one rank, in any of its visits. Pure arithmetic.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

from noria.blocks import layer_name
from noria.errors import InputError

Ties: TypeAlias = Sequence[Sequence[int]]  # groups of layers


def partition(
    num_layers: int,
    num_stages: int,
    how: str | Sequence[int],
    extra: tuple[float, float] = (0.0, 0.0),
    ties: Ties = (),
    num_ranks: int = 1,
) -> list[range]:
    """The layers of each virtual stage.

    `how`: "greedy" (equal, the first `num_layers mod num_stages` get one more), "balanced" (the heaviest stage as light as can
    be, where the first carries `extra[0]` and the last `extra[1]` more, in layers), or the numbers of layers themselves.
    Where `ties` do not let the first two be, the nearest cut that keeps them.
    Raises InputError if there are more stages than layers, the numbers do not fit, or tied layers would be on several ranks.
    """
    if num_stages > num_layers:
        raise InputError(
            f"{num_stages} virtual stages (ranks x laps) for {num_layers} layers: use at most {num_layers} ranks x laps"
        )
    if isinstance(how, str):
        counts = _balanced(num_layers, num_stages, extra) if how == "balanced" else _greedy(num_layers, num_stages)
        if parted(counts, num_ranks, ties):
            weights = extra if how == "balanced" else (0.0, 0.0)
            counts = _together(num_layers, num_stages, weights, ties, num_ranks)
    else:
        counts = list(how)
        if len(counts) != num_stages or sum(counts) != num_layers:
            raise InputError(
                f"pipeline.partition has {len(counts)} numbers with sum {sum(counts)}:"
                f" it needs {num_stages} (ranks x laps) with sum {num_layers} (layers)"
            )
        if tie := parted(counts, num_ranks, ties):
            raise _parting(counts, num_ranks, ties, tie)
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def parted(counts: Sequence[int], num_ranks: int, ties: Ties) -> tuple[int, int] | None:
    """Two tied layers that stages of these numbers of layers put on different ranks, if there are any."""
    ranks = [stage % num_ranks for stage, count in enumerate(counts) for _ in range(count)]
    pairs = ((layers[0], layer) for layers in ties for layer in layers)
    return next(((first, layer) for first, layer in pairs if ranks[first] != ranks[layer]), None)


def _parting(counts: Sequence[int], num_ranks: int, ties: Ties, tie: tuple[int, int]) -> InputError:
    """What is said of an explicit partition that parts tied layers: which ones, where, and the nearest that does not."""
    ranks = [stage % num_ranks for stage, count in enumerate(counts) for _ in range(count)]
    first, layer = tie
    better = ",".join(map(str, _together(sum(counts), len(counts), (0.0, 0.0), ties, num_ranks)))
    return InputError(
        f"pipeline.partition {','.join(map(str, counts))} puts layer {first} on rank {ranks[first]} and layer {layer}, which"
        f" reads its cache, on rank {ranks[layer]}: they must be on one rank, as in {better}; or leave pipeline.partition out"
    )


def _together(num_layers: int, num_stages: int, extra: tuple[float, float], ties: Ties, num_ranks: int) -> list[int]:
    """The numbers of layers that keep ties: the heaviest stage as light as can be, then all as equal as can be.

    Raises InputError if no numbers do.
    """
    carried = [0.0] * num_stages
    carried[0] += extra[0]
    carried[-1] += extra[1]
    weights = sorted({count + more for count in range(1, num_layers + 1) for more in set(carried)})
    place = bisect_left(weights, True, key=lambda most: bool(_at_most(most, num_layers, carried, ties, num_ranks)))
    if place < len(weights) and (counts := _at_most(weights[place], num_layers, carried, ties, num_ranks)):
        return counts
    groups = "; ".join(", ".join(map(str, layers)) for layers in ties[:4]) + "; ..." * (len(ties) > 4)
    raise InputError(
        f"layers that read each other's cache must be on one rank ({groups}), but no cut of {num_layers} layers into"
        f" {num_stages} virtual stages on {num_ranks} ranks keeps them there: use fewer ranks, or other pipeline.laps"
    )


# The sum of the squares of the stages' weights; the numbers of layers, negative, so that the least has fuller first stages.
Way: TypeAlias = tuple[float, list[int]]
# The layer before which a stage ends; the rank of each tie that is open there.
Open: TypeAlias = tuple[int, tuple[tuple[int, int], ...]]


def _at_most(most: float, num_layers: int, carried: Sequence[float], ties: Ties, num_ranks: int) -> list[int] | None:
    """Numbers of layers that keep ties, with no stage heavier than `most`; the most equal ones, the first stages fuller.

    Stage after stage, for each layer at which one may end and the ranks of the ties that are open there.
    """
    tie_of = {layer: number for number, layers in enumerate(ties) for layer in layers}
    closing = {max(layers): number for number, layers in enumerate(ties)}
    ways: dict[Open, Way] = {(0, ()): (0.0, [])}
    for stage, more in enumerate(carried):
        rank, following = stage % num_ranks, dict[Open, Way]()
        left = len(carried) - stage - 1  # stages that need a layer each
        for (end, held), (squares, counts) in ways.items():
            homes = dict(held)
            for layer in range(end, min(end + int(most - more + 1e-9), num_layers - left)):
                tie = tie_of.get(layer)
                if tie is not None and homes.setdefault(tie, rank) != rank:
                    break
                homes.pop(closing.get(layer, -1), None)
                count = layer + 1 - end
                way = squares + (count + more) ** 2, [*counts, -count]
                place = layer + 1, tuple(sorted(homes.items()))
                following[place] = min(following.get(place, way), way)
        ways = following
    found = ways.get((num_layers, ()))
    return [-count for count in found[1]] if found else None


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
