"""Streams and events of a device, and their twin on the CPU that does nothing. The only file that names a CUDA stream.

Knows no tensors but the device's: who waits for what is said by its callers.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch

from noria.batch_copies import CopyRuns, batch_copies

LANES = ("load", "store")  # to the device and from it: a link carries both at once
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # (destination, source) of a copy
Pairs: TypeAlias = Iterable[Pair]
Mark: TypeAlias = int | torch.cuda.Event  # a point in time: CpuStreams' marks are numbers, CudaStreams' events
Observe: TypeAlias = Callable[[str, str, dict[str, Any], int, Mark, Mark], None]


class Watching(Protocol):
    """Who is told how long copies, and what else there is, take in the rounds that it `watches`."""

    @property
    def watches(self) -> bool: ...

    def copied(self, lane: str, begin: Mark, end: Mark) -> None: ...

    def idled(self, name: str, begin: Mark, end: Mark) -> None: ...

    def took(self, name: str, seconds: float) -> None: ...


class Event(Protocol):
    """A point of a stream: what was queued before it has completed, or has not."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Streams(Protocol):
    """What the rest of the program asks of a device's streams; CpuStreams and CudaStreams say what each does."""

    device: torch.device
    observe: Observe | None
    watch: Watching | None

    def aside(self) -> AbstractContextManager[object]: ...

    def event(self) -> Event: ...

    def set_device(self) -> None: ...

    def copying(self) -> AbstractContextManager[object]: ...

    def wait(self, event: Event) -> None: ...

    def copy(self, lane: str, pairs: Pairs, after: Iterable[Event] = ()) -> Event: ...

    def waiting(self, name: str) -> AbstractContextManager[object]: ...

    def label(self, buffer: torch.Tensor, name: str, **args: object) -> None: ...

    def mark(self) -> Mark: ...

    def nanoseconds(self, start: Mark, mark: Mark) -> int: ...

    def passed(self, mark: Mark) -> bool: ...

    def took(self, name: str, seconds: float) -> None: ...

    def anchor(self) -> tuple[Mark, int]: ...


class Observed:
    """What a trace and a gauge need of streams. `observe`, once set, hears of each copy, in the thread that queues it:
    observe(lane, name, args, nbytes, begin mark, end mark). `watch`, once set, hears of copies and waits.
    """

    observe: Observe | None = None
    watch: Watching | None = None
    _labels: dict[int, tuple[str, dict[str, object]]] | None = None

    def mark(self) -> Mark:
        """A point of the current stream: of the compute stream, but inside `aside`, `copying` and copies."""
        raise NotImplementedError

    def label(self, buffer: torch.Tensor, name: str, **args: object) -> None:
        """Names, for a trace, what copies to and from the memory of this buffer of the device carry from now on."""
        if self.observe is not None:
            if self._labels is None:
                self._labels = {}
            self._labels[buffer.untyped_storage().data_ptr()] = name, args

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """The compute stream waits for `name` in here, from when it is through with what was queued before."""
        begin = self.mark() if self.watch is not None and self.watch.watches else None
        yield
        if begin is not None and self.watch is not None:
            self.watch.idled(name, begin, self.mark())

    def took(self, name: str, seconds: float) -> None:
        """Something that no stream does took so long; any thread may say so."""
        if self.watch is not None:
            self.watch.took(name, seconds)

    def _begin(self) -> Mark | None:
        watched = self.watch is not None and self.watch.watches
        return self.mark() if watched or self.observe is not None else None

    def _end(self, lane: str, copies: Sequence[Pair] | CopyRuns, begin: Mark | None) -> None:
        """The copies are queued; called on their stream."""
        if begin is None or not copies:
            return
        end = self.mark()
        if self.watch is not None:
            self.watch.copied(lane, begin, end)
        if self.observe is None:
            return
        pairs = list(copies)
        buffer = pairs[0][0 if lane == "load" else 1].untyped_storage().data_ptr()
        name, args = (self._labels or {}).get(buffer, (lane, {}))
        self.observe(lane, name, args, sum(source.nbytes for _, source in pairs), begin, end)


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

    def event(self) -> Event:
        """An event that marks all work queued so far on the current stream."""
        return Done()

    def aside(self) -> AbstractContextManager[object]:
        """Work inside the context goes to another stream, behind what is queued; what is queued later comes after it."""
        return contextlib.nullcontext()

    def set_device(self) -> None:
        """Binds the calling thread to the device."""

    def copying(self) -> AbstractContextManager[object]:
        """Work inside the context goes to the copy stream."""
        return contextlib.nullcontext()

    def wait(self, event: Event) -> None:
        """The compute stream goes on after `event`."""

    def copy(self, lane: str, pairs: Pairs, after: Iterable[Event] = ()) -> Event:
        """Copies on the lane's own stream, in order, after the given events; CopyRuns by one call, in any order. The event that
        is returned completes with them.

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
        """A point of the current stream, in ns of the host's clock."""
        return time.perf_counter_ns()

    def nanoseconds(self, start: Mark, mark: Mark) -> int:
        """From one mark to another."""
        assert isinstance(start, int) and isinstance(mark, int), "marks of another device"
        return mark - start

    def passed(self, mark: Mark) -> bool:
        """Whether the stream has come to the mark: then nothing waits for its time."""
        return True

    def anchor(self) -> tuple[int, int]:
        """A mark, and when it was on the host's clock (time.perf_counter_ns)."""
        now = time.perf_counter_ns()
        return now, now


class CudaStreams(Observed):
    """One compute stream (the current one) and one beside it, one for the transports' copies and one for each lane."""

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.set_device(device)
        self.compute = torch.cuda.current_stream(device)
        self._copying = torch.cuda.Stream(device)
        self._lanes = {lane: torch.cuda.Stream(device) for lane in LANES}
        self._aside = torch.cuda.Stream(device)
        self._batch = batch_copies(self._copying)

    def event(self) -> torch.cuda.Event:
        """An event that marks all work queued so far on the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work inside the context goes to another stream, behind what is queued; what is queued later comes after it."""
        self._aside.wait_stream(self.compute)
        try:
            with torch.cuda.stream(self._aside):
                yield
        finally:
            self.compute.wait_stream(self._aside)

    def set_device(self) -> None:
        """Binds the calling thread to the device, and to its context: MPI libraries look for one that is current."""
        torch.cuda.set_device(self.device)
        torch.cuda.current_stream(self.device).query()  # torch's setting alone may leave a new thread without a context

    def copying(self) -> AbstractContextManager[object]:
        """Work inside the context goes to the copy stream."""
        return torch.cuda.stream(self._copying)

    def wait(self, event: Event) -> None:
        """The compute stream goes on after `event`."""
        self.compute.wait_event(_own(event))

    def copy(self, lane: str, pairs: Pairs, after: Iterable[Event] = ()) -> Event:
        """Copies on the lane's own stream, in order, after the given events; CopyRuns by one call, in any order. The event that
        is returned completes with them.

        Any thread may call it. Until the event has completed, sources must not be written to, nor destinations read.
        """
        stream = self._lanes[lane]
        for event in after:
            stream.wait_event(_own(event))
        pairs = pairs if isinstance(pairs, CopyRuns) else list(pairs)
        with torch.inference_mode(), torch.cuda.stream(stream):
            begin = self._begin()
            if self._batch is not None and isinstance(pairs, CopyRuns) and len(pairs) > 1:
                self._batch(pairs, stream.cuda_stream)
            else:
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

    def nanoseconds(self, start: Mark, mark: Mark) -> int:
        """From one mark to another; waits for both, so it is for after the run."""
        begin, end = _own(start), _own(mark)
        begin.synchronize()
        end.synchronize()
        return round(begin.elapsed_time(end) * 1e6)

    def passed(self, mark: Mark) -> bool:
        """Whether the stream has come to the mark: then nothing waits for its time."""
        return _own(mark).query()

    def anchor(self) -> tuple[torch.cuda.Event, int]:
        """A mark, and when it was on the host's clock (time.perf_counter_ns). Waits: it is for before the first step."""
        mark = self.mark()
        mark.synchronize()
        return mark, time.perf_counter_ns()


def _own(event: Event | Mark) -> torch.cuda.Event:
    assert isinstance(event, torch.cuda.Event), f"{event} is of another device"
    return event


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else CpuStreams(device)
