"""How long copies, layers and the host keep a rank busy in its rounds: what a plan's terms are held against.

Looks at some rounds, those of prefill and of decode apart. Waits for nothing: marks of the device are read when they have
passed. Knows no plan.
"""

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Generator
from typing import Protocol

import torch

from noria.streams import Event, Mark, Streams
from noria.transports import Transport

WATCHED = 8  # rounds after the first that are all looked at, then every 8th: two marks a layer cost the host some 10 us
NAMES = ("load", "store", "disk", "compute", "launches", "prepare", "host", "hops", "waited")
IDLE = ("input", "weights", "cache")  # what a device may wait for, with nothing to compute
PHASES = ("prefill", "decode")


class Gauging(Protocol):
    """What the engine asks of a gauge: Gauge looks, Unwatched does nothing."""

    def mark(self) -> Mark | None: ...

    def computed(self, begin: Mark | None) -> None: ...

    def waited(self, name: str, begin: Mark | None) -> None: ...

    def took(self, name: str, seconds: float, before: bool = False) -> None: ...

    def end_round(self, phase: str) -> None: ...

    def lasted(self, seconds: float) -> None: ...

    def transport(self, transport: Transport | None) -> Transport | None: ...

    def columns(self) -> dict[str, float]: ...


class Unwatched:
    """No gauge: the methods of Gauge, doing nothing."""

    def mark(self) -> None:
        return None

    def computed(self, begin: Mark | None) -> None:
        pass

    def waited(self, name: str, begin: Mark | None) -> None:
        pass

    def took(self, name: str, seconds: float, before: bool = False) -> None:
        pass

    def end_round(self, phase: str) -> None:
        pass

    def lasted(self, seconds: float) -> None:
        pass

    def transport(self, transport: Transport | None) -> Transport | None:
        return transport

    def columns(self) -> dict[str, float]:
        return {}


class Gauge:
    """Seconds of a rank by phase and name: of copies to and from the device, of disks, of layers on the device, of the host that
    queues them or composes steps, of sending hidden states, and of waiting for the ring; and what the device stood still for.
    Any thread may add.

    The first round is left out, unless it is the only one of its phase: it waits for what is loaded ahead in all others.
    """

    def __init__(self, streams: Streams):
        self._streams, self._lock = streams, threading.Lock()
        self._round = 0
        self._counts: defaultdict[str, float] = defaultdict(float)  # of this round
        self._spans: list[tuple[str, Mark, Mark]] = []
        # Of rounds before, that the device may not have passed.
        self._pending: deque[tuple[str, str, Mark, Mark]] = deque()
        self._seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._rounds: Counter[str] = Counter()
        self._latest = ""  # the phase under which the last round is counted, if it is
        streams.watch = self

    @property
    def watches(self) -> bool:
        return self._round <= WATCHED or self._round % WATCHED == 1

    def mark(self) -> Mark | None:
        """Where the stream is now; None in a round that is not looked at."""
        return self._streams.mark() if self.watches else None

    def computed(self, begin: Mark | None) -> None:
        """The device computes from the mark on to where the stream is now."""
        if begin is not None:
            self._add("compute", begin, self._streams.mark())

    def waited(self, name: str, begin: Mark | None) -> None:
        """The host has waited for this since the mark: the device too, from when it had computed all that was queued."""
        if begin is not None:
            self.idled(name, begin, self._streams.mark())

    def idled(self, name: str, begin: Mark, end: Mark) -> None:
        """The device stood still between these marks, one of IDLE was not there; "experts": weights, in the midst of a layer."""
        if name == "experts":
            self._add("compute_stopped", begin, end)
        self._add(f"idle_{'weights' if name == 'experts' else name}", begin, end)

    def copied(self, lane: str, begin: Mark, end: Mark) -> None:
        """Copies of a lane lie between these marks."""
        self._add(lane, begin, end)

    def took(self, name: str, seconds: float, before: bool = False) -> None:
        """Something of the host, or of a disk, took so long; `before`: for the round that ended last."""
        with self._lock:
            if not before:
                self._counts[name] += seconds
            elif self._latest:
                self._seconds[self._latest, name] += seconds

    def end_round(self, phase: str) -> None:
        """All of a round is queued; `phase` "": it had no tokens."""
        with self._lock:
            counts, spans, self._counts, self._spans = self._counts, self._spans, defaultdict(float), []
        self._latest = (phase if self._round else f"first {phase}") if self.watches and phase else ""
        if self._latest:
            self._rounds[self._latest] += 1
            for name, seconds in counts.items():
                self._seconds[self._latest, name] += seconds
            self._pending += ((self._latest, *span) for span in spans)
        self._round += 1
        self._resolve(waits=False)

    def lasted(self, seconds: float) -> None:
        """How long the round that ended last was, from its first step to its results."""
        if self._latest:
            self._seconds[self._latest, "watched"] += seconds

    def transport(self, transport: Transport | None) -> Transport | None:
        """The transport, with its sends of hidden states timed."""
        return None if transport is None else GaugedTransport(transport, self)

    def columns(self) -> dict[str, float]:
        """One number a column, for the output's `timing`. After the last step: waits for marks that have not passed."""
        self._resolve(waits=True)
        columns = {}
        for phase in PHASES:
            counted = phase if self._rounds[phase] else f"first {phase}"
            columns[f"{phase}_watched_rounds"] = float(self._rounds[counted])
            for name in ("watched", *NAMES, *(f"idle_{one}" for one in IDLE)):
                columns[f"{phase}_{name}_seconds"] = self._seconds[counted, name]
            columns[f"{phase}_compute_seconds"] -= self._seconds[counted, "compute_stopped"]
        return columns

    def _add(self, name: str, begin: Mark, end: Mark) -> None:
        with self._lock:
            self._spans.append((name, begin, end))

    def _resolve(self, waits: bool) -> None:
        while self._pending and (waits or self._streams.passed(self._pending[0][3])):
            phase, name, begin, end = self._pending.popleft()
            self._seconds[phase, name] += self._streams.nanoseconds(begin, end) / 1e9


class GaugedTransport:
    """A transport that tells a gauge how long sends of hidden states take, from when their bytes are ready."""

    def __init__(self, transport: Transport, gauge: Gauging):
        self._transport, self._gauge = transport, gauge
        self.device = transport.device
        self.receive, self.send_bytes, self.receive_bytes = (
            transport.receive,
            transport.send_bytes,
            transport.receive_bytes,
        )
        self.close = transport.close

    def send(self, tensor: torch.Tensor, dest: int, tag: int, ready: Event) -> Generator[None, None, None]:
        while not ready.query():
            yield
        began = time.perf_counter()
        yield from self._transport.send(tensor, dest, tag, ready)
        self._gauge.took("hops", time.perf_counter() - began)
