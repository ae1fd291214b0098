"""From a run's settings, a model's blocks and the ranks' memory to a plan: every number that the run needs.

Needs no torch, no MPI and no GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from noria.blocks import Block, ModelShape
from noria.config import TIERS, Config, InputError, parse_nbytes, require
from noria.plan import tiers
from noria.plan.memory import Sizes, block_nbytes, head_in_layers, streamed
from noria.plan.placement import blocks_of, check_blocking, partition
from noria.plan.plans import Plan
from noria.plan.tiers import size_words
from noria.step import PAGE_TOKENS

GiB = 1024**3
SLOTS = 3  # buffers in use, being loaded, and free again
SLOT_NBYTES = 2**28  # of a staging buffer of the cache: large enough for a link, and for a microbatch of some size
STREAMED_STEP_TOKENS = 16384  # a prefill step behind which a layer's load hides (a link of 55 GB/s, 800 TFLOP/s)
MICROBATCH_TOKENS = 4096


@dataclass(frozen=True)
class Machine:
    """What the planner must know of the ranks, each number the least over them.

    The device's kind, bytes of the device and of host memory that each may use (on a CPU they are the same memory), and
    free bytes in scratch (None: not known).
    """

    device: str
    memory_nbytes: int
    cpu_memory_nbytes: int = 1 << 62
    scratch_nbytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """What one candidate fixes before memory is counted. `weights`, `cache`: shares in % or bytes, by tier."""

    laps: int
    groups: int
    step_tokens: int
    weights: Mapping
    cache: Mapping


@dataclass(frozen=True)
class _Work:
    """What every candidate has in common."""

    config: Config
    shape: ModelShape
    blocks: Mapping[str, Block]
    dtype: str
    num_ranks: int
    machine: Machine
    most_pages: int

    @property
    def limits(self) -> dict[str, int]:
        """Bytes of each tier that a rank may use."""
        placement, machine = self.config.placement, self.machine
        return {
            "gpu": _limit(placement.gpu_memory, "placement.gpu_memory", machine.memory_nbytes),
            "cpu": _limit(placement.cpu_memory, "placement.cpu_memory", machine.cpu_memory_nbytes),
            "disk": 1 << 62 if machine.scratch_nbytes is None else machine.scratch_nbytes,
        }


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
    """The plan of a run: what the user asked for, and the rest chosen.

    `dtype` is the run's, `num_rows` the number of prompts. Raises InputError, with the numbers and the remedy, where the
    memory does not suffice.
    """
    check(config, num_ranks, shape.num_layers)
    most_pages = max(num_rows, 1) * config.sampling.n * -(-shape.max_positions // PAGE_TOKENS)
    work = _Work(config, shape, blocks, dtype, num_ranks, machine, most_pages)
    plan = build(work, _asked(work))
    _check_disk(work, plan)
    return plan


def _asked(work: _Work) -> Choice:
    """What the user asked for; what they left out lives on the device."""
    placement, pipeline = work.config.placement, work.config.pipeline
    weights, cache = placement.weights or {"gpu": 100}, placement.cache or {"gpu": 100}
    streams = any(share for tier, share in weights.items() if tier != "gpu")
    laps = pipeline.laps or 1
    once = streams and work.num_ranks == 1 and laps == 1
    groups = pipeline.groups or _default_groups(work.config, work.num_ranks, work.machine.device, once)
    return Choice(laps, groups, _step_tokens(work, streams), weights, cache)


def _step_tokens(work: _Work, streams: bool) -> int:
    if work.config.pipeline.step_tokens:
        return work.config.pipeline.step_tokens
    if work.machine.device == "cpu":
        return 512
    return STREAMED_STEP_TOKENS if streams else MICROBATCH_TOKENS


def build(work: _Work, choice: Choice) -> Plan:
    """The plan of one candidate. Raises InputError if it does not fit."""
    config, shape = work.config, work.shape
    pipeline, schedule = config.pipeline, _schedule(config, choice)
    stages = partition(shape.num_layers, work.num_ranks * choice.laps, pipeline.partition, head_in_layers(work.blocks))
    weight_tiers = tuple(_weight_tiers(work, choice.weights, rank, stages) for rank in range(work.num_ranks))
    slots = 1 if schedule == "sequential" else SLOTS
    step_tokens = choice.step_tokens
    sizes = Sizes(
        shape,
        work.blocks,
        work.dtype,
        work.num_ranks,
        stages,
        choice.groups,
        step_tokens,
        min(pipeline.microbatch_tokens or MICROBATCH_TOKENS, step_tokens),
        weight_tiers,
        slots if any(map(streamed, weight_tiers)) else 0,
        activations=config.placement.activations or "gpu",
    )
    if any(share for tier, share in choice.cache.items() if tier != "gpu"):
        sizes = replace(sizes, cache_slots=slots, cache_slot_pages=_slot_pages(work, sizes, slots))
    cache_pages = _cache_pages(work, sizes, choice.cache)
    return Plan(
        num_ranks=work.num_ranks,
        laps=choice.laps,
        groups=choice.groups,
        microbatches=pipeline.microbatches,
        step_tokens=step_tokens,
        microbatch_tokens=sizes.microbatch_tokens,
        dtype=work.dtype,
        num_pages=sum(cache_pages.values()),
        stages=tuple((stage.start, stage.stop) for stage in stages),
        blocking=pipeline.blocking,
        schedule=schedule,
        weight_tiers=weight_tiers,
        weight_slots=sizes.weight_slots,
        cache_pages=cache_pages,
        cache_slots=sizes.cache_slots,
        cache_slot_pages=sizes.cache_slot_pages,
        activations=sizes.activations,
        memory=sizes.tables(cache_pages),
    )


def _schedule(config: Config, choice: Choice) -> str:
    if config.pipeline.schedule:
        return config.pipeline.schedule
    elsewhere = any(share for tier, share in choice.cache.items() if tier != "gpu")
    return "multi_batch" if elsewhere or config.placement.activations == "cpu" else "single_batch"


def _weight_tiers(work: _Work, shares: Mapping, rank: int, stages: list[range]) -> dict[str, str]:
    """The tier of each of the rank's blocks."""
    names = blocks_of(rank, work.num_ranks, stages)
    nbytes = {name: block_nbytes(work.blocks[name], work.dtype) for name in names}
    moved = [name for name in names if name != "embed"]
    embed = {}
    if tiers.is_budget(shares):
        budgets = tiers.budgets_of(shares, "placement.weights")
        if "embed" in nbytes:
            held = "gpu" if nbytes["embed"] <= budgets.get("gpu", 0) else "cpu"
            embed = {"embed": held}
            budgets[held] = budgets.get(held, 0) - nbytes["embed"] if held == "gpu" else budgets.get("cpu", 0)
        chosen = tiers.by_budget([nbytes[name] for name in moved], budgets)
    else:
        if "embed" in nbytes:
            embed = {"embed": "gpu" if shares.get("gpu") else "cpu"}
        chosen = tiers.by_share([nbytes[name] for name in moved], shares)
    return embed | dict(zip(moved, chosen, strict=True))


def _slot_pages(work: _Work, sizes: Sizes, slots: int) -> int:
    """Pages of a staging buffer: the longest sequence at least, else SLOT_NBYTES or what a 16th of the device holds."""
    longest = -(-work.shape.max_positions // PAGE_TOKENS)
    room = min(SLOT_NBYTES, work.limits["gpu"] // 16 // slots) // sizes.layer_page
    return min(max(longest, room), max(work.most_pages, longest))


def _cache_pages(work: _Work, sizes: Sizes, shares: Mapping) -> dict[str, int]:
    """Pages in each tier, the same on all ranks. Raises InputError where a tier holds too few."""
    room = _room(work, sizes)
    cache_tiers = [tier for tier in TIERS if tier in shares and shares[tier]]
    if tiers.is_budget(shares):
        budgets = tiers.budgets_of(shares, "placement.cache")
        largest = max(sizes.page(rank) for rank in range(work.num_ranks))
        pages, left = {}, work.most_pages
        for tier in cache_tiers:
            wanted = min(budgets[tier] // largest, left)
            _require_room(work, sizes, tier, wanted, room[tier], asked=f"placement.cache.{tier} ({shares[tier]})")
            pages[tier] = wanted
            left -= wanted
        require(sum(pages.values()) >= 1, f"placement.cache holds no page: a page is {size_words(largest)} on a rank")
        return dict.fromkeys(TIERS, 0) | pages
    for tier in cache_tiers:
        _require_room(work, sizes, tier, 1, room[tier])
    total = min(int(room[tier] / (shares[tier] / 100)) for tier in cache_tiers)
    total = max(min(total, work.most_pages), 1)
    counts = {tier: int(total * shares[tier] / 100 + 1e-9) for tier in cache_tiers}
    first = max(cache_tiers, key=lambda tier: room[tier] - counts[tier])
    counts[first] += min(total - sum(counts.values()), room[first] - counts[first])
    return dict.fromkeys(TIERS, 0) | counts


def _room(work: _Work, sizes: Sizes) -> dict[str, int]:
    """Pages that every rank can hold in each tier beside what else it has there. Raises InputError for what does not fit."""
    limits, room = work.limits, dict.fromkeys(TIERS, 1 << 62)
    has_disk_cache = sizes.cache_slots and "disk" in (work.config.placement.cache or {})
    for rank, table in enumerate(sizes.tables({"disk": 1} if has_disk_cache else {})):
        used = {tier: sum(sizes.fixed(rank, tier).values()) for tier in TIERS}
        used["cpu"] = sum(table["cpu"].values())
        if not work.config.placement.stage:
            used["disk"] = 0  # read from the checkpoint where it lies
        free = {tier: limits[tier] - used[tier] for tier in TIERS}
        if work.machine.device == "cpu":  # one memory: what one tier takes, the other lacks
            free["gpu"] = min(free["gpu"], work.machine.memory_nbytes - used["gpu"] - used["cpu"])
            free["cpu"] = min(free["cpu"], work.machine.memory_nbytes - used["gpu"] - used["cpu"])
        for tier in TIERS:
            if free[tier] < 0:
                raise _refused(work, sizes, rank, tier, used[tier], limits[tier])
            room[tier] = min(room[tier], free[tier] // sizes.page(rank))
    return room


def _require_room(work: _Work, sizes: Sizes, tier: str, pages: int, room: int, asked: str = "") -> None:
    if pages <= room:
        return
    rank = max(range(work.num_ranks), key=lambda rank: sum(sizes.fixed(rank, tier).values()) + pages * sizes.page(rank))
    needed = sum(sizes.fixed(rank, tier).values()) + pages * sizes.page(rank)
    raise _refused(work, sizes, rank, tier, needed, work.limits[tier], asked)


def _refused(work: _Work, sizes: Sizes, rank: int, tier: str, needed: int, limit: int, asked: str = "") -> InputError:
    """What is said where a tier is too small: the numbers and the remedy."""
    items = ", ".join(f"{purpose} {size_words(nbytes)}" for purpose, nbytes in sizes.fixed(rank, tier).items())
    weights = (work.config.placement.weights or {}).get(tier)
    if weights is not None:
        asked = asked or f"placement.weights.{tier} ({weights if isinstance(weights, str) else format(weights, 'g')})"
    other = {
        "gpu": "use more ranks, a smaller dtype, fewer pipeline.step_tokens, or raise placement.gpu_memory",
        "cpu": "raise placement.cpu_memory",
        "disk": "make room in placement.scratch or name another folder",
    }[tier]
    lower = f"lower {asked}{',' if tier == 'gpu' else ' or'} " if asked else ""
    return InputError(
        f"{tier} tier needs {size_words(needed)}, the limit is {size_words(limit)}: {lower}{other}"
        f" (rank {rank} needs at least {size_words(needed)}: {items})"
    )


def _check_disk(work: _Work, plan: Plan) -> None:
    """Refuses weights on disk that the run could not read there. Raises InputError."""
    config, stored = work.config, next(iter(work.blocks.values())).dtype
    on_disk = any("disk" in held.values() for held in plan.weight_tiers)
    if not on_disk:
        require(
            not config.placement.stage,
            "placement.stage is true, but no weights live on disk: leave it out, or give placement.weights a share on disk",
        )
        return
    require(
        work.dtype == stored,
        f"weights on disk are read as they are stored, {stored}, but the run's dtype is {work.dtype}: set dtype ="
        f' "{stored}", or convert the model again with --dtype {work.dtype}, or leave disk out of placement.weights',
    )
    require(
        config.job.random_weights is None or config.placement.stage,
        "weights on disk with job.random_weights, which has no file: set placement.stage = true, or leave disk out of"
        " placement.weights",
    )


def _default_groups(config: Config, num_ranks: int, device: str, once: bool = False) -> int:
    """M: the ring is full at M = N; one more group hides the hop and rank 0's own work. One GPU stays busy with two.

    `once`: a single group, so that one rank loads its streamed blocks once a round.
    """
    if config.pipeline.blocking:
        return num_ranks
    if num_ranks == 1:
        return 2 if device == "cuda" and not once else 1
    return num_ranks + 1


def _limit(asked: str | None, name: str, has: int) -> int:
    if asked is None:
        return has
    limit = parse_nbytes(asked, name)
    require(
        limit <= has, f"{name} is {size_words(limit)}, but the tightest rank has {size_words(has)} to use: lower it"
    )
    return limit
