"""From a run's settings, a model's blocks and the ranks' memory to a plan: every number that the run needs.

Where the user left choices open, a handful of candidates are built and the one with the most predicted tokens/s is taken.
Needs no torch, no MPI and no GPU.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from noria.config import Config
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.order import check_blocking
from noria.plan import costs, rates
from noria.plan.building import MICROBATCH_TOKENS, check_disk, sizes_of, variants
from noria.plan.memory import Sizes
from noria.plan.placement import partition
from noria.plan.plan import Plan
from noria.plan.problem import Candidate, Problem
from noria.plan.room import asked_pages
from noria.plan.shares import check_list, is_budget

GiB = 1024**3
STREAMED_STEP_TOKENS = 16384  # a prefill step behind which a layer's load hides (a link of 55 GB/s, 800 TFLOP/s)
LEAST_STEP_TOKENS = 256
FRACTIONS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)  # of the rows, for which the cache has room in a candidate
WORTH_IT = 1.3  # times as fast as everything on the device, before anything is moved off it


def check(config: Config, num_ranks: int, shape: ModelShape) -> None:
    """Refuses settings of the pipeline that contradict each other or the model. Raises InputError."""
    pipeline, laps = config.pipeline, config.pipeline.laps or 1
    # Where laps are open, the candidates for a plan say whether some number of them keeps tied layers together.
    ties = shape.tied_layers if pipeline.laps or not isinstance(pipeline.partition, str) else ()
    partition(shape.num_layers, num_ranks * laps, pipeline.partition, ties=ties, num_ranks=num_ranks)
    check_list(config.placement.weights, shape.num_layers)
    if pipeline.blocking:
        check_blocking(num_ranks, pipeline.groups or num_ranks)
    step, micro = pipeline.step_tokens, pipeline.microbatch_tokens
    require(
        step is None or micro is None or micro <= step,
        f"pipeline.microbatch_tokens is {micro}, more than pipeline.step_tokens ({step}): lower it",
    )


def make(problem: Problem, known: rates.Rates | None = None) -> Plan:
    """The plan of a run: what the user asked for, and the rest chosen. `known`: the machine's rates (None: rates_of).

    Raises InputError, with the numbers and the remedy, where the memory does not suffice.
    """
    check(problem.config, problem.num_ranks, problem.shape)
    known = known or rates_of(problem.config, problem.machine.device, problem.num_ranks)
    plan = _choose(problem, known)
    check_disk(problem, plan)
    return replace(plan, predicted=costs.predict(plan, problem.shape, problem.blocks, known, problem.workload))


def rates_of(config: Config, device: str, num_ranks: int) -> rates.Rates:
    """The machine's rates: measured ones of job.machine, else built-in ones, where the ranks share one disk."""
    if config.job.machine:
        return rates.read(config.job.machine, device)
    known = rates.assumed(device)
    return replace(known, disk_read=known.disk_read / num_ranks, disk_write=known.disk_write / num_ranks)


def _choose(problem: Problem, known: rates.Rates) -> Plan:
    """The candidate with the most tokens/s; of equal ones that of larger steps, then of more laps.

    Raises the InputError of the most modest one if none fits.
    """
    workload = problem.workload
    resident, refused = _built(problem, known, _resident(problem))
    kept, plan = max(resident, key=lambda one: one[0]) if resident else (0.0, None)
    if plan is not None and costs.rows_in_flight(plan, workload) >= workload.num_rows and plan.holds(workload.longest):
        return plan
    candidates = (candidate for step_tokens in _steps(problem) for candidate in _candidates(problem, step_tokens))
    found, last = _built(problem, known, candidates)
    if not found:
        raise last or refused or AssertionError("a plan without a candidate")
    best = max(speed for speed, _ in found)
    if (
        plan is not None
        and kept * WORTH_IT >= best
        and plan.holds(workload.longest) >= found[0][1].holds(workload.longest)
    ):
        return plan
    good = (plan for speed, plan in found if speed >= 0.995 * best)
    return max(good, key=lambda plan: (plan.step_tokens, plan.laps))


def _built(
    problem: Problem, known: rates.Rates, candidates: Iterable[Candidate]
) -> tuple[list[tuple[float, Plan]], InputError | None]:
    """(predicted tokens/s of the whole run, plan) of the candidates that fit, and why the last one of the others does not.

    Where some have room for the longest row, only those.
    """
    found: list[tuple[float, Plan]] = []
    refused: InputError | None = None
    for candidate in candidates:
        try:
            plans = variants(problem, candidate)
        except InputError as error:
            refused = error
            continue
        if candidate.weights is None and not plans[0].weight_slots:
            continue  # everything fits: another candidate has it so, with the groups for that
        for plan in plans:
            speed = costs.predict(plan, problem.shape, problem.blocks, known, problem.workload)["tokens_per_second"]
            found.append((speed, plan))
    roomy = [(speed, plan) for speed, plan in found if plan.holds(problem.workload.longest)]
    return roomy or found, refused


def _resident(problem: Problem) -> list[Candidate]:
    """Everything on the device, where the user did not ask for another tier."""
    placement, pipeline = problem.config.placement, problem.config.pipeline
    if placement.weights is not None or placement.cache is not None:
        return []
    step_tokens = pipeline.step_tokens or (MICROBATCH_TOKENS if problem.machine.device == "cuda" else 512)
    return [
        Candidate(pipeline.laps or 1, groups, step_tokens, {"gpu": 100.0}, None)
        for groups in _groups(problem, once=False)
    ]


def _steps(problem: Problem) -> list[int]:
    """Sizes of steps to try, the best first."""
    asked = problem.config.pipeline.step_tokens
    if asked:
        return [asked]
    step_tokens = STREAMED_STEP_TOKENS if problem.machine.device == "cuda" else 512
    least = max(LEAST_STEP_TOKENS, problem.config.pipeline.microbatch_tokens or 1)
    return [step_tokens, *(smaller for smaller in (4096, 1024, 256) if least <= smaller < step_tokens)]


def _candidates(problem: Problem, step_tokens: int) -> Iterator[Candidate]:
    """Every combination of laps, room for the cache, and the tiers that the cache may live in."""
    placement, pipeline = problem.config.placement, problem.config.pipeline
    for streams in (False, True):
        if streams and not _may_stream(placement.weights):
            continue
        if not streams and placement.weights is not None and _must_stream(placement.weights):
            continue
        for laps in _laps(problem, streams):
            small = not streams and not pipeline.step_tokens
            step = min(step_tokens, MICROBATCH_TOKENS) if small else step_tokens
            for groups in _groups(problem, once=streams and laps == 1):
                base = Candidate(laps, groups, step, placement.weights, placement.cache)
                if placement.weights is None and not streams:
                    base = replace(base, weights={"gpu": 100.0})
                for cached in _cached(problem, base):
                    if base.weights is not None:
                        yield cached
                    else:
                        yield from _reserving(problem, cached)


def _may_stream(weights: Mapping[str, Any] | None) -> bool:
    return weights is None or _must_stream(weights)


def _must_stream(weights: Mapping[str, Any]) -> bool:
    return any(share for tier, share in weights.items() if tier != "gpu")


def _laps(problem: Problem, streams: bool) -> list[int]:
    """Once round where all is resident; else up to as many times as there are layers, so that a visit streams few."""
    asked, most = problem.config.pipeline.laps, problem.shape.num_layers // problem.num_ranks
    if asked or not streams or problem.num_ranks == 1 or not isinstance(problem.config.pipeline.partition, str):
        listed = problem.config.pipeline.partition
        counted = len(listed) // problem.num_ranks if isinstance(listed, list) else 1
        return [asked or max(counted, 1)]
    tried = sorted({1, max(most // 4, 1), max(most // 2, 1), most})
    return [laps for laps in tried if _is_cut(problem, laps)] or [1]


def _is_cut(problem: Problem, laps: int) -> bool:
    """Whether so many laps keep tied layers together."""
    try:
        problem.stages(laps)
    except InputError:
        return False
    return True


def _cached(problem: Problem, base: Candidate) -> Iterator[Candidate]:
    """Where the cache may live: as asked, else on the device, or there and in CPU memory."""
    yield base
    if base.cache is None and problem.config.placement.weights is None and problem.machine.device != "cpu":
        yield replace(base, cache_tiers=("gpu", "cpu"))


def _reserving(problem: Problem, base: Candidate) -> Iterator[Candidate]:
    """Candidates that keep room for the cache of a part of the rows; the rest of the device holds weights."""
    sizes = sizes_of(problem, replace(base, weights={"gpu": 100.0}))
    cap = problem.cap(base.groups)
    if base.cache is not None and is_budget(base.cache):
        asked = asked_pages(sizes, base.cache)
        yield replace(base, reserved={tier: min(count, cap) for tier, count in asked.items()})
        return
    wanted = -(-problem.workload.num_rows // base.groups) * base.groups * problem.workload.pages
    for split in [base.cache] if base.cache else [{tier: 100.0} for tier in base.cache_tiers]:
        shares = {tier: share / 100 for tier, share in split.items() if share}
        most = min([wanted, *(int(_fitting(sizes, problem.limits[tier]) / share) for tier, share in shares.items())])
        for fraction in FRACTIONS:
            pages = max(int(most * fraction), min(problem.longest, cap))
            yield replace(base, reserved={tier: int(pages * share) for tier, share in shares.items()})


def _fitting(sizes: Sizes, nbytes: int) -> int:
    """Pages that every rank can hold in so many bytes."""
    return min(sizes.pages_in(nbytes, rank) for rank in range(sizes.num_ranks))


def _groups(problem: Problem, once: bool) -> tuple[int, ...]:
    """M to try: the ring is full at M = N; one more group hides the hop and rank 0's own work.

    A single GPU stays busy with two groups, but reads its weights for each of them. `once`: a single group there, so that
    it loads its streamed blocks once a round.
    """
    pipeline = problem.config.pipeline
    if pipeline.groups or pipeline.blocking:
        return (pipeline.groups or problem.num_ranks,)
    if problem.num_ranks == 1:
        return (1,) if once or problem.machine.device == "cpu" else (2, 1)
    return (problem.num_ranks + 1,)
