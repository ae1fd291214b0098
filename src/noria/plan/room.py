"""How many pages of the cache each tier holds beside all else that a candidate has there, or why it does not fit."""

from collections.abc import Mapping
from dataclasses import replace

from noria.errors import InputError, require
from noria.limits import TIERS
from noria.plan.memory import Sizes
from noria.plan.problem import Candidate, Problem
from noria.plan.shares import amounts, budgets_of, is_budget
from noria.step import PAGE_TOKENS
from noria.tools.text import nbytes_words
from noria.tools.values import parse_pages

LARGE_HEAD = 1.5  # layers; smaller ones are streamed as layers are


def cache_pages(problem: Problem, sizes: Sizes, candidate: Candidate) -> dict[str, int]:
    """Pages in each tier, the same on all ranks. Raises InputError where a tier holds too few, or none a usual row."""
    room, least = _room(problem, sizes), min(problem.workload.pages, problem.cap(sizes.groups))
    pages = _pages(problem, sizes, candidate, room)
    if max(pages.values()) < least:  # all pages of a row are in one tier
        if problem.config.placement.cache is None:
            tier = "gpu" if candidate.on_device else "cpu"
            _require_room(problem, sizes, tier, least, room[tier])
        raise InputError(
            f"the cache has room for {max(pages.values()) * PAGE_TOKENS} tokens in a tier, a usual row of this run needs"
            f" {least * PAGE_TOKENS}: give placement.cache more, or lower sampling.max_new_tokens"
        )
    return pages


def reserved(problem: Problem, sizes: Sizes, candidate: Candidate) -> dict[str, int]:
    """Pages in each tier for which blocks leave room."""
    asked, cap = problem.config.placement.cache, problem.cap(candidate.groups)
    if asked is not None and is_budget(asked):
        return {tier: min(count, cap) for tier, count in asked_pages(sizes, asked).items()}
    split = {tier: share / 100 for tier, share in (asked or {}).items()}
    split = split or {"gpu": candidate.on_device, "cpu": 1 - candidate.on_device}
    pages = problem.pages(candidate.rows, candidate.groups)
    counts = {tier: round(pages * share) for tier, share in split.items()}
    if asked is None and 0 < candidate.on_device < 1:
        counts["gpu"] = _of_whole_rows(problem, candidate.groups, counts["gpu"])
        counts["cpu"] = pages - counts["gpu"]
    return counts


def with_head(problem: Problem, sizes: Sizes, candidate: Candidate, rank: int, slots: int) -> Sizes:
    """The sizes with a head on the device that is so large that buffers for it would take as much, if it finds room."""
    names = sizes.cut.share(rank).names
    layers = [problem.nbytes[name] for name in names if name.startswith("layers/")]
    if "head" not in names or problem.nbytes["head"] < LARGE_HEAD * max(layers, default=0):
        return sizes
    with_head = replace(sizes, weight_tiers={rank: ["gpu" if name == "head" else "" for name in names]})
    used = with_head.table(rank, reserved(problem, sizes, candidate))["gpu"]
    return with_head if sum(used.values()) + slots * max(layers) <= problem.limits["gpu"] else sizes


def _of_whole_rows(problem: Problem, groups: int, pages: int) -> int:
    """Those of so many pages of a tier that rows use: a row's are all in one tier, where each group has an equal share."""
    unit = groups * problem.workload.pages
    return pages // unit * unit


def _pages(problem: Problem, sizes: Sizes, candidate: Candidate, room: Mapping[str, int]) -> dict[str, int]:
    """Pages in each tier, of which `room` says what it can hold."""
    asked, cap = problem.config.placement.cache, problem.cap(sizes.groups)
    if asked is None:  # where all rows are in the cache at once, it may hold longer ones too
        elsewhere = problem.elsewhere(candidate)
        whole = candidate.rows >= problem.workload.num_rows or not elsewhere
        most = cap if whole else problem.pages(candidate.rows, candidate.groups)
        on_device = max(min(room["gpu"], most), 0)  # more than was reserved, where there is room left
        used = _of_whole_rows(problem, sizes.groups, on_device)
        beside = min(room["cpu"], most - used) if on_device < cap else 0
        return {"gpu": on_device, "cpu": max(beside, 0) * elsewhere, "disk": 0}
    held = [tier for tier in TIERS if asked.get(tier)]
    if is_budget(asked):
        return _budgeted_pages(problem, sizes, asked, held, room)
    for tier in held:
        _require_room(problem, sizes, tier, 1, room[tier])
    share = {tier: asked[tier] / 100 for tier in held}
    total = max(min([cap, *(int(room[tier] / share[tier]) for tier in held)]), 1)
    counts = {tier: int(total * share[tier] + 1e-9) for tier in held}
    widest = max(held, key=lambda tier: room[tier] - counts[tier])
    counts[widest] += min(total - sum(counts.values()), room[widest] - counts[widest])
    return dict.fromkeys(TIERS, 0) | counts


def _budgeted_pages(
    problem: Problem, sizes: Sizes, budgets: Mapping[str, str], held: list[str], room: Mapping[str, int]
) -> dict[str, int]:
    """Pages of sizes that the user gives: the first tiers are filled first."""
    ranks = sizes.cut.counts
    pages, left = dict.fromkeys(TIERS, 0), problem.cap(sizes.groups)
    for tier, count in asked_pages(sizes, {tier: budgets[tier] for tier in held}).items():
        pages[tier] = min(count, left)
        left -= left if pages[tier] == left else _of_whole_rows(problem, sizes.groups, pages[tier])  # as in `_pages`
        _require_room(problem, sizes, tier, pages[tier], room[tier], f"placement.cache.{tier} ({budgets[tier]})")
    largest = max(sizes.usual.nbytes(1, sizes.page(rank), sizes.state(rank)) for rank in ranks)
    require(sum(pages.values()) >= 1, f"placement.cache holds no page: a page takes {nbytes_words(largest)} on a rank")
    return pages


def asked_pages(sizes: Sizes, budgets: Mapping[str, str]) -> dict[str, int]:
    """The pages that placement.cache gives each tier, as a number of them or as bytes, on the rank where they are largest."""
    pages = {tier: parse_pages(text) for tier, text in budgets.items()}
    in_bytes = {tier: budgets[tier] for tier, count in pages.items() if count is None}
    for tier, nbytes in budgets_of(in_bytes, "placement.cache").items():
        pages[tier] = min(sizes.pages_in(nbytes, rank) for rank in sizes.cut.counts)
    return {tier: count or 0 for tier, count in pages.items()}


def _room(problem: Problem, sizes: Sizes) -> dict[str, int]:
    """Pages that every rank can hold in each tier beside what else it has there. Raises InputError for what does not fit."""
    limits, room = problem.limits, dict.fromkeys(TIERS, 1 << 62)
    asked = problem.config.placement.cache or {}
    for rank, table in sizes.tables({"disk": 1} if asked.get("disk") else {}).items():
        table["disk"].pop("cache", None)
        used = {tier: sum(table[tier].values()) for tier in TIERS}
        if not problem.config.placement.stage:
            used["disk"] = 0  # read from the checkpoint where it lies
        free = {tier: limits[tier] - used[tier] for tier in TIERS}
        if problem.machine.device == "cpu":  # one memory: what one tier takes, the other lacks
            free["gpu"] = min(free["gpu"], problem.machine.memory_nbytes - used["gpu"] - used["cpu"])
            free["cpu"] = min(free["cpu"], problem.machine.memory_nbytes - used["gpu"] - used["cpu"])
            if used["gpu"] <= limits["gpu"] and free["gpu"] < 0 and used["cpu"]:
                raise _refused_together(problem, rank, table)
        for tier in TIERS:
            if free[tier] < 0:
                raise refused(problem, rank, tier, table[tier])
            later = table[tier].get("loading", 0)  # the cache is made where the buffers of loading were
            room[tier] = min(room[tier], sizes.pages_in(free[tier] + later, rank))
    if problem.machine.device == "cpu" and asked.get("gpu") and asked.get("cpu"):
        shares = amounts(asked, "placement.cache")
        for tier in ("gpu", "cpu"):
            room[tier] = int(room[tier] * shares[tier] / (shares["gpu"] + shares["cpu"]))
    return room


def _require_room(problem: Problem, sizes: Sizes, tier: str, pages: int, room: int, asked: str = "") -> None:
    if pages <= room:
        return
    tables = {rank: table[tier] for rank, table in sizes.tables({tier: pages}).items()}
    rank = max(tables, key=lambda rank: sum(tables[rank].values()))
    raise refused(problem, rank, tier, tables[rank], asked)


def refused(problem: Problem, rank: int, tier: str, table: Mapping[str, int], asked: str = "") -> InputError:
    """What is said where a tier is too small for what the rank's `table` has there: the numbers and the remedy."""
    needed, limit = sum(table.values()), problem.limits[tier]
    items = ", ".join(f"{purpose} {nbytes_words(nbytes)}" for purpose, nbytes in table.items() if nbytes)
    words = nbytes_words if nbytes_words(needed) != nbytes_words(limit) else "{:,} bytes".format
    weights = (problem.config.placement.weights or {}).get(tier)
    if weights is not None:
        asked = asked or f"placement.weights.{tier} ({weights if isinstance(weights, str) else format(weights, 'g')})"
    other = {
        "gpu": f"use {_more_ranks(problem)}, a smaller dtype, fewer pipeline.step_tokens, or {more_memory(problem, 'gpu')}",
        "cpu": more_memory(problem, "cpu"),
        "disk": f"make room in {problem.machine.scratch} or set placement.scratch to another folder",
    }[tier]
    lower = f"lower {asked}{',' if tier == 'gpu' else ' or'} " if asked else ""
    in_memory = problem.machine.device == "cpu" and tier == "gpu"
    needs = f"a rank needs {words(needed)} of memory" if in_memory else f"{tier} tier needs {words(needed)}"
    return InputError(
        f"{needs}, the limit is {words(limit)}: {lower}{other} (rank {rank} needs at least {words(needed)}: {items})"
    )


def _refused_together(problem: Problem, rank: int, table: Mapping[str, Mapping[str, int]]) -> InputError:
    """What is said where two tiers of a machine that has one memory do not fit into it, whatever the limit of each."""
    both = {**table["gpu"], **{f"{purpose} in the cpu tier": nbytes for purpose, nbytes in table["cpu"].items()}}
    config = problem.config
    unlimited = replace(config, placement=replace(config.placement, gpu_memory=None))
    return refused(replace(problem, config=unlimited), rank, "gpu", both)


def more_memory(problem: Problem, *tiers: str) -> str:
    """How a rank may use more memory in one of these tiers. On a CPU a limit that is not set is all that is free."""
    keys, on_cpu = [f"placement.{tier}_memory" for tier in tiers], problem.machine.device == "cpu"
    if on_cpu:
        keys = [key for key in keys if getattr(problem.config.placement, key.removeprefix("placement."))]
    note = " (on a CPU: all memory of a rank)" if on_cpu and "placement.gpu_memory" in keys else ""
    return f"raise {' or '.join(keys)}{note}" if keys else "free memory of the host"


def _more_ranks(problem: Problem) -> str:
    """On a CPU the ranks of a host share its memory, unless each has a limit."""
    own = problem.machine.device != "cpu" or problem.config.placement.gpu_memory
    return "more ranks" if own else "more hosts"
