"""The ring of ranks: hands a group's hidden states to the next virtual stage, headers onward, results back to rank 0.

The buffers that MPI sees are fixed for the run. Knows no MPI and no layers; the order of messages is order.py's.
"""

from collections import deque
from collections.abc import Callable, Generator
from typing import TypeAlias

import torch

from noria.limits import MAX_GROUPS
from noria.masks import Masks, Pending
from noria.order import HEADER, HIDDEN, MASKS, RESULT, check_blocking, tag
from noria.ring.base import BaseRing, RingShape
from noria.ring.blocking import BlockingRing
from noria.ring.communication import EAGER_AWAITED, EAGER_BESIDE_GPU, Communication, Ticket
from noria.ring.heartbeat import SILENCE, beat, listen
from noria.ring.loopback import LoopbackRing
from noria.ring.messages import Answer, Hidden, arrays_in
from noria.step import Result, Step, Word
from noria.streams import Event, Streams
from noria.transports import Transport


class Ring(BaseRing):
    """The non-blocking ring: receives are posted before sends, all of them by whoever does the communication's work.

    One receive and one send buffer per group are enough. A group's message on lap l+1 (or of its
    next step) exists only after this rank's lap l message went through the whole ring. So nothing can arrive while
    this rank still reads lap l's input, and the receive of lap l+1 is posted when the event of lap l's output has
    completed, just before that output is sent. A send buffer is rewritten only after the ticket of the group's
    previous send: its contents have arrived by then, but MPI must have let go of it too.
    """

    def __init__(self, transport: Transport, shape: RingShape, streams: Streams):
        super().__init__(shape, streams)
        place = self.place
        assert place.groups <= MAX_GROUPS
        self._transport = transport
        self._inputs = self._buffers(self._received, place.groups)
        self._outputs = self._buffers(self._sent, place.groups)
        self._headers: deque[Ticket[Step]] = deque()  # of the steps to come; the last one's header is not here yet
        self._receives: dict[int, tuple[int, Ticket[None]]] = {}
        self._sends: dict[int, Ticket[None]] = {}
        self._results: dict[int, Ticket[bytes]] = {}
        self._masks: dict[int, Ticket[bytes]] = {}
        self._communication = communication_of(streams)
        if place.rank:
            self._headers.append(self._communication.ticket())
            self._communication.start(self._relay_headers(self._headers[0]))

    def watch(self, lost: Callable[[int, float], None], silence: float = SILENCE) -> None:
        """From now to `close` the ranks hear each other's heartbeats; called on every rank.

        `lost(rank, seconds)` is called, in the thread that does the work, when the previous rank has been silent so long.
        """
        ending = lambda: self._communication.closing  # noqa: E731
        self._communication.start(beat(self._transport, self.place, silence, ending))
        self._communication.start(listen(self._transport, self.place, silence, lost, ending))

    def send_header(self, step: Step) -> None:
        """Rank 0: the step sets out. Its result is awaited from now on."""
        assert self.place.rank == 0
        self._check_round(step, step.group)
        message = self._transport.send_bytes(step.encode(), self.place.next, tag(HEADER))
        self._communication.start(message)
        if step.num_tokens:
            answer = self._transport.receive_bytes(self.place.last, tag(RESULT, step.group))
            self._results[step.group] = self._communication.start(answer)

    def send_masks(self, group: int, masks: Pending) -> None:
        """Rank 0: what the samples of the step that has just set out may be, as soon as that is known."""
        self._communication.start(self._hand_over(group, masks))

    def receive_masks(self, group: int) -> Masks:
        """Last rank: those of the group's step. Waits for them."""
        return Masks.decode(self._masks.pop(group).wait())

    def receive_header(self, group: int) -> Step:
        """Every other rank: the group's next step. Waits for it."""
        step = self._headers.popleft().wait()
        self._check_round(step, group)
        return step

    def receive(self, group: int, lap: int, num_tokens: int) -> Hidden:
        """The hidden states of so many tokens that this visit computes from. Waits for them.

        Views of the group's receive buffer, the caller's to read until it sends the group on.
        """
        assert not self.place.embeds(lap)
        expected_lap, ticket = self._receives.pop(group)
        assert expected_lap == lap, (expected_lap, lap)
        ticket.wait()
        return Hidden(arrays_in(self._inputs[group], self._shape.incoming(lap), num_tokens))

    def send(self, group: int, lap: int, hidden: Hidden) -> int:
        """Hands hidden states on to the next virtual stage and returns at once: the bytes of the message.

        They are copied on the current stream: what is queued there later may write over them. With an event `ready` they
        are what `output` gave, complete with the event.
        """
        message, ready = self._filled(group, lap, hidden)
        following: Callable[[], None] = lambda: None  # noqa: E731
        if lap + 1 < self.place.laps:
            ticket, num_tokens = self._communication.ticket(), len(hidden.arrays[0])
            self._receives[group] = lap + 1, ticket
            following = lambda: self._post_receive(group, lap + 1, num_tokens, ticket)  # noqa: E731
        self._sends[group] = self._communication.start(self._hand_on(group, message, ready, following))
        return message.nbytes

    def send_result(self, group: int, answer: Answer) -> None:
        """Last virtual stage: the answer goes to rank 0 when its event has completed."""
        assert self.place.is_last
        self._communication.start(self._send_answer(group, answer))

    def receive_result(self, group: int) -> Result:
        """Rank 0: the result of the group's last step that had tokens. Waits for it."""
        return Result.decode(self._results.pop(group).wait())

    def close(self) -> None:
        """The clean end, after the STOP round: waits until everything has been sent. Raises CommunicationError."""
        self._communication.close()
        self._close_buffers()

    def abandon(self) -> None:
        """The end after an error: waits for nobody. Messages under way are lost."""
        self._communication.abandon()

    def _outgoing(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """The group's send buffer, once its previous message is sent."""
        if group in self._sends:
            self._sends.pop(group).wait()
        return self._outputs[group, : self._shape.outgoing(lap).nbytes(num_tokens)]

    # What follows is work: it runs in the communication thread, or in the main thread where that waits.

    def _relay_headers(self, awaited: Ticket[Step]) -> Generator[None, None, None]:
        stops_to_come = self.place.groups
        while stops_to_come:
            header = yield from self._transport.receive_bytes(self.place.previous, tag(HEADER))
            step = Step.decode(header)
            if not self.place.is_last:
                self._communication.start(self._transport.send_bytes(header, self.place.next, tag(HEADER)))
            if step.num_tokens:
                ticket = self._communication.ticket()
                self._receives[step.group] = 0, ticket
                self._post_receive(step.group, 0, step.num_tokens, ticket)
            if step.masked and self.place.is_last:
                self._masks[step.group] = self._communication.ticket()
                answer = self._transport.receive_bytes(0, tag(MASKS, step.group))
                self._communication.start(answer, self._masks[step.group])
            stops_to_come -= step.word == Word.STOP
            following = self._communication.ticket()
            self._headers.append(following)
            awaited.finish(step)
            awaited = following

    def _hand_on(
        self, group: int, message: torch.Tensor, ready: Event, following: Callable[[], None]
    ) -> Generator[None, None, None]:
        while not ready.query():
            yield
        self._communication.moved()
        following()
        yield from self._transport.send(message, self.place.next, tag(HIDDEN, group), ready)

    def _post_receive(self, group: int, lap: int, num_tokens: int, ticket: Ticket[None]) -> None:
        message = self._inputs[group, : self._shape.incoming(lap).nbytes(num_tokens)]
        self._communication.start(self._transport.receive(message, self.place.previous, tag(HIDDEN, group)), ticket)

    def _hand_over(self, group: int, masks: Pending) -> Generator[None, None, None]:
        while not masks.done():
            yield
        self._communication.moved()
        yield from self._transport.send_bytes(masks.result().encode(), self.place.last, tag(MASKS, group))

    def _send_answer(self, group: int, answer: Answer) -> Generator[None, None, None]:
        while not answer.ready.query():
            yield
        self._communication.moved()
        yield from self._transport.send_bytes(answer.result.encode(), 0, tag(RESULT, group))


def communication_of(streams: Streams) -> Communication:
    """A rank's communication. Beside a GPU no core is short: polls follow each other at once, and longer."""
    cuda = streams.device.type == "cuda"
    outside = lambda: torch.inference_mode(False)  # noqa: E731 -- buffers that work makes are written to in either thread
    return Communication(streams.set_device, EAGER_BESIDE_GPU if cuda else EAGER_AWAITED, cuda, outside)


AnyRing: TypeAlias = Ring | BlockingRing | LoopbackRing  # the three have the same methods


def open_ring(transport: Transport | None, shape: RingShape, streams: Streams, blocking: bool = False) -> AnyRing:
    """The ring of this run. Raises InputError where a blocking one would deadlock.

    `transport` is None with one rank: there are no messages there. That of a blocking ring has synchronous sends.
    """
    if blocking:
        check_blocking(shape.place.num_ranks, shape.place.groups)
    if shape.place.num_ranks == 1:
        return LoopbackRing(shape, streams)
    assert transport is not None, "several ranks need a transport"
    return BlockingRing(transport, shape, streams) if blocking else Ring(transport, shape, streams)
