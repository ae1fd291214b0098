"""What a placement takes: bytes of each tier on each rank, by purpose. Work space is estimated generously: a plan is kept.

Arithmetic on sizes alone: no torch, no MPI, no GPU.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from noria.blocks import DTYPE_NBYTES, Block
from noria.bundle import Bundle, borders_of, most_nbytes, turns, within
from noria.kernels.work import SECTION
from noria.limits import ACTIVATION_SLOTS, DISK_NBYTES, DRAW_NBYTES, LOADING_BUFFERS, LOGITS_ROWS, PARTIAL_NBYTES, TIERS
from noria.model import ModelShape
from noria.plan.pools import Usual
from noria.step import PAGE_TOKENS

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
class Sizes:
    """A model cut into stages on ranks, its blocks in tiers, and the steps that pass through them."""

    shape: ModelShape
    blocks: Mapping[str, Block]
    weighed: Weighed
    dtype: str
    num_ranks: int
    stages: list[range]
    groups: int
    step_tokens: int
    microbatch_tokens: int
    weight_tiers: tuple[dict[str, str], ...]
    weight_slots: int = 0
    cache_slots: int = 0
    cache_slot_pages: int = 0
    state_rows: int = 0
    usual: Usual = Usual()
    activations: str = "gpu"
    device: str = "cuda"
    staged: bool = False
    decoding_room: int = 0
    decoded: bool = False
    coded: bool = False

    def block(self, name: str) -> int:
        """Bytes of a block in the run's dtype."""
        return self.weighed.held[name]

    def page(self, rank: int) -> int:
        """Bytes of one page of the cache in all layers of the rank."""
        return PAGE_TOKENS * self.shape.cache_nbytes(self._stages_of(rank), self.dtype)

    def state(self, rank: int) -> int:
        """Bytes of one state in all layers of the rank."""
        return self.shape.cache_nbytes(self._stages_of(rank), self.dtype, "sequence")

    def pages_in(self, nbytes: int, rank: int) -> int:
        """Pages that have room in so many bytes of the rank, with the states of as many rows."""
        return self.usual.fitting(nbytes, self.page(rank), self.state(rank))

    def layer_nbytes(self, layers: Iterable[range], pages: int, states: int) -> int:
        """Bytes of so many pages and states in the one of these layers where they are most."""
        return self.shape.largest_cache(layers, self.dtype, pages * PAGE_TOKENS, states)

    def _stages_of(self, rank: int) -> list[range]:
        """The rank's layers, a range a lap."""
        return self.stages[rank :: self.num_ranks]

    def weights(self, rank: int, tier: str) -> int:
        names = [name for name, at in self.weight_tiers[rank].items() if at == tier]
        held = self.weighed.decoded if self.decoded and tier == "gpu" else {}
        return sum(held.get(name, self.block(name)) for name in names)

    def slot(self, rank: int) -> int:
        """Bytes of a weight slot: the rank's largest streamed block."""
        return max(map(self.block, streamed(self.weight_tiers[rank])), default=0)

    def fixed(self, rank: int, tier: str) -> dict[str, int]:
        """Bytes that the rank needs in a tier while it runs, besides its cache's pages, by purpose."""
        items = {"weights": self.weights(rank, tier)}
        layers = self._stages_of(rank)
        slots = self.cache_slots * self.layer_nbytes(layers, self.cache_slot_pages, self.state_rows)
        if tier == "gpu":
            items["weight slots"] = self.weight_slots * self.slot(rank)
            items["decoded weights"] = self._decoded(rank)
            items["cache slots"] = slots
            items["messages"] = self._messages(rank) if self.activations == "gpu" else 0
            slots = ACTIVATION_SLOTS * (self.activations == "cpu")
            items["activation slots"] = slots * most_nbytes(self._borders_of(rank), self.microbatch_tokens)
            states = self.layer_nbytes(layers, 0, self.state_rows)
            items["work space"] = self._work_space(rank) + 3 * states  # before, after, and what a layer makes of them
        elif tier == "cpu":
            items["disk slots"] = DISK_NBYTES * ("disk" in self.weight_tiers[rank].values())
            items["messages"] = self._messages(rank) if self.activations == "cpu" else 0
            steps = 2 * (self.activations == "cpu")
            items["activations"] = steps * most_nbytes(self._borders_of(rank), self.step_tokens)
        return {purpose: nbytes for purpose, nbytes in items.items() if nbytes or (tier, purpose) == ("gpu", "weights")}

    def loading(self, rank: int) -> int:
        """Bytes of the buffers through which the rank's blocks pass before the run begins."""
        stored = self.weighed.stored
        passing = [stored[name] for name, tier in self.weight_tiers[rank].items() if self._passes(name, tier)]
        return min(len(passing), LOADING_BUFFERS) * max(passing, default=0)

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
        if (loading := self.loading(rank)) > later:
            host["loading"] = loading - later
        if cache_pages.get("disk"):  # a microbatch goes through host memory on its way
            host["disk slots"] = host.get("disk slots", 0) + DISK_NBYTES
        return table

    def tables(self, cache_pages: Mapping[str, int]) -> tuple[dict[str, dict[str, int]], ...]:
        """The table of every rank."""
        return tuple(self.table(rank, cache_pages) for rank in range(self.num_ranks))

    def _decoded(self, rank: int) -> int:
        """Bytes of the buffer into which encoded parameters are decoded, one block after another."""
        tiers, encoded = self.weight_tiers[rank], self.weighed.encoded
        names = [name for name in tiers if name in encoded and not (self.decoded and tiers[name] == "gpu")]
        blocks = [encoded[name] for name in names]
        if self.coded:
            blocks += [
                self.weighed.coded[name] for name in tiers if tiers[name] == "cpu" and name in self.weighed.coded
            ]
        return max((block.decoding_room(self.decoding_room) for block in blocks), default=0)

    def _messages(self, rank: int) -> int:
        """A receive and a send buffer per group; one rank alone keeps a group's hidden states between laps."""
        stages, borders = self._stages_of(rank), self._borders
        received, sent = [borders[stage.start] for stage in stages], [borders[stage.stop] for stage in stages]
        if self.num_ranks > 1:
            return self.groups * (most_nbytes(received, self.step_tokens) + most_nbytes(sent, self.step_tokens))
        kept = sent[:-1]
        return self.groups * turns(self.activations == "cpu", kept) * most_nbytes(kept, self.step_tokens)

    @cached_property
    def _borders(self) -> list[Bundle]:
        return borders_of(self.shape, self.dtype)

    def _borders_of(self, rank: int) -> list[Bundle]:
        """What travels at the borders of the rank's layers."""
        return within(self._borders, self._stages_of(rank))

    def _work_space(self, rank: int) -> int:
        itemsize = DTYPE_NBYTES[self.dtype]
        layers = [self.blocks[name] for name in self.weight_tiers[rank] if name.startswith("layers/")]
        widest = max(block.widest for block in layers)
        # In CPU memory: all but the rows that the head needs, which are those of a whole step where prompts are scored.
        on_device = 2 if self.activations == "gpu" else 2 * (rank == self.num_ranks - 1)
        borders = self._borders_of(rank)
        work = on_device * most_nbytes(borders, self.step_tokens) + 8 * most_nbytes(borders, self.microbatch_tokens)
        work += self.microbatch_tokens * max(3 * widest, self.shape.mixture_size) * itemsize
        work += attention_nbytes(self.shape, self.dtype, self.microbatch_tokens) * (self.device == "cuda")
        if rank == self.num_ranks - 1:
            work += LOGITS_ROWS * self.shape.vocab_size * (itemsize + 4) + min(
                DRAW_NBYTES, 64 * LOGITS_ROWS * self.shape.vocab_size
            )
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


def streamed(tiers: Mapping[str, str]) -> list[str]:
    """The blocks that pass through weight slots, in the order of visits. The embedding is never one of them."""
    return [name for name, tier in tiers.items() if tier != "gpu" and name != "embed"]


def head_in_layers(blocks: Mapping[str, Block]) -> tuple[float, float]:
    """What embedding and head weigh, in layers: the row gather nothing, the head by its bytes."""
    layers = [block.nbytes for name, block in blocks.items() if name.startswith("layers/")]
    return 0.0, blocks["head"].nbytes * len(layers) / sum(layers)
