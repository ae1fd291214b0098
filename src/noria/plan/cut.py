"""A model cut into virtual stages on ranks: what each rank has, whichever tiers its bytes are in. Counted once for a search.

Ranks that have the same are counted as one. Pure arithmetic.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from noria.blocks import Block
from noria.bundle import Bundle, borders_of, token_nbytes, within
from noria.model import ModelShape
from noria.plan.placement import blocks_of, stages_of

CacheRow = tuple[int, int]  # bytes that a token, and a sequence, leave in a layer


@dataclass(frozen=True)
class Tasks:
    """What a rank's blocks are to compute: bytes unless the name says numbers.

    numbers, read, between: of all layers, and of their experts alone (`expert_`): multiplied, read by products, and a
    token's inputs and outputs of products. logits: of a sampled row. token, state: of the cache that the layers have of a
    token and of a sequence, rings: of the latter those of windows, ring_token: a token in them. attended: numbers that a
    query head multiplies for each token that it looks at. decoded: of what a token leaves, decoded, where the cache is encoded.
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
    token: int
    state: int
    attended: int
    decoded: int = 0
    rings: int = 0
    ring_token: int = 0


@dataclass(frozen=True)
class Portion:
    """A rank's share of the model: its blocks in the order of visits, its layers a range a lap, what they compute.

    borders: the different bundles before, between and after its layers; received, sent: those of visits, kept: those
    between two visits of its own. travelling: bytes of a token received and sent at visits, and between all layers.
    decoding_row: bytes that a token of an encoded cache takes in a layer while it is decoded; ring_row: that one takes in a ring.
    """

    names: tuple[str, ...]
    visits: tuple[range, ...]
    work: Tasks
    widest: int
    cache_rows: frozenset[CacheRow]
    borders: tuple[Bundle, ...]
    received: tuple[Bundle, ...]
    sent: tuple[Bundle, ...]
    kept: tuple[Bundle, ...]
    travelling: tuple[int, int, int, int]
    decoding_row: int = 0
    ring_row: int = 0


@dataclass(frozen=True)
class Cut:
    """The stages of a model on so many ranks. `layer_kinds`: a number for each layer, the same of equal ones."""

    shape: ModelShape
    blocks: Mapping[str, Block]
    layer_kinds: tuple[int, ...]
    dtype: str
    num_ranks: int
    stages: tuple[range, ...]

    @cached_property
    def alike(self) -> tuple[int, ...]:
        """For each rank the first one that has the same."""
        first: dict[object, int] = {}
        ends = (0, self.num_ranks - 1)
        of_ranks = [
            (
                rank if rank in ends else -1,
                *(self.layer_kinds[visit.start : visit.stop] for visit in self._visits(rank)),
            )
            for rank in range(self.num_ranks)
        ]
        return tuple(first.setdefault(key, rank) for rank, key in enumerate(of_ranks))

    @cached_property
    def counts(self) -> dict[int, int]:
        """The first ranks of each kind -> how many ranks are of it."""
        counts = dict.fromkeys(self.alike, 0)
        for rank in self.alike:
            counts[rank] += 1
        return counts

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The blocks of each rank."""
        return tuple(tuple(blocks_of(rank, self.num_ranks, list(self.stages))) for rank in range(self.num_ranks))

    def share(self, rank: int) -> Portion:
        """What a rank has, but for its names where another has the same."""
        return self._shares[self.alike[rank]]

    @cached_property
    def counted(self) -> dict[object, Any]:
        """What was counted of ranks so far, by what decides it (plan/memory.py): many candidates have it in common."""
        return {}

    @cached_property
    def cache_rows(self) -> frozenset[CacheRow]:
        """Those of all layers."""
        return frozenset().union(*(share.cache_rows for share in self._shares.values()))

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """Bytes of a token in each hop of the ring but the last one, which brings token ids; of one rank none."""
        if self.num_ranks == 1:
            return ()
        return tuple(self._borders[stage.start].token_nbytes for stage in self.stages[1:])

    @cached_property
    def _borders(self) -> list[Bundle]:
        return borders_of(self.shape, self.dtype)

    @cached_property
    def _shares(self) -> dict[int, Portion]:
        return {rank: self._share(rank) for rank in self.counts}

    def _visits(self, rank: int) -> list[range]:
        return stages_of(rank, self.num_ranks, list(self.stages))

    def _share(self, rank: int) -> Portion:
        names, visits = self.names[rank], self._visits(rank)
        received, sent = (
            [self._borders[visit.start] for visit in visits],
            [self._borders[visit.stop] for visit in visits],
        )
        layers = [range(layer, layer + 1) for visit in visits for layer in visit]
        inner = [
            [self._borders[at] for at in places]
            for places in zip(*((one.start, one.stop) for one in layers), strict=True)
        ]
        return Portion(
            names,
            tuple(visits),
            work_of(self.shape, self.blocks, names, visits, self.dtype),
            max(self.blocks[name].widest for name in names if name.startswith("layers/")),
            self.shape.cache_rows(visits, self.dtype),
            different(within(self._borders, visits)),
            different(received),
            different(sent),
            different(sent[:-1]),
            (token_nbytes(received), token_nbytes(sent), token_nbytes(inner[0]), token_nbytes(inner[1])),
            max((self._decoding_row(layer) for layer in layers), default=0),
            self.shape.ring_row(visits, self.dtype),
        )

    def _decoding_row(self, layer: range) -> int:
        """What a layer reads of a token as it is kept, gathered, and what is made of it."""
        decoded = self.shape.decoded_nbytes([layer], self.dtype)
        source = self.shape.reads(layer.start)
        return decoded + self.shape.cache_nbytes([range(source, source + 1)], self.dtype) * (decoded > 0)


def different(bundles: Iterable[Bundle]) -> tuple[Bundle, ...]:
    """Each of these bundles once: most borders of a model are one and the same."""
    return tuple({id(bundle): bundle for bundle in bundles}.values())


def work_of(
    shape: ModelShape, blocks: Mapping[str, Block], names: Iterable[str], visits: Iterable[range], dtype: str
) -> Tasks:
    """What these blocks compute in a run in `dtype`."""
    held = {name: blocks[name].cast(dtype) for name in names if name != "embed"}
    head, visits = held.pop("head", None), list(visits)
    layers = held.values()
    return Tasks(
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
        shape.cache_nbytes(visits, dtype),
        shape.cache_nbytes(visits, dtype, "sequence"),
        shape.attended(visits),
        shape.decoded_nbytes(visits, dtype),
        shape.cache_nbytes(visits, dtype, "sequence") if shape.rings else 0,
        shape.without_rings().cache_nbytes(visits, dtype) - shape.cache_nbytes(visits, dtype) if shape.rings else 0,
    )
