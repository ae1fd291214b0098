"""What ends a job that cannot go on: one line that says who, where and doing what, then every rank's end, whatever hangs.

Knows nothing of models: what a rank was doing is told to it.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TextIO

from noria.launch import mpi
from noria.tools.log import log
from noria.tools.writing import WriteError

RECORD_SECONDS = 1.0
ABORT_SECONDS = 5.0  # an abort that has not ended this process by then is helped along


class Watchdog:
    """A rank's own. A context manager: inside it, an exception that no code catches ends the whole job.

    It is told what the rank is at, by `begin`, and whom to tell why the job ends before it does, by `record_by`: that has
    RECORD_SECONDS, for the disk may be what fails.
    """

    def __init__(self) -> None:
        self.rank, self.num_ranks = mpi.launched_rank(), max(mpi.launched(), 1)
        self.host, self._layers = socket.gethostname(), ""
        self.began = time.time()
        self._doing: str | Callable[[], str] = "starting"
        self._record: Callable[[str], None] | None = None
        self._hooks = sys.excepthook, threading.excepthook

    def __enter__(self) -> "Watchdog":
        self._hooks = sys.excepthook, threading.excepthook
        sys.excepthook = lambda kind, error, _: self.fail(error)
        threading.excepthook = lambda failed: self.fail(
            failed.exc_value or RuntimeError("a thread ended without a reason")
        )
        return self

    def __exit__(self, *_: object) -> None:
        sys.excepthook, threading.excepthook = self._hooks

    def is_rank(self, rank: int, num_ranks: int) -> None:
        """The rank as it is counted from now on: a ring may have another order than the launcher."""
        self.rank, self.num_ranks = rank, num_ranks

    def computes(self, layers: str) -> None:
        """`stage 1 (layers 4-7)`: what this rank has of the model, in words."""
        self._layers = layers

    def begin(self, doing: str | Callable[[], str]) -> None:
        """What the rank is at from now on, in words or as a function that finds them."""
        self._doing = doing

    def record_by(self, record: Callable[[str], None] | None) -> None:
        self._record = record

    def place(self) -> str:
        """`on node3, stage 1 (layers 4-7), in round 12`."""
        doing = self._doing() if callable(self._doing) else self._doing
        return ", ".join(filter(None, [f"on {self.host}", self._layers, doing]))

    def say(self, message: str, stream: TextIO | None = None) -> None:
        log(self.rank, self.num_ranks, message, stream)

    def fail(self, error: BaseException) -> int:
        """Says what failed, and ends every rank with code 1. Returns it where no other rank is."""
        if isinstance(error, WriteError):  # of the disk, not of the program: its words say all
            return self.end(f"failed: {error}", 1)
        return self.end(f"failed: {type(error).__name__}: {error}", 1, "".join(traceback.format_exception(error)))

    def miss(self, rank: int, host: str, layers: str, seconds: float) -> None:
        """Ends the job because a rank has not been heard of."""
        who = f"rank {rank} on {host}, {layers}"
        self.end(f"failed: nothing heard for {seconds:.0f} s from {who}: it is stopped, or its machine is gone", 1)

    def end(self, message: str, code: int, details: str = "") -> int:
        """Says why, ends every rank with this code, and after ABORT_SECONDS this process by force."""
        if details:  # the message comes last, where people look
            self.say(details.rstrip())
        self.say(f"{message}\nwas {self.place()}")
        if self._record is not None:
            recorder = threading.Thread(target=_record, args=[self._record, message], daemon=True)
            recorder.start()
            recorder.join(RECORD_SECONDS)
        return abort(code)


def _record(record: Callable[[str], None], message: str) -> None:
    with contextlib.suppress(Exception):
        record(message)


def abort(code: int) -> int:
    """Ends every rank of the job. Any thread may call it; it returns only in the main thread of a run without MPI."""
    if not mpi.is_up():
        if threading.current_thread() is not threading.main_thread():
            os._exit(code)
    else:
        timer = threading.Timer(ABORT_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
        mpi.abort(code)
    return code
