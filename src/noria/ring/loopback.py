"""The ring of one rank: hidden states and results stay in the process, in the order of the compute stream.

Knows no threads and no transport: nothing waits for the device until a result is received.
"""

from collections.abc import Callable

import torch

from noria.masks import Masks, Pending
from noria.ring.base import BaseRing, RingShape
from noria.step import Result, Step
from noria.streams import Event, Streams


class LoopbackRing(BaseRing):
    """The methods of ring.Ring where a rank is its own next one."""

    def __init__(self, shape: RingShape, streams: Streams):
        super().__init__(shape, streams)
        # One buffer per group: the copy of lap l's output follows the reading of its input on the same stream.
        # In host memory two in turn: a visit may write its output while it still reads its input.
        self._turns = 2 if shape.in_host else 1
        self._hidden = self._buffers(self._turns, self.place.groups) if self.place.laps > 1 else None
        self._laps: dict[int, int] = {}
        self._results: dict[int, tuple[Event, Callable[[], Result]]] = {}
        self._masks: dict[int, Pending] = {}

    def watch(self, lost: Callable[[int, float], None], silence: float = 0.0) -> None:
        """There is no other rank."""

    def send_header(self, step: Step) -> None:
        """Nobody else needs it."""

    def send_masks(self, group: int, masks: Pending) -> None:
        """Keeps them for the step's samples."""
        self._masks[group] = masks

    def receive_masks(self, group: int) -> Masks:
        """Waits for what `send_masks` was given."""
        return self._masks.pop(group).result()

    def receive_header(self, group: int) -> Step:
        raise AssertionError("the only rank composes its steps itself")

    def receive(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """What `send` was given on the lap before: [num_tokens, E], to read until the group is sent on."""
        assert self._laps.pop(group) == lap
        return self._outgoing(group, lap - 1, num_tokens)

    def send(self, group: int, lap: int, hidden: torch.Tensor, ready: Event | None = None) -> None:
        """Keeps hidden [T, E] for the next lap, as a copy made on the current stream; with an event it is `output`'s."""
        self._filled(group, lap, hidden, ready)
        self._laps[group] = lap + 1

    def _outgoing(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """Where lap `lap` leaves a group's hidden states."""
        assert self._hidden is not None, "with one lap no hidden states are sent"
        return self._hidden[lap % self._turns, group, :num_tokens]

    def send_result(self, group: int, ready: Event, make: Callable[[], Result]) -> None:
        self._results[group] = ready, make

    def receive_result(self, group: int) -> Result:
        """Waits for the result's event, then makes it."""
        ready, make = self._results.pop(group)
        ready.synchronize()
        return make()

    def close(self) -> None:
        assert not self._results, "results that nobody received"
        self._close_buffers()

    def abandon(self) -> None:
        pass
