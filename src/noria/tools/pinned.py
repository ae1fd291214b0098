"""Tensors that are fixed for the run: those that MPI, or a stream other than the compute stream, reads and writes.

On the device, or in page-locked host memory. Knows shapes, not what they hold.
"""

import contextlib
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import torch

_TOUCH_NBYTES = 64 << 20
_TOUCH_THREADS = 16


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
