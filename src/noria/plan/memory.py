"""What a placement takes: bytes of each tier on each rank, by purpose. Work space is estimated generously: a plan is kept.

Arithmetic on sizes alone: no torch, no MPI, no GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from noria.blocks import DTYPE_NBYTES, Block
from noria.bundle import most_nbytes, turns
from noria.kernels.work import SECTION
from noria.limits import (
    ACTIVATION_SLOTS,
    BESIDE_RINGS,
    DISK_NBYTES,
    DRAW_NBYTES,
    GRAPHS_NBYTES,
    LOADING_BUFFERS,
    LOGITS_ROWS,
    PARTIAL_NBYTES,
    TIERS,
)
from noria.model import ModelShape
from noria.plan.cut import Cut
from noria.plan.plan import Choices
from noria.plan.pools import Usual
from noria.step import PAGE_TOKENS

ROUNDING_PASSES = 6  # of new rows in float32, while they are rounded to an encoded cache
MOST_PREFIXES = 4  # that a row is taken to have at most, one behind the other


@dataclass(frozen=True)
class Weighed:
    """Bytes of a model's blocks by name, counted once for all candidates: as the run has them, as they are stored, and of
    those with encoded parameters with all of them decoded. `encoded`: these as the run has them; `changed`: those that are
    cast to the run's dtype; `coded`: those that can be coded without loss on their way into CPU memory, as they would be."""

    held: Mapping[str, int]
    stored: Mapping[str, int]
    decoded: Mapping[str, int]
    encoded: Mapping[str, Block]
    changed: frozenset[str]
    coded: Mapping[str, Block]


def weigh(blocks: Mapping[str, Block], dtype: str) -> Weighed:
    """The bytes of these blocks in a run in `dtype`."""
    cast = {name: block.cast(dtype) for name, block in blocks.items()}
    return Weighed(
        {name: block.nbytes for name, block in cast.items()},
        {name: block.nbytes for name, block in blocks.items()},
        {name: block.plain(dtype).nbytes for name, block in cast.items() if block.encoded},
        {name: block for name, block in cast.items() if block.encoded},
        (changed := frozenset(name for name, block in blocks.items() if block.changes(dtype))),
        {
            name: block.coded
            for name, block in cast.items()
            if name != "embed" and name not in changed and block.coded is not block
        },
    )


@dataclass(frozen=True)
class Occupied:
    """What a rank has in tiers: bytes of its blocks by tier, of its largest streamed block, of the buffers of loading, and of
    the buffer into which encoded parameters are decoded, one block after another."""

    by_tier: Mapping[str, int]
    slot: int
    loading: int
    decoding: int


@dataclass(frozen=True)
class Sizes(Choices):
    """A model cut into stages on ranks, its blocks in tiers, and the steps that pass through them.

    weight_tiers: of the first rank of each kind (`cut.alike`), the tier of each of its blocks in the order of visits.
    """

    cut: Cut
    weighed: Weighed
    weight_tiers: Mapping[int, Sequence[str]]
    usual: Usual = Usual()
    device: str = "cuda"

    @property
    def key(self) -> tuple[object, ...]:
        """All that sets them apart from other sizes of the same model."""
        return self.cut.stages, *self._tiers.values(), self._places

    def page(self, rank: int) -> int:
        """Bytes of one page of the cache in all layers of the rank."""
        return PAGE_TOKENS * self.cut.share(rank).work.token

    def state(self, rank: int) -> int:
        """Bytes of one state in all layers of the rank."""
        return self.cut.share(rank).work.state

    def pages_in(self, nbytes: int, rank: int) -> int:
        """Pages that have room in so many bytes of the rank, with the states of as many rows."""
        return self.usual.fitting(nbytes, self.page(rank), self.state(rank))

    def layer_nbytes(self, pages: int, states: int, rank: int | None = None) -> int:
        """Bytes of so many pages and states in the layer where they are most, of all layers or of a rank's."""
        rows = self.cut.cache_rows if rank is None else self.cut.share(rank).cache_rows
        return max((pages * PAGE_TOKENS * token + states * sequence for token, sequence in rows), default=0)

    def tiers_of(self, rank: int) -> dict[str, str]:
        """Each of the rank's blocks -> its tier."""
        return dict(zip(self.cut.names[rank], self.weight_tiers[self.cut.alike[rank]], strict=True))

    def fixed(self, rank: int, tier: str) -> dict[str, int]:
        """Bytes that the rank needs in a tier while it runs, besides its cache's pages, by purpose."""
        counted, tiers = self.cut.counted, self._tiers[self.cut.alike[rank]]
        if (key := (rank, tier, tiers, self._places)) not in counted:
            counted[key] = self._fixed(rank, tier)
        return dict(counted[key])

    @cached_property
    def _tiers(self) -> dict[int, tuple[str, ...]]:
        return {rank: tuple(tiers) for rank, tiers in self.weight_tiers.items()}

    @cached_property
    def _places(self) -> tuple[object, ...]:
        """What sizes of one cut differ by, but for the tiers of blocks."""
        slots = self.weight_slots, self.cache_slots, self.cache_slot_pages, self.state_rows, self.decoded_pages
        steps = self.groups, self.step_tokens, self.microbatch_tokens, self.graph_rows
        return slots, steps, self.activations, self._ways

    @property
    def _ways(self) -> tuple[object, ...]:
        return self.decoded, self.coded, self.staged, self.decoding_room, self.device

    def _fixed(self, rank: int, tier: str) -> dict[str, int]:
        held, borders = self._held(rank), self.cut.share(rank).borders
        items = {"weights": held.by_tier[tier]}
        if tier == "gpu":
            items["weight slots"] = self.weight_slots * held.slot
            items["decoded weights"] = held.decoding
            items["decoded cache"] = self.decoded_pages * PAGE_TOKENS * self.cut.share(rank).decoding_row
            items["cache slots"] = self.cache_slots * self.layer_nbytes(self.cache_slot_pages, self.state_rows, rank)
            items["messages"] = self._messages(rank) if self.activations == "gpu" else 0
            slots = ACTIVATION_SLOTS * (self.activations == "cpu")
            items["graphs"] = self.graphs(rank)
            items["activation slots"] = slots * most_nbytes(borders, self.microbatch_tokens)
            items["work space"] = self._work_space(rank) + self._of_states(rank)
        elif tier == "cpu":
            items["disk slots"] = DISK_NBYTES * (held.by_tier["disk"] > 0)
            items["messages"] = self._messages(rank) if self.activations == "cpu" else 0
            steps = 2 * (self.activations == "cpu")
            items["activations"] = steps * most_nbytes(borders, self.step_tokens)
        return {purpose: nbytes for purpose, nbytes in items.items() if nbytes or (tier, purpose) == ("gpu", "weights")}

    def _held(self, rank: int) -> Occupied:
        counted, first = self.cut.counted, self.cut.alike[rank]
        if (key := (first, self._tiers[first], self._ways)) not in counted:
            counted[key] = self._count(first)
        return cast(Occupied, counted[key])

    def _count(self, rank: int) -> Occupied:
        by_tier, slot, passing, decoding = dict.fromkeys(("", *TIERS), 0), 0, [], 0
        tiers = self.coded_tiers
        for name, tier in zip(self.cut.share(rank).names, self.weight_tiers[rank], strict=True):
            encoded, whole = self.weighed.encoded.get(name), self.decoded and tier == "gpu"
            coded = self.weighed.coded.get(name) if tier in ("", *tiers) and tiers else None
            by_tier[tier] += self.weighed.decoded[name] if encoded and whole else self.weighed.held[name]
            if tier not in ("", "gpu") and name != "embed":
                slot = max(slot, self.weighed.held[name])
            if self._passes(name, tier):
                passing.append(self.weighed.stored[name])
            for block in (encoded if not whole else None, coded):
                decoding = max(decoding, block.decoding_room(self.decoding_room) if block else 0)
        return Occupied(by_tier, slot, min(len(passing), LOADING_BUFFERS) * max(passing, default=0), decoding)

    def _passes(self, name: str, tier: str) -> bool:
        """Whether a block is read into a buffer first: on its way to the device, to scratch, or into another dtype."""
        if tier == "disk":
            return self.staged
        if self.decoded and tier == "gpu" and name in self.weighed.encoded:
            return True
        if tier == "cpu" and self.coded and name in self.weighed.coded:
            return True
        return (tier != "cpu" and self.device != "cpu") or name in self.weighed.changed

    def table(self, rank: int, cache_pages: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Per tier the rank's bytes by purpose, with so many pages of cache in each tier.

        `loading` is what the buffers of loading take beyond all that takes their place when the run begins.
        """
        table = {tier: self.fixed(rank, tier) for tier in TIERS}
        for tier, pages in cache_pages.items():
            if pages:
                table[tier]["cache"] = self.usual.nbytes(pages, self.page(rank), self.state(rank))
        host = table["cpu"]
        later = sum(host.get(purpose, 0) for purpose in ("disk slots", "activations", "cache"))
        if (loading := self._held(rank).loading) > later:
            host["loading"] = loading - later
        if cache_pages.get("disk"):  # a microbatch goes through host memory on its way
            host["disk slots"] = host.get("disk slots", 0) + DISK_NBYTES
        return table

    def tables(self, cache_pages: Mapping[str, int]) -> dict[int, dict[str, dict[str, int]]]:
        """The table of the first rank of each kind."""
        return {rank: self.table(rank, cache_pages) for rank in self.cut.counts}

    def _messages(self, rank: int) -> int:
        """A receive and a send buffer per group; one rank alone keeps a group's hidden states between laps."""
        share = self.cut.share(rank)
        if self.cut.num_ranks > 1:
            both = most_nbytes(share.received, self.step_tokens) + most_nbytes(share.sent, self.step_tokens)
            return self.groups * both
        return self.groups * turns(self.activations == "cpu", share.kept) * most_nbytes(share.kept, self.step_tokens)

    def graphs(self, rank: int) -> int:
        """Where layers stay on the device: what a decode step computes between them, which its graph does not give back, a page
        and a state of nobody, and graphs themselves."""
        layers = zip(self.cut.share(rank).names, self.weight_tiers[self.cut.alike[rank]], strict=True)
        if not self.graph_rows or any(tier != "gpu" for name, tier in layers if name.startswith("layers/")):
            return 0
        shape, dtype, share = self.cut.shape, self.cut.dtype, self.cut.share(rank)
        work = 12 * most_nbytes(share.borders, self.graph_rows)
        work += self.graph_rows * max(3 * share.widest, shape.mixture_size) * DTYPE_NBYTES[dtype]
        work += attention_nbytes(shape, dtype, self.graph_rows)
        work += self.graph_rows * ROUNDING_PASSES * share.decoding_row
        return work + self.page(rank) + self.state(rank) + GRAPHS_NBYTES

    def _of_states(self, rank: int) -> int:
        """What a layer makes of states: before, after, and between. Of rings: what is new of a microbatch, what of it lies beside
        them, what goes there from other rings, and what is copied."""
        if not (rings := self.cut.shape.rings):
            return 3 * self.layer_nbytes(0, self.state_rows, rank)
        tokens = 5 * self.microbatch_tokens + max(rings.values()) + BESIDE_RINGS
        return tokens * self.cut.share(rank).ring_row

    def _work_space(self, rank: int) -> int:
        shape, dtype, share = self.cut.shape, self.cut.dtype, self.cut.share(rank)
        is_last = rank == self.cut.num_ranks - 1
        itemsize, micro = DTYPE_NBYTES[dtype], self.microbatch_tokens
        # In CPU memory: all but the rows that the head needs, which are those of a whole step where prompts are scored.
        on_device = 2 if self.activations == "gpu" else 2 * is_last
        work = on_device * most_nbytes(share.borders, self.step_tokens) + 8 * most_nbytes(share.borders, micro)
        work += micro * max(3 * share.widest, shape.mixture_size) * itemsize
        work += attention_nbytes(shape, dtype, micro) * (self.device == "cuda")
        work += micro * ROUNDING_PASSES * share.decoding_row
        if is_last:
            logits = LOGITS_ROWS * shape.vocab_size
            work += logits * (itemsize + 4) + min(DRAW_NBYTES, 64 * logits)
        return work


def attention_nbytes(shape: ModelShape, dtype: str, tokens: int) -> int:
    """Bytes of attention's partial results at most, where it goes by work items: a microbatch has so many tokens.

    Of a token and head a sum, a maximum and a weight: for each section that is computed apart, twice for each prefix.
    """
    if dtype not in ("bfloat16", "float16"):
        return 0
    slot = shape.num_heads * (shape.widest_row + 2) * 4
    slots = -(-shape.max_positions // SECTION) + 2 * MOST_PREFIXES
    return min(2 * PARTIAL_NBYTES, tokens * slots * slot)


def head_in_layers(blocks: Mapping[str, Block]) -> tuple[float, float]:
    """What embedding and head weigh, in layers: the row gather nothing, the head by its bytes."""
    layers = [block.nbytes for name, block in blocks.items() if name.startswith("layers/")]
    return 0.0, blocks["head"].nbytes * len(layers) / sum(layers)
