"""The tier in CPU memory: a load or a store is one copy a piece, over the link, or two where memory is locked in two parts;
of runs of the cache one call for all.

Knows offsets in its memory, not what lies there.
"""

from collections.abc import Iterator
from typing import TypeGuard

import torch

from noria.batch_copies import CopyRuns
from noria.streams import Streams
from noria.tiers import Events, Pieces, TierRuns, Transfer
from noria.tools.pinned import PIECE_NBYTES, HostMemory


class Cpu:
    """Exactly `nbytes` of host memory. memory: uint8 [nbytes], to be filled by the caller before `register`.

    Any thread may load and store; two transfers of the same bytes are in order only if they are on the same lane, or one
    comes `after` the other's event.
    """

    def __init__(self, nbytes: int, streams: Streams, piece_nbytes: int = PIECE_NBYTES):
        """Raises OSError if the address space does not have them."""
        self._host, self._streams = HostMemory(nbytes, piece_nbytes), streams
        self.memory, self.nbytes = self._host.memory, nbytes

    def touch(self) -> None:
        """Zeroes the memory: for what no one fills before it is registered."""
        self._host.touch()

    def register(self) -> None:
        """Page-locks the memory, once it is filled or touched. Raises OSError if the system refuses."""
        self._host.register(self._streams.device)

    def register_ahead(self) -> None:
        """Begins to page-lock the memory beside what fills it; `register` ends that."""
        self._host.register_ahead(self._streams.device)

    def load(self, pieces: Pieces, after: Events = ()) -> Transfer:
        """Copies to the device: (offset here, the device's bytes)."""
        if self._in_one(pieces):
            runs = CopyRuns(pieces.buffer, self.memory, pieces.here, pieces.there, pieces.nbytes)
            return Transfer(self._streams.copy("load", runs, after))
        pairs = [(part, here) for offset, data in pieces for here, part in self._parts(offset, data)]
        return Transfer(self._streams.copy("load", pairs, after))

    def store(self, pieces: Pieces, after: Events = ()) -> Transfer:
        """Copies from the device: (offset here, the device's bytes)."""
        if self._in_one(pieces) and not self._host.locks_ahead:
            runs = CopyRuns(self.memory, pieces.buffer, pieces.there, pieces.here, pieces.nbytes)
            return Transfer(self._streams.copy("store", runs, after))
        pieces = list(pieces)
        for offset, data in pieces:
            self._host.wait_registered(offset, offset + data.numel())
        pairs = [pair for offset, data in pieces for pair in self._parts(offset, data)]
        return Transfer(self._streams.copy("store", pairs, after))

    def _in_one(self, pieces: Pieces) -> TypeGuard[TierRuns]:
        """Whether these are runs of which each lies in one locked piece of the memory."""
        if not isinstance(pieces, TierRuns):
            return False
        first, last = pieces.there, pieces.there + pieces.nbytes - 1
        assert not len(first) or (first.min() >= 0 and last.max() < self.nbytes), (first, last, self.nbytes)
        return bool((first // self._host.piece_nbytes == last // self._host.piece_nbytes).all())

    def _parts(self, offset: int, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(bytes here, the device's bytes), cut where one locked piece of the memory ends and the next begins."""
        size, end = self._host.piece_nbytes, offset + data.numel()
        assert 0 <= offset and end <= self.nbytes, (offset, end, self.nbytes)
        begin = offset
        while end > (border := (begin // size + 1) * size):
            yield self.memory[begin:border], data[begin - offset : border - offset]
            begin = border
        yield self.memory[begin:end], data if begin == offset else data[begin - offset :]

    def close(self) -> int:
        """Lets go of the memory; returns the bytes that were page-locked. No transfer may be under way. May be called twice."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        return self._host.close()
