"""What the rings share: their shape, the order of a group's steps, and the buffers of its hidden states. Sends nothing."""

from dataclasses import dataclass

import torch

from noria.order import Place
from noria.step import Step
from noria.streams import Event, Streams
from noria.tools.pinned import Fixed


@dataclass(frozen=True)
class RingShape:
    """A rank's place in a ring, and its messages: at most [step_tokens, hidden_size] of `dtype`.

    in_host: they are in page-locked host memory, and the caller fills those that it sends (`output`).
    """

    place: Place
    hidden_size: int
    step_tokens: int
    dtype: torch.dtype
    in_host: bool = False


class BaseRing:
    """The part of a ring that is the same whether its messages travel or not."""

    def __init__(self, shape: RingShape, streams: Streams):
        self.place, self._shape, self._streams = shape.place, shape, streams
        self._fixed: list[Fixed] = []
        self._rounds = [0] * shape.place.groups

    def output(self, group: int, lap: int, num_tokens: int) -> torch.Tensor | None:
        """Where in host memory to put the [num_tokens, E] that `send` is given next; None where it takes a copy itself."""
        return self._outgoing(group, lap, num_tokens) if self._shape.in_host else None

    def _outgoing(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """The buffer of what a visit sends, when it may be written to."""
        raise NotImplementedError

    def _filled(self, group: int, lap: int, hidden: torch.Tensor, ready: Event | None) -> tuple[torch.Tensor, Event]:
        """The buffer with hidden [T, E], and the event after which it holds them; with `ready` the caller filled it."""
        assert not self.place.answers(lap)
        output = self._outgoing(group, lap, len(hidden))
        if ready is None:
            output.copy_(hidden)
            ready = self._streams.event()
        return output, ready

    def _buffers(self, *sizes: int) -> torch.Tensor:
        """[*sizes, step_tokens, E], fixed for the run."""
        size = (*sizes, self._shape.step_tokens, self._shape.hidden_size)
        self._fixed.append(Fixed(size, self._shape.dtype, self._streams.device, self._shape.in_host))
        return self._fixed[-1].tensor

    def _close_buffers(self) -> None:
        for buffer in self._fixed:
            buffer.close()

    def _check_round(self, step: Step, group: int) -> None:
        expected = self._rounds[group], group
        assert (step.round, step.group) == expected, f"step (round, group) {(step.round, step.group)}, not {expected}"
        self._rounds[group] += 1
