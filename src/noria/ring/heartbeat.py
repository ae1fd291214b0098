"""Heartbeats: each rank tells the next one, every few seconds, that it is there.

A rank that was stopped, or whose machine is gone without a word, is missed by the next one. Knows no MPI.
"""

import threading
import time
from collections.abc import Callable, Generator

from noria.order import BEAT, Place, tag
from noria.transports import Transport

SILENCE = 30.0  # seconds without a beat after which a rank counts as lost
BEATS = 8  # in that time
AWAKE = 1.0  # seconds: a longer gap between two looks was this rank's own sleep, and nobody else's silence
PAUSE = 0.02  # seconds between two looks of a thread that has nothing else to do
_ALIVE, _LAST = b"a", b"z"


def beat(transport: Transport, place: Place, silence: float, ending: Callable[[], bool]) -> Generator[None, None, None]:
    """Sends beats to the next rank until `ending` says that this rank is through, then the last one."""
    while not ending():
        yield from transport.send_bytes(_ALIVE, place.next, tag(BEAT))
        due = time.monotonic() + silence / BEATS
        while time.monotonic() < due and not ending():
            yield
    yield from transport.send_bytes(_LAST, place.next, tag(BEAT))


def listen(
    transport: Transport,
    place: Place,
    silence: float,
    lost: Callable[[int, float], None],
    ending: Callable[[], bool] = lambda: False,
) -> Generator[None, None, None]:
    """Hears the previous rank's beats until its last one; calls `lost(rank, seconds)` once when they stay away."""
    last = time.monotonic()
    look, quiet = last, 0.0
    receive = transport.receive_bytes(place.previous, tag(BEAT))
    while True:
        now = time.monotonic()
        quiet, last = quiet + min(now - last, AWAKE), now
        if now >= look or ending():  # seldom, while hidden states travel beside it
            look = now + silence / BEATS / 4
            try:
                next(receive)
            except StopIteration as message:
                if message.value == _LAST:
                    return
                quiet = 0.0
                receive = transport.receive_bytes(place.previous, tag(BEAT))
        if quiet > silence:
            lost(place.previous, quiet)
            return
        yield


class Heart:
    """Beats and listens in a thread of its own: for a ring that has no communication thread, whose calls block."""

    def __init__(
        self,
        transport: Transport,
        place: Place,
        silence: float,
        lost: Callable[[int, float], None],
        set_device: Callable[[], None] = lambda: None,
    ):
        """`set_device` binds the thread to the rank's device: a call for a heartbeat may move other messages too."""
        self._set_device = set_device
        self._closing = self._abandoned = False
        self._work = [
            beat(transport, place, silence, lambda: self._closing),
            listen(transport, place, silence, lost, lambda: self._closing),
        ]
        self._thread = threading.Thread(target=self._run, name="noria-heart", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends the last beat and waits for that of the previous rank."""
        self._closing = True
        self._thread.join()

    def abandon(self) -> None:
        """Stops, whatever is under way."""
        self._abandoned = True
        self._thread.join(50 * PAUSE)

    def _run(self) -> None:
        self._set_device()
        ended = object()
        while self._work and not self._abandoned:
            self._work = [one for one in self._work if next(one, ended) is not ended]
            time.sleep(PAUSE)
