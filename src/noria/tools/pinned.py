"""Tensors that are fixed for the run: those that MPI, or a stream other than the compute stream, reads and writes.

On the device, or in page-locked host memory. Knows shapes, not what they hold.
"""

import math

import torch

from noria.tiers import HostMemory


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
