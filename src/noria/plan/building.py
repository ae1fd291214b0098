"""One candidate for a plan: what it puts where, in numbers, or why it does not fit. Knows nothing of how candidates are found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain

from noria.blocks import dtype_of
from noria.errors import InputError, require
from noria.limits import DISK_NBYTES, GRAPH_ROWS, TIERS, padded_rows
from noria.plan.memory import Sizes
from noria.plan.plan import Choices, Plan, coded_tiers
from noria.plan.pools import Usual
from noria.plan.problem import Candidate, Problem
from noria.plan.room import cache_pages, more_memory, refused, reserved, with_head
from noria.plan.shares import Uncovered, budgets_of, by_budget, by_list, by_share, is_budget
from noria.plan.terms import HALF
from noria.step import PAGE_TOKENS
from noria.tools.listed import is_listed
from noria.tools.text import nbytes_words

SLOTS = 3  # buffers in use, being loaded, and free again
SLOT_NBYTES = 2**28  # of a staging buffer of the cache: large enough for a link, and for a microbatch of some size
# Times the rows that are counted on: of these graphs are captured too, since most rows end before their limits.
GRAPHS_ROOM = 8
LEAST_GRAPH = 16  # rows for which graphs are worth their room
GRAPHS_SHARE = 10  # of the memory that is left for the cache, one in so many goes to graphs at most
DECODED_CACHE_NBYTES = 2**29  # of a buffer in which an encoded cache is decoded: few launches, a small part of a device
SHARING_ROWS = 8  # for which a ring more is kept, where rows begin alike
DECODING_SHARE = 20  # of the device's memory, a block that needs no more is decoded whole


def build(problem: Problem, candidate: Candidate) -> Plan:
    """The plan of one candidate. Raises InputError if it does not fit."""
    return plan_of(problem, candidate, *sized(problem, candidate))


def sized(problem: Problem, candidate: Candidate) -> tuple[Sizes, dict[str, int]]:
    """What decides the plan of a candidate: its sizes, and pages of the cache by tier. Raises InputError if it does not fit."""
    sizes = sizes_of(problem, candidate)
    return sizes, cache_pages(problem, sizes, candidate)


def plan_of(problem: Problem, candidate: Candidate, sizes: Sizes, pages: Mapping[str, int]) -> Plan:
    """The plan of a candidate that has come to these sizes and pages."""
    cut, tables, ranks = sizes.cut, sizes.tables(pages), range(problem.num_ranks)
    return Plan(
        num_ranks=problem.num_ranks,
        laps=candidate.laps,
        microbatches=problem.config.pipeline.microbatches,
        dtype=problem.dtype,
        num_pages=sum(pages.values()),
        stages=tuple((stage.start, stage.stop) for stage in cut.stages),
        blocking=problem.config.pipeline.blocking,
        schedule=_schedule(problem, candidate),
        weight_tiers=tuple(map(sizes.tiers_of, ranks)),
        pools=sizes.usual.pools(pages),
        memory=tuple(tables[cut.alike[rank]] for rank in ranks),
        may_code=problem.may_code,
        kv_cache_dtype=problem.config.kv_cache_dtype,
        products=problem.config.products,
        rings=bool(problem.shape.rings),
        windows=problem.windows,
        **{chosen.name: getattr(sizes, chosen.name) for chosen in fields(Choices)},
    )


def sizes_of(problem: Problem, candidate: Candidate) -> Sizes:
    """A candidate's buffers and the tiers of its blocks. Raises InputError if the blocks find no room."""
    slots = 1 if _schedule(problem, candidate) == "sequential" else SLOTS
    cut, step_tokens = problem.cut(candidate.laps, candidate.ends), problem.step_tokens(candidate)
    sizes = Sizes(
        cut,
        problem.weighed,
        {rank: ("",) * len(cut.share(rank).names) for rank in cut.counts},
        groups=candidate.groups,
        step_tokens=step_tokens,
        microbatch_tokens=min(candidate.microbatch_tokens, step_tokens),
        activations=candidate.activations,
        device=problem.machine.device,
        staged=bool(problem.config.placement.stage),
        usual=_usual(problem),
        decoding_room=problem.limits["gpu"] // DECODING_SHARE,
        decoded=candidate.decoded,
        coded=candidate.coded,
    )
    rows = _state_rows(problem, sizes, candidate)
    sizes = replace(sizes, state_rows=rows, decoded_pages=_decoded_pages(problem, sizes))
    if problem.elsewhere(candidate):
        sizes = replace(sizes, cache_slots=slots, cache_slot_pages=_slot_pages(problem, sizes, slots))
    held = {rank: _weight_tiers(problem, sizes, candidate, rank, slots) for rank in cut.counts}
    placed = [*chain(*(zip(cut.share(rank).names, tiers, strict=True) for rank, tiers in held.items()))]
    streams = any(tier != "gpu" for name, tier in placed if name != "embed")
    takes_room = streams and problem.config.placement.weights is None
    decoded = candidate.decoded and not takes_room
    decoded = decoded and any(tier == "gpu" for name, tier in placed if name in problem.weighed.encoded)
    coded = candidate.coded and problem.may_code
    tiers = coded_tiers(coded, sizes.staged)
    coded = any(tier in tiers for name, tier in placed if name in problem.weighed.coded)
    sizes = replace(sizes, weight_tiers=held, weight_slots=slots * streams, decoded=decoded, coded=coded)
    sizes = replace(sizes, graph_rows=0 if streams or problem.elsewhere(candidate) else _graph_rows(problem, sizes))
    while sizes.graph_rows and not _graphs_fit(problem, sizes):
        sizes = replace(sizes, graph_rows=padded_rows(sizes.graph_rows // 2) if sizes.graph_rows > LEAST_GRAPH else 0)
    return sizes


def _graph_rows(problem: Problem, sizes: Sizes) -> int:
    """Rows of the largest step that is captured as a graph: where beginnings are shared, or rows end before their limits, more
    find room than are counted, but for no more than their prompts do."""
    if not problem.config.pipeline.graphs or problem.machine.device != "cuda" or sizes.activations != "gpu":
        return 0
    if problem.dtype not in HALF:  # attention by lists of work alone can be captured
        return 0
    shape = problem.shape
    if shape.cache_encoding and shape.values_within:  # decoded before attention: how many rows at once, lengths decide
        return 0
    room = min(sizes.pages_in(_left(problem, sizes, rank), rank) for rank in sizes.cut.counts)
    work = problem.workload
    rows = max(min(GRAPHS_ROOM * room // work.own_pages, room // work.least_pages), 1)
    return min(padded_rows(-(-min(rows, work.num_rows) // sizes.groups)), GRAPH_ROWS)


def _left(problem: Problem, sizes: Sizes, rank: int) -> int:
    """Bytes of the device that are left for the cache, and for graphs."""
    return max(problem.limits["gpu"] - sum(sizes.fixed(rank, "gpu").values()) + sizes.graphs(rank), 0)


def _graphs_fit(problem: Problem, sizes: Sizes) -> bool:
    """Whether graphs take no more than a small share of what is left for the cache, which is worth more."""
    ranks = sizes.cut.counts
    return all(sizes.graphs(rank) * GRAPHS_SHARE <= _left(problem, sizes, rank) for rank in ranks)


def _schedule(problem: Problem, candidate: Candidate) -> str:
    """The one that overlaps most: with nothing to stage, one microbatch after another loses nothing."""
    asked, staged = problem.config.pipeline.schedule, problem.elsewhere(candidate) or candidate.activations == "cpu"
    return asked or ("multi_batch" if staged else "single_batch")


def _weight_tiers(problem: Problem, sizes: Sizes, candidate: Candidate, rank: int, slots: int) -> list[str]:
    """The tier of each of the rank's blocks, in the order of visits. Raises InputError if they find no room."""
    names, shares = sizes.cut.share(rank).names, problem.config.placement.weights
    if shares is None:
        return _filled(problem, with_head(problem, sizes, candidate, rank, slots), candidate, rank, slots)
    if is_listed(shares):
        return list(by_list(names, shares).values())
    if is_budget(shares):
        return _budgeted(problem, names, rank, [budgets_of(shares, "placement.weights")], problem.nbytes)
    moved = [problem.nbytes[name] for name in names if name != "embed"]
    embed = ["gpu" if shares.get("gpu") else "cpu"] * ("embed" in names)
    return embed + by_share(moved, shares)


def _filled(problem: Problem, sizes: Sizes, candidate: Candidate, rank: int, slots: int) -> list[str]:
    """On the device what it holds beside the reserved pages, the buffers and work space; then CPU memory, then disk.

    A head that `sizes` have there stays. The buffers of loading count in CPU memory where a block passes them. Raises
    InputError where the others are too much.
    """
    limits, kept = problem.limits, [*sizes.weight_tiers[rank]]
    names = [name for name, tier in zip(sizes.cut.share(rank).names, kept, strict=True) if not tier]
    kept = kept[len(names) :]
    on_device = {**problem.nbytes, **(problem.weighed.decoded if sizes.decoded else {})}
    for tier, items in sizes.table(rank, {}).items():
        if tier != "disk" and sum(items.values()) > limits[tier]:
            raise refused(problem, rank, tier, items)
    pages = reserved(problem, sizes, candidate)
    table = sizes.table(rank, pages)
    loading = table["cpu"].pop("loading", 0)
    free = {tier: max(limits[tier] - sum(table[tier].values()), 0) for tier in TIERS}
    if problem.machine.device == "cpu":  # one memory: nothing is won by moving blocks inside it
        used = sum(sum(table[tier].values()) for tier in ("gpu", "cpu")) + loading
        free |= {"gpu": max(min(free["gpu"], problem.machine.memory_nbytes - used), 0), "cpu": 0}
    if sum(on_device[name] for name in names) <= free["gpu"]:
        return ["gpu"] * (len(names) + len(kept))
    largest = max((problem.nbytes[name] for name in names if name != "embed"), default=0)
    beside = max(free["gpu"] - slots * largest, 0)
    budgets = [{"gpu": beside, "cpu": max(free["cpu"] - less, 0)} for less in dict.fromkeys((0, loading))]
    if problem.disk_allowed:
        less = loading + DISK_NBYTES
        budgets.append({"gpu": beside, "cpu": max(free["cpu"] - less, 0), "disk": 1 << 62})

    def fits(tiers: list[str]) -> bool:
        table = replace(sizes, weight_tiers={rank: tiers + kept}).table(rank, pages)
        return sum(table["cpu"].values()) <= limits["cpu"]

    return _budgeted(problem, names, rank, budgets, on_device, fits) + kept


def _budgeted(
    problem: Problem,
    names: Sequence[str],
    rank: int,
    budgets: Sequence[Mapping[str, int]],
    nbytes: Mapping[str, int],
    fits: Callable[[list[str]], bool] = lambda tiers: True,
) -> list[str]:
    """The tiers of these blocks of a rank by the first of these budgets that holds all. Raises InputError if none does."""
    refusal = InputError("")
    for budget in budgets:
        left, embed = dict(budget), []
        if "embed" in names:
            embed = ["gpu" if nbytes["embed"] <= left.get("gpu", 0) else "cpu"]
            left |= {tier: max(left[tier] - nbytes["embed"], 0) for tier in embed if tier in left}
        try:
            tiers = embed + by_budget([nbytes[name] for name in names if name != "embed"], left)
        except Uncovered as error:
            refusal = _uncovered(problem, rank, left, error)
            continue
        if budget is budgets[-1] or fits(tiers):
            return tiers
    raise refusal


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
        f" gpu {nbytes_words(problem.limits['gpu'])} and cpu {nbytes_words(problem.limits['cpu'])}: use more ranks, {disk}"
        f"{more_memory(problem, 'gpu', 'cpu')}"
    )


def _usual(problem: Problem) -> Usual:
    """What the rows of a usual prompt hold: a state of a shared beginning beside their own, where there is one."""
    n, pages = problem.config.sampling.n, problem.workload.pages
    shared = n > 1 or problem.workload.shared_tokens > 0
    if problem.shape.rings and n == 1:  # as large as what a row has of its own: few rows are to lack room for them
        return Usual(pages, 1, SHARING_ROWS * shared)
    return Usual(n * pages, (n + shared) * problem.shape.has_states)


def _state_rows(problem: Problem, sizes: Sizes, candidate: Candidate) -> int:
    """Rows of a microbatch, whose states in a layer take a 64th of the device; 0 where the family has none. Rings on the device
    are computed with where they lie, however many."""
    state = sizes.layer_nbytes(0, 1)
    if not state:
        return 0
    if problem.shape.rings and not problem.elsewhere(candidate):
        return sizes.microbatch_tokens
    room = problem.limits["gpu"] // 64 // state
    return max(min(room, sizes.microbatch_tokens, problem.workload.num_rows), 1)


def _slot_pages(problem: Problem, sizes: Sizes, slots: int) -> int:
    """Pages of a staging buffer: the longest sequence at least, else SLOT_NBYTES or what a 16th of the device holds."""
    page = sizes.layer_nbytes(1, 0)
    room = min(SLOT_NBYTES, problem.limits["gpu"] // 16 // slots) // max(page, 1)
    return min(max(problem.longest, room), max(problem.cap(sizes.groups), problem.longest))


def _decoded_pages(problem: Problem, sizes: Sizes) -> int:
    """Pages of the buffer for decoded rows of a cache that is encoded: the longest sequence at least."""
    page = PAGE_TOKENS * max(sizes.cut.share(rank).decoding_row for rank in sizes.cut.counts)
    if not page:
        return 0
    room = min(DECODED_CACHE_NBYTES, problem.limits["gpu"] // DECODING_SHARE) // page
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
