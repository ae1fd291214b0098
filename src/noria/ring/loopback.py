"""The ring of one rank: hidden states and results stay in the process, in the order of the compute stream.

Knows no threads and no transport: nothing waits for the device until a result is received.
"""

from collections.abc import Callable

import torch

from noria.order import Place
from noria.step import Result, Step
from noria.streams import Event
from noria.tools.pinned import Fixed


class LoopbackRing:
    """The methods of engine.ring.Ring where a rank is its own next one."""

    def __init__(
        self,
        place: Place,
        hidden_size: int,
        step_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        in_host: bool = False,
    ):
        self.place = place
        # One buffer per group: the copy of lap l's output follows the reading of its input on the same stream.
        # In host memory two in turn: a visit may write its output while it still reads its input.
        self._turns = 2 if in_host else 1
        shape = (self._turns, place.groups, step_tokens, hidden_size)
        self._buffer = Fixed(shape, dtype, device, in_host) if place.laps > 1 else None
        self._in_host = in_host
        self._laps: dict[int, int] = {}
        self._results: dict[int, tuple[Event, Callable[[], Result]]] = {}

    def watch(self, lost: Callable[[int, float], None], silence: float = 0.0) -> None:
        """There is no other rank."""

    def send_header(self, step: Step) -> None:
        """Nobody else needs it."""

    def receive_header(self, group: int) -> Step:
        raise AssertionError("the only rank composes its steps itself")

    def receive(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """What `send` was given on the lap before: [num_tokens, E], to read until the group is sent on."""
        assert self._laps.pop(group) == lap
        return self._of(group, lap - 1, num_tokens)

    def output(self, group: int, lap: int, num_tokens: int) -> torch.Tensor | None:
        """Where in host memory to put the [num_tokens, E] that `send` is given next; None where it takes a copy itself."""
        return self._of(group, lap, num_tokens) if self._in_host else None

    def send(self, group: int, lap: int, hidden: torch.Tensor, ready: Event | None = None) -> None:
        """Keeps hidden [T, E] for the next lap, as a copy made on the current stream; with an event it is `output`'s."""
        assert not self.place.answers(lap)
        if ready is None:
            self._of(group, lap, len(hidden)).copy_(hidden)
        self._laps[group] = lap + 1

    def _of(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """Where lap `lap` leaves a group's hidden states."""
        assert self._buffer is not None, "with one lap no hidden states are sent"
        return self._buffer.tensor[lap % self._turns, group, :num_tokens]

    def send_result(self, group: int, ready: Event, make: Callable[[], Result]) -> None:
        self._results[group] = ready, make

    def receive_result(self, group: int) -> Result:
        """Waits for the result's event, then makes it."""
        ready, make = self._results.pop(group)
        ready.synchronize()
        return make()

    def close(self) -> None:
        assert not self._results, "results that nobody received"
        if self._buffer is not None:
            self._buffer.close()

    def abandon(self) -> None:
        pass
