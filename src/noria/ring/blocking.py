"""The textbook ring of blocking sends and receives: nothing overlaps, and no thread but the one that beats.

Sends are synchronous, so that it finishes only where theory says so (plan.placement.check_blocking). Kept as the plain reference
beside engine.ring.
"""

from collections.abc import Callable

import torch

from noria.order import HEADER, HIDDEN, RESULT, Place, tag
from noria.ring.heartbeat import SILENCE, Heart
from noria.step import Result, Step
from noria.streams import Event, Streams
from noria.tools.pinned import Fixed
from noria.transports import Transport


class BlockingRing:
    """The methods of engine.ring.Ring. Rank 0 receives what its next visit needs before it sends; the others receive,
    compute, send. A header travels just ahead of its hidden states."""

    def __init__(
        self,
        transport: Transport,
        place: Place,
        hidden_size: int,
        step_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        streams: Streams,
        in_host: bool = False,
    ):
        self.place = place
        self._transport = transport
        self._streams = streams
        shape = (place.groups, step_tokens, hidden_size)
        self._buffers = Fixed(shape, dtype, device, in_host), Fixed(shape[1:], dtype, device, in_host)
        self._inputs, self._output = (buffer.tensor for buffer in self._buffers)  # a send is over when it returns
        self._in_host = in_host
        self._rounds = [0] * place.groups
        self._num_tokens = [0] * place.groups  # of each group's latest step
        self._header: bytes | None = None  # waits for its hidden states
        # Rank 0: what visits to come need that is here.
        self._received: dict[tuple[int, int], torch.Tensor] = {}  # (lap, group) -> hidden states
        self._results: dict[int, bytes] = {}  # group -> result
        self._heart: Heart | None = None
        streams.set_device()

    def watch(self, lost: Callable[[int, float], None], silence: float = SILENCE) -> None:
        """As in engine.ring; `lost` is called in a thread of the heartbeats' own."""
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
        self._transport.send_bytes_now(header, self.place.next, tag(HEADER))

    def receive_header(self, group: int) -> Step:
        """Every other rank: the group's next step. Blocks."""
        header = self._transport.receive_bytes_now(self.place.previous, tag(HEADER))
        step = Step.decode(header)
        self._check_round(step, group)
        if not self.place.is_last:
            self._header = header
            if not step.num_tokens:
                self._send_kept_header()
        return step

    def receive(self, group: int, lap: int, num_tokens: int) -> torch.Tensor:
        """Hidden states [num_tokens, E] for this visit, the caller's to read until it sends the group on. Blocks."""
        if self.place.rank == 0:
            self._receive_once(lap, group)
            return self._received.pop((lap, group))
        return self._receive_hidden(group, num_tokens)

    def output(self, group: int, lap: int, num_tokens: int) -> torch.Tensor | None:
        """As in engine.ring."""
        return self._output[:num_tokens] if self._in_host else None

    def send(self, group: int, lap: int, hidden: torch.Tensor, ready: Event | None = None) -> None:
        """Hands hidden [T, E] on to the next virtual stage, as engine.ring does. Blocks until it is being received."""
        assert not self.place.answers(lap)
        output = self._output[: len(hidden)]
        if ready is None:
            output.copy_(hidden)
            ready = self._streams.event()
        if self.place.rank == 0:
            self._receive_ahead(lap, group)
        if self._header is not None:
            self._send_kept_header()
        self._transport.send_now(output, self.place.next, tag(HIDDEN, group), ready)

    def send_result(self, group: int, ready: Event, make: Callable[[], Result]) -> None:
        """Last virtual stage: the result that `make` returns after the event `ready` goes to rank 0. Blocks."""
        ready.synchronize()
        self._transport.send_bytes_now(make().encode(), 0, tag(RESULT, group))

    def receive_result(self, group: int) -> Result:
        """Rank 0: the result of the group's last step that had tokens."""
        self._receive_once(0, group)
        return Result.decode(self._results.pop(group))

    def close(self) -> None:
        assert not self._received and not self._results, "messages that nobody asked for"
        if self._heart is not None:
            self._heart.close()
        for buffer in self._buffers:
            buffer.close()

    def abandon(self) -> None:
        if self._heart is not None:
            self._heart.abandon()

    def _check_round(self, step: Step, group: int) -> None:
        expected = self._rounds[group], group
        assert (step.round, step.group) == expected, f"step (round, group) {(step.round, step.group)}, not {expected}"
        self._rounds[group] += 1

    def _send_kept_header(self) -> None:
        header, self._header = self._header, None
        assert header is not None
        self._transport.send_bytes_now(header, self.place.next, tag(HEADER))

    def _receive_ahead(self, lap: int, group: int) -> None:
        """Rank 0: receives what the visit after (lap, group) needs."""
        lap, group = self.place.next_visit(lap, group)
        if self._num_tokens[group]:
            self._receive_once(lap, group)

    def _receive_once(self, lap: int, group: int) -> None:
        if lap and (lap, group) not in self._received:
            self._received[lap, group] = self._receive_hidden(group, self._num_tokens[group])
        elif not lap and group not in self._results:
            self._results[group] = self._transport.receive_bytes_now(self.place.last, tag(RESULT, group))

    def _receive_hidden(self, group: int, num_tokens: int) -> torch.Tensor:
        hidden = self._inputs[group, :num_tokens]
        self._transport.receive_now(hidden, self.place.previous, tag(HIDDEN, group))
        return hidden
