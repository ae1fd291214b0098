"""What the ranks of a plan have computed, from counts of their steps: numbers multiplied, and bytes of their devices' memory.

A share of a machine's rates that is measured, not planned. Pure arithmetic.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from noria.blocks import Block
from noria.model import ModelShape
from noria.plan.cut import Tasks, work_of
from noria.plan.placement import blocks_of, stages_of
from noria.plan.plan import Plan

PHASES = ("prefill", "decode")
Counts = Mapping[str, Any]  # of a rank: engine.timing.Timing and the bytes of its links, by name


def with_work(
    plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], counts: Sequence[Counts]
) -> list[dict[str, Any]]:
    """The counts of each rank, and of both phases `flops` and `memory_nbytes`.

    flops: of products and of attention, two for each number that is multiplied; what a window hides counts too.
    memory_nbytes: weights that each microbatch reads, the cache that each row reads, and what is copied from and to the host.
    """
    stages, found, shape = plan.ranges(), [], plan.kept(shape)
    for rank, of_rank in enumerate(counts):
        names = blocks_of(rank, plan.num_ranks, stages)
        work = work_of(shape, blocks, names, stages_of(rank, plan.num_ranks, stages), plan.dtype)
        done = {f"{phase}_flops": _flops(work, shape, of_rank, phase) for phase in PHASES}
        done |= {f"{phase}_memory_nbytes": _nbytes(work, shape, of_rank, phase) for phase in PHASES}
        found.append({**of_rank, **done})
    return found


def _flops(work: Tasks, shape: ModelShape, counts: Counts, phase: str) -> float:
    tokens, pairs = counts[f"{phase}_tokens"], counts[f"{phase}_pairs"]
    heads = counts[f"{phase}_sampled"] + counts[f"{phase}_scored"]
    numbers = work.numbers - (1 - shape.experts_share) * work.expert_numbers
    return float(2 * (tokens * numbers + heads * work.head_numbers + pairs * shape.num_heads * work.attended))


def _nbytes(work: Tasks, shape: ModelShape, counts: Counts, phase: str) -> float:
    passes, tokens = counts[f"{phase}_passes"], counts[f"{phase}_tokens"]
    touched = 1 - (1 - shape.experts_share) ** (tokens / max(passes, 1))  # of the experts, by any token of a microbatch
    weights = passes * (work.read - (1 - touched) * work.expert_read)
    cache = counts[f"{phase}_seen"] * work.token + counts[f"{phase}_sampled"] * (2 * work.state - work.rings)
    return float(weights + cache + sum(counts[f"{phase}_{link}_nbytes"] for link in ("host_to_gpu", "gpu_to_host")))
