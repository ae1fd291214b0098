"""Signals that reach another rank than rank 0, handed to rank 0, which alone stops a job; and where a job that its
launcher ends can still be read.

Knows neither rows nor the ring: it has a communicator of its own, which no other thread uses.
"""

import contextlib
import fcntl
import os
import stat
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from noria.communicator import Communicator
from noria.launch.signals import Signals

TAG = 9
FIRST_SECONDS = 0.5  # that rank 0 has to hear of a signal itself: launchers send most of them to all ranks
READ_SECONDS = 0.05  # a launcher that ends its ranks leaves them a quarter of a second
LAUNCHERS = ("mpirun", "prterun", "orterun", "mpiexec")


class Notices:
    """Made by all ranks together. Its `with` is where other ranks than rank 0 watch their signals, in a thread.

    What `prepare_by` names is called before each message, in the thread that sends or looks: it binds the thread to its
    device, for MPI may move other messages at the same time.
    """

    def __init__(self, comm: Communicator, signals: Signals):
        self._prepare: Callable[[], None] = lambda: None
        self._comm, self._signals, self._closed = comm.Split(0, key=comm.Get_rank()), signals, False
        self._alone, self._first = comm.Get_size() == 1, comm.Get_rank() == 0
        self._thread = threading.Thread(target=self._watch, name="noria-notices", daemon=True)

    def __enter__(self) -> "Notices":
        if not self._first:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        if not self._first:
            self._signals.wake()
            self._thread.join(1.0)

    def prepare_by(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def heard(self) -> str | None:
        """On rank 0: `SIGTERM at rank 3`, if another rank has had a signal since. Never waits."""
        if self._alone or self._closed:
            return None
        self._prepare()
        return self._comm.recv(tag=TAG) if self._comm.iprobe(tag=TAG) else None

    def _watch(self) -> None:
        while not self._closed:
            came = self._signals.wait(1.0)
            if came is not None and not self._closed:
                time.sleep(FIRST_SECONDS)
                self._prepare()
                self._comm.send(f"{came.name} at rank {self._comm.Get_rank()}", dest=0, tag=TAG)


def say_where_it_is_read(say: Callable[[TextIO | None], None]) -> None:
    """`say(None)`, and where Open MPI's launcher does not hand that on, `say` again to the launcher's own stderr.

    On Ctrl-C and SIGTERM it reads nothing more of what its ranks print, though they live on for a moment.
    """
    say(None)
    stream = None if _was_read() else _stderr_of_launcher()
    if stream is not None:
        with contextlib.suppress(OSError), stream:
            say(stream)


def _was_read() -> bool:
    """Whether somebody takes what this process wrote to stderr. True where that cannot be seen."""
    end, unread = time.monotonic() + READ_SECONDS, array("i", [0])
    try:
        descriptor = sys.stderr.fileno()
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return True
        while fcntl.ioctl(descriptor, termios.FIONREAD, unread) == 0 and unread[0]:
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
    except (OSError, ValueError):
        pass
    return True


def _stderr_of_launcher() -> TextIO | None:
    """What Open MPI's launcher on this node writes its own words to, opened anew; None where it cannot be found."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return None
    try:
        process = os.getppid()
        while process > 1:
            name, _, rest = Path(f"/proc/{process}/stat").read_text().partition("(")[2].rpartition(")")
            if name in LAUNCHERS:
                return open(f"/proc/{process}/fd/2", "a")
            process = int(rest.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
