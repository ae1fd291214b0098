"""Measures what the ranks' machines do: links, memory, matmul, disk and messages, with all ranks at work at once.

Every figure is the slowest rank's. Knows no model and no plan but the names of the rates.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from noria import transports
from noria.communicator import Communicator
from noria.launch import launcher
from noria.limits import DISK_THREADS
from noria.plan.rates import NAMES, Rates
from noria.streams import Event, streams_of
from noria.tools import direct
from noria.tools.pinned import HostMemory
from noria.transports import Transport

OPERATIONS = 20  # small ones, such as a layer has
MESSAGE_NBYTES = 16 << 20
SMALL_NBYTES = 16 << 10


class Probe:
    """One rank's measurements. `seconds` of each figure, about; `folder` is where the disk is measured."""

    def __init__(
        self,
        comm: Communicator,
        location: launcher.Location,
        device: torch.device,
        folder: Path,
        seconds: float,
        nbytes: int | None,
    ):
        self._comm, self._location, self._device, self._folder, self._seconds = comm, location, device, folder, seconds
        self._streams = streams_of(device)
        self._cuda = device.type == "cuda"
        self._nbytes = nbytes or (256 << 20 if self._cuda else 64 << 20)

    def measure(self, transport: Transport | None, say: Callable[[str, float, str], None]) -> Rates:
        """All rates. Collective. `transport` None: one rank, no messages. `say(name, value, unit)` after each."""
        found: dict[str, float] = {}
        for measured in (self._link, self._memory, self._launches, self._disk, lambda: self._hop(transport)):
            self._comm.Barrier()
            own = measured()
            for name, value in self._slowest(own).items():
                found[name] = value
                say(name, value, "s" if name.endswith("seconds") else "B" if name.endswith("capacity") else "B/s")
        matmul = {}
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            self._comm.Barrier()
            matmul[dtype] = self._slowest({"matmul": self._matmul(getattr(torch, dtype))})["matmul"]
            say(f"matmul {dtype}", matmul[dtype], "flop/s")
        name = torch.cuda.get_device_name(self._device) if self._cuda else "CPU"
        left = tuple(name for name in NAMES if name not in found)
        return Rates(device=name, matmul=matmul, assumed=left, **found)

    def _slowest(self, own: dict[str, float]) -> dict[str, float]:
        ranks = self._comm.allgather(own)
        return {name: (max if name.endswith("seconds") else min)(rank[name] for rank in ranks) for name in own}

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of one call, as many of them are made one after another; `work` may return an event to wait for."""
        self._wait(work())  # the first one is not like the others
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < self._seconds or not count:
            self._wait(work())
            count += 1
        return elapsed / count

    def _wait(self, made: Any) -> None:
        """Until an event has completed, or what the compute stream was given so far."""
        (made if hasattr(made, "synchronize") else self._streams.event()).synchronize()

    def _link(self) -> dict[str, float]:
        host, back = HostMemory(self._nbytes), HostMemory(self._nbytes)
        for memory in (host, back):
            memory.touch()
            memory.register(self._device)
        there, here = (torch.zeros(self._nbytes, dtype=torch.uint8, device=self._device) for _ in range(2))

        def both() -> Event:
            loading = self._streams.copy("load", [(there, host.memory)])
            self._streams.copy("store", [(back.memory, here)]).synchronize()
            return loading

        times = {
            "host_to_device": self._timed(lambda: self._streams.copy("load", [(there, host.memory)])),
            "device_to_host": self._timed(lambda: self._streams.copy("store", [(back.memory, here)])),
            "both_directions": self._timed(both),
        }
        host.close()
        back.close()
        return {name: self._nbytes / seconds for name, seconds in times.items()}

    def _memory(self) -> dict[str, float]:
        size = 4 * self._nbytes if self._cuda else self._nbytes
        rates = {}
        for name, device in (("device_memory", self._device), ("host_memory", torch.device("cpu"))):
            source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
            rates[name] = 2 * size / self._timed(functools.partial(target.copy_, source))
        capacity = launcher.device_memory(self._comm, self._location, self._device)
        return rates | {
            "device_capacity": float(capacity),
            "host_capacity": float(launcher.host_memory(self._location)),
        }

    def _launches(self) -> dict[str, float]:
        small = torch.zeros(16, device=self._device)

        def layer() -> None:
            for _ in range(OPERATIONS):
                small.add_(1)

        return {"layer_seconds": self._timed(layer)}

    def _matmul(self, dtype: torch.dtype) -> float:
        size = 8192 if self._cuda else 256
        left, right = (torch.randn(size, size, device=self._device).to(dtype) for _ in range(2))
        return 2 * size**3 / self._timed(lambda: torch.mm(left, right))

    def _disk(self) -> dict[str, float]:
        """Direct writes and reads of a file that is large enough for `seconds` of writing, at most 4 GiB."""
        most = 4 << 30 if self._cuda else 8 * self._nbytes
        pieces = direct.chunks(most)
        memory = HostMemory(DISK_THREADS * direct.CHUNK_NBYTES)
        memory.touch()
        views = [part.numpy().data for part in memory.memory.split(direct.CHUNK_NBYTES)]
        file = direct.scratch_file(self._folder, most, "--scratch")
        try:
            with ThreadPoolExecutor(DISK_THREADS) as pool:
                write = _passes(pool, pieces, views, lambda start, view: file.write(start, view), self._seconds)
                read = _passes(
                    pool, pieces[: write[1]], views, lambda start, view: file.read(start, view), self._seconds
                )
        finally:
            file.close()
            memory.close()
        return {"disk_read": read[0], "disk_write": write[0]}

    def _hop(self, transport: Transport | None) -> dict[str, float]:
        if transport is None:
            return {}
        large, small = (self._exchange(transport, nbytes) for nbytes in (MESSAGE_NBYTES, SMALL_NBYTES))
        return {"hop": MESSAGE_NBYTES / max(large - small, 1e-9), "hop_seconds": small}

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


def _passes(
    pool: ThreadPoolExecutor,
    pieces: list[tuple[int, int]],
    views: list[memoryview],
    call: Callable[[int, memoryview], None],
    seconds: float,
) -> tuple[float, int]:
    """Bytes/s of calls for one piece after another, some at once, and how many pieces were done in about `seconds`."""
    done, nbytes, began = 0, 0, time.perf_counter()
    while done < len(pieces) and (time.perf_counter() - began < seconds or not done):
        turn = pieces[done : done + len(views)]
        list(pool.map(lambda one: call(one[0][0], one[1][: one[0][1] - one[0][0]]), zip(turn, views, strict=False)))
        done, nbytes = done + len(turn), nbytes + sum(end - start for start, end in turn)
    return nbytes / (time.perf_counter() - began), done


def choose_transport(comm: Communicator, device: torch.device, requested: str) -> tuple[str, str, Transport | None]:
    """The transport's name, why, and the transport (None for one rank). Collective."""
    name, reason = transports.choose(comm, device, requested)
    return name, reason, transports.open_transport(name, comm, device)
