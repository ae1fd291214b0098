"""The ring of one rank: hidden states and results stay in the process, in the order of the compute stream.

Knows no threads and no transport: nothing waits for the device until a result is received.
"""

from collections.abc import Callable

import torch

from noria.bundle import turns
from noria.masks import Masks, Pending
from noria.ring.base import BaseRing, RingShape
from noria.ring.messages import Answer, Hidden, arrays_in
from noria.step import Result, Step
from noria.streams import Streams


class LoopbackRing(BaseRing):
    """The methods of ring.Ring where a rank is its own next one."""

    def __init__(self, shape: RingShape, streams: Streams):
        super().__init__(shape, streams)
        # One buffer per group: the copy of lap l's output follows the reading of its input on the same stream.
        # Two in turn where a visit may write its output while its input is still read: in host memory, and where arrays
        # that travel beside the hidden states may be handed on as they came.
        self._turns = turns(shape.in_host, self._sent)
        self._buffer = self._buffers(self._sent, self._turns, self.place.groups) if self._sent else None
        self._kept: dict[int, tuple[int, Hidden]] = {}  # group -> the lap that reads it, and what it reads
        self._answers: dict[int, Answer] = {}
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

    def receive(self, group: int, lap: int, num_tokens: int) -> Hidden:
        """What `send` was given on the lap before, to read until the group is sent on."""
        for_lap, hidden = self._kept.pop(group)
        assert for_lap == lap and len(hidden.arrays[0]) == num_tokens
        return hidden

    def send(self, group: int, lap: int, hidden: Hidden) -> int:
        """Keeps hidden states for the next lap, as a copy made on the current stream; with an event they are `output`'s.

        Returns the bytes that left this rank: none.
        """
        message, _ = self._filled(group, lap, hidden)
        arrays = arrays_in(message, self._shape.outgoing(lap), len(hidden.arrays[0]))
        self._kept[group] = lap + 1, Hidden(arrays, hidden.ready)
        return 0

    def _outgoing(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """Where lap `lap` leaves a group's hidden states."""
        assert self._buffer is not None, "with one lap no hidden states are sent"
        return self._buffer[lap % self._turns, group, : self._shape.outgoing(lap).nbytes(num_tokens)]

    def send_result(self, group: int, answer: Answer) -> None:
        self._answers[group] = answer

    def receive_result(self, group: int) -> Result:
        """Waits for the answer's event."""
        answer = self._answers.pop(group)
        answer.ready.synchronize()
        return answer.result

    def close(self) -> None:
        assert not self._answers, "results that nobody received"
        self._close_buffers()

    def abandon(self) -> None:
        pass
