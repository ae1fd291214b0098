"""Streams and events of a device, and their twin on the CPU that does nothing. The only file that names a CUDA stream.

Knows no tensors but the device's: who waits for what is said by its callers.
"""

import contextlib
import time
from collections.abc import Callable, Iterable

import torch

LANES = ("load", "store")  # to the device and from it: a link carries both at once
Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]  # (destination, source) of copies


class Observed:
    """What a trace needs of streams. `observe`, once set, hears of each copy, in the thread that queues it:

    observe(lane, name, args, nbytes, begin mark, end mark).
    """

    observe: Callable | None = None

    def label(self, buffer: torch.Tensor, name: str, **args) -> None:
        """Names, for a trace, what copies to and from the memory of this buffer of the device carry from now on."""
        if self.observe is not None:
            self.__dict__.setdefault("_labels", {})[buffer.untyped_storage().data_ptr()] = name, args

    def _begin(self):
        return self.mark() if self.observe is not None else None

    def _end(self, lane: str, pairs: Pairs, begin) -> None:
        """The copies of `pairs` are queued; called on their stream."""
        if begin is None or not pairs:
            return
        buffer = pairs[0][0 if lane == "load" else 1].untyped_storage().data_ptr()
        name, args = self.__dict__.get("_labels", {}).get(buffer, (lane, {}))
        self.observe(lane, name, args, sum(source.nbytes for _, source in pairs), begin, self.mark())


class Done:
    """The CPU's event: work there is complete when the call returns."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuStreams(Observed):
    """The streams of a device that computes in order: nothing to wait for."""

    def __init__(self, device: torch.device):
        self.device = device

    def event(self) -> Done:
        """An event that marks all work queued so far on the compute stream."""
        return Done()

    def set_device(self) -> None:
        """Binds the calling thread to the device."""

    def copying(self):
        """Work inside the context goes to the copy stream."""
        return contextlib.nullcontext()

    def wait(self, event: Done) -> None:
        """The compute stream goes on after `event`."""

    def copy(self, lane: str, pairs: Pairs, after: Iterable[Done] = ()) -> Done:
        """Copies on the lane's own stream, in order, after the given events. The event returned completes with them.

        Any thread may call it. Until the event has completed, sources must not be written to, nor destinations read.
        """
        assert lane in LANES
        pairs, begin = list(pairs), self._begin()
        # A mode of the thread: views that another made in it may be written to in it alone.
        with torch.inference_mode():
            for destination, source in pairs:
                destination.copy_(source)
        self._end(lane, pairs, begin)
        return Done()

    def mark(self) -> int:
        """A point of the compute stream, in ns of the host's clock."""
        return time.perf_counter_ns()

    def nanoseconds(self, start: int, mark: int) -> int:
        """From one mark to another."""
        return mark - start

    def anchor(self) -> tuple[int, int]:
        """A mark, and when it was on the host's clock (time.perf_counter_ns)."""
        now = time.perf_counter_ns()
        return now, now


class CudaStreams(Observed):
    """One compute stream (the current one), one for the transports' copies and one for each lane, of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.set_device(device)
        self.compute = torch.cuda.current_stream(device)
        self._copying = torch.cuda.Stream(device)
        self._lanes = {lane: torch.cuda.Stream(device) for lane in LANES}

    def event(self) -> torch.cuda.Event:
        """An event that marks all work queued so far on the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    def set_device(self) -> None:
        """Binds the calling thread to the device, and to its context: MPI libraries look for one that is current."""
        torch.cuda.set_device(self.device)
        torch.cuda.current_stream(self.device).query()  # torch's setting alone may leave a new thread without a context

    def copying(self):
        """Work inside the context goes to the copy stream."""
        return torch.cuda.stream(self._copying)

    def wait(self, event: torch.cuda.Event) -> None:
        """The compute stream goes on after `event`."""
        self.compute.wait_event(event)

    def copy(self, lane: str, pairs: Pairs, after: Iterable[torch.cuda.Event] = ()) -> torch.cuda.Event:
        """Copies on the lane's own stream, in order, after the given events. The event returned completes with them.

        Any thread may call it. Until the event has completed, sources must not be written to, nor destinations read.
        """
        stream = self._lanes[lane]
        for event in after:
            stream.wait_event(event)
        pairs = list(pairs)
        with torch.inference_mode(), torch.cuda.stream(stream):
            begin = self._begin()
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
            self._end(lane, pairs, begin)
        return event

    def mark(self) -> torch.cuda.Event:
        """A point of the current stream, as an event with a time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def nanoseconds(self, start: torch.cuda.Event, mark: torch.cuda.Event) -> int:
        """From one mark to another; waits for both, so it is for after the run."""
        start.synchronize()
        mark.synchronize()
        return round(start.elapsed_time(mark) * 1e6)

    def anchor(self) -> tuple[torch.cuda.Event, int]:
        """A mark, and when it was on the host's clock (time.perf_counter_ns). Waits: it is for before the first step."""
        mark = self.mark()
        mark.synchronize()
        return mark, time.perf_counter_ns()


def streams_of(device: torch.device) -> CpuStreams | CudaStreams:
    return CudaStreams(device) if device.type == "cuda" else CpuStreams(device)
