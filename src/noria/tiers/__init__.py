"""Where bytes live when not on the device, a kind of place a file: each loads to the device and stores from it.

Owns what the kinds share: host memory that can be page-locked, and the ticket of a transfer. Knows bytes alone.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch

from noria.streams import Event

Pieces: TypeAlias = Iterable[tuple[int, torch.Tensor]]  # (offset in bytes, the device's bytes: contiguous uint8)
Events: TypeAlias = Iterable[
    Event
]  # of streams: a transfer does not touch the device's bytes before they have completed


@dataclass(frozen=True)
class TierRuns:
    """Pieces as arrays: runs of bytes of a tier, from `there` on, in a buffer of the device, from `here` on. [n] int64 each."""

    buffer: torch.Tensor
    there: np.ndarray
    here: np.ndarray
    nbytes: np.ndarray

    def __len__(self) -> int:
        return len(self.there)

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for there, here, nbytes in zip(self.there.tolist(), self.here.tolist(), self.nbytes.tolist(), strict=True):
            yield there, self.buffer[here : here + nbytes]


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

    def close(self) -> int: ...
