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
Lanes: TypeAlias = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # lane -> (destination, source), of equal sizes


class Buffers:
    """What is copied: two buffers of the host, page-locked as a run's weights are, and two of the device."""

    def __init__(self, nbytes: int, device: torch.device):
        """Raises OSError or RuntimeError where there is no memory, or none that may be page-locked."""
        self._memories = [HostMemory(nbytes) for _ in range(2)]
        for memory in self._memories:
            memory.touch()
            memory.register(device)
        self.host, self.back = (memory.memory for memory in self._memories)
        if device.type == "cpu":  # which copies within one memory
            self.there, self.here = self.back, self.host
            return
        self.there, self.here = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))

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
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or any(len(times) < LEAST_COPIES for times in done.values()):
        for lane, pair in lanes.items():
            while len(flying[lane]) < IN_FLIGHT:
                flying[lane].append(streams.copy(lane, [pair]))
            if flying[lane][0].query():
                flying[lane].popleft()
                done[lane].append(time.perf_counter())
    for event in itertools.chain(*flying.values()):
        event.synchronize()
    return min(
        (len(times) - 1) * lanes[lane][1].nbytes / max(times[-1] - times[0], 1e-9) for lane, times in done.items()
    )
