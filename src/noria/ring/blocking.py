"""The textbook ring of blocking sends and receives: nothing overlaps, and no thread but the one that beats.

Sends are synchronous, so that it finishes only where theory says so (order.check_blocking). Kept as the plain reference
beside ring.Ring.
"""

import time
from collections.abc import Callable, Generator
from typing import TypeVar, cast

import torch

from noria.masks import Masks, Pending
from noria.order import HEADER, HIDDEN, RESULT, tag
from noria.ring.base import BaseRing, RingShape
from noria.ring.communication import EAGER_AWAITED, pause
from noria.ring.heartbeat import SILENCE, Heart
from noria.ring.messages import Answer, Hidden, arrays_in
from noria.step import Result, Step
from noria.streams import Streams
from noria.transports import Transport

T = TypeVar("T")


class BlockingRing(BaseRing):
    """The methods of ring.Ring. Rank 0 receives what its next visit needs before it sends; the others receive, compute,
    send. A header travels just ahead of its hidden states. The transport's sends are synchronous."""

    def __init__(self, transport: Transport, shape: RingShape, streams: Streams):
        super().__init__(shape, streams)
        place = self.place
        self._transport = transport
        self._inputs = self._buffers(self._received, place.groups)
        self._output = self._buffers(self._sent)  # one is enough: a send is over when it returns
        self._num_tokens = [0] * place.groups  # of each group's latest step
        self._header: bytes | None = None  # waits for its hidden states, with the step's masks behind it
        self._masks: dict[int, Masks] = {}
        # Rank 0: what visits to come need that is here.
        self._here: dict[tuple[int, int], Hidden] = {}  # (lap, group) -> hidden states
        self._results: dict[int, bytes] = {}  # group -> result
        self._heart: Heart | None = None
        streams.set_device()

    def watch(self, lost: Callable[[int, float], None], silence: float = SILENCE) -> None:
        """As in ring.Ring; `lost` is called in a thread of the heartbeats' own."""
        self._heart = Heart(self._transport, self.place, silence, lost, self._streams.set_device)

    def send_header(self, step: Step) -> None:
        """Rank 0: sent with the step's hidden states, or now if it has none."""
        assert self.place.rank == 0
        self._check_round(step, step.group)
        header = step.encode()
        if step.num_tokens:
            self._num_tokens[step.group] = step.num_tokens
            self._header = header
            return
        self._num_tokens[step.group] = 0
        self._receive_ahead(0, step.group)
        finish(self._transport.send_bytes(header, self.place.next, tag(HEADER)))

    def send_masks(self, group: int, masks: Pending) -> None:
        """Rank 0: they travel behind the header, in its message. Waits for them."""
        assert self._header is not None, "masks without a step that has tokens"
        message = masks.result().encode()
        self._header += message + len(message).to_bytes(8, "little")

    def receive_masks(self, group: int) -> Masks:
        """Last rank: those of the group's step."""
        return self._masks.pop(group)

    def receive_header(self, group: int) -> Step:
        """Every other rank: the group's next step. Blocks."""
        header = finish(self._transport.receive_bytes(self.place.previous, tag(HEADER)))
        step = Step.decode(header)
        self._check_round(step, group)
        if step.masked and self.place.is_last:
            size = int.from_bytes(header[-8:], "little")
            self._masks[group] = Masks.decode(header[-8 - size : -8])
        if not self.place.is_last:
            self._header = header
            if not step.num_tokens:
                self._send_kept_header()
        return step

    def receive(self, group: int, lap: int, num_tokens: int) -> Hidden:
        """Hidden states for this visit, the caller's to read until it sends the group on. Blocks."""
        if self.place.rank == 0:
            self._receive_once(lap, group)
            return self._here.pop((lap, group))
        return self._receive_hidden(group, lap, num_tokens)

    def send(self, group: int, lap: int, hidden: Hidden) -> int:
        """Hands hidden states on to the next virtual stage, as ring.Ring does. Blocks until they are being received."""
        message, ready = self._filled(group, lap, hidden)
        if self.place.rank == 0:
            self._receive_ahead(lap, group)
        if self._header is not None:
            self._send_kept_header()
        finish(self._transport.send(message, self.place.next, tag(HIDDEN, group), ready))
        return message.nbytes

    def send_result(self, group: int, answer: Answer) -> None:
        """Last virtual stage: the answer goes to rank 0 after its event. Blocks."""
        answer.ready.synchronize()
        finish(self._transport.send_bytes(answer.result.encode(), 0, tag(RESULT, group)))

    def receive_result(self, group: int) -> Result:
        """Rank 0: the result of the group's last step that had tokens."""
        self._receive_once(0, group)
        return Result.decode(self._results.pop(group))

    def close(self) -> None:
        assert not self._here and not self._results, "messages that nobody asked for"
        if self._heart is not None:
            self._heart.close()
        self._close_buffers()

    def abandon(self) -> None:
        if self._heart is not None:
            self._heart.abandon()

    def _outgoing(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        return self._output[: self._shape.outgoing(lap).nbytes(num_tokens)]

    def _send_kept_header(self) -> None:
        header, self._header = self._header, None
        assert header is not None
        finish(self._transport.send_bytes(header, self.place.next, tag(HEADER)))

    def _receive_ahead(self, lap: int, group: int) -> None:
        """Rank 0: receives what the visit after (lap, group) needs."""
        lap, group = self.place.next_visit(lap, group)
        if self._num_tokens[group]:
            self._receive_once(lap, group)

    def _receive_once(self, lap: int, group: int) -> None:
        if lap and (lap, group) not in self._here:
            self._here[lap, group] = self._receive_hidden(group, lap, self._num_tokens[group])
        elif not lap and group not in self._results:
            self._results[group] = finish(self._transport.receive_bytes(self.place.last, tag(RESULT, group)))

    def _receive_hidden(self, group: int, lap: int, num_tokens: int) -> Hidden:
        bundle = self._shape.incoming(lap)
        message = self._inputs[group, : bundle.nbytes(num_tokens)]
        finish(self._transport.receive(message, self.place.previous, tag(HIDDEN, group)))
        return Hidden(arrays_in(message, bundle, num_tokens))


def finish(work: Generator[None, None, T]) -> T:
    """What a transfer returns, once it has ended."""
    began = time.monotonic()
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast(T, end.value)
        waited = time.monotonic() - began
        time.sleep(pause(waited) if waited > EAGER_AWAITED else 0)
