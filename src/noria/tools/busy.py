"""How long at least one of several threads is at something."""

import threading
import time
from collections.abc import Callable


class Busy:
    """A context that threads enter side by side; `say(seconds)` hears how long it was not empty, each time that it gets empty."""

    def __init__(self, say: Callable[[float], None], clock: Callable[[], float] = time.perf_counter):
        self._say, self._clock, self._lock = say, clock, threading.Lock()
        self._inside, self._began = 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._began = self._clock()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._say(self._clock() - self._began)
