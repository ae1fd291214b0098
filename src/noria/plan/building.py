"""One candidate for a plan: what it puts where, in numbers, or why it does not fit. Knows nothing of how candidates are found."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from noria.blocks import dtype_of
from noria.config import Config
from noria.errors import InputError, require
from noria.limits import DISK_NBYTES, TIERS
from noria.plan.memory import Sizes, streamed
from noria.plan.placement import blocks_of
from noria.plan.plan import Plan
from noria.plan.pools import Usual
from noria.plan.problem import Candidate, Problem
from noria.plan.room import cache_pages, refused
from noria.plan.shares import Uncovered, budgets_of, by_budget, by_list, by_share, is_budget
from noria.tools.listed import is_listed
from noria.tools.text import nbytes_words

SLOTS = 3  # buffers in use, being loaded, and free again
SLOT_NBYTES = 2**28  # of a staging buffer of the cache: large enough for a link, and for a microbatch of some size
MICROBATCH_TOKENS = 4096
DECODING_SHARE = 32  # of the device's memory, a block that needs no more is decoded whole


def build(problem: Problem, candidate: Candidate) -> Plan:
    """The plan of one candidate. Raises InputError if it does not fit."""
    pipeline, schedule = problem.config.pipeline, _schedule(problem.config, candidate)
    sizes = sizes_of(problem, candidate)
    pages = cache_pages(problem, sizes, candidate)
    return Plan(
        num_ranks=problem.num_ranks,
        laps=candidate.laps,
        groups=candidate.groups,
        microbatches=pipeline.microbatches,
        step_tokens=sizes.step_tokens,
        microbatch_tokens=sizes.microbatch_tokens,
        dtype=problem.dtype,
        num_pages=sum(pages.values()),
        stages=tuple((stage.start, stage.stop) for stage in sizes.stages),
        blocking=pipeline.blocking,
        schedule=schedule,
        weight_tiers=sizes.weight_tiers,
        weight_slots=sizes.weight_slots,
        pools=sizes.usual.pools(pages),
        cache_slots=sizes.cache_slots,
        cache_slot_pages=sizes.cache_slot_pages,
        state_rows=sizes.state_rows,
        activations=sizes.activations,
        memory=sizes.tables(pages),
        decoding_room=sizes.decoding_room,
        decoded=sizes.decoded,
        coded=sizes.coded,
    )


def variants(problem: Problem, candidate: Candidate) -> list[Plan]:
    """The plan of one candidate, and those that take more memory and less time: before it the one whose resident blocks are
    decoded while they load, if some are encoded, behind both those whose streamed blocks are coded without loss meanwhile.

    Raises InputError if the first does not fit.
    """
    plan, weights = build(problem, candidate), candidate.weights
    tiers = [its for held in plan.weight_tiers for its in held.items()]
    resident, from_memory = ({name for name, tier in tiers if tier == its} for its in ("gpu", "cpu"))
    found, others = [plan], [candidate]
    filled = weights is None and plan.weight_slots  # what streams leaves no room to be decoded
    stored = weights is not None and is_budget(weights)  # what the user gives in bytes is of weights as they are stored
    if resident & problem.weighed.encoded.keys() and not (filled or stored):
        found, others = (
            _fitting(problem, [replace(candidate, decoded=True)]) + found,
            [replace(candidate, decoded=True), candidate],
        )
    if problem.may_code and plan.weight_slots and from_memory & problem.weighed.coded.keys():
        found += _fitting(problem, [replace(one, coded=True) for one in others])
    return found


def _fitting(problem: Problem, candidates: list[Candidate]) -> list[Plan]:
    """The plans of those that fit."""
    found = []
    for candidate in candidates:
        with suppress(InputError):
            found.append(build(problem, candidate))
    return found


def sizes_of(problem: Problem, candidate: Candidate) -> Sizes:
    """A candidate's buffers and the tiers of its blocks. Raises InputError if the blocks find no room."""
    config, shape = problem.config, problem.shape
    slots = 1 if _schedule(config, candidate) == "sequential" else SLOTS
    stages = problem.stages(candidate.laps)
    sizes = Sizes(
        shape,
        problem.blocks,
        problem.weighed,
        problem.dtype,
        problem.num_ranks,
        stages,
        candidate.groups,
        candidate.step_tokens,
        min(config.pipeline.microbatch_tokens or MICROBATCH_TOKENS, candidate.step_tokens),
        tuple(dict.fromkeys(blocks_of(rank, problem.num_ranks, stages), "") for rank in range(problem.num_ranks)),
        activations=config.placement.activations or "gpu",
        device=problem.machine.device,
        staged=bool(config.placement.stage),
        usual=_usual(problem),
        decoding_room=problem.limits["gpu"] // DECODING_SHARE,
        decoded=candidate.decoded,
        coded=candidate.coded,
    )
    sizes = replace(sizes, state_rows=_state_rows(problem, sizes))
    if candidate.elsewhere:
        sizes = replace(sizes, cache_slots=slots, cache_slot_pages=_slot_pages(problem, sizes, slots))
    held = tuple(_weight_tiers(problem, sizes, candidate, rank, slots) for rank in range(problem.num_ranks))
    return replace(sizes, weight_tiers=held, weight_slots=slots if any(map(streamed, held)) else 0)


def _schedule(config: Config, candidate: Candidate) -> str:
    if config.pipeline.schedule:
        return config.pipeline.schedule
    return "multi_batch" if candidate.elsewhere or config.placement.activations == "cpu" else "single_batch"


def _fill(problem: Problem, sizes: Sizes, candidate: Candidate, rank: int, slots: int) -> dict[str, int]:
    """Bytes of each tier for the rank's blocks: beside the reserved pages, the buffers and work space.

    Raises InputError where these alone are too much.
    """
    names = sizes.weight_tiers[rank]
    total = sum(problem.nbytes[name] for name in names)
    for tier, items in sizes.table(rank, {}).items():
        if tier != "disk" and sum(items.values()) > problem.limits[tier]:
            raise refused(problem, rank, tier, items)
    table = sizes.table(rank, candidate.reserved or {})
    used = {tier: sum(table[tier].values()) for tier in TIERS}
    free = {tier: max(problem.limits[tier] - used[tier], 0) for tier in TIERS}
    if problem.machine.device == "cpu":  # one memory: nothing is won by moving blocks inside it
        free["gpu"] = max(min(free["gpu"], problem.machine.memory_nbytes - used["gpu"] - used["cpu"]), 0)
        free["cpu"] = 0
    if total <= free["gpu"]:
        return {"gpu": total}
    largest = max((problem.nbytes[name] for name in names if name != "embed"), default=0)
    free["gpu"] = max(free["gpu"] - slots * largest, 0)
    if total <= free["gpu"] + free["cpu"] - largest or not problem.disk_allowed:
        return {"gpu": free["gpu"], "cpu": free["cpu"]}
    return {"gpu": free["gpu"], "cpu": max(free["cpu"] - DISK_NBYTES, 0), "disk": 1 << 62}


def _weight_tiers(problem: Problem, sizes: Sizes, candidate: Candidate, rank: int, slots: int) -> dict[str, str]:
    """The tier of each of the rank's blocks."""
    names, shares = list(sizes.weight_tiers[rank]), candidate.weights
    if shares is not None and is_listed(shares):
        return by_list(names, shares)
    moved, embed = [name for name in names if name != "embed"], {}
    if shares is not None and not is_budget(shares):
        if "embed" in names:
            embed = {"embed": "gpu" if shares.get("gpu") else "cpu"}
        chosen = by_share([problem.nbytes[name] for name in moved], shares)
        return embed | dict(zip(moved, chosen, strict=True))
    budgets = (
        _fill(problem, sizes, candidate, rank, slots) if shares is None else budgets_of(shares, "placement.weights")
    )
    if "embed" in names:
        held = "gpu" if problem.nbytes["embed"] <= budgets.get("gpu", 0) else "cpu"
        embed = {"embed": held}
        if held in budgets:
            budgets[held] = max(budgets.get(held, 0) - problem.nbytes["embed"], 0)
    try:
        chosen = by_budget([problem.nbytes[name] for name in moved], budgets)
    except Uncovered as error:
        raise _uncovered(problem, rank, budgets, error) from error
    return embed | dict(zip(moved, chosen, strict=True))


def _uncovered(problem: Problem, rank: int, budgets: Mapping[str, int], error: Uncovered) -> InputError:
    """What is said where blocks find no room: the numbers and the remedy."""
    held = ", ".join(f"{tier} {nbytes_words(budgets[tier])}" for tier in TIERS if tier in budgets)
    missing = f"{nbytes_words(error.missing)} of {nbytes_words(error.total)} do not fit on rank {rank}"
    if problem.config.placement.weights is not None:
        return InputError(
            f"placement.weights is too small: {missing} ({held}, without the embedding): raise one of them"
        )
    stored = dtype_of(problem.blocks.values())
    disk = "placement.stage = true would keep the rest on disk, " if problem.config.job.random_weights else ""
    disk = disk or (f'dtype = "{stored}" would read the rest from disk, ' if not problem.as_stored else "")
    return InputError(
        f"weights do not fit: {missing}, where the tiers have {held} for them, under the limits of"
        f" gpu {nbytes_words(problem.limits['gpu'])} and cpu {nbytes_words(problem.limits['cpu'])}: use more ranks, {disk}raise"
        " placement.gpu_memory or placement.cpu_memory"
    )


def _usual(problem: Problem) -> Usual:
    """What the rows of a usual prompt hold: a state of a shared beginning beside their own, where there is one."""
    n, pages = problem.config.sampling.n, problem.workload.pages
    shared = n > 1 or problem.workload.shared_tokens > 0
    return Usual(n * pages, (n + shared) * problem.shape.has_states)


def _state_rows(problem: Problem, sizes: Sizes) -> int:
    """Rows of a microbatch, whose states in a layer take a 64th of the device; 0 where the family has none."""
    state = sizes.layer_nbytes(sizes.stages, 0, 1)
    if not state:
        return 0
    room = problem.limits["gpu"] // 64 // state
    return max(min(room, sizes.microbatch_tokens, problem.workload.num_rows), 1)


def _slot_pages(problem: Problem, sizes: Sizes, slots: int) -> int:
    """Pages of a staging buffer: the longest sequence at least, else SLOT_NBYTES or what a 16th of the device holds."""
    page = sizes.layer_nbytes(sizes.stages, 1, 0)
    room = min(SLOT_NBYTES, problem.limits["gpu"] // 16 // slots) // max(page, 1)
    return min(max(problem.longest, room), max(problem.cap(sizes.groups), problem.longest))


def check_disk(problem: Problem, plan: Plan) -> None:
    """Refuses weights on disk that the run could not read there. Raises InputError."""
    config, stored = problem.config, dtype_of(problem.blocks.values())
    on_disk = any("disk" in held.values() for held in plan.weight_tiers)
    if not on_disk:
        weights = config.placement.weights  # shares that leave the disk out; what is planned or filled may not need it
        require(
            not config.placement.stage or weights is None or is_budget(weights),
            "placement.stage is true, but no weights are on disk: leave it out, or give placement.weights a share on disk",
        )
        return
    require(
        problem.as_stored,
        f"weights on disk are read as they are stored, {stored}, but the run's dtype is {problem.dtype}: set dtype ="
        f' "{stored}", or convert the model again with --dtype {problem.dtype}, or leave disk out of placement.weights',
    )
    require(
        config.job.random_weights is None or config.placement.stage,
        "weights on disk with job.random_weights, which has no file: set placement.stage = true, or leave disk out of"
        " placement.weights",
    )
