"""What each rank of a plan has to do in a round: bytes that pass each link, numbers that are multiplied. Seconds: costs.py.

Pure arithmetic.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from noria.blocks import Block, layer_name
from noria.bundle import borders_of, token_nbytes
from noria.limits import loaded_once
from noria.model import ModelShape
from noria.plan.plan import Plan
from noria.plan.rounds import Round
from noria.step import PAGE_TOKENS


@dataclass(frozen=True)
class Load:
    """What a rank has to do in every round, whatever is in it: bytes unless the name says numbers. Equal ranks have equal ones.

    weights, from_disk: of streamed blocks that pass the link, and of those that come from disk. numbers, read, between: of
    all layers, and of their experts alone (`expert_`): multiplied, read by products, and a token's inputs and outputs of
    products. token, state: of the cache that the rank's layers have of a token and of a sequence. received, sent: what
    travels of a token before and after the rank's visits, `inner_` between all its layers. logits: of a sampled row. decoded:
    what a visit reads and writes to decode parameters, `_again`: what every microbatch does, where blocks find no room.
    """

    layers: int
    mixtures: int
    numbers: int
    expert_numbers: int
    head_numbers: int
    logits: int
    read: int
    expert_read: int
    between: int
    expert_between: int
    decoded: int
    decoded_again: int
    expert_decoded_again: int
    weights: int
    from_disk: int
    token: int
    state: int
    attended: int
    received: int
    sent: int
    inner_received: int
    inner_sent: int


def once(plan: Plan, rank: int, lap: int) -> bool:
    """Whether a streamed block of this visit is loaded once a round for all groups, not once a group."""
    return loaded_once(len(_streamed_of(plan, rank, lap)), plan.groups, plan.weight_slots)


def weights_nbytes(plan: Plan, blocks: Mapping[str, Block], rank: int) -> dict[str, int]:
    """Bytes of weights a round that go to the rank's device ("link") and come from disk ("disk")."""
    moved, tiers = {"link": 0, "disk": 0}, plan.weight_tiers[rank]
    for lap in range(plan.laps) if plan.weight_slots else ():
        names = _streamed_of(plan, rank, lap)
        times = 1 if loaded_once(len(names), plan.groups, plan.weight_slots) else plan.groups
        for name in names:
            nbytes = times * _held(plan, blocks[name], tiers[name]).nbytes
            moved["link"] += nbytes
            moved["disk"] += nbytes * (tiers[name] == "disk")
    return moved


def load_of(plan: Plan, shape: ModelShape, blocks: Mapping[str, Block], rank: int) -> Load:
    """What a rank has to do."""
    held = {name: blocks[name].cast(plan.dtype) for name in plan.weight_tiers[rank] if name != "embed"}
    head = held.pop("head", None)
    layers, its = held.values(), _layers_of(plan, rank)
    moved = weights_nbytes(plan, blocks, rank)
    return Load(
        len(held),
        sum(block.expert_numbers > 0 for block in layers),
        sum(block.numbers for block in layers),
        sum(block.expert_numbers for block in layers),
        head.numbers if head else 0,
        shape.vocab_size if head else 0,
        sum(block.computed_nbytes for block in layers) + (head.computed_nbytes if head else 0),
        sum(block.expert_nbytes for block in layers),
        sum(block.between_nbytes for block in layers),
        sum(block.expert_between_nbytes for block in layers),
        *_decoded(plan, blocks, rank),
        moved["link"],
        moved["disk"],
        shape.cache_nbytes(its, plan.dtype),
        shape.cache_nbytes(its, plan.dtype, "sequence"),
        shape.attended(its),
        *_travelling(plan, shape, its),
    )


def _decoded(plan: Plan, blocks: Mapping[str, Block], rank: int) -> tuple[int, int, int]:
    """Bytes that are read and written where the rank decodes blocks: whole ones once a visit, and others for each microbatch,
    all their parameters and those in several pieces alone. Those that were decoded while they were loaded are not decoded."""
    tiers = plan.weight_tiers[rank]
    names = [name for name, tier in tiers.items() if name != "embed" and not (plan.decoded and tier == "gpu")]
    encoded = [block for name in names if (block := _held(plan, blocks[name], tiers[name])).encoded]
    parts = [block for block in encoded if block.decoded_nbytes > plan.decoding_room]
    again = sum(block.decoding_nbytes for block in parts)
    whole = sum(block.decoding_nbytes for block in encoded) - again
    return whole, again, sum(block.decoding_expert_nbytes for block in parts)


def _held(plan: Plan, block: Block, tier: str) -> Block:
    """The layout of a block in a tier."""
    cast = block.cast(plan.dtype)
    return cast.coded if plan.coded and tier == "cpu" and not block.changes(plan.dtype) else cast


def _travelling(plan: Plan, shape: ModelShape, visits: list[range]) -> tuple[int, int, int, int]:
    """Bytes of a token that are received and sent at visits, and between all layers; none where they stay on the device."""
    if plan.activations == "gpu":
        return 0, 0, 0, 0
    borders = borders_of(shape, plan.dtype)
    layers = [range(layer, layer + 1) for visit in visits for layer in visit]
    sums = [
        token_nbytes([borders[place] for place in places])
        for spans in (visits, layers)
        for places in ([span.start for span in spans], [span.stop for span in spans])
    ]
    return sums[0], sums[1], sums[2], sums[3]


def loads(plan: Plan, shape: ModelShape, blocks: Mapping[str, Block]) -> Counter[Load]:
    """What each rank has to do -> how many ranks have it."""
    return Counter(load_of(plan, shape, blocks, rank) for rank in range(plan.num_ranks))


def ring_nbytes(plan: Plan, shape: ModelShape, tokens: float) -> float:
    """Bytes of what travels that so many tokens send round the ring: all hops but the last one, which brings token ids."""
    return tokens * sum(sent_nbytes(plan, shape))


def sent_nbytes(plan: Plan, shape: ModelShape) -> list[int]:
    """Bytes of a token in each hop of the ring; of one rank none."""
    if plan.num_ranks == 1:
        return []
    borders = borders_of(shape, plan.dtype)
    return [borders[first].token_nbytes for first, _ in plan.stages[1:]]


def cache_nbytes(plan: Plan, shape: ModelShape, rank: int, turn: Round) -> dict[str, dict[str, float]]:
    """Bytes of cache a round that the rank loads and stores, in each tier that is not the device."""
    layers = _layers_of(plan, rank)
    return cache_moved(
        plan, shape.cache_nbytes(layers, plan.dtype), shape.cache_nbytes(layers, plan.dtype, "sequence"), turn
    )


def cache_moved(plan: Plan, token: int, state: int, turn: Round) -> dict[str, dict[str, float]]:
    """The same, where the rank's layers have so many bytes of a token and of a sequence."""
    moved = {}
    for tier in ("cpu", "disk"):
        share = plan.of_pool("pages").get(tier, 0) / max(plan.num_pages, 1)
        seen = turn.rows * turn.context + turn.chunk_rows * turn.chunk_cached
        loaded = (seen * token + turn.rows * state) * share
        moved[tier] = {"load": loaded, "store": (turn.tokens * token + turn.all_rows * state) * share}
    return moved


def states_nbytes(plan: Plan, shape: ModelShape, rank: int, turn: Round) -> tuple[float, float]:
    """Bytes of what travels a round that the rank loads from host memory, and that it stores there.

    A step of several microbatches leaves the device between all layers, one of a single microbatch between ranks alone.
    """
    received, sent, inner_received, inner_sent = _travelling(plan, shape, _layers_of(plan, rank))
    inner = microbatches(plan, turn) > 1
    return turn.tokens * (inner_received if inner else received), turn.tokens * (inner_sent if inner else sent)


def microbatches(plan: Plan, turn: Round) -> float:
    """Microbatches of a group's step."""
    tokens, rows = turn.tokens / plan.groups, turn.all_rows / plan.groups
    count = max(plan.microbatches, -(-tokens // plan.microbatch_tokens))
    if plan.state_rows:
        count = max(count, -(-rows // plan.state_rows))
    elsewhere = 1 - plan.of_pool("pages").get("gpu", 0) / max(plan.num_pages, 1)
    if elsewhere and plan.cache_slot_pages:
        tokens = turn.rows * turn.context + turn.chunk_rows * 2 * turn.chunk_context
        pages = elsewhere * max(tokens / plan.groups, rows) / PAGE_TOKENS
        count = max(count, -(-pages // plan.cache_slot_pages))
    return max(min(count, max(rows, 1)), 1)


def _layers_of(plan: Plan, rank: int) -> list[range]:
    """The rank's layers, a range a lap."""
    return [range(*stage) for stage in plan.stages[rank :: plan.num_ranks]]


def _streamed_of(plan: Plan, rank: int, lap: int) -> list[str]:
    """The streamed blocks of one visit."""
    first, last = plan.stages[lap * plan.num_ranks + rank]
    ends = lap == plan.laps - 1 and rank == plan.num_ranks - 1
    names, tiers = [layer_name(layer) for layer in range(first, last)] + ["head"] * ends, plan.weight_tiers[rank]
    return [name for name in names if tiers[name] != "gpu"]
