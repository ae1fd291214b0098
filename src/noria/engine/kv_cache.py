"""This rank's KV cache: pages of 16 tokens for each of its layers. Knows no slots and no steps.

Pages are given by rank 0 and are the same on all ranks. Those beyond the device live in other tiers: a microbatch's are
loaded into a staging slot, a layer at a time.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from noria.engine.timing import Traffic
from noria.model import ModelShape
from noria.step import PAGE_TOKENS
from noria.streams import Event, Streams
from noria.tiers import Tier, Transfer

Awaited: TypeAlias = Transfer | Event
Triples: TypeAlias = Sequence[
    tuple[int, int, int]
]  # rows: the first in the tier, the first in a staging slot, how many

NAMES = ("key", "value")


@dataclass(frozen=True)
class TierPages:
    """Pages of the cache that live in a tier other than the device: `num_pages` from page `first` on."""

    first: int
    num_pages: int
    tier: Tier
    load_links: tuple[str, ...]
    store_links: tuple[str, ...]


@dataclass(frozen=True)
class Staging:
    """The pages beyond the device, and the staging slots that they pass through: `slots` of `slot_pages` pages."""

    tiers: tuple[TierPages, ...] = ()
    slots: int = 0
    slot_pages: int = 0


ALL_ON_DEVICE = Staging()


@dataclass(frozen=True)
class Staged:
    """A microbatch whose pages are in another tier: what to load before it is computed, and what to store after it."""

    held: TierPages
    num_pages: int  # of a staging slot
    loads: Triples
    stores: Triples


@dataclass
class StagingSlot:
    """A buffer [2, rows, Hkv, D] for keys and values of one layer.

    `busy`: transfers and events after which it may be rewritten; `coming`: those after which it may be computed with.
    """

    rows: torch.Tensor
    busy: list[Awaited] = field(default_factory=list)
    coming: list[Awaited] = field(default_factory=list)


class KvCache:
    """K and V of this rank's layers, each `[layer][page * token][kv head][head dim]`, so that a run of pages is a view.

    `num_pages` pages live on the device; `staging` says where the others are.
    """

    def __init__(
        self,
        shape: ModelShape,
        layers: list[int],
        num_pages: int,
        dtype: torch.dtype,
        streams: Streams,
        staging: Staging = ALL_ON_DEVICE,
        traffic: Traffic | None = None,
    ):
        row = (shape.num_kv_heads, shape.head_dim)
        size, device = (len(layers), num_pages * PAGE_TOKENS, *row), streams.device
        self._keys = torch.empty(size, dtype=dtype, device=device)
        self._values = torch.empty(size, dtype=dtype, device=device)
        self._row_nbytes = row[0] * row[1] * self._keys.element_size()
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._staging, self._streams, self._traffic = staging, streams, traffic or Traffic()
        staged = (2, staging.slot_pages * PAGE_TOKENS, *row)
        self._free = deque(StagingSlot(torch.empty(staged, dtype=dtype, device=device)) for _ in range(staging.slots))
        self._staged: dict[tuple[int, int], StagingSlot] = {}
        self._stored: dict[int, Transfer] = {}  # of each layer the last store under way

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        slots = [*self._free, *self._staged.values()]
        return self._keys.nbytes + self._values.nbytes + sum(slot.rows.nbytes for slot in slots)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer on the device, each [pages * 16, Hkv, D]."""
        index = self._index[layer]
        return self._keys[index], self._values[index]

    def load(self, layer: int, microbatch: int, staged: Staged | None, after: Iterable[Event] = ()) -> None:
        """Sends a microbatch's keys and values of a layer on their way to the device."""
        if staged is None or (layer, microbatch) in self._staged:
            return
        assert staged.num_pages <= self._staging.slot_pages, f"a microbatch of {staged.num_pages} pages"
        slot = self._staged[layer, microbatch] = self._free.popleft()
        held, stored = staged.held, self._stored.get(layer)
        waits = [*after, *map(event_of, slot.busy), *([event_of(stored)] if stored is not None else [])]
        self._streams.label(slot.rows, "cache", layer=layer, microbatch=microbatch)
        pieces = self._pieces(layer, slot, held, staged.loads)
        slot.busy, slot.coming = [], [held.tier.load(pieces, waits)] if pieces else [*waits]
        self._count(held.load_links, staged.loads)

    def tensors(self, layer: int, microbatch: int, staged: Staged | None) -> dict[str, torch.Tensor]:
        """A layer's arrays for a microbatch, each [rows, Hkv, D], ready on the compute stream."""
        if staged is None:
            return dict(zip(NAMES, self.layer(layer), strict=True))
        slot = self._staged[layer, microbatch]
        for coming in slot.coming:
            self._streams.wait(event_of(coming))
        slot.coming = []
        return dict(zip(NAMES, slot.rows, strict=True))

    def store(self, layer: int, microbatch: int, staged: Staged | None) -> None:
        """Sends the new keys and values, queued on the compute stream so far, on their way back to their tier."""
        if staged is None:
            return
        slot, held = self._staged.pop((layer, microbatch)), staged.held
        pieces = self._pieces(layer, slot, held, staged.stores)
        stored = self._stored[layer] = held.tier.store(pieces, [self._streams.event()])
        slot.busy = [stored]
        self._free.append(slot)
        self._count(held.store_links, staged.stores)

    def drop(self) -> None:
        """Lets staged keys and values go that will not be computed with: the step is cut anew."""
        for slot in self._staged.values():
            slot.busy, slot.coming = [self._streams.event(), *slot.coming], []
            self._free.append(slot)
        self._staged.clear()

    def close(self) -> int:
        """Waits for stores under way and closes the tiers. Returns the bytes of host memory that were page-locked."""
        for stored in self._stored.values():
            stored.event().synchronize()
        return sum(held.tier.close() for held in self._staging.tiers)

    def _pieces(
        self, layer: int, slot: StagingSlot, held: TierPages, triples: Triples
    ) -> list[tuple[int, torch.Tensor]]:
        """(offset in the tier, bytes in the staging slot) of keys and values. In a tier: [layer][K, V][row]."""
        start = self._index[layer] * 2 * held.num_pages * PAGE_TOKENS
        pieces = []
        for which, rows in enumerate(slot.rows):
            base = start + which * held.num_pages * PAGE_TOKENS
            for tier_row, row, count in triples:
                bytes_ = rows[row : row + count].view(torch.uint8).reshape(-1)
                pieces.append(((base + tier_row) * self._row_nbytes, bytes_))
        return pieces

    def _count(self, links: Iterable[str], triples: Triples) -> None:
        nbytes = 2 * self._row_nbytes * sum(count for _, _, count in triples)
        for link in links:
            self._traffic.add(link, nbytes)


def pages_nbytes(shape: ModelShape, num_layers: int, num_pages: int, dtype: str) -> int:
    """Bytes that so many pages take in a tier, in all layers of a rank."""
    return num_layers * num_pages * PAGE_TOKENS * shape.cache_nbytes_per_token(dtype)


def event_of(awaited: Awaited) -> Event:
    """The event of a transfer, once it has one; an event is its own."""
    return awaited.event() if isinstance(awaited, Transfer) else awaited
