"""The signals that ask a job to stop, held as bytes in a pipe until somebody reads them.

The interpreter writes them there the moment they arrive, whatever the main thread sits in; nothing acts in a handler.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
AGAIN_SECONDS = 0.5  # a launcher and a terminal may both hand on one Ctrl-C


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
