"""The trace of all ranks: begun together, by one clock, and written by rank 0. Knows no event."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from noria.errors import InputError
from noria.launch import mpi
from noria.launch.here import ThisRank
from noria.tools.atomic import check_file
from noria.tools.trace_file import TraceFile


class Traced(Protocol):
    """A rank's own events; `offset`: nanoseconds to add to its clock for rank 0's."""

    def start(self, offset: int, zero: int) -> None: ...

    def events(self, offset: int) -> Iterable[str]: ...


def check(path: str | None, files: Callable[[], Iterable[str | None]]) -> None:
    """Raises InputError unless a trace could be written there, over no file but an older trace: `files()` are the run's."""
    if path is None:
        return
    if Path(path).is_dir() or os.path.realpath(path) in [os.path.realpath(file) for file in files() if file]:
        raise InputError(f"job.trace is {path}, which is a folder or a file of this run: name a file of its own")
    check_file(Path(path))


def start(here: ThisRank, trace: Traced) -> None:
    """Collective."""
    trace.start(mpi.clock_offset(here.comm), mpi.on_first_rank(here.comm, time.perf_counter_ns))


def write(here: ThisRank, trace: Traced, path: Path) -> None:
    """Every rank's events into rank 0's file. That it cannot be written costs the trace alone. Collective."""
    events, file = list(trace.events(mpi.clock_offset(here.comm))), TraceFile(path)
    mpi.in_turn(here.comm, events, file.add)
    if here.rank == 0:
        try:
            file.close()
            here.log(f"trace {path}: open it at https://ui.perfetto.dev")
        except OSError as error:
            here.log(f"warning: the trace {path} was not written: {error}")
