"""What each rank of a plan has to do in a round: bytes that pass each link, numbers that are multiplied. Seconds: costs.py.

Pure arithmetic.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from noria.blocks import Block, layer_name
from noria.bundle import borders_of
from noria.limits import loaded_once
from noria.model import ModelShape, in_products
from noria.plan.cut import Cut, Tasks
from noria.plan.plan import Plan
from noria.plan.rounds import Round
from noria.step import PAGE_TOKENS

# What products with weights as they are stored take, of what reading their numbers at a copy's rate does (one H200): 8,192 and
# 57,344 x 8,192, of 64 rows.
STORED_OTHERS = 1.2


@dataclass(frozen=True)
class Load:
    """What a rank has to do in every round, whatever is in it.

    weights, from_disk: bytes of streamed blocks that pass the link, and of those that come from disk. travelling: bytes of a
    token that are received and sent over the link at visits, and between all layers. decoded: what a visit reads and writes to
    decode parameters; decoded_again: what every microbatch does, where blocks find no room, and of it that of experts; in_tiles:
    of both, those of experts that are multiplied as they are stored where they have few rows; dense: those of other weights that
    are where microbatches have; expert_tiles: the part of the experts that are so.
    experts: of the bytes that pass the link and of those from disk, those of experts, which may be loaded when they are chosen;
    mixtures: streamed blocks that have any.
    """

    work: Tasks
    weights: int
    from_disk: int
    travelling: tuple[int, int, int, int]
    decoded: int = 0
    decoded_again: int = 0
    expert_decoded_again: int = 0
    in_tiles: tuple[int, int] = (0, 0)
    experts: tuple[int, int] = (0, 0)
    mixtures: int = 0
    dense: tuple[int, int] = (0, 0)
    expert_tiles: float = 0.0

    def with_chosen(self, share: float) -> "Load":
        """With this share of the experts alone."""
        link, disk = (round((1 - share) * nbytes) for nbytes in self.experts)
        return replace(self, weights=self.weights - link, from_disk=self.from_disk - disk)

    def read(self, as_stored: bool) -> float:
        """Bytes that a microbatch's products read, but for experts; as_stored: whether these weights are multiplied as they are
        stored, which takes as long as reading so many."""
        return (self.work.read - self.work.expert_read) * (STORED_OTHERS if as_stored and any(self.dense) else 1)

    def decoding(self, groups: int, passes: float, read_experts: float, as_stored: tuple[bool, bool]) -> float:
        """Bytes that a round of so many groups and microbatches reads and writes to decode, with this share of the experts, but
        for experts, and other weights, that are multiplied as they are stored."""
        experts, experts_again = self.in_tiles if as_stored[0] else (0, 0)
        others, others_again = self.dense if as_stored[1] else (0, 0)
        rest = (1 - read_experts) * (self.expert_decoded_again - experts_again)
        again = self.decoded_again - experts_again - others_again - rest
        return groups * (self.decoded - experts - others) + passes * again


def touched(shape: ModelShape, tokens: float) -> float:
    """Of a layer's experts, those that any of so many tokens goes to."""
    return 1 - (1 - shape.experts_share) ** tokens


def once(plan: Plan, rank: int, lap: int) -> bool:
    """Whether a streamed block of this visit is loaded once a round for all groups, not once a group."""
    return loaded_once(len(_streamed_of(plan, rank, lap)), plan.groups, plan.weight_slots)


def weights_nbytes(plan: Plan, blocks: Mapping[str, Block], rank: int, share: float = 1.0) -> dict[str, int]:
    """Bytes of weights a round that go to the rank's device ("link") and come from disk ("disk"), with such a share of the
    experts."""
    moved, tiers = {"link": 0, "disk": 0}, plan.weight_tiers[rank]
    for lap in range(plan.laps) if plan.weight_slots else ():
        names = _streamed_of(plan, rank, lap)
        times = 1 if loaded_once(len(names), plan.groups, plan.weight_slots) else plan.groups
        for name in names:
            held = _held(plan, blocks[name], tiers[name])
            nbytes = times * (held.nbytes - round((1 - share) * held.stored_expert_nbytes))
            moved["link"] += nbytes
            moved["disk"] += nbytes * (tiers[name] == "disk")
    return moved


def load_of(plan: Plan, cut: Cut, rank: int) -> Load:
    """What a rank has to do."""
    share, moved = cut.share(rank), weights_nbytes(plan, cut.blocks, rank)
    travelling = share.travelling if plan.activations == "cpu" else (0, 0, 0, 0)
    encoded = _encoded(plan, cut.blocks, rank)
    load = Load(share.work, moved["link"], moved["disk"], travelling, *_decoded(plan, encoded))
    in_tiles = sum(block.expert_nbytes for block in encoded if block.decoding_expert_nbytes[1])
    load = replace(load, dense=_dense(plan, cut, encoded), expert_tiles=in_tiles / max(share.work.expert_read, 1))
    if plan.groups > 1 or not share.work.mixtures or not plan.weight_slots:
        return load
    rest = weights_nbytes(plan, cut.blocks, rank, 0.0)
    streamed = [name for lap in range(plan.laps) for name in _streamed_of(plan, rank, lap)]
    mixtures = sum(cut.blocks[name].expert_numbers > 0 for name in streamed)
    return replace(load, experts=(moved["link"] - rest["link"], moved["disk"] - rest["disk"]), mixtures=mixtures)


def _decoded(plan: Plan, encoded: Sequence[Block]) -> tuple[int, int, int, tuple[int, int]]:
    """Bytes that are read and written where a rank decodes these blocks: whole ones once a visit, and others for each microbatch,
    all their parameters and those in several pieces alone; of both, those that are multiplied as they are stored where they have
    few rows."""
    parts = [block for block in encoded if block.decoded_nbytes > plan.decoding_room]
    again = sum(block.decoding_nbytes for block in parts)
    whole = sum(block.decoding_nbytes for block in encoded) - again
    experts, in_tiles = (sum(block.decoding_expert_nbytes[n] for block in parts) for n in (0, 1))
    of_whole = sum(block.decoding_expert_nbytes[1] for block in encoded) - in_tiles
    return whole, again, experts, (of_whole, in_tiles)


def _dense(plan: Plan, cut: Cut, encoded: Sequence[Block]) -> tuple[int, int]:
    """Of the bytes of whole blocks and of others, those of weights that are multiplied as they are stored by few rows."""
    found = [0, 0]
    for block in encoded:
        name = "dense", block.name
        if name not in cut.counted:
            its = (one for one in in_products(block) if one.in_tiles and not one.multiplied)
            cut.counted[name] = sum(one.computed_nbytes + one.nbytes for one in its)
        found[block.decoded_nbytes > plan.decoding_room] += cut.counted[name]
    return found[0], found[1]


def _encoded(plan: Plan, blocks: Mapping[str, Block], rank: int) -> list[Block]:
    """The rank's blocks that are decoded in rounds, as they are held: those that were decoded while they were loaded are not."""
    tiers = plan.weight_tiers[rank]
    names = [name for name, tier in tiers.items() if name != "embed" and not (plan.decoded and tier == "gpu")]
    return [block for name in names if (block := _held(plan, blocks[name], tiers[name])).encoded]


def _held(plan: Plan, block: Block, tier: str) -> Block:
    """The layout of a block in a tier."""
    cast = block.cast(plan.dtype)
    return cast.coded if tier in plan.coded_tiers and not block.changes(plan.dtype) else cast


def loads(plan: Plan, cut: Cut) -> dict[Load, int]:
    """What each rank has to do -> how many ranks have it."""
    return {load_of(plan, cut, rank): count for rank, count in cut.counts.items()}


def ring_nbytes(plan: Plan, shape: ModelShape, tokens: float) -> float:
    """Bytes of what travels that so many tokens send round the ring: all hops but the last one, which brings token ids."""
    borders = borders_of(shape, plan.dtype)
    return tokens * sum(borders[first].token_nbytes for first, _ in plan.stages[1:] if plan.num_ranks > 1)


def cache_nbytes(plan: Plan, shape: ModelShape, rank: int, round: Round) -> dict[str, dict[str, float]]:
    """Bytes of cache a round that the rank loads and stores, in each tier that is not the device."""
    layers = _layers_of(plan, rank)
    token, state = (shape.cache_nbytes(layers, plan.dtype, per) for per in ("token", "sequence"))
    rings = (state, shape.without_rings().cache_nbytes(layers, plan.dtype) - token) if shape.rings else (0, 0)
    return cache_moved(plan, token, state, round, rings)


def cache_moved(
    plan: Plan, token: int, state: int, round: Round, rings: tuple[int, int] = (0, 0)
) -> dict[str, dict[str, float]]:
    """The same, where the rank's layers have so many bytes of a token and of a sequence; of these in rings, and of a token there,
    which is all that a decoding row stores of them."""
    moved, shares = {}, cache_shares(plan, round)
    for tier in ("cpu", "disk"):
        share = shares.get(tier, 0.0)
        seen = round.rows * round.context + round.chunk_rows * round.chunk_cached
        loaded = (seen * token + round.rows * state) * share
        stored = round.tokens * token + round.all_rows * state - round.rows * (rings[0] - rings[1])
        moved[tier] = {"load": loaded, "store": stored * share}
    return moved


def cache_decoded(work: Tasks, round: Round, in_tiles: bool = False) -> float:
    """Bytes that a rank reads and writes in a round to decode the cache before attention, where it is encoded, of the rows that
    attend: of those that share a beginning as if each had its own. in_tiles: attention decodes that of decoding rows itself."""
    tokens = round.rows * round.context * (not in_tiles) + round.chunk_rows * round.chunk_cached + round.chunk_tokens
    return tokens * (work.token + work.decoded) * (work.decoded > 0)


def states_nbytes(load: Load, cuts: float, round: Round) -> tuple[float, float]:
    """Bytes of what travels a round that the rank loads from host memory, and that it stores there.

    A step of several microbatches leaves the device between all layers, one of a single microbatch between ranks alone.
    """
    received, sent = load.travelling[2:] if cuts > 1 else load.travelling[:2]
    return round.tokens * received, round.tokens * sent


def cache_shares(plan: Plan, round: Round) -> dict[str, float]:
    """The part of the pages of the rows in flight that each tier has: a row goes to the first one where it finds room."""
    pages, shares = min(round.reserved, plan.num_pages) or max(plan.num_pages, 1), {}
    left = pages
    for tier, count in plan.of_pool("pages").items():
        shares[tier] = min(count, left) / pages
        left -= min(count, left)
    return shares


def cache_elsewhere(plan: Plan, round: Round) -> float:
    """The part of the cache that is not on the device."""
    return 1 - cache_shares(plan, round).get("gpu", 0.0)


def microbatches(plan: Plan, round: Round) -> float:
    """Microbatches of a group's step: those that its tokens fill, and no more than the largest step has, whatever rounds have on
    average."""
    tokens, rows = round.tokens / plan.groups, round.all_rows / plan.groups
    count = max(plan.microbatches, -(-min(tokens, plan.step_tokens) // plan.microbatch_tokens))
    if plan.state_rows:
        count = max(count, -(-rows // plan.state_rows))
    if plan.cache_slot_pages and (elsewhere := cache_elsewhere(plan, round)):
        tokens = round.rows * round.context + round.chunk_rows * 2 * round.chunk_context
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
