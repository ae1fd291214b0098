"""A trace of a run: what each rank did when, in the format that Perfetto and chrome://tracing open.

Events are kept as marks of the streams and resolved after the last step, so that nothing waits for the device meanwhile.
Knows no MPI: the offsets of clocks are given to it.
"""

import json
import time
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from noria.order import BEAT, RESULT, kind_of
from noria.streams import Event, Mark, Streams
from noria.transports import Transport

LIMIT = 250_000  # events of a rank, some 100 MB of host memory; those after them are counted and dropped
TRACKS = ("steps", "waits", "compute", "load", "store", "send", "receive")
_HOST = {"steps", "waits", "send", "receive"}  # their marks are nanoseconds of time.perf_counter_ns()
_SUBTRACKS = 1000
_ROUNDING = 2000  # ns by which two events of a stream may seem to overlap: the device's clock has steps of 0.5 us
_ANCHOR_NS = 4 * 10**9  # ns; the device's clock counts milliseconds in 32 bits, which are exact near an anchor alone


T = TypeVar("T")


class TraceEvent(NamedTuple):
    track: str
    name: str
    begin: Mark
    end: Mark
    args: dict[str, Any]


class Tracing(Protocol):
    """What the engine asks of a trace: Trace keeps it, Off does nothing."""

    def start(self, offset: int, zero: int) -> None: ...

    def mark(self) -> Mark | None: ...

    def compute(
        self,
        name: str,
        begin: Mark | None,
        round: int,
        lap: int,
        group: int,
        layer: int | None = None,
        microbatch: int | None = None,
    ) -> None: ...

    def host(self, track: str, name: str, begin: float, end: float | None = None, **args: Any) -> None: ...

    def transport(self, transport: Transport | None) -> Transport | None: ...

    def events(self, offset: int) -> Iterable[str]: ...


class Off:
    """No trace: the methods of Trace, doing nothing."""

    def start(self, offset: int, zero: int) -> None:
        pass

    def mark(self) -> None:
        return None

    def compute(
        self,
        name: str,
        begin: Mark | None,
        round: int,
        lap: int,
        group: int,
        layer: int | None = None,
        microbatch: int | None = None,
    ) -> None:
        pass

    def host(self, track: str, name: str, begin: float, end: float | None = None, **args: Any) -> None:
        pass

    def transport(self, transport: Transport | None) -> Transport | None:
        return transport

    def events(self, offset: int) -> Iterable[str]:
        return ()


OFF = Off()


class Trace:
    """The events of one rank, at most `limit`. Any thread may add; `title` names the rank's process in the picture."""

    def __init__(self, rank: int, title: str, streams: Streams, limit: int = LIMIT):
        self._rank, self._title, self._streams, self._limit = rank, title, streams, limit
        self._kept: list[TraceEvent] = []
        self.dropped = 0
        self._anchor, self._began = streams.anchor()
        self._offset = self._zero = 0
        streams.observe = self._copied

    def start(self, offset: int, zero: int) -> None:
        """The run begins: `offset` (ns) makes this rank's clock rank 0's, and `zero` is where the trace begins there."""
        self._anchor, self._began = self._streams.anchor()
        self._offset, self._zero = offset, zero

    def mark(self) -> Mark | None:
        """Where the compute stream is now; None when no event is kept any more."""
        return self._streams.mark() if len(self._kept) < self._limit else None

    def compute(
        self,
        name: str,
        begin: Mark | None,
        round: int,
        lap: int,
        group: int,
        layer: int | None = None,
        microbatch: int | None = None,
    ) -> None:
        """A block was computed from the mark `begin` on to where the compute stream is now."""
        args = {"round": round, "lap": lap, "group": group, "layer": layer, "microbatch": microbatch}
        self._add("compute", name, begin, self.mark(), {key: v for key, v in args.items() if v is not None})

    def host(self, track: str, name: str, begin: float, end: float | None = None, **args: Any) -> None:
        """Something of a host thread, in seconds of time.perf_counter(); it ends now if no end is given."""
        end = time.perf_counter() if end is None else end
        self._add(track, name, int(begin * 1e9), int(end * 1e9), args)

    def transport(self, transport: Transport | None) -> Transport | None:
        """The transport, with its messages traced; those of the heartbeat and the wait for headers are not."""
        return TracedTransport(transport, self) if transport is not None else None

    def message(self, track: str, kind: str, begin: int, group: int, nbytes: int) -> None:
        self._add(track, kind, begin, time.perf_counter_ns(), {"group": group, "bytes": nbytes})

    def events(self, offset: int) -> Iterable[str]:
        """This rank's events, each as JSON. `offset`: as at the start, measured now; between the two it is interpolated.

        Every stream must be done, or is waited for.
        """
        now = time.perf_counter_ns()
        drift = (offset - self._offset) / max(now - self._began, 1)

        def microseconds(ns: int) -> float:
            return (ns + self._offset + round(drift * (ns - self._began)) - self._zero) / 1000

        title = self._title + (f" ({self.dropped} events dropped)" if self.dropped else "")
        yield from self._names("process", 0, self._rank, title)
        for number, track in enumerate(TRACKS):
            used: set[int] = set()
            for place, begin, end, event in _beside(self._resolved(track)):
                number_of = number * _SUBTRACKS + place
                if place not in used:
                    used.add(place)
                    yield from self._names("thread", number_of, number_of, track + f" {place + 1}" * (place > 0))
                shown = {"ph": "X", "pid": self._rank, "tid": number_of, "name": event.name, "cat": track}
                at = microseconds(begin)
                yield json.dumps(shown | {"ts": at, "dur": round(microseconds(end) - at, 3), "args": event.args})

    def _names(self, what: str, thread: int, index: int, name: str) -> Iterable[str]:
        shown = {"ph": "M", "pid": self._rank, "tid": thread}
        yield json.dumps(shown | {"name": f"{what}_name", "args": {"name": name}})
        yield json.dumps(shown | {"name": f"{what}_sort_index", "args": {"sort_index": index}})

    def _copied(self, lane: str, name: str, args: dict[str, Any], nbytes: int, begin: Mark, end: Mark) -> None:
        self._add(lane, name, begin, end, args | {"bytes": nbytes})

    def _add(self, track: str, name: str, begin: Mark | None, end: Mark | None, args: dict[str, Any]) -> None:
        if len(self._kept) >= self._limit or begin is None or end is None:
            self.dropped += 1
        else:
            self._kept.append(TraceEvent(track, name, begin, end, args))

    def _resolved(self, track: str) -> list[tuple[int, int, TraceEvent]]:
        """(begin, end, event) of a track in ns of this rank's clock, in order."""
        found: list[tuple[int, int, TraceEvent]] = []
        anchor, at = self._anchor, self._began
        for event in (event for event in self._kept if event.track == track):
            if isinstance(event.begin, int) and isinstance(event.end, int) and track in _HOST:
                found.append((event.begin, event.end, event))
                continue
            begin = at + self._streams.nanoseconds(anchor, event.begin)
            found.append((begin, begin + self._streams.nanoseconds(event.begin, event.end), event))
            if begin - at > _ANCHOR_NS:
                anchor, at = event.begin, begin
        return sorted(found, key=lambda item: item[:2])


def _beside(events: list[tuple[int, int, TraceEvent]]) -> Iterable[tuple[int, int, int, TraceEvent]]:
    """(place, begin, end, event): events that overlap get places beside each other, the lowest that is free."""
    ends: list[int] = []
    for begin, end, event in events:
        place = next((place for place, last in enumerate(ends) if last <= begin + _ROUNDING), len(ends))
        if place == len(ends):
            ends.append(begin)
        begin = max(begin, ends[place])
        ends[place] = end = max(begin, end)
        yield place, begin, end, event


class TracedTransport:
    """A transport whose messages leave events: a send from when its bytes are ready, a receive from when it is posted."""

    def __init__(self, transport: Transport, trace: Trace):
        self._transport, self._trace = transport, trace
        self.device = transport.device
        self.close = transport.close

    def send(self, tensor: torch.Tensor, dest: int, tag: int, ready: Event) -> Generator[None, None, None]:
        return self._watched("send", tag, tensor.nbytes, self._transport.send(tensor, dest, tag, ready))

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Generator[None, None, None]:
        return self._watched("receive", tag, tensor.nbytes, self._transport.receive(tensor, source, tag))

    def send_bytes(self, data: bytes, dest: int, tag: int) -> Generator[None, None, None]:
        work = self._transport.send_bytes(data, dest, tag)
        return work if kind_of(tag)[0] == BEAT else self._watched("send", tag, len(data), work)

    def receive_bytes(self, source: int, tag: int) -> Generator[None, None, bytes]:
        work = self._transport.receive_bytes(source, tag)
        return self._watched("receive", tag, None, work) if kind_of(tag)[0] == RESULT else work

    def _watched(
        self, track: str, tag: int, nbytes: int | None, work: Generator[None, None, T]
    ) -> Generator[None, None, T]:
        begin, (kind, group) = time.perf_counter_ns(), kind_of(tag)
        value = yield from work
        if nbytes is None:
            nbytes = len(value) if isinstance(value, bytes) else 0
        self._trace.message(track, kind, begin, group, nbytes)
        return value
