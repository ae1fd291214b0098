"""Four ranks for the whole test run: what they have in common is started once, and a test asks them to call a function.

A test of this world is marked `world`. A call that fails, hangs, crashes or leaves a file or a thread behind fails the
test that made it, with what every rank said; the next call has ranks that know nothing of it.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Listener, wait
from pathlib import Path

from mpirun import TRIES, environment, of_forks, of_the_machine

NUM_RANKS = 4
START_SECONDS = 60.0  # for the ranks
PATIENCE = 3.0  # seconds for the other ranks, once one has failed: they may wait for it
RANK = Path(__file__).parent / "mpi" / "world_rank.py"
_worlds = []


def call(num_ranks, function, *arguments, timeout=120):
    """`function(comm, *arguments)` on the first ranks of the world, `comm` among them: what each returned, by rank.

    The function lives in a module of tests/mpi. Raises AssertionError if one of them raised, ended, left something open or
    was not ready after `timeout` seconds.
    """
    left = TRIES
    while True:
        left -= 1
        try:
            if not _worlds:
                _worlds.append(World())
            return _worlds[0].call(num_ranks, function, arguments, timeout)
        except BaseException as error:
            if not of_the_machine(str(error) + _end()) or not left:
                raise


def _end():
    """Ends the world, if there is one: all that its launcher and its ranks wrote."""
    if not _worlds:
        return ""
    world = _worlds.pop()
    said = world.said()
    world.kill()
    return said


def command(num_ranks, argv, timeout=120):
    """`noria argv...` on so many ranks: the CompletedProcess of the launch that it stands for."""
    import world_rank

    done = call(num_ranks, world_rank.command, list(map(str, argv)), timeout=timeout)
    codes = {code for code, _, _ in done}
    assert len(codes) == 1, done
    said = ["".join(parts) for parts in zip(*(parts for _, *parts in done), strict=True)]
    return subprocess.CompletedProcess(["noria", *map(str, argv)], codes.pop(), *said)


class World:
    """The ranks' launcher, and a connection to each of them."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="noria-world-")
        listener = Listener(f"{self._folder.name}/socket", backlog=NUM_RANKS)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the world
        self._launcher = subprocess.Popen(
            ["mpirun", "-n", str(NUM_RANKS), *of_forks([sys.executable, RANK, listener.address])],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._ranks, self._processes = [], []
        atexit.register(self.close)
        try:
            self._meet(listener)
        except BaseException:
            self.kill()
            raise

    def _meet(self, listener):
        listener._listener._socket.settimeout(START_SECONDS)  # a listener has no time limit of its own
        met = []
        with listener:
            for _ in range(NUM_RANKS):
                try:
                    connection = listener.accept()
                    assert connection.poll(START_SECONDS), "a rank says nothing"
                except (OSError, AssertionError) as error:
                    raise AssertionError(f"the ranks did not start: {error}\n{self.said()}") from error
                met.append((*connection.recv(), connection))
        for _, process, connection in sorted(met, key=lambda one: one[0]):
            self._ranks.append(connection)
            self._processes.append(process)

    def call(self, num_ranks, function, arguments, timeout):
        answers, began = {}, time.monotonic()
        end = began + timeout
        for rank in self._ranks[:num_ranks]:
            try:
                rank.send((num_ranks, function, arguments))
            except OSError:
                answers[rank] = ("ended", "before this call", "")
                end = began + PATIENCE
        while len(answers) < num_ranks and time.monotonic() < end:
            asked = [rank for rank in self._ranks[:num_ranks] if rank not in answers]
            for rank in wait(asked, max(end - time.monotonic(), 0)):
                answers[rank] = self._answer(rank)
                if answers[rank][0] != "returned":
                    end = min(end, time.monotonic() + PATIENCE)
        hung = ("did not end", f"after {time.monotonic() - began:.0f} s", "")
        found = [answers.get(rank, hung) for rank in self._ranks[:num_ranks]]
        assert all(word == "returned" for word, _, _ in found), self._told(function, found)
        return [value for _, value, _ in found]

    def _answer(self, rank):
        try:
            return rank.recv()
        except (EOFError, ConnectionError):
            return "ended", "", ""

    def _told(self, function, found):
        lines = [f"{function.__module__}.{function.__name__} in the world of {NUM_RANKS} ranks:"]
        for rank, (word, value, said) in enumerate(found):
            lines.append(f"--- rank {rank} {word} {value if word != 'returned' else ''}\n{said}")
        return "\n".join([*lines, "--- the launcher and all ranks", self.said()[-4000:]])

    def said(self):
        """All that the launcher and the ranks wrote, but for what calls write."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def close(self):
        """Lets the ranks end: a closed connection says that no call will come."""
        atexit.unregister(self.close)
        for rank in self._ranks:
            rank.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._launcher.wait(PATIENCE)
        self.kill()

    def kill(self):
        """Ends whatever is left of the ranks and their launcher."""
        atexit.unregister(self.close)
        for process in [*self._processes, self._launcher.pid] if self._launcher.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._launcher.wait()
        for rank in self._ranks:
            rank.close()
        self._log.close()
        self._folder.cleanup()
