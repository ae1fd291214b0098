"""What the rings share: their shape, the order of a group's steps, and the buffers of its hidden states. Sends nothing."""

from dataclasses import dataclass

import torch

from noria.bundle import Bundle, most_nbytes
from noria.order import Place
from noria.ring.messages import Arrays, Hidden, arrays_in
from noria.step import Step
from noria.streams import Event, Streams
from noria.tools.pinned import Fixed


@dataclass(frozen=True)
class RingShape:
    """A rank's place in a ring, and its messages: of at most `step_tokens` tokens.

    entering: what goes into each virtual stage. in_host: messages are in page-locked host memory, and the caller fills
    those that it sends (`output`).
    """

    place: Place
    entering: tuple[Bundle, ...]
    step_tokens: int
    in_host: bool = False

    def incoming(self, lap: int) -> Bundle:
        """What the visit of a lap receives."""
        return self.entering[lap * self.place.num_ranks + self.place.rank]

    def outgoing(self, lap: int) -> Bundle:
        """What the visit of a lap sends, where it does not answer."""
        return self.entering[lap * self.place.num_ranks + self.place.rank + 1]


class BaseRing:
    """The part of a ring that is the same whether its messages travel or not."""

    def __init__(self, shape: RingShape, streams: Streams):
        self.place, self._shape, self._streams = shape.place, shape, streams
        self._fixed: list[Fixed] = []
        self._rounds = [0] * shape.place.groups
        laps = range(shape.place.laps)
        self._received = [shape.incoming(lap) for lap in laps if not shape.place.embeds(lap)]
        self._sent = [shape.outgoing(lap) for lap in laps if not shape.place.answers(lap)]

    def output(self, group: int, lap: int, num_tokens: int) -> Arrays | None:
        """Where in host memory to put the arrays that `send` is given next; None where it takes a copy itself."""
        if not self._shape.in_host:
            return None
        return arrays_in(self._outgoing(group, lap, num_tokens), self._shape.outgoing(lap), num_tokens)

    def _outgoing(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """The message of what a visit sends, as bytes, when it may be written to."""
        raise NotImplementedError

    def _filled(self, group: int, lap: int, hidden: Hidden) -> tuple[torch.Tensor, Event]:
        """The message of what a visit sends, and the event after which it is complete; with `ready` the caller filled it."""
        assert not self.place.answers(lap)
        num_tokens = len(hidden.arrays[0])
        message = self._outgoing(group, lap, num_tokens)
        if hidden.ready is not None:
            return message, hidden.ready
        for target, array in zip(arrays_in(message, self._shape.outgoing(lap), num_tokens), hidden.arrays, strict=True):
            target.copy_(array)
        return message, self._streams.event()

    def _buffers(self, bundles: list[Bundle], *sizes: int) -> torch.Tensor:
        """[*sizes, bytes of the largest message] of these bundles, fixed for the run."""
        size = (*sizes, most_nbytes(bundles, self._shape.step_tokens))
        self._fixed.append(Fixed(size, torch.uint8, self._streams.device, self._shape.in_host))
        return self._fixed[-1].tensor

    def _close_buffers(self) -> None:
        for buffer in self._fixed:
            buffer.close()

    def _check_round(self, step: Step, group: int) -> None:
        expected = self._rounds[group], group
        assert (step.round, step.group) == expected, f"step (round, group) {(step.round, step.group)}, not {expected}"
        self._rounds[group] += 1
