"""The tier in CPU memory: a load or a store is one copy a piece, over the link.

Knows offsets in its memory, not what lies there.
"""

import torch

from noria.streams import Streams
from noria.tiers import Events, Pieces, Transfer, total_nbytes
from noria.tools.pinned import HostMemory


class Cpu:
    """Exactly `nbytes` of host memory. memory: uint8 [nbytes], to be filled by the caller before `register`.

    nbytes_loaded, nbytes_stored: bytes that went to the device and came from it. Any thread may load and store; two
    transfers of the same bytes are in order only if they are on the same lane, or one comes `after` the other's event.
    """

    def __init__(self, nbytes: int, streams: Streams):
        """Raises OSError if the address space does not have them."""
        self._host, self._streams = HostMemory(nbytes), streams
        self.memory, self.nbytes = self._host.memory, nbytes
        self.nbytes_loaded = self.nbytes_stored = 0

    def touch(self) -> None:
        """Zeroes the memory: for what no one fills before it is registered."""
        self._host.touch()

    def register(self) -> None:
        """Page-locks the memory, once it is filled or touched. Raises OSError if the system refuses."""
        self._host.register(self._streams.device)

    def load(self, pieces: Pieces, after: Events = ()) -> Transfer:
        """Copies to the device: (offset here, the device's bytes)."""
        pieces = list(pieces)
        self.nbytes_loaded += total_nbytes(pieces)
        pairs = [(data, self._part(offset, data)) for offset, data in pieces]
        return Transfer(self._streams.copy("load", pairs, after))

    def store(self, pieces: Pieces, after: Events = ()) -> Transfer:
        """Copies from the device: (offset here, the device's bytes)."""
        pieces = list(pieces)
        self.nbytes_stored += total_nbytes(pieces)
        pairs = [(self._part(offset, data), data) for offset, data in pieces]
        return Transfer(self._streams.copy("store", pairs, after))

    def _part(self, offset: int, data: torch.Tensor) -> torch.Tensor:
        end = offset + data.numel()
        assert 0 <= offset and end <= self.nbytes, (offset, end, self.nbytes)
        return self.memory[offset:end]

    def close(self) -> None:
        """Unlocks and lets go of the memory. No transfer may be under way. May be called twice."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._host.close()
