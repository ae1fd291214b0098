"""How long a plan takes: seconds of a rank's round by term, of a round, and of the whole run.

Copies hide behind compute where the schedule lets them, so that a rank takes as long as the slowest of link, disk, device and
host; else their sum. A round takes as long as the slowest rank, or as one group's way round the ring if that is longer.
Pure arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from noria.model import ModelShape
from noria.plan import terms
from noria.plan.cut import Cut, Tasks
from noria.plan.loads import (
    Load,
    cache_decoded,
    cache_elsewhere,
    cache_moved,
    cache_nbytes,
    loads,
    microbatches,
    ring_nbytes,
    states_nbytes,
    touched,
    weights_nbytes,
)
from noria.plan.plan import Plan
from noria.plan.rates import Rates
from noria.plan.rounds import Composing, Round, Rounds, Workload, decoding, rounds_of
from noria.step import PAGE_TOKENS

__all__ = ["Round", "Workload", "cache_nbytes", "decoding", "ring_nbytes", "touched", "weights_nbytes"]
PRODUCTS, KERNELS = ("matmul", "device memory"), ("attention", "other kernels", "decoding", "host not hidden")
TERMS = ("link", "disk", *PRODUCTS, *KERNELS, "launches", "host")


def resources(plan: Plan, shape: ModelShape, load: Load, rates: Rates, round: Round) -> dict[str, float]:
    """Seconds of a round by term, of a rank that has this to do. `decoding` has the products of experts that decode them, too."""
    work, dtype, share, cuts = load.work, plan.dtype, shape.experts_share, microbatches(plan, round)
    passes, sampled = plan.groups * cuts, round.sampled
    tokens = max(round.tokens / passes, 1)
    read_experts = touched(shape, tokens)  # of all, by any token of a microbatch
    pairs = tokens * share / read_experts if read_experts else 0.0  # of token and expert, of each
    cache, (received, sent) = _caches(plan, work, round), states_nbytes(load, cuts, round)
    loaded = load.weights + received + sum(tier["load"] for tier in cache.values())
    stored = sent + sum(tier["store"] for tier in cache.values())
    as_stored = terms.stored_experts(tokens * share, dtype, rates), terms.stored_products(tokens, dtype, rates)
    experts, in_tiles = passes * read_experts * work.expert_read, as_stored[0] * load.expert_tiles
    read = passes * load.read(as_stored[1]) + experts * (1 - in_tiles)
    flops = 2 * round.tokens * (work.numbers - work.expert_numbers)
    of_experts = 2 * round.tokens * share * work.expert_numbers * (1 - in_tiles)
    context = terms.own_context(round.context, round.shared)
    states = round.all_rows * (2 * work.state - work.rings)  # they are written too
    seen = round.rows * context * (work.decoded or work.token) + states
    cache_in_tiles = work.decoded > 0 and terms.decodes_in_tiles(dtype, rates, shape.values_within)
    looked = 2 * round.chunk_tokens * round.chunk_context * shape.num_heads * work.attended
    decoded = load.decoding(plan.groups, passes, read_experts, as_stored)
    between, chosen = round.tokens * (work.between - work.expert_between), round.tokens * share * work.expert_between
    launched = terms.launches(passes * work.layers, passes * work.mixtures, rates)
    return {
        "link": terms.link(loaded, stored, rates),
        "disk": terms.disk(load.from_disk + cache["disk"]["load"], cache["disk"]["store"], rates),
        "device memory": terms.device_memory(read + loaded + stored, rates),
        "matmul": terms.matmul(flops, tokens, dtype, rates, load.weights > 0)
        + terms.experts(of_experts, pairs, dtype, rates, load.weights > 0)
        + terms.matmul(2 * sampled * work.head_numbers, max(sampled / plan.groups, 1), dtype, rates),
        "attention": terms.cache_reading(seen, rates) + terms.chunks(looked, round.chunk_context, dtype, rates),
        "other kernels": terms.elementwise(between, chosen, dtype, rates)
        + terms.least(passes * work.layers, passes * work.mixtures, rates)
        + terms.sampling(sampled * work.logits, rates),
        "decoding": terms.decoding(decoded + cache_decoded(work, round, cache_in_tiles), rates)
        + terms.as_stored(experts * in_tiles, pairs, rates),
        "host not hidden": _not_hidden(plan, work, round, launched, tokens) if rates.device != "CPU" else 0.0,
        "launches": terms.replays(plan.groups)
        if plan.graph_rows and not round.chunk_tokens
        else launched + terms.calls(plan.groups * work.layers * calls_of(plan, round), dtype, rates),
        "host": terms.host(plan.groups, sampled, _waits(plan, rates))
        + terms.prompts(round.begun, plan.num_ranks > 1 and rates.device != "CPU"),
    }


def _not_hidden(plan: Plan, work: Tasks, round: Round, launched: float, tokens: float) -> float:
    """What a rank's device waits for its host in a round of microbatches of so many tokens."""
    changed = terms.changes(round.begun, round.ended)
    if plan.num_ranks > 1:
        return terms.steps_in_ring(plan.groups, plan.laps, work.logits > 0) + changed
    return changed + terms.shown(launched, tokens) * (round.chunk_tokens > 0)


def rank_seconds(plan: Plan, used: Mapping[str, float], rates: Rates) -> tuple[float, str]:
    """Seconds of a rank's round from its terms, and the term that binds.

    A single group waits while rank 0 takes its results and composes its next step, unless that is composed ahead; of several
    the others go on meanwhile.
    Without overlap times add up: `sequential`, and `single_batch` for microbatches whose cache is elsewhere. A CPU computes,
    copies and does the host's work in one thread.
    """
    products, wait = max(PRODUCTS, key=used.__getitem__), ("host",) * _waits(plan, rates)
    on_device, on_host = (products, *KERNELS, *wait), ("launches", "host")
    compute = max((on_device, on_host), key=lambda names: sum(used[name] for name in names))
    engines: tuple[tuple[str, ...], ...] = (("link",), ("disk",), compute)
    if rates.device == "CPU":
        engines = ("disk",), ("link", products, *KERNELS, *on_host)
    if not _overlaps(plan):
        engines = (tuple(chain(*engines)),)
    slowest = max(engines, key=lambda names: sum(used[name] for name in names))
    return sum(used[name] for name in slowest), max(slowest, key=used.__getitem__)


@dataclass(frozen=True)
class Way:
    """What a rank's round takes: seconds by term, seconds of all, and the term that binds."""

    terms: Mapping[str, float]
    seconds: float
    binds: str


def of_rank(plan: Plan, shape: ModelShape, load: Load, rates: Rates, round: Round) -> Way:
    """A rank's round with whole blocks, or where that is faster with the chosen experts of streamed ones alone."""
    whole = whole_blocks(plan, shape, load, rates, round)
    if not load.mixtures:
        return whole
    return min(whole, chosen_experts(plan, shape, load, rates, round), key=lambda way: way.seconds)


def whole_blocks(plan: Plan, shape: ModelShape, load: Load, rates: Rates, round: Round) -> Way:
    used = resources(plan, shape, load, rates, round)
    seconds, binds = rank_seconds(plan, used, rates)
    exposed = _exposed(plan, round)
    if not exposed:
        return Way(used, seconds, binds)
    hidden = dict.fromkeys(("link", "host not hidden"), 0.0)  # chunks are queued while caches come
    caches = sum(tier["load"] for tier in _caches(plan, load.work, round).values())
    alone = exposed * terms.link(caches, 0, rates)
    computed, compute = rank_seconds(plan, used | hidden, rates)
    return Way(used, *max((seconds, binds), (computed + alone, "link" if alone > computed else compute)))


def _caches(plan: Plan, work: Tasks, round: Round) -> dict[str, dict[str, float]]:
    """Bytes of cache that a rank with these tasks loads and stores in a round, in each tier that is not the device."""
    return cache_moved(plan, work.token, work.state, round, (work.rings, work.ring_token))


def _exposed(plan: Plan, round: Round) -> float:
    """The part of the caches that a layer loads while little is computed.

    Microbatches of rows that decode stand between those of chunks (rows/spreading.py), whose computing hides what one of them
    loads; where there are more of them, they load one after the other. Weights come beside chunks (schedules/multi_batch.py).
    """
    if not round.chunk_tokens or not plan.cache_slots:
        return 0.0
    tokens = cache_elsewhere(plan, round) * round.rows * round.context / plan.groups
    loading = tokens / (plan.cache_slot_pages * PAGE_TOKENS)
    chunks = round.chunk_tokens / plan.groups / plan.microbatch_tokens
    return max(1 - max(chunks, 1) / loading, 0.0) if loading > 1 else 0.0


def chosen_experts(plan: Plan, shape: ModelShape, load: Load, rates: Rates, round: Round) -> Way:
    """A round of a single group whose experts are loaded when they are chosen: copies and what is computed take turns."""
    used = resources(plan, shape, load.with_chosen(touched(shape, round.tokens)), rates, round)
    used["link"] += terms.choosing(load.mixtures)
    computed, binds = rank_seconds(plan, used | {"link": 0.0, "disk": 0.0}, rates)
    copied = max(("link", "disk"), key=used.__getitem__)
    return Way(used, computed + used[copied], copied if used[copied] > computed else binds)


def chosen_tokens(plan: Plan, cut: Cut, rates: Rates, workload: Workload) -> int:
    """The most tokens of a step for which chosen experts alone are faster than whole blocks, where one group is left; 0: none."""
    alone, least, most = replace(plan, groups=1), 0, plan.step_tokens
    ranks = [load for load in loads(alone, cut) if load.mixtures]

    def gains(tokens: int) -> bool:
        given = [(alone, cut.shape, load, rates, decoding(tokens, workload)) for load in ranks]
        return all(chosen_experts(*its).seconds < whole_blocks(*its).seconds for its in given)

    while least < most and ranks:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if gains(middle) else (least, middle - 1)
    return least


def _waits(plan: Plan, rates: Rates) -> bool:
    """Whether nothing is computed between a step's results and the next step."""
    return rates.device == "CPU" or (plan.groups == 1 and not plan.composes_ahead)


def calls_of(plan: Plan, round: Round) -> float:
    """Calls of attention of a group's step, where each computes a chunk, or decoding rows of one length."""
    return (min(round.lengths, round.rows) + round.chunk_rows) / plan.groups


def _overlaps(plan: Plan) -> bool:
    staged = plan.cache_slots or plan.activations == "cpu"
    return plan.schedule == "multi_batch" or (plan.schedule == "single_batch" and not staged)


@dataclass(frozen=True)
class Took:
    """Seconds of a round, what binds it (one of TERMS, or "ring"), and each term's seconds on the rank where it is longest."""

    seconds: float
    binds: str
    terms: Mapping[str, float]


def seconds(plan: Plan, cut: Cut, ranks: Mapping[Load, int], rates: Rates, round: Round) -> Took:
    """What a round takes, on ranks that have this to do."""
    ways = {load: of_rank(plan, cut.shape, load, rates, round) for load in ranks}
    longest, binds = max((way.seconds, way.binds) for way in ways.values())
    most = {name: max(way.terms[name] for way in ways.values()) for name in TERMS}
    if cut.num_ranks == 1:
        return Took(longest, binds, most)
    message = terms.hop(round.tokens / plan.groups * max(cut.sent), rates)
    hops = cut.num_ranks * plan.laps * message
    turn_over = most["host"] * (plan.groups > 1)  # rank 0's, between a group's result and its next step
    way = (sum(count * ways[load].seconds for load, count in ranks.items()) + turn_over) / plan.groups + hops
    ring = max(way, plan.laps * round.tokens * max(cut.sent) / rates.hop)
    return Took(max(ring, longest), "ring" if ring > longest else binds, most | {"ring": ring})


def predict(plan: Plan, cut: Cut, rates: Rates, workload: Workload) -> dict[str, Any]:
    """What the plan should reach: rows in flight, seconds and tokens/s of prefill and decode, tokens/s overall, what binds.

    `terms`: seconds of a round by term in each phase, on the rank where it is longest. `rounds`: of each phase in the run.
    """
    rows, ranks, rounds = rows_in_flight(plan, workload), loads(plan, cut), planned_rounds(plan, workload, rates.device)
    decode = mean([seconds(plan, cut, ranks, rates, round) for round in rounds.fills()])
    prefill = of_prefill(rounds, seconds(plan, cut, ranks, rates, rounds.full), decode)
    whole = rounds.prefill_rounds * prefill.seconds + rounds.decode_rounds * decode.seconds
    return {
        "rows": rows,
        "longest_pages": workload.longest,
        "prefill": _phase(rounds.prefill, prefill),
        "decode": _phase(rounds.decode, decode),
        "tokens_per_second": workload.num_rows * workload.new_tokens / whole,
        "seconds": whole,
        "terms": {"prefill": dict(prefill.terms), "decode": dict(decode.terms)},
        "rounds": {"prefill": rounds.prefill_rounds, "decode": rounds.decode_rounds},
        "assumed": sorted(name for name in rates.assumed if plan.num_ranks > 1 or not name.startswith("hop")),
        "device": rates.device,
    }


def mean(rounds: Sequence[Took]) -> Took:
    """Of several rounds; what binds the one in the middle."""
    terms = {name: sum(one.terms[name] for one in rounds) / len(rounds) for name in rounds[0].terms}
    return Took(sum(one.seconds for one in rounds) / len(rounds), rounds[len(rounds) // 2].binds, terms)


def of_prefill(rounds: Rounds, full: Took, decode: Took) -> Took:
    """Of the rounds with chunks, of which some are in part decode rounds; what binds the full ones."""
    terms = {name: rounds.of_prefill(full.terms[name], decode.terms[name]) for name in full.terms}
    return Took(rounds.of_prefill(full.seconds, decode.seconds), full.binds, terms)


def planned_rounds(plan: Plan, workload: Workload, device: str) -> Rounds:
    """The rounds of a plan's run; until the first group has come to the last rank, the ring fills, a part of a round."""
    most, chunk = rows_in_flight(plan, workload), min(plan.step_tokens, plan.microbatch_tokens)
    composing = Composing(plan.groups, plan.composes_ahead and device != "CPU", plan.graph_rows > 0)
    rounds = rounds_of(workload, most, plan.step_tokens, chunk, composing)
    filling = (plan.num_ranks - 1) / (plan.groups * plan.laps)
    return replace(rounds, prefill_rounds=rounds.prefill_rounds + filling)


def rows_in_flight(plan: Plan, workload: Workload) -> int:
    """Rows that are generated at once: what the cache holds, at least one; each group has an equal share of each tier.

    All of them where a tier has the pages of all, and of one row more in each group; states are one a row of a usual length.
    """
    pages, own, states = plan.of_pool("pages").values(), workload.own_pages, plan.of_pool("states").values()
    if not any(states) and workload.total_pages and max(pages) >= workload.total_pages + plan.groups * workload.pages:
        held = workload.num_rows
    else:
        shares = plan.groups * sum(count // plan.groups // own for count in pages)
        held = max(shares, min(sum(count // own for count in pages), plan.groups))
    return max(min(held, workload.num_rows, plan.groups * plan.step_tokens), 1)


def _phase(round: Round, took: Took) -> dict[str, Any]:
    return {"round_seconds": took.seconds, "tokens_per_second": round.tokens / took.seconds, "binds": took.binds}
