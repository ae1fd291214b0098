"""Measures what the ranks' machines do: links, memory, matmul, disk and messages, with all ranks at work at once.

Every figure is the slowest rank's. Knows no model and no plan but the names of the rates.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from noria import transports
from noria.communicator import Communicator
from noria.errors import InputError
from noria.launch import launcher
from noria.launch.copies import Buffers, Lanes, sustained
from noria.launch.disk_rates import disk_rates
from noria.launch.node import mount_of, node_of
from noria.limits import DTYPES
from noria.plan.rates import Rates, assumed
from noria.streams import streams_of
from noria.tools.provenance import now
from noria.transports import Transport

GROUPS = {  # of figures that are measured together
    "link": ("host_to_device", "device_to_host", "both_directions"),
    "memory": ("device_memory", "host_memory"),
    "launches": ("layer_seconds",),
    "disk": ("disk_read", "disk_write"),
    "hop": ("hop", "hop_seconds"),
}
LEAST_BATCHES = 3  # of calls that are timed together: of three, the machine's other work spoils one at most
OPERATIONS = 20  # small ones, such as a layer has
LONGEST, CPU_LONGEST = 1 / 2, 1 / 6  # of a figure's seconds: no product is measured behind one that takes longer
MEMORY_PARTS = 16  # of the host: the matrices of a product take one of them at most, or four matrices
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)  # of a product
CPU_ROWS = (1, 4, 8, 16, 32, 64, 256, 1024, 4096, 16384)  # a library multiplies few rows in several ways
SIZE, CPU_SIZE = 8192, 2048  # of a square matrix
# Of matrices: the caches of a server hold up to 320 MiB, and a run's weights find none there.
UNCACHED_NBYTES = 512 << 20
MESSAGE_NBYTES = 16 << 20
SMALL_NBYTES = 16 << 10
Say = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured: about so many seconds of each figure, copying buffers of `nbytes` (None: large ones).

    `strict`: what cannot be measured raises; else it is left out on every rank.
    """

    seconds: float
    nbytes: int | None = None
    strict: bool = True


class Probe:
    """One rank's measurements. `folder` is where the disk is measured."""

    def __init__(
        self,
        comm: Communicator,
        location: launcher.Location,
        device: torch.device,
        folder: Path,
        effort: Effort,
    ):
        self._comm, self._location, self._device, self._folder = comm, location, device, folder
        self._streams, self._seconds, self._strict = streams_of(device), effort.seconds, effort.strict
        self._cuda = device.type == "cuda"
        self._size = SIZE if self._cuda else CPU_SIZE
        self._nbytes = effort.nbytes or (512 << 20 if self._cuda else 64 << 20)

    def measure(
        self,
        transport: tuple[str, Transport | None],
        say: Say = lambda name, value, unit: None,
        groups: Container[str] = GROUPS,
        dtypes: Sequence[str] = DTYPES,
    ) -> Rates:
        """The rates of these groups, and of products in these dtypes; the others are assumed. Collective.

        `transport`: its name and itself (None: one rank, no messages). `say(name, value, unit)` after each figure.
        """
        found: dict[str, float] = {}
        for measured in self._figures(transport[1], groups):
            for name, value in measured.items():
                found[name] = value
                say(name, value, "s" if name.endswith("seconds") else "B" if name.endswith("capacity") else "B/s")
        rows = {dtype: table for dtype in dtypes if (table := self._products(dtype, say))}
        self._forget()
        device, node = node_of(self._comm, self._location, self._device)
        done = {*found, *(f"matmul.{dtype}" for dtype in rows)}
        known = assumed(device)
        return replace(
            known,
            device=device,
            matmul=known.matmul | {dtype: max(table.values()) for dtype, table in rows.items()},
            matmul_rows=rows,
            assumed=tuple(name for name in known.assumed if name not in done),
            node=node,
            transport=transport[0] if "hop" in found else "",
            scratch=mount_of(self._folder) if "disk_read" in found else "",
            measured=now(),
            **found,  # type: ignore[arg-type]  # rates alone, by name
        )

    def _figures(self, transport: Transport | None, groups: Container[str]) -> Iterator[dict[str, float]]:
        """Of each group in turn; all ranks are at the same figure at the same time."""
        capacity = float(launcher.device_memory(self._comm, self._location, self._device))
        yield self._slowest({"device_capacity": capacity, "host_capacity": float(launcher.host_memory(self._location))})
        with contextlib.ExitStack() as held:
            if "link" in groups or "memory" in groups:
                yield from self._copies(held.enter_context(self._buffers()), groups)
        yield from (self._attempt(work) for name, work in self._others() if name in groups)
        if "hop" in groups and transport is not None:
            yield self._slowest(self._hop(transport))

    @contextlib.contextmanager
    def _buffers(self) -> Iterator[Buffers | None]:
        """None where a rank has no memory for them."""
        buffers = None
        try:
            buffers = Buffers(self._nbytes, self._device)
        except (OSError, RuntimeError):
            if self._strict:
                raise
        try:
            yield buffers if all(self._comm.allgather(buffers is not None)) else None
        finally:
            if buffers is not None:
                buffers.close()

    def _copies(self, buffers: Buffers | None, groups: Container[str]) -> Iterator[dict[str, float]]:
        if buffers is None:
            return
        if not self._cuda:
            yield self._attempt(partial(self._within_memory, buffers))
            return
        load, store = {"load": (buffers.there, buffers.host)}, {"store": (buffers.back, buffers.here)}
        for name, lanes in zip(GROUPS["link"], (load, store, load | store), strict=True):
            if "link" in groups:
                yield self._attempt(partial(self._lanes, name, lanes))
        if "memory" in groups:
            yield self._attempt(partial(self._memory, buffers))

    def _others(self) -> tuple[tuple[str, Callable[[], dict[str, float]]], ...]:
        return ("launches", self._launches), ("disk", self._disk)

    def _forget(self) -> None:
        """The device's memory is as it was, and so is what was the most of it."""
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _attempt(self, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The slowest rank's figures of `work`, which no rank may need another for."""
        self._comm.Barrier()
        try:
            own = work()
        except (OSError, RuntimeError, InputError):
            if self._strict:
                raise
            own = {}
        return self._slowest(own)

    def _slowest(self, own: dict[str, float]) -> dict[str, float]:
        """Of what every rank has measured."""
        ranks = self._comm.allgather(own)
        return {
            name: (max if name.endswith("seconds") else min)(rank[name] for rank in ranks)
            for name in own
            if all(name in rank for rank in ranks)
        }

    def _timed(self, work: Callable[[], object], seconds: float) -> list[float]:
        """Seconds of one call in each of three batches or more, within which the calls follow each other without a wait."""
        work()  # the first one is not like the others
        self._wait()
        times: list[float] = []
        count, batch, began = 0, 1, time.perf_counter()
        while time.perf_counter() - began < seconds or len(times) < LEAST_BATCHES:
            before = time.perf_counter()
            for _ in range(batch):
                work()
            self._wait()
            times.append((time.perf_counter() - before) / batch)
            count += batch
            batch = max(1, int(count * seconds / 4 / max(time.perf_counter() - began, 1e-9)))
        return times

    def _wait(self) -> None:
        """Until what the compute stream was given so far is done."""
        self._streams.event().synchronize()

    def _lanes(self, name: str, lanes: Lanes) -> dict[str, float]:
        """All ranks are at the same lanes at the same time: links of one host may have a limit in common."""
        return {name: sustained(self._streams, lanes, self._seconds)}

    def _within_memory(self, buffers: Buffers) -> dict[str, float]:
        """On a CPU links and memory are the same, and every copy is made by the thread that asks for it, one after another. What
        a run computes with is read by all threads, and caches hold none of it."""
        rate = sustained(self._streams, {"load": (buffers.back, buffers.host)}, self._seconds)
        link = {"host_to_device": rate, "device_to_host": rate, "both_directions": rate / 2}
        multiply = partial(self._multiply, self._weights(torch.float32), self._numbers(1, torch.float32))
        memory = torch.float32.itemsize * self._size**2 / min(self._timed(multiply, self._seconds))
        return link | {"device_memory": memory, "host_memory": memory}

    def _memory(self, buffers: Buffers) -> dict[str, float]:
        rate = 2 * self._nbytes / median(self._timed(lambda: buffers.back.copy_(buffers.host), self._seconds / 2))
        source, target = (torch.ones(2 * self._nbytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        on_device = 2 * source.nbytes / median(self._timed(lambda: target.copy_(source), self._seconds / 2))
        return {"device_memory": on_device, "host_memory": rate}

    def _launches(self) -> dict[str, float]:
        small = torch.zeros(16, device=self._device)

        def layer() -> None:
            for _ in range(OPERATIONS):
                small.add_(1)

        return {"layer_seconds": median(self._timed(layer, self._seconds / 4))}

    def _products(self, dtype: str, say: Say) -> dict[int, float]:
        """flop/s of products in a dtype by their rows, as far as one takes no longer than a figure may."""
        found = self._attempt(lambda: self._matmul(getattr(torch, dtype)))
        if found:
            say(f"matmul {dtype}", max(found.values()), "flop/s")
        return {int(rows): flops for rows, flops in found.items()}

    def _matmul(self, dtype: torch.dtype) -> dict[str, float]:
        weights, found, counts = self._weights(dtype), {}, ROWS if self._cuda else CPU_ROWS
        for rows in counts:
            multiply = partial(self._multiply, weights, self._numbers(rows, dtype))
            times = self._timed(multiply, self._seconds / len(counts))
            # The threads of a CPU wait for the one that another program keeps from its core.
            found[str(rows)] = 2 * rows * self._size**2 / (median if self._cuda else min)(times)
            if min(times) > self._seconds * (LONGEST if self._cuda else CPU_LONGEST):
                break
        return found

    @staticmethod
    def _multiply(weights: Iterator[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, next(weights))

    def _weights(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Square matrices in turn, those of all ranks of a host together too large for caches: a run reads every matrix anew."""
        number = 2 if self._cuda else self._uncached(self._size**2 * dtype.itemsize)
        return itertools.cycle([self._numbers(self._size, dtype) for _ in range(number)])

    def _numbers(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """A matrix of a product: what is in it changes a GPU's clock."""
        make = torch.randn if self._cuda else torch.ones
        return make(rows, self._size, device=self._device).to(dtype)

    def _uncached(self, nbytes: int) -> int:
        """Matrices of so many bytes that a rank must have for caches to hold none, in a small part of its memory."""
        room = launcher.host_memory(self._location) // MEMORY_PARTS
        return max(min(UNCACHED_NBYTES // self._location.ranks_on_host, room) // nbytes, 4)

    def _disk(self) -> dict[str, float]:
        read, write = disk_rates(self._folder, self._seconds, self._location.ranks_on_host)
        return {"disk_read": read, "disk_write": write}

    def _hop(self, transport: Transport) -> dict[str, float]:
        most = MESSAGE_NBYTES if self._cuda else MESSAGE_NBYTES // 4
        large, small = (self._exchange(transport, nbytes) for nbytes in (most, SMALL_NBYTES))
        # On a busy machine a small message may take as long as a large one.
        return {"hop": most / max(large - small, large / 2), "hop_seconds": small}

    def _exchange(self, transport: Transport, nbytes: int) -> float:
        """Seconds in which a message goes from every rank to the next one: the same number of times on all ranks."""
        rank, num_ranks = self._comm.Get_rank(), self._comm.Get_size()
        sent, received = (torch.zeros(nbytes, dtype=torch.uint8, device=self._device) for _ in range(2))
        times, done = [], object()
        for _ in range(12):
            ready = self._streams.event()
            ready.synchronize()
            self._comm.Barrier()
            began = time.perf_counter()
            live = [
                transport.receive(received, (rank - 1) % num_ranks, 0),
                transport.send(sent, (rank + 1) % num_ranks, 0, ready),
            ]
            while live := [work for work in live if next(work, done) is not done]:
                time.sleep(0)
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]


def choose_transport(comm: Communicator, device: torch.device, requested: str) -> tuple[str, str, Transport | None]:
    """The transport's name, why, and the transport (None for one rank). Collective."""
    name, reason = transports.choose(comm, device, requested)
    return name, reason, transports.open_transport(name, comm, device)
