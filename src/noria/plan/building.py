"""One candidate for a plan: what it puts where, in numbers, or why it does not fit. Knows nothing of how candidates are found."""

from collections.abc import Mapping
from dataclasses import replace

from noria.config import Config
from noria.errors import InputError, require
from noria.limits import DISK_NBYTES, TIERS
from noria.plan.memory import Sizes, head_in_layers, streamed
from noria.plan.placement import blocks_of, partition
from noria.plan.plan import Plan
from noria.plan.problem import Choice, Work
from noria.plan.room import cache_pages, refused
from noria.plan.shares import Uncovered, budgets_of, by_budget, by_share, is_budget
from noria.tools.values import size_words

SLOTS = 3  # buffers in use, being loaded, and free again
SLOT_NBYTES = 2**28  # of a staging buffer of the cache: large enough for a link, and for a microbatch of some size
MICROBATCH_TOKENS = 4096


def build(work: Work, choice: Choice) -> Plan:
    """The plan of one candidate. Raises InputError if it does not fit."""
    pipeline, schedule = work.config.pipeline, _schedule(work.config, choice)
    sizes = sizes_of(work, choice)
    pages = cache_pages(work, sizes, choice)
    return Plan(
        num_ranks=work.num_ranks,
        laps=choice.laps,
        groups=choice.groups,
        microbatches=pipeline.microbatches,
        step_tokens=sizes.step_tokens,
        microbatch_tokens=sizes.microbatch_tokens,
        dtype=work.dtype,
        num_pages=sum(pages.values()),
        stages=tuple((stage.start, stage.stop) for stage in sizes.stages),
        blocking=pipeline.blocking,
        schedule=schedule,
        weight_tiers=sizes.weight_tiers,
        weight_slots=sizes.weight_slots,
        cache_pages=pages,
        cache_slots=sizes.cache_slots,
        cache_slot_pages=sizes.cache_slot_pages,
        activations=sizes.activations,
        memory=sizes.tables(pages),
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
        device=work.machine.device,
        staged=bool(config.placement.stage),
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
    """Bytes of each tier for the rank's blocks: beside the reserved pages, the buffers and work space.

    Raises InputError where these alone are too much.
    """
    names = sizes.weight_tiers[rank]
    total = sum(work.nbytes[name] for name in names)
    for tier, items in sizes.table(rank, {}).items():
        if tier != "disk" and sum(items.values()) > work.limits[tier]:
            raise refused(work, rank, tier, items)
    table = sizes.table(rank, choice.reserved or {})
    used = {tier: sum(table[tier].values()) for tier in TIERS}
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
    if shares is not None and not is_budget(shares):
        if "embed" in names:
            embed = {"embed": "gpu" if shares.get("gpu") else "cpu"}
        chosen = by_share([work.nbytes[name] for name in moved], shares)
        return embed | dict(zip(moved, chosen, strict=True))
    budgets = _fill(work, sizes, choice, rank, slots) if shares is None else budgets_of(shares, "placement.weights")
    if "embed" in names:
        held = "gpu" if work.nbytes["embed"] <= budgets.get("gpu", 0) else "cpu"
        embed = {"embed": held}
        if held in budgets:
            budgets[held] = max(budgets.get(held, 0) - work.nbytes["embed"], 0)
    try:
        chosen = by_budget([work.nbytes[name] for name in moved], budgets)
    except Uncovered as error:
        raise _uncovered(work, rank, budgets, error) from error
    return embed | dict(zip(moved, chosen, strict=True))


def _uncovered(work: Work, rank: int, budgets: Mapping[str, int], error: Uncovered) -> InputError:
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


def check_disk(work: Work, plan: Plan) -> None:
    """Refuses weights on disk that the run could not read there. Raises InputError."""
    config, stored = work.config, next(iter(work.blocks.values())).dtype
    on_disk = any("disk" in held.values() for held in plan.weight_tiers)
    if not on_disk:
        weights = config.placement.weights  # shares that leave the disk out; what is planned or filled may not need it
        require(
            not config.placement.stage or weights is None or is_budget(weights),
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
