"""Where the hidden states of a visit are between its layers: on the device, or in CPU memory.

In CPU memory they pass through the device a microbatch at a time, as its cache does. Knows microbatches and layers by
number alone, nothing of models, weights or the ring.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from noria.engine.batch import Batch, Microbatch
from noria.engine.timing import Traffic
from noria.limits import ACTIVATION_SLOTS
from noria.streams import Event, Streams
from noria.tools.pinned import Fixed


@dataclass
class Embedding:
    """Hidden states that are gathered when they are needed: `gather(first, last)` for these tokens of the step.

    in_host: whether they come in page-locked host memory, not on the device.
    """

    gather: Callable[[int, int], torch.Tensor]
    in_host: bool


class OnDevice:
    """Hidden states as tensors of the device. stored: the event after which those of the last visit are there (None: now)."""

    stored: Event | None = None

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []

    def needed(self, sampled: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `InHost.needed` returns: here all rows stay where they are."""
        return np.empty(0, np.int64), sampled, scored

    def begin(
        self, batch: Batch, num_layers: int, hidden: torch.Tensor | Embedding, output: torch.Tensor | None
    ) -> None:
        """A visit begins with hidden [T, E]. `output` is None: the ring copies what it is sent."""
        assert isinstance(hidden, torch.Tensor)
        self._parts, self._after = [hidden[m.first : m.last] for m in batch.microbatches], []

    def load(self, layer: int, microbatch: int, after: Iterable[Event] = ()) -> None:
        """Nothing is to be moved."""

    def take(self, layer: int, microbatch: int) -> torch.Tensor:
        """The microbatch's part before a layer."""
        return self._parts[microbatch]

    def put(self, layer: int, microbatch: int, part: torch.Tensor) -> None:
        """The microbatch's part after a layer."""
        self._after.append(part)
        if len(self._after) == len(self._parts):
            self._parts, self._after = self._after, []

    def store(self, layer: int, microbatch: int) -> None:
        """Nothing is to be moved."""

    def cut(self, old: tuple[Microbatch, ...], new: tuple[Microbatch, ...]) -> None:
        """The layer is begun anew with finer microbatches."""
        whole = {m.first: (m, part) for m, part in zip(old, self._parts, strict=True)}
        finer: list[torch.Tensor] = []
        holder = old[0], self._parts[0]
        for microbatch in new:
            holder = whole.get(microbatch.first, holder)
            start = holder[0].first
            finer.append(holder[1][microbatch.first - start : microbatch.last - start])
        self._parts, self._after = finer, []

    def end(self) -> torch.Tensor:
        """[T, E] after the visit's layers."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        pass


@dataclass
class ActivationSlot:
    """A buffer [microbatch_tokens, E] on the device. `busy`: events after which it may be rewritten; `ready`: after which
    it may be read."""

    buffer: torch.Tensor
    busy: list[Event] = field(default_factory=list)
    ready: Event | None = None

    @property
    def written(self) -> Event:
        assert self.ready is not None, "nothing was written to this buffer"
        return self.ready


class InHost:
    """Hidden states in page-locked memory: a receive buffer of the ring, two [step_tokens, E] in turn, a send buffer.

    The states before a layer stay there until the layer is done, so that it can be begun anew. A visit of one microbatch
    keeps its part on the device between layers, and the last visit only the rows that the head needs.
    """

    def __init__(
        self,
        step_tokens: int,
        microbatch_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        streams: Streams,
        traffic: Traffic | None = None,
    ):
        self._streams, self._traffic = streams, traffic or Traffic()
        self._fixed = Fixed((2, step_tokens, hidden_size), dtype, streams.device, in_host=True)
        size = (microbatch_tokens, hidden_size)
        self._free = deque(
            ActivationSlot(torch.empty(size, dtype=dtype, device=streams.device)) for _ in range(ACTIVATION_SLOTS)
        )
        self._coming: dict[tuple[int, int], ActivationSlot] = {}
        self._leaving: dict[tuple[int, int], ActivationSlot] = {}
        self._written: dict[int, Event] = {}  # address of a send buffer -> the event of its last store
        self.stored: Event | None = None

    def needed(self, sampled: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of a step that the head needs, and where among them the sampled and the scored rows are."""
        rows = np.union1d(sampled, scored).astype(np.int64)
        return rows, np.searchsorted(rows, sampled), np.searchsorted(rows, scored)

    def begin(
        self, batch: Batch, num_layers: int, hidden: torch.Tensor | Embedding, output: torch.Tensor | None
    ) -> None:
        """A visit begins with hidden [T, E] in host memory, or an Embedding. It ends in `output`, or with the head's rows."""
        self._microbatches, self._last, self._output = batch.microbatches, num_layers - 1, output
        self._input: torch.Tensor | Embedding | None = hidden
        self._needed = batch.needed, batch.needed_rows
        self._rows: list[torch.Tensor] = []
        self._held: tuple[int, torch.Tensor] | None = None  # (layer, [T, E] before it), where it stays on the device
        # A rank that is its own next one reads what it stored itself; from other ranks nothing comes before it is here.
        self.stored = None if isinstance(hidden, Embedding) else self._written.get(hidden.data_ptr())
        self._stored = [self.stored] * len(self._microbatches)

    def load(self, layer: int, microbatch: int, after: Iterable[Event] = ()) -> None:
        """Sends a microbatch's part before a layer on its way to the device."""
        m = self._microbatches[microbatch]
        if (layer, microbatch) in self._coming or self._stays(layer):
            return
        if layer:
            source = self._turn(layer)[m.first : m.last]
        elif isinstance(self._input, torch.Tensor):
            source = self._input[m.first : m.last]
        elif self._input is not None and self._input.in_host:
            source = self._input.gather(m.first, m.last)
        else:
            return
        slot, before = self._free.popleft(), self._stored[microbatch]
        waits = [*after, *slot.busy, *([] if before is None else [before])]
        slot.ready, slot.busy = self._streams.copy("load", [(slot.buffer[: len(source)], source)], waits), []
        self._coming[layer, microbatch] = slot
        self._traffic.add("host_to_gpu", source.nbytes)

    def take(self, layer: int, microbatch: int) -> torch.Tensor:
        """The microbatch's part before a layer, ready on the compute stream."""
        m = self._microbatches[microbatch]
        if self._held is not None and self._held[0] == layer:
            return self._held[1][m.first : m.last]
        if (layer, microbatch) not in self._coming:
            assert isinstance(self._input, Embedding), "nothing was loaded, so it is gathered on the device"
            return self._input.gather(m.first, m.last)
        slot = self._coming[layer, microbatch]
        self._streams.wait(slot.written)
        return slot.buffer[: m.last - m.first]

    def put(self, layer: int, microbatch: int, part: torch.Tensor) -> None:
        """The microbatch's part after a layer."""
        slot, whole = self._coming.pop((layer, microbatch), None), len(self._microbatches) == 1
        if layer == self._last and self._output is None:
            self._rows.append(part[self._rows_of(microbatch)])
            self._release(slot)
        elif layer < self._last and whole:
            self._held = layer + 1, part
            self._release(slot)
        else:
            if slot is None:
                slot = self._free.popleft()
                for event in slot.busy:
                    self._streams.wait(event)
            slot.buffer[: len(part)].copy_(part)
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
        target = whole[m.first : m.last]
        stored = self._streams.copy("store", [(target, slot.buffer[: len(target)])], [slot.written])
        self.stored = stored
        slot.busy, self._stored[microbatch] = [stored], stored
        self._free.append(slot)
        self._traffic.add("gpu_to_host", target.nbytes)

    def cut(self, old: tuple[Microbatch, ...], new: tuple[Microbatch, ...]) -> None:
        """The layer is begun anew with finer microbatches, from the states before it."""
        for slot in (*self._coming.values(), *self._leaving.values()):
            slot.busy = [self._streams.event(), slot.written]
            self._free.append(slot)
        self._coming.clear()
        self._leaving.clear()
        self._rows.clear()
        self._microbatches, self._stored = new, [self.stored] * len(new)  # the lane's last store is after all others

    def end(self) -> torch.Tensor:
        """[T, E] after the visit's layers, in the send buffer once `stored` has completed; or the head's rows [S, E]."""
        self._held = self._input = None
        if self._output is None:
            rows, self._rows = self._rows, []
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if self.stored is not None:
            self._written[self._output.data_ptr()] = self.stored
        return self._output

    def close(self) -> None:
        """Waits for the last store and unlocks the memory."""
        if self.stored is not None:
            self.stored.synchronize()
        self._fixed.close()

    def _turn(self, layer: int) -> torch.Tensor:
        return self._fixed.tensor[layer % 2]

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
