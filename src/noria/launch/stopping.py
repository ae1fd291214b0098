"""How a job stops before its end: rank 0's threads, one that waits for signals and for the deadline, one that looks for
the stop file, one that seals.

A stop seals what there is at once and lets the ring drain; the other ranks hear of it by the headers. Knows no signals'
handlers, and of the rows only how to ask for their sealing.
"""

import signal
import threading
import time
from typing import Protocol

from noria.launch.deadline import Deadline
from noria.launch.notices import Notices, say_where_it_is_read
from noria.launch.signals import AGAIN_SECONDS, Signals
from noria.launch.stop_file import LOOK_SECONDS, StopFile
from noria.launch.watchdog import Watchdog, abort

STOPPED = 75  # the exit code of a job that the same command takes up again
MARGIN = 0.05, 2.0, 60.0  # stop this part of the time left before the deadline, at least and at most these seconds
TEND_SECONDS = 1.0
QUICK_SECONDS = 0.05  # of a seal; a launcher may end its ranks a quarter of a second after a signal
DRAIN_SECONDS = 30.0  # of the ring at least, and three rounds of it


class Sealing(Protocol):
    """Rows that a stop brings to the disk."""

    def stop(self, reason: str) -> tuple[str, float]:
        """Seals what there is. Returns words for the user and the seconds of a round."""

    def tend(self) -> None:
        """Seals what is due."""


class Stopping:
    """Rank 0's own; the threads live inside its `with`.

    Before the first step nothing is there to seal: a stop ends the job. Then `serve` says whose rows are sealed. Sealing
    and tending have a thread each, so that a second SIGINT is heard while a disk keeps them waiting, and a stop does not
    wait for what `tend` is at. `notices`: of signals at other ranks, which stop the job as rank 0's own do, but never
    count as a second SIGINT.
    """

    def __init__(self, signals: Signals, deadline: Deadline, watchdog: Watchdog, notices: Notices | None = None):
        self._signals, self._deadline, self._watchdog, self._notices = signals, deadline, watchdog, notices
        part, least, most = MARGIN
        self.margin = (
            min(max(part * deadline.seconds_left, least), most) if deadline.seconds_left < float("inf") else 0.0
        )
        self._rows: Sealing | None = None
        self._drained = self._merging = False
        self.reason = ""
        self._interrupted = float("inf")
        self._drained_by = float("inf")
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="noria-stopping", daemon=True)
        self._sealing = threading.Thread(target=self._tend, name="noria-sealing", daemon=True)
        self._looking: threading.Thread | None = None
        self._found = ""  # of the stop file, in words
        self._last: threading.Thread | None = None
        self._due, self._ending = threading.Event(), threading.Event()

    def __enter__(self) -> "Stopping":
        self._thread.start()
        self._sealing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._signals.wake()
        self.nudge()
        self._ending.set()
        for thread in filter(None, (self._thread, self._sealing, self._looking, self._last)):
            thread.join(1.0)

    def look_for(self, stop_file: StopFile) -> bool:
        """From now on that file stops the job; the output must be this job's. Returns whether an older one was removed.

        By a thread of its own: a file system that does not answer delays no signal. Raises InputError for one that stays.
        """
        removed = stop_file.forget_old_ones(self._watchdog.began, self._watchdog.say)
        self._looking = threading.Thread(target=self._look, args=[stop_file], name="noria-stop-file", daemon=True)
        self._looking.start()
        return removed

    def serve(self, rows: Sealing) -> None:
        """From the first step on: `rows` are sealed by a stop, and tended every second and when `nudge` is called."""
        self._rows = rows

    def drained(self, complete: bool) -> None:
        """Every step is over, and nothing is on its way between ranks. `complete`: every row is finished too, and from now on
        a stop lets the output be written."""
        self._drained, self._merging = True, complete

    def nudge(self) -> None:
        """Lets `tend` be called now. Never waits."""
        self._due.set()

    @property
    def seconds_left(self) -> float:
        """Until the run is stopped for its deadline."""
        return self._deadline.seconds_left - self.margin

    def _watch(self) -> None:
        while True:
            came = self._signals.wait(min(1.0, max(self.seconds_left, 0.05)))
            if self._closed:
                return
            told = self._notices.heard() if came is None and self._notices is not None else None
            if came is not None:
                self._heed(came)
            elif told is not None or (self._found and not self.reason):
                self._stop(told or self._found)
            elif not self.reason and self.seconds_left <= 0:
                self._stop(f"{self._deadline.source}: {self._deadline.seconds_left:.0f} s are left")
            elif time.monotonic() > self._drained_by and not self._drained:
                self._watchdog.end(
                    f"stopped ({self.reason}): everything is sealed, but the ring did not drain", STOPPED
                )

    def _heed(self, came: signal.Signals) -> None:
        if came is signal.SIGINT:
            again = time.monotonic() - self._interrupted > AGAIN_SECONDS
            self._interrupted = min(self._interrupted, time.monotonic())
            if again:
                self._watchdog.end("stopped at once: interrupted again", 128 + signal.SIGINT)
        self._stop(came.name)

    def _stop(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        if self._rows is not None:
            self._last = threading.Thread(target=self._seal, args=[self._rows], name="noria-stop", daemon=True)
            self._last.start()
            self._last.join(QUICK_SECONDS)
            if self._last.is_alive():
                self._say(f"{reason}: rows are being sealed; the same command continues with them")
        else:
            self._say(f"stopped ({reason}) before the first step: start the same run again to go on")
            abort(STOPPED)

    def _say(self, message: str) -> None:
        say_where_it_is_read(lambda stream: self._watchdog.say(message, stream))

    def _look(self, stop_file: StopFile) -> None:
        while not self._found and not self._ending.wait(LOOK_SECONDS):
            self._found = stop_file.heard() or ""
        if not self._closed:
            self._signals.wake()

    def _tend(self) -> None:
        while not self._closed:
            self._due.wait(TEND_SECONDS)
            self._due.clear()
            if self._rows is not None and not self._closed and not self.reason:
                self._rows.tend()

    def _seal(self, rows: Sealing) -> None:
        words, round_seconds = rows.stop(self.reason)
        if self._merging:
            self._say(f"{self.reason}: every row is finished, the output is being written and will be completed")
        else:
            self._drained_by = time.monotonic() + max(DRAIN_SECONDS, 3 * round_seconds)
            self._say(f"stopping ({self.reason}): {words}")
