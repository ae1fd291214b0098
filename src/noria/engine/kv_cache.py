"""This rank's KV cache: pages of 16 tokens of each of its layers' arrays. Knows no slots and no steps.

Pages are given by rank 0 and are the same on all ranks. Those beyond the device live in other tiers: a microbatch's are
loaded into a staging slot, a layer at a time.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import numpy as np
import torch

from noria.arrays import Layout
from noria.engine.parameters import FIELD_DTYPES
from noria.engine.timing import Traffic
from noria.model import ModelShape
from noria.step import PAGE_TOKENS
from noria.streams import Event, Streams
from noria.tiers import Tier, TierRuns, Transfer

Awaited: TypeAlias = Transfer | Event
Views: TypeAlias = dict[str, torch.Tensor]  # arrays by name
Triples: TypeAlias = Sequence[
    tuple[int, int, int]
]  # rows: the first in the tier, the first in a staging slot, how many


@dataclass(frozen=True)
class TierPages:
    """Pages of the cache that live in a tier other than the device: `num_pages` from page `first` on; states in like manner."""

    first: int
    num_pages: int
    tier: Tier
    load_links: tuple[str, ...]
    store_links: tuple[str, ...]
    first_state: int = 0
    num_states: int = 0


@dataclass(frozen=True)
class Staging:
    """The pages beyond the device, and the staging slots that they pass through: `slots` of `slot_pages` pages.

    slot_states: of each, for the states of as many rows.
    """

    tiers: tuple[TierPages, ...] = ()
    slots: int = 0
    slot_pages: int = 0
    slot_states: int = 0


ALL_ON_DEVICE = Staging()


@dataclass(frozen=True)
class Staged:
    """A microbatch whose pages are in another tier: what to load before it is computed, and what to store after it.

    loads, stores: of the arrays per token and of those per sequence. ring_stores: of rings by window, in tokens: the new ones.
    """

    held: TierPages
    num_pages: int  # of a staging slot
    loads: Mapping[str, Triples]
    stores: Mapping[str, Triples]
    ring_stores: Mapping[int, Triples] = field(default_factory=dict)


@dataclass
class StagingSlot:
    """A buffer for the arrays of one layer; `views` of it, by layer.

    `busy`: transfers and events after which it may be rewritten; `coming`: those after which it may be computed with.
    """

    buffer: torch.Tensor
    views: dict[int, Views] = field(default_factory=dict)
    busy: list[Awaited] = field(default_factory=list)
    coming: list[Awaited] = field(default_factory=list)


class KvCache:
    """The arrays of this rank's layers, each `[page * token][row]`, so that a run of pages is a view, or `[state][row]`, of
    rings `[state * token][row]`.

    held: how many pages and states live on the device; `staging` says where the others are.
    """

    def __init__(
        self,
        shape: ModelShape,
        layers: list[int],
        held: tuple[int, int],
        dtype: str,
        streams: Streams,
        staging: Staging = ALL_ON_DEVICE,
        traffic: Traffic | None = None,
    ):
        self._arrays = {layer: shape.stored(layer) for layer in layers}
        self._reads = {layer: shape.reads(layer) for layer in layers}
        self._dtype, device = dtype, streams.device
        layout = Layout(self._arrays, dtype, *held)
        page, state = (Layout(self._arrays, dtype, *one).nbytes / max(len(layers), 1) for one in ((1, 0), (0, 1)))
        self._row_nbytes = {"token": page / PAGE_TOKENS, "sequence": state}  # of a layer, on average
        self._buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        self._views = {layer: self._view(self._buffer, layout, layer, *held) for layer in layers}
        self._staging, self._streams, self._traffic = staging, streams, traffic or Traffic()
        tiers, slot = staging.tiers, (staging.slot_pages, staging.slot_states)
        self._in_tier = {at.first: Layout(self._arrays, dtype, at.num_pages, at.num_states) for at in tiers}
        self._in_slot = {layer: Layout({layer: arrays}, dtype, *slot) for layer, arrays in self._arrays.items()}
        size = max((layout.nbytes for layout in self._in_slot.values()), default=0)
        buffers = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(staging.slots))
        self._free = deque(map(StagingSlot, buffers))
        self._staged: dict[tuple[int, int], StagingSlot] = {}
        self._stored: dict[int, Transfer] = {}  # of each layer the last store under way

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        slots = [*self._free, *self._staged.values()]
        return self._buffer.nbytes + sum(slot.buffer.nbytes for slot in slots)

    def load_nbytes(self, staged: Staged | None) -> float:
        """Bytes that a microbatch loads in a layer, on average."""
        loads = {} if staged is None else staged.loads
        return sum(count * self._row_nbytes[kept] for kept, rows in loads.items() for _, _, count in rows)

    def layer(self, layer: int) -> Views:
        """The arrays of one layer on the device, each [pages * 16, ...]."""
        return self._views[self._reads[layer]]

    def _view(self, buffer: torch.Tensor, layout: Layout, layer: int, num_pages: int, num_states: int) -> Views:
        """The arrays of a layer that lie in a buffer."""
        views = {}
        for array in self._arrays[layer]:
            start, kind = layout.offsets[layer, array.name], FIELD_DTYPES[array.computed(self._dtype)]
            rows = num_pages * PAGE_TOKENS if array.kept == "token" else num_states * (array.ring or 1)
            nbytes = array.nbytes(self._dtype) // (array.ring or 1)
            whole = buffer[start : start + rows * nbytes].view(kind).view(rows, nbytes // kind.itemsize)
            heads = [1] * (array.per == "token" and len(array.row) == 1)  # one vector a token: one key head
            views[array.name] = whole[:, : prod(array.row)].view(rows, *heads, *array.row)
        return views

    def load(self, layer: int, microbatch: int, staged: Staged | None, after: Iterable[Event] = ()) -> None:
        """Sends a microbatch's rows of a layer's arrays on their way to the device.

        Those of another layer, which may not have been computed yet, are sent when they are asked for.
        """
        if staged is None or (layer, microbatch) in self._staged or self._reads[layer] != layer:
            return
        self._send(layer, microbatch, staged, staged.loads, after)

    def _send(
        self, layer: int, microbatch: int, staged: Staged, rows: Mapping[str, Triples], after: Iterable[Event] = ()
    ) -> None:
        states, most = len(staged.stores.get("sequence", ())), (self._staging.slot_pages, self._staging.slot_states)
        assert staged.num_pages <= most[0] and states <= most[1], (
            f"a microbatch of {staged.num_pages} pages, {states} states"
        )
        slot = self._staged[layer, microbatch] = self._free.popleft()
        source, held = self._reads[layer], staged.held
        stored = self._stored.get(source)
        waits = [*after, *map(event_of, slot.busy), *([event_of(stored)] if stored is not None else [])]
        self._streams.label(slot.buffer, "cache", layer=layer, microbatch=microbatch)
        pieces = self._pieces(source, slot, held, rows)
        slot.busy, slot.coming = [], [held.tier.load(pieces, waits)] if pieces else [*waits]
        self._count(held.load_links, pieces)

    def tensors(self, layer: int, microbatch: int, staged: Staged | None) -> Views:
        """The arrays that a layer reads, for a microbatch, each [rows, ...], ready on the compute stream."""
        if staged is None:
            return self.layer(layer)
        source = self._reads[layer]
        if source != layer:
            self._send(layer, microbatch, staged, {"token": (*staged.loads["token"], *staged.stores["token"])})
        slot = self._staged[layer, microbatch]
        with self._streams.waiting("cache"):
            for coming in slot.coming:
                self._streams.wait(event_of(coming))
        slot.coming = []
        if source not in slot.views:
            slot.views[source] = self._view(
                slot.buffer, self._in_slot[source], source, self._staging.slot_pages, self._staging.slot_states
            )
        return slot.views[source]

    def store(self, layer: int, microbatch: int, staged: Staged | None) -> None:
        """Sends the new rows, queued on the compute stream so far, on their way back to their tier."""
        if staged is None:
            return
        slot, held, computed = self._staged.pop((layer, microbatch)), staged.held, self._streams.event()
        slot.busy = [computed]
        if pieces := self._pieces(layer, slot, held, staged.stores, staged.ring_stores):
            stored = self._stored[layer] = held.tier.store(pieces, [computed])
            slot.busy = [stored]
            self._count(held.store_links, pieces)
        self._free.append(slot)

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
        self,
        layer: int,
        slot: StagingSlot,
        held: TierPages,
        rows: Mapping[str, Triples],
        of_rings: Mapping[int, Triples] | None = None,
    ) -> TierRuns:
        """The runs of rows of all arrays of a layer; of rings whole ones, unless it is said of which tokens."""
        found = [np.empty((0, 3), np.int64)]
        for array in self._arrays[layer]:
            nbytes, its = array.nbytes(self._dtype), rows.get(array.kept, ())
            if array.ring and of_rings and array.window is not None:
                nbytes, its = nbytes // array.ring, of_rings[array.window]
            there = self._in_tier[held.first].offsets[layer, array.name]
            here = self._in_slot[layer].offsets[layer, array.name]
            if its:
                found.append(np.array(its, np.int64) * nbytes + (there, here, 0))
        runs = np.concatenate(found)
        return TierRuns(slot.buffer, *(np.ascontiguousarray(column) for column in runs[runs[:, 2] > 0].T))

    def _count(self, links: Iterable[str], pieces: TierRuns) -> None:
        nbytes = int(pieces.nbytes.sum())
        for link in links:
            self._traffic.add(link, nbytes)


def event_of(awaited: Awaited) -> Event:
    """The event of a transfer, once it has one; an event is its own."""
    return awaited.event() if isinstance(awaited, Transfer) else awaited
