"""Copies between host and device, one behind the other without a gap: what a link carries while a run streams over it.

Knows one rank; others that are to be busy too must be told to begin at the same time.
"""

import itertools
import time
from collections import deque
from collections.abc import Mapping
from typing import TypeAlias

import torch

from noria.streams import Event, Streams
from noria.tools.pinned import HostMemory

IN_FLIGHT = 2  # copies on their way at any moment in each direction, as many as a run queues ahead
LEAST_COPIES = 4  # in each direction, however slow the link is
BLOCK_NBYTES = 128 << 20  # of a copy; they go through a larger buffer in turn, whose pages are not all equally near
# lane -> (destination, source), bytes of equal sizes
Lanes: TypeAlias = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Buffers:
    """What is copied: two buffers of the host, page-locked as a run's weights are, and two of the device."""

    def __init__(self, nbytes: int, device: torch.device):
        """Raises OSError or RuntimeError where there is no memory, or none that may be page-locked."""
        self._memories = [HostMemory(nbytes) for _ in range(2)]
        try:
            for memory in self._memories:
                memory.touch()
                memory.register(device)
            self.host, self.back = (memory.memory for memory in self._memories)
            if device.type == "cpu":  # which copies within one memory
                self.there, self.here = self.back, self.host
            else:
                self.there, self.here = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        except BaseException:
            self.close()  # else what is page-locked stays so, and its addresses could not be locked again
            raise

    def close(self) -> None:
        """No copy may be under way."""
        for memory in self._memories:
            memory.close()


def sustained(streams: Streams, lanes: Lanes, seconds: float) -> float:
    """Bytes/s of the slowest of these lanes in about so many seconds, while IN_FLIGHT copies are on their way on each.

    A copy that is queued when the host has seen the one before leaves the link idle between them; a run queues the next
    blocks while one is copied.
    """
    flying: dict[str, deque[Event]] = {lane: deque() for lane in lanes}
    done: dict[str, list[float]] = {lane: [] for lane in lanes}
    blocks = {lane: itertools.cycle(_blocks(*buffers)) for lane, buffers in lanes.items()}
    nbytes = {lane: min(source.nbytes, BLOCK_NBYTES) for lane, (_, source) in lanes.items()}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or any(len(times) < LEAST_COPIES for times in done.values()):
        for lane in lanes:
            while len(flying[lane]) < IN_FLIGHT:
                flying[lane].append(streams.copy(lane, [next(blocks[lane])]))
            if flying[lane][0].query():
                flying[lane].popleft()
                done[lane].append(time.perf_counter())
    for event in itertools.chain(*flying.values()):
        event.synchronize()
    return min((len(times) - 1) * nbytes[lane] / max(times[-1] - times[0], 1e-9) for lane, times in done.items())


def _blocks(destination: torch.Tensor, source: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The whole blocks of two buffers, or both as they are where they are smaller."""
    pairs = zip(destination.split(BLOCK_NBYTES), source.split(BLOCK_NBYTES), strict=True)
    return [pair for pair in pairs if pair[1].nbytes in (BLOCK_NBYTES, source.nbytes)]
