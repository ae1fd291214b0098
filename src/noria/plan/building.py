"""One candidate for a plan: what it puts where, in numbers, or why it does not fit. Knows nothing of how candidates are found."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from noria.blocks import Block, ModelShape
from noria.config import TIERS, Config, InputError, parse_nbytes, require
from noria.plan import tiers
from noria.plan.memory import DISK_NBYTES, Sizes, block_nbytes, head_in_layers, streamed
from noria.plan.placement import blocks_of, partition
from noria.plan.plans import Plan
from noria.plan.tiers import size_words
from noria.step import PAGE_TOKENS

SLOTS = 3  # buffers in use, being loaded, and free again
SLOT_NBYTES = 2**28  # of a staging buffer of the cache: large enough for a link, and for a microbatch of some size
MICROBATCH_TOKENS = 4096


@dataclass(frozen=True)
class Machine:
    """What the planner must know of the ranks, each number the least over them.

    The device's kind, bytes of the device and of host memory that each may use (on a CPU they are the same memory), and
    free bytes in scratch (None: not known). `most_memory_nbytes`: what of the device a user may ask for (None: no more).
    """

    device: str
    memory_nbytes: int
    cpu_memory_nbytes: int = 1 << 62
    scratch_nbytes: int | None = None
    most_memory_nbytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """What one candidate fixes before memory is counted.

    `weights`, `cache`: shares in % or sizes, by tier, as the user gives them. `weights` None: resident what the device
    holds beside `reserved` pages of the cache (by tier), then CPU memory, then disk. `cache` None: what the tiers in
    `cache_tiers` hold, in their order.
    """

    laps: int
    groups: int
    step_tokens: int
    weights: Mapping | None
    cache: Mapping | None
    reserved: Mapping[str, int] | None = None
    cache_tiers: tuple[str, ...] = ("gpu",)

    @property
    def elsewhere(self) -> bool:
        """Whether some of the cache lives in another tier than the device."""
        held = self.cache_tiers if self.cache is None else [tier for tier, share in self.cache.items() if share]
        return any(tier != "gpu" for tier in held)


@dataclass(frozen=True)
class Work:
    """What every candidate has in common.

    `most_pages`: of as many rows as there are, were all as long as the context; `total_pages`: what they reserve, if that is
    known; `row_pages`: of a usual row; `longest`: of the longest row that there can be.
    """

    config: Config
    shape: ModelShape
    blocks: Mapping[str, Block]
    dtype: str
    num_ranks: int
    machine: Machine
    most_pages: int
    total_pages: int | None = None
    row_pages: int = 1

    def cap(self, groups: int) -> int:
        """Pages that all rows can use, where every group has an equal share of them."""
        if self.total_pages is None:
            return self.most_pages
        return min(self.most_pages, max(self.total_pages + groups * self.row_pages, self.longest))

    @property
    def longest(self) -> int:
        return -(-self.shape.max_positions // PAGE_TOKENS)

    @cached_property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each block in the run's dtype."""
        return {name: block_nbytes(block, self.dtype) for name, block in self.blocks.items()}

    @cached_property
    def limits(self) -> dict[str, int]:
        """Bytes of each tier that a rank may use."""
        placement, machine = self.config.placement, self.machine
        return {
            "gpu": _limit(
                placement.gpu_memory, "placement.gpu_memory", machine.memory_nbytes, machine.most_memory_nbytes
            ),
            "cpu": _limit(placement.cpu_memory, "placement.cpu_memory", machine.cpu_memory_nbytes),
            "disk": 1 << 62 if machine.scratch_nbytes is None else machine.scratch_nbytes,
        }

    @property
    def disk_allowed(self) -> bool:
        """Whether weights can be read from disk: in the dtype of a checkpoint that is there, or will be."""
        placement, job = self.config.placement, self.config.job
        stored = next(iter(self.blocks.values())).dtype
        return stored == self.dtype and (job.random_weights is None or placement.stage)


def build(work: Work, choice: Choice) -> Plan:
    """The plan of one candidate. Raises InputError if it does not fit."""
    pipeline, schedule = work.config.pipeline, _schedule(work.config, choice)
    sizes = sizes_of(work, choice)
    cache_pages = _cache_pages(work, sizes, choice)
    return Plan(
        num_ranks=work.num_ranks,
        laps=choice.laps,
        groups=choice.groups,
        microbatches=pipeline.microbatches,
        step_tokens=sizes.step_tokens,
        microbatch_tokens=sizes.microbatch_tokens,
        dtype=work.dtype,
        num_pages=sum(cache_pages.values()),
        stages=tuple((stage.start, stage.stop) for stage in sizes.stages),
        blocking=pipeline.blocking,
        schedule=schedule,
        weight_tiers=sizes.weight_tiers,
        weight_slots=sizes.weight_slots,
        cache_pages=cache_pages,
        cache_slots=sizes.cache_slots,
        cache_slot_pages=sizes.cache_slot_pages,
        activations=sizes.activations,
        memory=sizes.tables(cache_pages),
    )


def sizes_of(work: Work, choice: Choice) -> Sizes:
    """A candidate's buffers and the tiers of its blocks. Raises InputError if the blocks find no room."""
    config, shape = work.config, work.shape
    slots = 1 if _schedule(config, choice) == "sequential" else SLOTS
    stages = partition(
        shape.num_layers, work.num_ranks * choice.laps, config.pipeline.partition, head_in_layers(work.blocks)
    )
    sizes = Sizes(
        shape,
        work.blocks,
        work.dtype,
        work.num_ranks,
        stages,
        choice.groups,
        choice.step_tokens,
        min(config.pipeline.microbatch_tokens or MICROBATCH_TOKENS, choice.step_tokens),
        tuple(dict.fromkeys(blocks_of(rank, work.num_ranks, stages), "") for rank in range(work.num_ranks)),
        activations=config.placement.activations or "gpu",
    )
    if choice.elsewhere:
        sizes = replace(sizes, cache_slots=slots, cache_slot_pages=_slot_pages(work, sizes, slots))
    held = tuple(_weight_tiers(work, sizes, choice, rank, slots) for rank in range(work.num_ranks))
    return replace(sizes, weight_tiers=held, weight_slots=slots if any(map(streamed, held)) else 0)


def _schedule(config: Config, choice: Choice) -> str:
    if config.pipeline.schedule:
        return config.pipeline.schedule
    return "multi_batch" if choice.elsewhere or config.placement.activations == "cpu" else "single_batch"


def _fill(work: Work, sizes: Sizes, choice: Choice, rank: int, slots: int) -> dict[str, int]:
    """Bytes of each tier for the rank's blocks: beside the reserved pages, the buffers and work space."""
    names = sizes.weight_tiers[rank]
    total = sum(work.nbytes[name] for name in names)
    reserved = {tier: pages * sizes.page(rank) for tier, pages in (choice.reserved or {}).items()}
    used = {tier: sum(sizes.fixed(rank, tier).values()) + reserved.get(tier, 0) for tier in TIERS}
    free = {tier: max(work.limits[tier] - used[tier], 0) for tier in TIERS}
    if work.machine.device == "cpu":  # one memory: nothing is won by moving blocks inside it
        free["gpu"] = max(min(free["gpu"], work.machine.memory_nbytes - used["gpu"] - used["cpu"]), 0)
        free["cpu"] = 0
    if total <= free["gpu"]:
        return {"gpu": total}
    largest = max((work.nbytes[name] for name in names if name != "embed"), default=0)
    free["gpu"] = max(free["gpu"] - slots * largest, 0)
    if total <= free["gpu"] + free["cpu"] - largest or not work.disk_allowed:
        return {"gpu": free["gpu"], "cpu": free["cpu"]}
    return {"gpu": free["gpu"], "cpu": max(free["cpu"] - DISK_NBYTES, 0), "disk": 1 << 62}


def _weight_tiers(work: Work, sizes: Sizes, choice: Choice, rank: int, slots: int) -> dict[str, str]:
    """The tier of each of the rank's blocks."""
    names, shares = list(sizes.weight_tiers[rank]), choice.weights
    moved, embed = [name for name in names if name != "embed"], {}
    if shares is not None and not tiers.is_budget(shares):
        if "embed" in names:
            embed = {"embed": "gpu" if shares.get("gpu") else "cpu"}
        chosen = tiers.by_share([work.nbytes[name] for name in moved], shares)
        return embed | dict(zip(moved, chosen, strict=True))
    planned = shares is None
    budgets = _fill(work, sizes, choice, rank, slots) if planned else tiers.budgets_of(shares, "placement.weights")
    if "embed" in names:
        held = "gpu" if work.nbytes["embed"] <= budgets.get("gpu", 0) else "cpu"
        embed = {"embed": held}
        if held in budgets:
            budgets[held] = max(budgets.get(held, 0) - work.nbytes["embed"], 0)
    try:
        chosen = tiers.by_budget([work.nbytes[name] for name in moved], budgets)
    except tiers.Uncovered as error:
        raise _uncovered(work, rank, budgets, error) from error
    return embed | dict(zip(moved, chosen, strict=True))


def _uncovered(work: Work, rank: int, budgets: Mapping[str, int], error: tiers.Uncovered) -> InputError:
    """What is said where blocks find no room: the numbers and the remedy."""
    held = ", ".join(f"{tier} {size_words(budgets[tier])}" for tier in TIERS if tier in budgets)
    missing = f"{size_words(error.missing)} of {size_words(error.total)} find no room on rank {rank}"
    if work.config.placement.weights is not None:
        return InputError(
            f"placement.weights covers too little: {missing} ({held}, the embedding aside): raise one of them"
        )
    stored = next(iter(work.blocks.values())).dtype
    disk = "placement.stage = true would keep the rest on disk, " if work.config.job.random_weights else ""
    disk = disk or (f'dtype = "{stored}" would read the rest from disk, ' if stored != work.dtype else "")
    return InputError(
        f"weights do not fit: {missing}, where the tiers have {held} for them, under the limits of"
        f" gpu {size_words(work.limits['gpu'])} and cpu {size_words(work.limits['cpu'])}: use more ranks, {disk}raise"
        " placement.gpu_memory or placement.cpu_memory"
    )


def _slot_pages(work: Work, sizes: Sizes, slots: int) -> int:
    """Pages of a staging buffer: the longest sequence at least, else SLOT_NBYTES or what a 16th of the device holds."""
    room = min(SLOT_NBYTES, work.limits["gpu"] // 16 // slots) // sizes.layer_page
    return min(max(work.longest, room), max(work.cap(sizes.groups), work.longest))


def _cache_pages(work: Work, sizes: Sizes, choice: Choice) -> dict[str, int]:
    """Pages in each tier, the same on all ranks. Raises InputError where a tier holds too few."""
    room = _room(work, sizes, choice)
    if choice.cache is None:
        pages, left = dict.fromkeys(TIERS, 0), work.cap(sizes.groups)
        for tier in choice.cache_tiers:
            pages[tier] = max(min(room[tier], left), 0)
            left -= pages[tier]
        if not sum(pages.values()):
            _require_room(work, sizes, choice.cache_tiers[0], 1, 0)
        return pages
    held = [tier for tier in TIERS if choice.cache.get(tier)]
    if tiers.is_budget(choice.cache):
        return _budgeted_pages(work, sizes, choice.cache, held, room)
    for tier in held:
        _require_room(work, sizes, tier, 1, room[tier])
    share = {tier: choice.cache[tier] / 100 for tier in held}
    total = max(min([work.cap(sizes.groups), *(int(room[tier] / share[tier]) for tier in held)]), 1)
    counts = {tier: int(total * share[tier] + 1e-9) for tier in held}
    widest = max(held, key=lambda tier: room[tier] - counts[tier])
    counts[widest] += min(total - sum(counts.values()), room[widest] - counts[widest])
    return dict.fromkeys(TIERS, 0) | counts


def _budgeted_pages(
    work: Work, sizes: Sizes, budgets: Mapping[str, str], held: list[str], room: Mapping
) -> dict[str, int]:
    """Pages of sizes that the user gives: the first tiers are filled first."""
    largest = max(sizes.page(rank) for rank in range(work.num_ranks))
    pages, left = dict.fromkeys(TIERS, 0), work.cap(sizes.groups)
    for tier, nbytes in tiers.budgets_of({tier: budgets[tier] for tier in held}, "placement.cache").items():
        pages[tier] = min(nbytes // largest, left)
        left -= pages[tier]
        _require_room(work, sizes, tier, pages[tier], room[tier], f"placement.cache.{tier} ({budgets[tier]})")
    require(sum(pages.values()) >= 1, f"placement.cache holds no page: a page takes {size_words(largest)} on a rank")
    return pages


def _room(work: Work, sizes: Sizes, choice: Choice) -> dict[str, int]:
    """Pages that every rank can hold in each tier beside what else it has there. Raises InputError for what does not fit."""
    limits, room = work.limits, dict.fromkeys(TIERS, 1 << 62)
    has_disk_cache = bool((choice.cache or {}).get("disk"))
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
    if work.machine.device == "cpu" and choice.cache and choice.cache.get("gpu") and choice.cache.get("cpu"):
        asked = tiers.amounts(choice.cache, "placement.cache")
        for tier in ("gpu", "cpu"):
            room[tier] = int(room[tier] * asked[tier] / (asked["gpu"] + asked["cpu"]))
    return room


def _require_room(work: Work, sizes: Sizes, tier: str, pages: int, room: int, asked: str = "") -> None:
    if pages <= room:
        return
    rank = max(range(work.num_ranks), key=lambda rank: sum(sizes.fixed(rank, tier).values()) + pages * sizes.page(rank))
    needed = sum(sizes.fixed(rank, tier).values()) + pages * sizes.page(rank)
    raise _refused(work, sizes, rank, tier, needed, work.limits[tier], asked)


def _refused(work: Work, sizes: Sizes, rank: int, tier: str, needed: int, limit: int, asked: str = "") -> InputError:
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


def check_disk(work: Work, plan: Plan) -> None:
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


def _limit(asked: str | None, name: str, has: int, most: int | None = None) -> int:
    """Bytes that a rank may use: `has`, or what is asked, up to `most`."""
    if asked is None:
        return has
    limit, most = parse_nbytes(asked, name), max(has, most or 0)
    said = f"{name} is {size_words(limit)}, but the tightest rank has {size_words(most)} to use: lower it"
    require(limit <= most, said)
    return limit
