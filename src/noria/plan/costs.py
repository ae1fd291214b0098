"""How long a plan takes: seconds of a round by what it moves and computes, and the bytes that must pass each link.

Copies hide behind compute, so that a rank takes as long as its slowest resource; with the sequential schedule, their sum.
A round takes as long as the slowest rank, or as one group's way round the ring if that is longer. Pure arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noria.blocks import Block, layer_name
from noria.bundle import Bundle, borders_of, token_nbytes
from noria.limits import loaded_once
from noria.model import ModelShape
from noria.plan.plan import Plan
from noria.plan.rates import Rates
from noria.step import PAGE_TOKENS

MANY = 4  # times as many rows as are in flight: from there on a slot that gets free is filled at once
# What whole layers reach of the rates of a bare product and a bare copy: measured with an OPT-30B shape on one H200, where
# prefill did 10,200 tokens/s (a bare product's rate allows 13,200) and a resident decode round took 61 ms (a copy's: 44).
MATMUL_SHARE = 0.78
DEVICE_MEMORY_SHARE = 0.74
# A single group waits while rank 0 takes a round's results and composes the next step: about 4 us a row on one core, twice
# that for what goes to the device, and what it takes to see that a result is there.
TURN_SECONDS = 1e-3
TURN_ROW_SECONDS = 1e-5
CPU_DECODING_SHARE = 0.25  # of the memory's rate: 0.8e9 numbers a second a core
RESOURCES = ("link", "disk", "device memory", "matmul", "launches")


@dataclass(frozen=True)
class Workload:
    """What is to be generated: rows (prompts times samples), tokens of a prompt and new tokens of a row, on average.

    `total_pages`: what all rows reserve together, `longest_pages`: what the longest of them does, if somebody looked.
    """

    num_rows: int
    prompt_tokens: float
    new_tokens: float
    total_pages: int | None = None
    longest_pages: int | None = None

    @property
    def longest(self) -> int:
        """Pages of the longest row that is known."""
        return self.longest_pages or self.pages

    @property
    def pages(self) -> int:
        """Pages that a row reserves."""
        return max(-(-round(self.prompt_tokens + self.new_tokens) // PAGE_TOKENS), 1)


@dataclass(frozen=True)
class Round:
    """One step of every group: its tokens (the same number in every group), the rows that they belong to, and what they see.

    `context`: tokens of cache that a token attends to, on average.
    """

    tokens: float
    rows: float
    context: float
    prefill: bool


def once(plan: Plan, rank: int, lap: int) -> bool:
    """Whether a streamed block of this visit is loaded once a round for all groups, not once a group."""
    return loaded_once(len(_streamed_of(plan, rank, lap)), plan.groups, plan.weight_slots)


def weights_nbytes(plan: Plan, blocks: Mapping[str, Block], rank: int) -> dict[str, int]:
    """Bytes of weights a round that go to the rank's device ("link") and come from disk ("disk")."""
    moved = {"link": 0, "disk": 0}
    for lap in range(plan.laps):
        names = _streamed_of(plan, rank, lap)
        times = 1 if once(plan, rank, lap) else plan.groups
        for name in names:
            nbytes = times * blocks[name].cast(plan.dtype).nbytes
            moved["link"] += nbytes
            moved["disk"] += nbytes * (plan.weight_tiers[rank][name] == "disk")
    return moved


def ring_nbytes(plan: Plan, shape: ModelShape, tokens: float) -> float:
    """Bytes of what travels that so many tokens send round the ring: all hops but the last one, which brings token ids."""
    return tokens * token_nbytes(_sent(plan, shape))


def _sent(plan: Plan, shape: ModelShape) -> list[Bundle]:
    """What each hop of the ring carries; of one rank none."""
    borders = borders_of(shape, plan.dtype)
    return [borders[first] for first, _ in plan.stages[1:]] if plan.num_ranks > 1 else []


def cache_nbytes(plan: Plan, shape: ModelShape, rank: int, turn: Round) -> dict[str, dict[str, float]]:
    """Bytes of cache a round that the rank loads and stores, in each tier that is not the device."""
    layers = _layers_of(plan, rank)
    token, state = shape.cache_nbytes(layers, plan.dtype), shape.cache_nbytes(layers, plan.dtype, "sequence")
    moved = {}
    for tier in ("cpu", "disk"):
        share = plan.of_pool("pages").get(tier, 0) / max(plan.num_pages, 1)
        loaded = 0.0 if turn.prefill else turn.rows * (turn.context * token + state) * share
        moved[tier] = {"load": loaded, "store": (turn.tokens * token + turn.rows * state) * share}
    return moved


def states_nbytes(plan: Plan, shape: ModelShape, rank: int, turn: Round) -> tuple[float, float]:
    """Bytes of what travels a round that the rank loads from host memory, and that it stores there.

    A step of several microbatches leaves the device between all layers, one of a single microbatch between ranks alone.
    """
    if plan.activations == "gpu":
        return 0.0, 0.0
    borders, visits = borders_of(shape, plan.dtype), _layers_of(plan, rank)
    if _microbatches(plan, turn) > 1:
        visits = [range(layer, layer + 1) for visit in visits for layer in visit]
    before, after = [borders[visit.start] for visit in visits], [borders[visit.stop] for visit in visits]
    return turn.tokens * token_nbytes(before), turn.tokens * token_nbytes(after)


def seconds(plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], rates: Rates, turn: Round) -> tuple[float, str]:
    """Seconds of a round, and what binds it: one of RESOURCES, or "ring"."""
    ranks = [resources(plan, shape, blocks, rates, rank, turn) for rank in range(plan.num_ranks)]
    combine = sum if plan.schedule == "sequential" else max
    slowest = max(ranks, key=lambda used: combine(used.values()))
    longest, binds = combine(slowest.values()), max(slowest, key=slowest.__getitem__)
    ring = _ring_seconds(plan, shape, rates, turn, ranks)
    return (ring, "ring") if ring > longest and plan.num_ranks > 1 else (longest, binds)


def terms(plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], rates: Rates, turn: Round) -> dict[str, float]:
    """Seconds of a round that keep each of RESOURCES busy, the most of any rank, and "ring": a group's way round it."""
    ranks = [resources(plan, shape, blocks, rates, rank, turn) for rank in range(plan.num_ranks)]
    most = {name: max(used[name] for used in ranks) for name in RESOURCES}
    return most | {"ring": _ring_seconds(plan, shape, rates, turn, ranks)} if plan.num_ranks > 1 else most


def _ring_seconds(
    plan: Plan, shape: ModelShape, rates: Rates, turn: Round, ranks: Sequence[Mapping[str, float]]
) -> float:
    """Seconds of a group's way round the ring, or of all groups' messages over a hop, whose ranks are so busy."""
    combine = sum if plan.schedule == "sequential" else max
    message = turn.tokens / plan.groups * max((bundle.token_nbytes for bundle in _sent(plan, shape)), default=0)
    hops = plan.num_ranks * plan.laps * (rates.hop_seconds + message / rates.hop) if plan.num_ranks > 1 else 0.0
    way = sum(combine(used.values()) for used in ranks) / plan.groups + hops
    sent = plan.groups * plan.laps * message / rates.hop if plan.num_ranks > 1 else 0.0
    return max(way, sent)


def resources(
    plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], rates: Rates, rank: int, turn: Round
) -> dict[str, float]:
    """Seconds that a round keeps each of the rank's RESOURCES busy."""
    names = [name for name in plan.weight_tiers[rank] if name != "embed"]
    layers = [name for name in names if name != "head"]
    passes = plan.groups * _microbatches(plan, turn)
    blocks = {name: blocks[name].cast(plan.dtype) for name in names}
    used = sum(_share_of(blocks[name].numbers, blocks[name].expert_numbers, shape.experts_share) for name in layers)
    of_pass = max(turn.tokens / passes, 1)
    touched = 1 - (1 - shape.experts_share) ** of_pass  # of the experts, by any of its tokens
    read = sum(_share_of(block.computed_nbytes, block.expert_nbytes, touched) for block in blocks.values())
    decoded = _decoding(plan, blocks, rank, passes, touched) / (CPU_DECODING_SHARE if rates.device == "CPU" else 1)
    head = blocks["head"].numbers if "head" in blocks else 0
    moved, cache = weights_nbytes(plan, blocks, rank), cache_nbytes(plan, shape, rank, turn)
    from_host, to_host = states_nbytes(plan, shape, rank, turn)
    loaded = moved["link"] + from_host + sum(tier["load"] for tier in cache.values())
    stored = to_host + sum(tier["store"] for tier in cache.values())
    seen = turn.rows * turn.context * shape.cache_nbytes(_layers_of(plan, rank), plan.dtype)
    seen += 2 * turn.rows * shape.cache_nbytes(_layers_of(plan, rank), plan.dtype, "sequence")  # read and written
    sampled = turn.rows
    attended = 2 * turn.tokens * turn.context * shape.num_heads * shape.attended(_layers_of(plan, rank))
    flops = 2 * (used * turn.tokens + head * sampled) + attended
    both = loaded > 0 and stored > 0.1 * loaded
    idle = TURN_SECONDS + TURN_ROW_SECONDS * turn.rows if plan.groups == 1 else 0.0
    return {
        "link": max(
            loaded / (rates.both_directions if both else rates.host_to_device),
            stored / (rates.both_directions if both else rates.device_to_host),
        ),
        "disk": (moved["disk"] + cache["disk"]["load"]) / rates.disk_read + cache["disk"]["store"] / rates.disk_write,
        "device memory": (passes * read + decoded + seen + loaded + stored)
        / (rates.device_memory * DEVICE_MEMORY_SHARE)
        + idle,
        "matmul": flops / (rates.matmul[plan.dtype] * MATMUL_SHARE) + idle,
        "launches": passes * len(layers) * rates.layer_seconds + idle,
    }


def _decoding(plan: Plan, blocks: Mapping[str, Block], rank: int, passes: float, touched: float) -> float:
    """Bytes a round that are read and written where the rank decodes parameters: a block that finds room once a visit, a
    larger one for each microbatch, of its experts those with rows (`touched`, a share)."""
    total = 0.0
    for name, block in blocks.items():
        if plan.decoded and plan.weight_tiers[rank][name] == "gpu":
            continue
        whole = block.decoded_nbytes <= plan.decoding_room
        share = 1.0 if whole else touched
        total += (plan.groups if whole else passes) * _share_of(
            block.decoding_nbytes, block.decoding_expert_nbytes, share
        )
    return total


def _share_of(whole: int, of_experts: int, share: float) -> float:
    """Of a block's numbers or bytes, what a share of its experts leaves."""
    return whole - (1 - share) * of_experts


def predict(
    plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], rates: Rates, workload: Workload
) -> dict[str, Any]:
    """What the plan should reach: rows in flight, seconds and tokens/s of prefill and decode, tokens/s overall, what binds."""
    rows = rows_in_flight(plan, workload)
    filling, rounds = filling_of(plan, workload, rows)
    growing = decoding(rows, workload)
    prefill, decode = (seconds(plan, shape, blocks, rates, turn) for turn in (filling, growing))
    times = workload.num_rows / rows
    waves = -(-workload.num_rows // rows) if times < MANY else times  # few rows of one length end together
    prefills, decodes = times * rounds, waves * max(workload.new_tokens - 1, 0)
    whole = prefills * prefill[0] + decodes * decode[0]
    return {
        "rows": rows,
        "longest_pages": workload.longest,
        "prefill": _phase(filling, prefill),
        "decode": _phase(growing, decode),
        "tokens_per_second": workload.num_rows * workload.new_tokens / whole,
        "seconds": whole,
        "rounds": {"prefill": prefills, "decode": decodes},
        "assumed": sorted(name for name in rates.assumed if plan.num_ranks > 1 or not name.startswith("hop")),
        "device": rates.device,
    }


def explain(
    plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], rates: Rates, workload: Workload
) -> dict[str, dict[str, float]]:
    """The terms of a prefill and of a decode round, as `predict` counts them."""
    rows = rows_in_flight(plan, workload)
    rounds = {"prefill": filling_of(plan, workload, rows)[0], "decode": decoding(rows, workload)}
    return {phase: terms(plan, shape, blocks, rates, turn) for phase, turn in rounds.items()}


def filling_of(plan: Plan, workload: Workload, rows: float) -> tuple[Round, float]:
    """A round that computes prompts of so many rows, and how many of them the rows take."""
    rounds = max(-(-rows / plan.groups * workload.prompt_tokens // plan.step_tokens), 1)
    return Round(rows * workload.prompt_tokens / rounds, rows / rounds, workload.prompt_tokens / 2, True), rounds


def decoding(rows: float, workload: Workload) -> Round:
    """A decode round of so many rows, half of their new tokens behind them."""
    return Round(rows, rows, workload.prompt_tokens + workload.new_tokens / 2, False)


def rows_in_flight(plan: Plan, workload: Workload) -> int:
    """Rows that are generated at once: what the cache holds, at least one."""
    held = sum(pages // workload.pages for pages in plan.of_pool("pages").values())
    return max(min(held, workload.num_rows, plan.groups * plan.step_tokens), 1)


def _phase(turn: Round, took: tuple[float, str]) -> dict[str, Any]:
    return {"round_seconds": took[0], "tokens_per_second": turn.tokens / took[0], "binds": took[1]}


def _microbatches(plan: Plan, turn: Round) -> float:
    """Microbatches of a group's step."""
    tokens, rows = turn.tokens / plan.groups, turn.rows / plan.groups
    count = max(plan.microbatches, -(-tokens // plan.microbatch_tokens))
    if plan.state_rows:
        count = max(count, -(-rows // plan.state_rows))
    elsewhere = 1 - plan.of_pool("pages").get("gpu", 0) / max(plan.num_pages, 1)
    if elsewhere and plan.cache_slot_pages:
        pages = rows * elsewhere * max(turn.context * (2 if turn.prefill else 1), 1) / PAGE_TOKENS
        count = max(count, -(-pages // plan.cache_slot_pages))
    return max(min(count, max(rows, 1)), 1)


def _layers_of(plan: Plan, rank: int) -> list[range]:
    """The rank's layers, a range a lap."""
    return [range(*stage) for stage in plan.stages[rank :: plan.num_ranks]]


def _streamed_of(plan: Plan, rank: int, lap: int) -> list[str]:
    """The streamed blocks of one visit."""
    first, last = plan.stages[lap * plan.num_ranks + rank]
    ends = lap == plan.laps - 1 and rank == plan.num_ranks - 1
    names = [layer_name(layer) for layer in range(first, last)] + ["head"] * ends
    return [name for name in names if plan.weight_tiers[rank][name] != "gpu"]
