"""Starts ranks for the tests, under a time limit: a hang is a failure that shows what the ranks had printed.

Knows nothing of Noria's commands: `argv` is the whole command line that each rank runs.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from pathlib import Path

from forks import forked

ENVIRONMENT = Path(__file__).parent.parent / "jobs" / "local" / "environment.sh"
MARK = "NORIA_TEST_LAUNCH"
ORPHAN_SECONDS = 10.0
TRIES = 3
# Seen of a launcher on a busy machine, and of a rank on one whose kernel answered a thread's wait with an error, by which
# glibc ends the process: neither says anything of Noria.
FAULTS_OF_THE_MACHINE = (
    "PMIx server's listener thread failed to start",
    "The futex facility returned an unexpected error code.",
)


class RanksHung(AssertionError):
    """The ranks were still running at the time limit."""


def mpirun(num_ranks, argv, timeout=60, env=None, cwd=None, fresh=False):
    """Run `mpirun -n num_ranks argv...` and return its CompletedProcess, with stdout and stderr as text.

    The exit code is the caller's to check, and `orphans`: the ranks that were there ORPHAN_SECONDS after mpirun. `env` is
    added to the environment; a value of None takes a variable away. Ranks of Python are forked from a process that has
    imported Noria, unless `fresh`. Raises RanksHung, with the output so far, after `timeout` seconds; no rank outlives
    the call.
    """
    launch = [str(timeout), "mpirun", "-n", str(num_ranks), *(map(str, argv) if fresh else of_forks(argv))]
    for _ in range(TRIES):
        done = _launch(launch, timeout, env, cwd)
        if done.returncode == 0 or not of_the_machine(done.stderr):
            break
    return done


def of_the_machine(said):
    """Whether what a launch said is a fault of the machine; pytest tells of it at the end."""
    found = [fault for fault in FAULTS_OF_THE_MACHINE if fault in said]
    for fault in found:
        warnings.warn(f"the machine's fault, tried again: {fault}", stacklevel=2)
    return bool(found)


def _launch(launch, timeout, env, cwd):
    mark = uuid.uuid4().hex
    variables = environment() | {MARK: mark} | (env or {})
    variables = {name: value for name, value in variables.items() if value is not None}
    # Files and not pipes: a rank that outlives mpirun would hold a pipe open, and reading it would hang too.
    orphans = []
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        try:
            code = subprocess.run(
                ["timeout", "-k", "5", *launch],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=variables,
                cwd=cwd,
            ).returncode
            # 124: ended by SIGTERM; 137: it took SIGKILL, which a rank that was killed for its memory also shows.
            killed = code in (137, -9) and "timeout: the monitored command" in _text(stderr)
            hung = code == 124 or killed
            orphans = [] if hung else _left_behind(mark)
        finally:
            _kill(_marked(mark))
        result = subprocess.CompletedProcess(launch[1:], code, _text(stdout), _text(stderr))
    result.orphans = orphans
    if hung:
        raise RanksHung(f"still running after {timeout} s\n{describe(result)}")
    return result


def of_forks(argv):
    """`argv` for ranks that are forked, where they can be: MPICH hands its ranks a descriptor, which a fork has not."""
    return forked(argv) if "Open MPI" in _launcher() else list(map(str, argv))


@functools.cache
def _launcher():
    return subprocess.run(
        ["mpirun", "--version"], env=environment(), capture_output=True, text=True, check=False
    ).stdout


def environment():
    """The variables with which mpirun starts ranks here: this process's, jobs/local/environment.sh's and one thread."""
    script = [
        "bash",
        "-c",
        'source "$1"; PATH="$2:$PATH"; env -0',
        "bash",
        ENVIRONMENT,
        os.path.dirname(sys.executable),
    ]
    printed = subprocess.run(script, stdout=subprocess.PIPE, check=True).stdout.decode(errors="surrogateescape")
    return dict(line.split("=", 1) for line in printed.split("\0") if line) | {"OMP_NUM_THREADS": "1"}


def describe(result):
    """The command, its exit code and all that it printed, for the message of a failed assertion."""
    command = " ".join(result.args)
    return f"$ {command}\nexit code {result.returncode}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}"


def _text(file):
    file.seek(0)
    return file.read().decode(errors="replace")


def _marked(mark):
    """The processes of this launch: mpirun puts ranks in process groups of their own, and they carry the mark, forked ones as their name."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, variables = (process / "comm").read_text(), (process / "environ").read_bytes().split(b"\0")
            if wanted in variables or name == f"{mark[:15]}\n":
                found.append(int(process.name))
        except OSError:
            continue
    return found


def _left_behind(mark):
    """Those that do not end by themselves."""
    end = time.monotonic() + ORPHAN_SECONDS
    while (left := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _kill(processes):
    for process in processes:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
