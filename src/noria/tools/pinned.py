"""Tensors that are fixed for the run: those that MPI, or a stream other than the compute stream, reads and writes.

On the device, or in page-locked host memory; and host memory for one read after another. Knows shapes, not what they hold.
"""

import contextlib
import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
PIECE_NBYTES = 1 << 30  # of a tier's memory: what one thread page-locks, unlocks and gives back at a time
_TOUCH_NBYTES = 64 << 20
_LOWER = "lower placement.weights.cpu and placement.cache.cpu"
_HUGE_NBYTES = 2 << 20  # of a huge page
_THREADS, _AHEAD_THREADS = 16, 8  # all that there are, and beside others that read


class HostMemory:
    """Exactly `nbytes` of anonymous memory, in huge pages where the system gives them; page-locked once registered.

    `piece_nbytes`: it is page-locked in pieces of so many bytes (a multiple of the page size), and no copy of a device may
    cross from one to the next; None: as one piece.
    """

    def __init__(self, nbytes: int, piece_nbytes: int | None = None):
        """Raises OSError if the address space does not have them; memory itself is taken as it is touched."""
        self.nbytes, self.piece_nbytes = nbytes, piece_nbytes or max(nbytes, 1)
        assert piece_nbytes is None or piece_nbytes % mmap.PAGESIZE == 0, piece_nbytes
        self._locked: list[torch.Tensor] = []
        self._ahead: list[Future[int]] = []
        try:
            pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{nbytes} bytes ({nbytes / 2**30:.1f} GiB) of host memory: {error.strerror}: raise the limit of the address"
                f" space (ulimit -v) or the job's memory, or {_LOWER}",
            ) from error
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a forked child has no business with locked pages
            _advise(pages, advice)
        # The tensor owns the map and is its only owner: it is unmapped when the last view is gone, never under one.
        self.memory = torch.frombuffer(pages, dtype=torch.uint8)[:nbytes]

    def touch(self) -> None:
        """Zeroes the memory, by several threads: a first touch costs far more than a later one."""
        _by_threads(torch.Tensor.zero_, self.memory.split(_TOUCH_NBYTES))

    def register_ahead(self, device: torch.device) -> None:
        """Begins to page-lock the memory, one piece after another, beside what the caller does; `register` ends it."""
        if device.type == "cuda" and not self._ahead and not self._locked and self.nbytes:
            pool = ThreadPoolExecutor(min(_AHEAD_THREADS, len(os.sched_getaffinity(0))), "lock")
            self._ahead = [pool.submit(_lock, piece, device) for piece in self.memory.split(self.piece_nbytes)]
            pool.shutdown(wait=False)

    @property
    def locks_ahead(self) -> bool:
        """Whether memory is being page-locked, or has been, beside what fills it."""
        return bool(self._ahead)

    def wait_registered(self, begin: int, end: int) -> None:
        """Waits until these bytes are page-locked, or cannot be, where that has begun."""
        for code in self._ahead[begin // self.piece_nbytes : -(-end // self.piece_nbytes)]:
            code.result()

    def register(self, device: torch.device) -> None:
        """Page-locks the memory for copies of a CUDA device; touch it first. Does nothing for another device.

        Raises OSError, with the bytes and the remedy, if the system refuses.
        """
        if device.type != "cuda" or self._locked or not self.nbytes:
            return
        pieces = self.memory.split(self.piece_nbytes)
        codes = self._locked_ahead() or self._keep(_by_threads(lambda piece: _lock(piece, device), pieces))
        code = next(filter(None, codes), 0)
        if code:
            self._unlock()
            raise OSError(
                f"{self.nbytes} bytes ({self.nbytes / 2**30:.1f} GiB) of host memory cannot be page-locked (CUDA error"
                f" {code}): raise the limit of locked memory (ulimit -l unlimited) or the job's memory, or {_LOWER}"
            )

    def _locked_ahead(self) -> list[int]:
        """CUDA's code of each piece that was page-locked ahead, when none is under way any more; -1 of one that will not be."""
        ahead, self._ahead = self._ahead, []
        return self._keep([-1 if code.cancelled() else code.result() for code in ahead])

    def _keep(self, codes: list[int]) -> list[int]:
        """Notes the pieces that CUDA took."""
        pieces = self.memory.split(self.piece_nbytes)
        self._locked += [piece for piece, code in zip(pieces, codes, strict=False) if not code]
        return codes

    def close(self) -> int:
        """Unlocks the memory and lets go of it. No copy may be under way. Returns the bytes that were page-locked.

        By several threads, piece by piece: by one, hundreds of GiB take longer than a scheduler waits for a process that it
        ends. What is still viewed of a memory of several pieces reads as zeros. May be called twice.
        """
        nbytes = self._unlock()
        if self.memory.numel() > self.piece_nbytes:
            _by_threads(_give_back, self.memory.split(self.piece_nbytes))
        self.memory = torch.empty(0, dtype=torch.uint8)
        return nbytes

    def _unlock(self) -> int:
        for code in self._ahead:
            code.cancel()
        self._locked_ahead()
        locked, self._locked = self._locked, []
        _by_threads(lambda piece: torch.cuda.cudart().cudaHostUnregister(piece.data_ptr()), locked)
        return sum(piece.numel() for piece in locked)


class ReusedMemory:
    """Host memory for one read after another: fresh memory takes as long to come as the bytes that are read into it.

    In huge pages, which a disk is given whole: a read into small ones is cut at every few hundred.
    """

    def __init__(self) -> None:
        self._free: list[HostMemory] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] at the beginning of a page. It is free again when nothing is left that views it. Any thread may."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or memory.nbytes < nbytes:
            memory = HostMemory(-(-nbytes // _HUGE_NBYTES) * _HUGE_NBYTES)
        view = memory.memory.numpy()[:nbytes]
        weakref.finalize(view, self._free.append, memory).atexit = False
        return torch.from_numpy(view)


def _by_threads(call: Callable[[torch.Tensor], T], pieces: Sequence[torch.Tensor]) -> list[T]:
    """What `call` returns of each piece: a thread a core at most, none for a single piece."""
    if len(pieces) < 2:
        return [call(piece) for piece in pieces]
    with ThreadPoolExecutor(min(_THREADS, len(pieces), len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(call, pieces))


def _lock(piece: torch.Tensor, device: torch.device) -> int:
    """CUDA's code: 0 if it took the piece."""
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.numel(), 0))


def _give_back(piece: torch.Tensor) -> None:
    """Returns the piece's pages to the system. By the C library: Python's own call would keep the other threads waiting."""
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(piece.data_ptr()), ctypes.c_size_t(piece.numel()), ctypes.c_int(mmap.MADV_DONTNEED)
    )


def _advise(pages: mmap.mmap, advice: str) -> None:
    if hasattr(mmap, advice):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            pages.madvise(getattr(mmap, advice))


class Fixed:
    """tensor: uninitialized, of this shape and dtype; in the host's memory if `in_host`, else on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, in_host: bool):
        """Raises OSError if the host does not have the memory, or may not page-lock it."""
        self._host: HostMemory | None = None
        if not in_host:
            self.tensor = torch.empty(shape, dtype=dtype, device=device)
            return
        self._host = HostMemory(math.prod(shape) * dtype.itemsize)
        self._host.touch()
        self._host.register(device)
        self.tensor = self._host.memory.view(dtype).view(shape)

    def close(self) -> None:
        """Unlocks host memory. No copy may be under way. May be called twice."""
        if self._host is not None:
            self._host.close()
