"""The signals that ask a job to stop, held as bytes in a pipe until somebody reads them; those that end other commands.

The interpreter writes the held ones there the moment they arrive, whatever the main thread sits in; nothing acts in a handler.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)  # beside SIGINT, of which Python makes a KeyboardInterrupt
AGAIN_SECONDS = 0.5  # a launcher and a terminal may both hand on one Ctrl-C


class EndedBySignal(KeyboardInterrupt):
    """A signal `number` ends the process: what was begun is taken away first, as after Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """ENDS raise EndedBySignal in the main thread inside this `with`, once each; those that are ignored or handled stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    for one in ENDS:  # what ends the process is at work: a second one would end it half-way
        if signal.getsignal(one) is _end:
            signal.signal(one, signal.SIG_IGN)
    raise EndedBySignal(number)


def die_of(number: int) -> None:
    """Ends this process by a signal, so that a shell or a launcher hears which one it was."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Signals:
    """Holds STOPS back inside its `with`. Elsewhere than in the main thread it does nothing.

    Those that the process was started to ignore, as by nohup or in the background of a script, it goes on to ignore.

    `attended`: the run listens, on this rank or another. Until then a second SIGINT ends the process at once, if
    `is_first`: at another rank than rank 0 it may be a launcher's copy of the first. `is_last_act`: the process ends after
    the `with`, and a signal that comes then is ignored: it would take the exit code away.
    """

    def __init__(self, is_first: bool = True, is_last_act: bool = False):
        self.attended = not is_first
        self._is_last_act = is_last_act
        self._interrupted = float("inf")
        self._read, self._write = -1, -1
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._wakeup = -1
        self._woken = threading.Event()

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._is_last_act else handler)
        if self._read >= 0:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._read)
            os.close(self._write)
            self._before, self._read = {}, -1

    def attend(self) -> None:
        """From now on the run listens: a second SIGINT is its to heed."""
        self.attended = True

    def wait(self, seconds: float) -> signal.Signals | None:
        """The next signal that came, or None after this time or a `wake`. One thread reads."""
        if self._read < 0:
            self._woken.wait(seconds)
            self._woken.clear()  # as the pipe: a wake ends one wait
            return None
        with contextlib.suppress(BlockingIOError):
            if select.select([self._read], [], [], max(seconds, 0))[0]:
                number = os.read(self._read, 1)[0]
                return signal.Signals(number) if number in STOPS else None
        return None

    def wake(self) -> None:
        """Ends a wait now."""
        self._woken.set()
        if self._read >= 0:
            os.write(self._write, b"\0")

    def _note(self, number: int, frame: FrameType | None) -> None:
        """A handler, so that the signal does not end the process; the pipe has it."""
        if number == signal.SIGINT and not self.attended:
            now = time.monotonic()
            if now - self._interrupted > AGAIN_SECONDS:
                os._exit(128 + signal.SIGINT)
            self._interrupted = min(self._interrupted, now)
