"""From a run's settings, a model's blocks and the ranks' memory to a plan: every number that the run needs.

Needs no torch, no MPI and no GPU.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from noria.blocks import Block, ModelShape
from noria.config import Config, InputError, parse_nbytes, require
from noria.plan import costs
from noria.plan.placement import check_blocking, partition
from noria.step import PAGE_TOKENS

GiB = 1024**3


@dataclass(frozen=True)
class Machine:
    """What the planner must know of the ranks: bytes that each may use (the least over the ranks), and the device's kind."""

    device: str
    memory_nbytes: int


@dataclass(frozen=True)
class Plan:
    """Every choice of a run. `memory`: bytes on each rank for weights, cache, messages and work space."""

    num_ranks: int
    laps: int
    groups: int
    microbatches: int
    step_tokens: int
    microbatch_tokens: int
    dtype: str
    num_pages: int
    stages: tuple[tuple[int, int], ...]
    blocking: bool
    memory: tuple[dict, ...]

    def ranges(self) -> list[range]:
        """The layers of each virtual stage."""
        return [range(*stage) for stage in self.stages]

    def as_dict(self) -> dict:
        return asdict(self)

    def stage_words(self, rank: int) -> str:
        """A rank's place, as `stage 1 (layers 4-7)`."""
        return f"stage {rank} (layers {self._layers(rank)})"

    def _layers(self, rank: int) -> str:
        return ", ".join(f"{first}-{last - 1}" for first, last in self.stages[rank :: self.num_ranks])

    def lines(self) -> list[str]:
        """The plan as people read it."""
        head = (
            f"plan: {self.num_ranks} ranks x {self.laps} laps, {self.groups} groups, steps of {self.step_tokens} tokens"
            f" in {self.microbatches}+ microbatches of {self.microbatch_tokens}, {self.dtype},"
            f" cache for {self.num_pages * PAGE_TOKENS:,} tokens"
        )
        rows = []
        for rank, memory in enumerate(self.memory):
            sizes = ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in memory.items())
            rows.append(f"plan: rank {rank}: layers {self._layers(rank)}; {sizes}")
        return [head, *rows]


def check(config: Config, num_ranks: int, num_layers: int) -> None:
    """Refuses settings of the pipeline that contradict each other or the model. Raises InputError."""
    pipeline, laps = config.pipeline, config.pipeline.laps or 1
    partition(num_layers, num_ranks * laps, pipeline.partition)
    if pipeline.blocking:
        check_blocking(num_ranks, pipeline.groups or num_ranks)
    step, micro = pipeline.step_tokens, pipeline.microbatch_tokens
    require(
        step is None or micro is None or micro <= step,
        f"pipeline.microbatch_tokens is {micro}, more than pipeline.step_tokens ({step}): lower it",
    )


def make(
    config: Config,
    shape: ModelShape,
    blocks: Mapping[str, Block],
    dtype: str,
    num_ranks: int,
    machine: Machine,
    num_rows: int,
) -> Plan:
    """The plan of a run whose weights and cache all live on the device.

    `dtype` is the run's, `num_rows` the number of prompts. Raises InputError, with the numbers and the remedy, where the
    memory does not suffice.
    """
    pipeline, laps = config.pipeline, config.pipeline.laps or 1
    check(config, num_ranks, shape.num_layers)
    groups = pipeline.groups or _default_groups(config, num_ranks, machine.device)
    step_tokens = pipeline.step_tokens or (4096 if machine.device == "cuda" else 512)
    microbatch_tokens = min(pipeline.microbatch_tokens or step_tokens, step_tokens)
    stages = partition(shape.num_layers, num_ranks * laps, pipeline.partition, costs.head_in_layers(blocks))
    sizes = costs.Sizes(shape, blocks, dtype, num_ranks, stages, groups, step_tokens, microbatch_tokens)
    num_pages = _num_pages(sizes, _limit(config, machine))
    most = max(num_rows, 1) * config.sampling.n * -(-shape.max_positions // PAGE_TOKENS)
    num_pages = min(num_pages, most)
    return Plan(
        num_ranks,
        laps,
        groups,
        pipeline.microbatches,
        step_tokens,
        microbatch_tokens,
        dtype,
        num_pages,
        tuple((stage.start, stage.stop) for stage in stages),
        pipeline.blocking,
        tuple({**sizes.fixed(rank), "cache": num_pages * sizes.page(rank)} for rank in range(num_ranks)),
    )


def _num_pages(sizes: costs.Sizes, limit: int) -> int:
    """Pages that fit on every rank. Raises InputError, with the numbers of the tightest rank, if none does."""
    ranks = range(sizes.num_ranks)
    num_pages = min((limit - sum(sizes.fixed(rank).values())) // sizes.page(rank) for rank in ranks)
    if num_pages >= 1:
        return num_pages
    needed, tightest = max((sum(sizes.fixed(rank).values()) + sizes.page(rank), rank) for rank in ranks)
    items = ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in sizes.fixed(tightest).items())
    raise InputError(
        f"rank {tightest} needs at least {_size(needed)} of device memory ({items}), the limit is {_size(limit)}:"
        " use more ranks, a smaller dtype, fewer pipeline.step_tokens, or raise placement.gpu_memory"
    )


def _default_groups(config: Config, num_ranks: int, device: str) -> int:
    """M: the ring is full at M = N; one more group hides the hop and rank 0's own work. One GPU stays busy with two."""
    if config.pipeline.blocking:
        return num_ranks
    if num_ranks == 1:
        return 2 if device == "cuda" else 1
    return num_ranks + 1


def _limit(config: Config, machine: Machine) -> int:
    asked = config.placement.gpu_memory
    if asked is None:
        return machine.memory_nbytes
    limit = parse_nbytes(asked, "placement.gpu_memory")
    require(
        limit <= machine.memory_nbytes,
        f"placement.gpu_memory is {_size(limit)}, but the tightest rank has {_size(machine.memory_nbytes)} to use: lower it",
    )
    return limit


def _size(nbytes: int) -> str:
    return f"{nbytes / GiB:.1f} GiB" if nbytes >= GiB / 10 else f"{nbytes / 1024**2:.1f} MiB"
