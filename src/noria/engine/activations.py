"""Where the hidden states of a visit are between its layers: on the device, or in CPU memory.

In CPU memory they pass through the device a microbatch at a time, as its cache does. Knows microbatches, layers and arrays
by number alone, nothing of models, weights or the ring.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from noria.bundle import Bundle, most_nbytes
from noria.engine.batch import Batch, Microbatch
from noria.engine.timing import Traffic
from noria.limits import ACTIVATION_SLOTS
from noria.ring.messages import Arrays, Hidden, arrays_in, joined, part_of
from noria.streams import Event, Streams
from noria.tools.pinned import Fixed


class OnDevice:
    """Hidden states as tensors of the device."""

    def __init__(self) -> None:
        self._parts: list[Arrays] = []
        self._after: list[Arrays] = []

    def needed(self, sampled: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `InHost.needed` returns: here all rows stay where they are."""
        return np.empty(0, np.int64), sampled, scored

    def begin(self, batch: Batch, layers: range, hidden: Hidden, output: Arrays | None) -> None:
        """A visit of these layers begins. `output` is None: the ring copies what it is sent."""
        assert hidden.ready is None and hidden.gather is None, "hidden states are on the device"
        self._parts, self._after = [part_of(hidden.arrays, m.first, m.last) for m in batch.microbatches], []

    def load_nbytes(self, microbatch: Microbatch) -> int:
        """What `InHost.load_nbytes` returns."""
        return 0

    def load(self, layer: int, microbatch: int, after: Iterable[Event] = ()) -> None:
        """Nothing is to be moved."""

    def take(self, layer: int, microbatch: int) -> Arrays:
        """The microbatch's part before a layer."""
        return self._parts[microbatch]

    def put(self, layer: int, microbatch: int, part: Arrays) -> None:
        """The microbatch's part after a layer."""
        self._after.append(part)
        if len(self._after) == len(self._parts):
            self._parts, self._after = self._after, []

    def store(self, layer: int, microbatch: int) -> None:
        """Nothing is to be moved."""

    def cut(self, old: Sequence[Microbatch], new: Sequence[Microbatch], failed: int) -> None:
        """The microbatches of a step from number `failed` on are cut finer; those before it are done with the layer."""
        finer = [part_of(self._parts[number], first, last) for number, first, last in _pieces(old, new, failed)]
        self._parts = self._parts[:failed] + finer

    def end(self) -> Hidden:
        """After the visit's layers."""
        parts, self._parts = self._parts, []
        return Hidden(joined(parts))

    def close(self) -> None:
        pass


@dataclass
class ActivationSlot:
    """A buffer on the device for a microbatch's part. `busy`: events after which it may be rewritten; `ready`: after which it
    may be read."""

    buffer: torch.Tensor
    busy: list[Event] = field(default_factory=list)
    ready: Event | None = None

    @property
    def written(self) -> Event:
        assert self.ready is not None, "nothing was written to this buffer"
        return self.ready


class InHost:
    """Hidden states in page-locked memory: a receive buffer of the ring, two of a step in turn, a send buffer.

    The states before a layer stay there until the layer is done, so that what is left of it can be cut finer. A visit of
    one microbatch keeps its part on the device between layers, and the last visit only the rows that the head needs.
    `borders`: the model's; buffers have room for those of `its_borders`, this rank's.
    """

    def __init__(
        self,
        step_tokens: int,
        microbatch_tokens: int,
        borders: Sequence[Bundle],
        its_borders: Sequence[Bundle],
        streams: Streams,
        traffic: Traffic | None = None,
    ):
        self._streams, self._traffic, self._borders = streams, traffic or Traffic(), borders
        self._fixed = Fixed((2, most_nbytes(its_borders, step_tokens)), torch.uint8, streams.device, in_host=True)
        size = most_nbytes(its_borders, microbatch_tokens)
        self._free = deque(
            ActivationSlot(torch.empty(size, dtype=torch.uint8, device=streams.device)) for _ in range(ACTIVATION_SLOTS)
        )
        self._coming: dict[tuple[int, int], ActivationSlot] = {}
        self._leaving: dict[tuple[int, int], ActivationSlot] = {}
        self._last_store: Event | None = None

    def needed(self, sampled: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of a step that the head needs, and where among them the sampled and the scored rows are."""
        rows = np.union1d(sampled, scored).astype(np.int64)
        return rows, np.searchsorted(rows, sampled), np.searchsorted(rows, scored)

    def begin(self, batch: Batch, layers: range, hidden: Hidden, output: Arrays | None) -> None:
        """A visit of these layers begins with hidden states in host memory, or to be gathered. It ends in `output`, or with the
        head's rows."""
        self._microbatches, self._output, self._input = batch.microbatches, output, hidden
        self._its_borders, self._last = self._borders[layers.start : layers.stop + 1], len(layers) - 1
        self._num_tokens = batch.microbatches[-1].last
        self._needed = batch.needed, batch.needed_rows
        self._rows: list[Arrays] = []
        self._held: tuple[int, Arrays] | None = None  # (layer, the step before it), where it stays on the device
        self._stored = [hidden.ready] * len(self._microbatches)  # of each microbatch: after which it is in host memory

    def load_nbytes(self, microbatch: Microbatch) -> int:
        """Bytes that a microbatch loads before a layer."""
        tokens = microbatch.last - microbatch.first
        return self._its_borders[0].token_nbytes * tokens * (len(self._microbatches) > 1)

    def load(self, layer: int, microbatch: int, after: Iterable[Event] = ()) -> None:
        """Sends a microbatch's part before a layer on its way to the device."""
        m, given = self._microbatches[microbatch], self._input
        if (layer, microbatch) in self._coming or self._stays(layer):
            return
        if layer:
            source = part_of(self._turn(layer), m.first, m.last)
        elif given.gather is None:
            source = part_of(given.arrays, m.first, m.last)
        elif given.in_host:
            source = given.gather(m.first, m.last)
        else:
            return
        slot, before = self._free.popleft(), self._stored[microbatch]
        waits = [*after, *slot.busy, *([] if before is None else [before])]
        pairs = list(zip(self._in_slot(slot, layer, m), source, strict=True))
        slot.ready, slot.busy = self._streams.copy("load", pairs, waits), []
        self._coming[layer, microbatch] = slot
        self._traffic.add("host_to_gpu", _nbytes(source))

    def take(self, layer: int, microbatch: int) -> Arrays:
        """The microbatch's part before a layer, ready on the compute stream."""
        m = self._microbatches[microbatch]
        if self._held is not None and self._held[0] == layer:
            return part_of(self._held[1], m.first, m.last)
        if (layer, microbatch) not in self._coming:
            assert self._input.gather is not None, "nothing was loaded, so it is gathered on the device"
            return self._input.gather(m.first, m.last)
        slot = self._coming[layer, microbatch]
        with self._streams.waiting("cache"):  # hidden states in CPU memory are read as a staged cache is
            self._streams.wait(slot.written)
        return self._in_slot(slot, layer, m)

    def put(self, layer: int, microbatch: int, part: Arrays) -> None:
        """The microbatch's part after a layer."""
        slot, whole = self._coming.pop((layer, microbatch), None), len(self._microbatches) == 1
        if layer == self._last and self._output is None:
            rows = self._rows_of(microbatch)
            self._rows.append(tuple(array[rows] for array in part))
            self._release(slot)
        elif layer < self._last and whole:
            self._held = layer + 1, _apart(part, slot)
            self._release(slot)
        else:
            if slot is None:
                slot = self._free.popleft()
                for event in slot.busy:
                    self._streams.wait(event)
            part, targets = _apart(part, slot), self._in_slot(slot, layer + 1, self._microbatches[microbatch])
            for target, array in zip(targets, part, strict=True):
                target.copy_(array)
            slot.ready = self._streams.event()
            self._leaving[layer, microbatch] = slot
        if not whole and self._held is not None and microbatch == len(self._microbatches) - 1:
            self._held = None

    def store(self, layer: int, microbatch: int) -> None:
        """Sends a microbatch's part after a layer on its way to host memory."""
        slot = self._leaving.pop((layer, microbatch), None)
        if slot is None:
            return
        m = self._microbatches[microbatch]
        whole = self._output if layer == self._last else self._turn(layer + 1)
        assert whole is not None, "the head's rows stay on the device"
        targets = part_of(whole, m.first, m.last)
        pairs = list(zip(targets, self._in_slot(slot, layer + 1, m), strict=True))
        stored = self._streams.copy("store", pairs, [slot.written])
        self._last_store = self._stored[microbatch] = stored
        slot.busy = [stored]
        self._free.append(slot)
        self._traffic.add("gpu_to_host", _nbytes(targets))

    def cut(self, old: Sequence[Microbatch], new: Sequence[Microbatch], failed: int) -> None:
        """The microbatches of a step from number `failed` on are cut finer; those before it are done with the layer, and on
        their way to host memory."""
        assert not self._leaving
        for slot in self._coming.values():
            slot.busy = [self._streams.event(), slot.written]
            self._free.append(slot)
        self._coming.clear()
        finer = [self._stored[number] for number, _, _ in _pieces(old, new, failed)]
        self._microbatches, self._stored = tuple(new), self._stored[:failed] + finer

    def end(self) -> Hidden:
        """After the visit's layers: what `output` holds once it is ready; or the head's rows, on the device."""
        self._held, self._input = None, Hidden()
        if self._output is None:
            rows, self._rows = self._rows, []
            return Hidden(joined(rows))
        return Hidden(self._output, self._last_store)  # of one lane: its last store is after all others

    def close(self) -> None:
        """Waits for the last store and unlocks the memory."""
        if self._last_store is not None:
            self._last_store.synchronize()
        self._fixed.close()

    def _turn(self, layer: int) -> Arrays:
        """The whole step before a layer, in host memory."""
        return arrays_in(self._fixed.tensor[layer % 2], self._its_borders[layer], self._num_tokens)

    def _in_slot(self, slot: ActivationSlot, layer: int, m: Microbatch) -> Arrays:
        """A microbatch's part before a layer, in a slot."""
        return arrays_in(slot.buffer, self._its_borders[layer], m.last - m.first)

    def _stays(self, layer: int) -> bool:
        """Whether the states before a layer are on the device, or will be."""
        held = self._held is not None and self._held[0] == layer
        return held or (layer > 0 and len(self._microbatches) == 1)

    def _rows_of(self, microbatch: int) -> torch.Tensor:
        """The rows of a microbatch that the head needs, on the device, counted from its first token."""
        m, (rows, on_device) = self._microbatches[microbatch], self._needed
        first, last = np.searchsorted(rows, [m.first, m.last])
        return on_device[first:last] - m.first

    def _release(self, slot: ActivationSlot | None) -> None:
        if slot is not None:
            slot.busy = [self._streams.event()]
            self._free.append(slot)


def _pieces(old: Sequence[Microbatch], new: Sequence[Microbatch], failed: int) -> Iterator[tuple[int, int, int]]:
    """Of each new microbatch from number `failed` on the old one that it is a piece of, and its tokens in it (first, last)."""
    number = failed
    for m in new[failed:]:
        while m.first >= old[number].last:
            number += 1
        yield number, m.first - old[number].first, m.last - old[number].first


def _apart(part: Arrays, slot: ActivationSlot | None) -> Arrays:
    """The arrays, none of them in the slot, which is written next: a layer may hand on what it was given."""
    if slot is None or len(part) == 1:  # hidden states alone are always computed anew
        return part
    held = slot.buffer.untyped_storage().data_ptr()
    return tuple(array.clone() if array.untyped_storage().data_ptr() == held else array for array in part)


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
