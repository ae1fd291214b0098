"""Where bytes live when not on the device, a kind of place a file: each loads to the device and stores from it.

Owns what the kinds share: host memory that can be page-locked, and the ticket of a transfer. Knows bytes alone.
"""

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias

import torch

from noria.streams import Event

Pieces: TypeAlias = Iterable[tuple[int, torch.Tensor]]  # (offset in bytes, the device's bytes: contiguous uint8)
Events: TypeAlias = Iterable[
    Event
]  # of streams: a transfer does not touch the device's bytes before they have completed
_TOUCH_NBYTES = 64 << 20
_TOUCH_THREADS = 16


class Transfer:
    """A load or store under way. Any thread may wait."""

    def __init__(self, event: Event | None = None):
        """`event` None: it is told later, by `done` or `failed`."""
        self._future: Future[Event] = Future()
        if event is not None:
            self.done(event)

    def done(self, event: Event) -> None:
        self._future.set_result(event)

    def failed(self, error: BaseException) -> None:
        self._future.set_exception(error)

    @property
    def settled(self) -> bool:
        return self._future.done()

    def event(self) -> Event:
        """The event after which the device's bytes are there (load), or may be written again (store).

        Blocks the host until the copy is queued. Raises what went wrong on the way.
        """
        return self._future.result()


class Tier(Protocol):
    """A place of bytes other than the device; cpu.Cpu says what the methods do."""

    nbytes: int

    def load(self, pieces: Pieces, after: Events = ()) -> Transfer: ...

    def store(self, pieces: Pieces, after: Events = ()) -> Transfer: ...

    def close(self) -> None: ...


class HostMemory:
    """Exactly `nbytes` of anonymous memory, in huge pages where the system gives them; page-locked once registered."""

    def __init__(self, nbytes: int):
        """Raises OSError if the address space does not have them; memory itself is taken as it is touched."""
        self.nbytes = nbytes
        self._registered = False
        try:
            pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OSError(error.errno, f"{nbytes} bytes of host memory: {error.strerror}") from error
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a forked child has no business with locked pages
            _advise(pages, advice)
        # The tensor owns the map and is its only owner: it is unmapped when the last view is gone, never under one.
        self.memory = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]

    def touch(self) -> None:
        """Zeroes the memory, by several threads: a first touch costs far more than a later one."""
        parts = self.memory.split(_TOUCH_NBYTES)
        with ThreadPoolExecutor(min(_TOUCH_THREADS, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(torch.Tensor.zero_, parts))

    def register(self, device: torch.device) -> None:
        """Page-locks the memory for copies of a CUDA device; touch it first. Does nothing for another device.

        Raises OSError, with the bytes and the remedy, if the system refuses.
        """
        if device.type != "cuda" or self._registered or not self.nbytes:
            return
        with torch.cuda.device(device):
            code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.nbytes, 0))
        if code:
            raise OSError(
                f"{self.nbytes} bytes ({self.nbytes / 2**30:.1f} GiB) of host memory cannot be page-locked (CUDA error"
                f" {code}): raise the limit of locked memory (ulimit -l unlimited) or the job's memory, or lower"
                " placement.weights.cpu and placement.cache.cpu"
            )
        self._registered = True

    def close(self) -> None:
        """Unlocks the memory and lets go of it. No copy may be under way. May be called twice."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
            self._registered = False
        self.memory = torch.empty(0, dtype=torch.uint8)


def _advise(pages: mmap.mmap, advice: str) -> None:
    if hasattr(mmap, advice):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            pages.madvise(getattr(mmap, advice))


def total_nbytes(pieces: Sequence[tuple[int, torch.Tensor]]) -> int:
    return sum(data.numel() for _, data in pieces)
