"""This rank's KV cache: pages of 16 tokens for each of its layers, and which pages each slot holds.

Slots and pages are given by rank 0 and are the same on all ranks; this file only executes the changes that headers carry.
Pages beyond those on the device live in other tiers: a microbatch's are loaded into a staging slot, a layer at a time.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from noria.checkpoint.scratch import scratch_region
from noria.engine.traffic import Traffic
from noria.limits import DISK_SLOT_NBYTES
from noria.model import ModelShape
from noria.step import PAGE_TOKENS, Run, Span, Step
from noria.streams import Event, Streams
from noria.tiers import Tier, Transfer
from noria.tiers.cpu import Cpu
from noria.tiers.disk import Disk

Awaited: TypeAlias = Transfer | Event
Triples: TypeAlias = Sequence[
    tuple[int, int, int]
]  # rows: the first in the tier, the first in a staging slot, how many


@dataclass(frozen=True)
class TierPages:
    """Pages of the cache that live in a tier other than the device: `num_pages` from page `first` on."""

    first: int
    num_pages: int
    tier: Tier
    load_links: tuple[str, ...]
    store_links: tuple[str, ...]


@dataclass(frozen=True)
class Staged:
    """A microbatch whose pages are in another tier: what to load before it is computed, and what to store after it."""

    held: TierPages
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

    `num_pages` pages live on the device; `elsewhere` are the others. `slots` staging slots of `slot_pages` pages.
    """

    def __init__(
        self,
        shape: ModelShape,
        layers: list[int],
        num_pages: int,
        dtype: torch.dtype,
        streams: Streams,
        elsewhere: Iterable[TierPages] = (),
        slots: int = 0,
        slot_pages: int = 0,
        traffic: Traffic | None = None,
    ):
        row = (shape.num_kv_heads, shape.head_dim)
        size, device = (len(layers), num_pages * PAGE_TOKENS, *row), streams.device
        self._keys = torch.empty(size, dtype=dtype, device=device)
        self._values = torch.empty(size, dtype=dtype, device=device)
        self._row_nbytes = row[0] * row[1] * self._keys.element_size()
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._runs: dict[int, tuple[Run, ...]] = {}
        self._elsewhere, self._streams, self._traffic = list(elsewhere), streams, traffic or Traffic()
        self._slot_pages = slot_pages
        size = (2, slot_pages * PAGE_TOKENS, *row)
        self._free = deque(StagingSlot(torch.empty(size, dtype=dtype, device=device)) for _ in range(slots))
        self._staged: dict[tuple[int, int], StagingSlot] = {}
        self._stored: dict[int, Transfer] = {}  # of each layer the last store under way

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        slots = [*self._free, *self._staged.values()]
        return self._keys.nbytes + self._values.nbytes + sum(slot.rows.nbytes for slot in slots)

    def apply(self, step: Step) -> None:
        """Takes over the changes of slots that a header carries."""
        for slot in step.released:
            del self._runs[slot]
        for admitted in step.admitted:
            self._runs[admitted.slot] = admitted.runs

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer on the device, each [pages * 16, Hkv, D]."""
        index = self._index[layer]
        return self._keys[index], self._values[index]

    def spans(self, step: Step, first_row: int, last_row: int) -> list[Span]:
        """The rows `first_row .. last_row` of a step as attention sees them, counted from the first one's first token."""
        spans, first = [], 0
        for row in range(first_row, last_row):
            slot, count, position = int(step.slots[row]), int(step.counts[row]), int(step.positions[row])
            spans.append(Span(first, count, position + count, self._runs[slot]))
            first += count
        return spans

    def to_staging(self, spans: list[Span]) -> tuple[list[Span], Staged | None]:
        """The spans with their pages where attention will find them, and what to move for that (None: nothing).

        The spans of a microbatch are all in one tier.
        """
        first = spans[0].runs[0].start if spans else -1
        held = next((held for held in reversed(self._elsewhere) if first >= held.first), None)
        if held is None:
            return spans, None
        moved: list[Span] = []
        loads: list[tuple[int, int, int]] = []
        stores: list[tuple[int, int, int]] = []
        page = 0
        for span in spans:
            tier_rows = cache_rows([replace(span, first=0, count=span.length)]) - held.first * PAGE_TOKENS
            assert tier_rows[0] >= 0 and tier_rows[-1] < held.num_pages * PAGE_TOKENS, span
            pages = -(-span.length // PAGE_TOKENS)
            old = span.length - span.count
            loads += _pieces(tier_rows[:old], page * PAGE_TOKENS)
            stores += _pieces(tier_rows[old:], page * PAGE_TOKENS + old)
            moved.append(replace(span, runs=(Run(page, pages),)))
            page += pages
        assert page <= self._slot_pages, f"a microbatch of {page} pages"
        return moved, Staged(held, tuple(loads), tuple(stores))

    def load(self, layer: int, microbatch: int, staged: Staged | None, after: Iterable[Event] = ()) -> None:
        """Sends a microbatch's keys and values of a layer on their way to the device."""
        if staged is None or (layer, microbatch) in self._staged:
            return
        staging = self._staged[layer, microbatch] = self._free.popleft()
        held, stored = staged.held, self._stored.get(layer)
        waits = [*after, *map(event_of, staging.busy), *([event_of(stored)] if stored is not None else [])]
        self._streams.label(staging.rows, "cache", layer=layer, microbatch=microbatch)
        pieces = self._pieces(layer, staging, held, staged.loads)
        staging.busy, staging.coming = [], [held.tier.load(pieces, waits)] if pieces else [*waits]
        self._count(held.load_links, staged.loads)

    def tensors(self, layer: int, microbatch: int, staged: Staged | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for a microbatch in a layer, each [rows, Hkv, D], ready on the compute stream."""
        if staged is None:
            return self.layer(layer)
        staging = self._staged[layer, microbatch]
        for coming in staging.coming:
            self._streams.wait(event_of(coming))
        staging.coming = []
        return staging.rows[0], staging.rows[1]

    def store(self, layer: int, microbatch: int, staged: Staged | None) -> None:
        """Sends the new keys and values, queued on the compute stream so far, on their way back to their tier."""
        if staged is None:
            return
        staging, held = self._staged.pop((layer, microbatch)), staged.held
        pieces = self._pieces(layer, staging, held, staged.stores)
        stored = self._stored[layer] = held.tier.store(pieces, [self._streams.event()])
        staging.busy = [stored]
        self._free.append(staging)
        self._count(held.store_links, staged.stores)

    def drop(self) -> None:
        """Lets staged keys and values go that will not be computed with: the step is cut anew."""
        for staging in self._staged.values():
            staging.busy, staging.coming = [self._streams.event(), *staging.coming], []
            self._free.append(staging)
        self._staged.clear()

    def close(self) -> int:
        """Waits for stores under way and closes the tiers. Returns the bytes of host memory that were page-locked."""
        for stored in self._stored.values():
            stored.event().synchronize()
        return sum(held.tier.close() for held in self._elsewhere)

    def _pieces(
        self, layer: int, staging: StagingSlot, held: TierPages, triples: Triples
    ) -> list[tuple[int, torch.Tensor]]:
        """(offset in the tier, bytes in the staging slot) of keys and values. In a tier: [layer][K, V][row]."""
        start = self._index[layer] * 2 * held.num_pages * PAGE_TOKENS
        pieces = []
        for which, rows in enumerate(staging.rows):
            base = start + which * held.num_pages * PAGE_TOKENS
            for tier_row, row, count in triples:
                bytes_ = rows[row : row + count].view(torch.uint8).reshape(-1)
                pieces.append(((base + tier_row) * self._row_nbytes, bytes_))
        return pieces

    def _count(self, links: Iterable[str], triples: Triples) -> None:
        nbytes = 2 * self._row_nbytes * sum(count for _, _, count in triples)
        for link in links:
            self._traffic.add(link, nbytes)


def open_tiers(
    cache_pages: dict[str, int], shape: ModelShape, num_layers: int, dtype: str, streams: Streams, scratch: Path
) -> list[TierPages]:
    """The tiers beyond the device, with room for the pages that the plan gives each; on disk a file in `scratch`."""
    opened: list[TierPages] = []
    first = 0
    for name, num_pages in cache_pages.items():
        nbytes = pages_nbytes(shape, num_layers, num_pages, dtype)
        if name == "cpu" and num_pages:
            memory = Cpu(nbytes, streams)
            memory.touch()
            memory.register()
            opened.append(TierPages(first, num_pages, memory, ("host_to_gpu",), ("gpu_to_host",)))
        elif name == "disk" and num_pages:
            disk = Disk(
                scratch_region(scratch, nbytes),
                streams,
                slot_nbytes=min(DISK_SLOT_NBYTES, nbytes // max(num_layers, 1)),
            )
            links = ("disk_to_host", "host_to_gpu"), ("gpu_to_host", "host_to_disk")
            opened.append(TierPages(first, num_pages, disk, *links))
        first += num_pages
    return opened


def pages_nbytes(shape: ModelShape, num_layers: int, num_pages: int, dtype: str) -> int:
    """Bytes that so many pages take in a tier, in all layers of a rank."""
    return num_layers * num_pages * PAGE_TOKENS * shape.cache_nbytes_per_token(dtype)


def event_of(awaited: Awaited) -> Event:
    """The event of a transfer, once it has one; an event is its own."""
    return awaited.event() if isinstance(awaited, Transfer) else awaited


def _pieces(tier_rows: np.ndarray, first: int) -> list[tuple[int, int, int]]:
    """Consecutive rows of a tier as (first there, first in the staging slot, how many)."""
    if not len(tier_rows):
        return []
    borders = np.flatnonzero(np.diff(tier_rows) != 1) + 1
    starts = [0, *borders.tolist()]
    ends = [*borders.tolist(), len(tier_rows)]
    return [(int(tier_rows[a]), first + a, b - a) for a, b in zip(starts, ends, strict=True)]


def cache_rows(spans: list[Span]) -> np.ndarray:
    """[T] where in the cache each new token's key and value belong: page * 16 + token."""
    pieces = []
    for span in spans:
        positions = np.arange(span.length - span.count, span.length)
        if len(span.runs) == 1:
            pieces.append(positions + span.runs[0].start * PAGE_TOKENS)
        else:
            pages = np.concatenate([np.arange(run.start, run.start + run.count) for run in span.runs])
            pieces.append(pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS)
    return np.concatenate(pieces)
