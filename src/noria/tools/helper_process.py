"""The process of a helper's child, as its parent has it: started by exec, asked over pipes, ended. Knows no request."""

import contextlib
import fcntl
import importlib.util
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from noria.tools import helper_child
from noria.tools.helper_child import ANSWERS, LIFELINE

START_SECONDS = 60  # that Python may take until it is ready: on a busy shared file system it takes long
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Limits:
    """What a child may use: address space, seconds of CPU and by the clock for one answer, the answer's bytes.

    It never writes a file and never starts a process or a thread; without `opens_files` it opens none either.
    """

    memory_nbytes: int
    cpu_seconds: int
    wall_seconds: int
    answer_nbytes: int
    opens_files: bool = False


class Ended(Exception):
    """The child ended, or had to be ended, before it answered."""


class Child:
    """One process, from its start to its end. Raises OSError where none can be made."""

    def __init__(self, module: str, limits: Limits, libraries: tuple[str, ...], environment: dict[str, str]):
        self._limits, self._is_ready = limits, False
        settings = {"module": module, "limits": asdict(limits), "paths": _paths((module.partition(".")[0], *libraries))}
        command = [sys.executable, "-I", "-S", helper_child.__file__, json.dumps(settings)]
        ends = [_high(end) for _ in range(3) for end in os.pipe()]
        requests, self._requests, self._answers, answers, lifeline, self._lifeline = ends
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, requests, 0), (os.POSIX_SPAWN_DUP2, answers, ANSWERS)]
        actions += [(os.POSIX_SPAWN_DUP2, lifeline, LIFELINE)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        self.pid = 0
        try:
            self.pid = os.posix_spawn(
                sys.executable,
                command,
                environment,
                file_actions=actions,
                setpgroup=0,  # a Ctrl-C of the terminal and a launcher's signals are the parent's
                setsigmask=_STOPS,
                setsigdef=(signal.SIGIO, signal.SIGXCPU),
            )
        finally:
            for end in (requests, answers, lifeline):
                os.close(end)
            if not self.pid:
                self.end()
        os.set_blocking(self._requests, False)

    def ready(self) -> bool:
        """Whether it has said that it is ready, which is waited for."""
        if not self._is_ready:
            try:
                self._is_ready = self._receive(START_SECONDS) == b"\n"
            except Ended:
                return False
        return self._is_ready

    def gone(self) -> bool:
        """Whether it has ended since its last answer."""
        return bool(_polled(self._answers, select.POLLIN, 0))

    def ask(self, line: bytes) -> bytes:
        """The answer to a request, both with the end of their lines. Raises Ended."""
        self._send(line)
        return self._receive(self._limits.wall_seconds)

    def _send(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            self._wait(self._requests, select.POLLOUT, self._limits.wall_seconds)
            try:
                left = left[os.write(self._requests, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Ended(self.end()) from None

    def _receive(self, seconds: int) -> bytes:
        pieces, nbytes = [], 0
        while True:
            self._wait(self._answers, select.POLLIN, seconds)
            piece = os.read(self._answers, 2**18)
            if not piece:
                raise Ended(self.end())
            pieces.append(piece)
            nbytes += len(piece)
            if nbytes > self._limits.answer_nbytes:
                self.end()
                raise Ended(f"its answer has more than {self._limits.answer_nbytes} bytes")
            if b"\n" in piece:
                return b"".join(pieces)

    def _wait(self, fd: int, event: int, seconds: int) -> None:
        """Waits in pieces of a second: a job that is suspended loses one of them."""
        for _ in range(seconds):
            if _polled(fd, event, 1000):
                return
        self.end()
        raise Ended(f"it took more than {seconds} s")

    def end(self) -> str:
        """Ends the process if it has not ended, and says how it did."""
        status = 0
        if self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if not ended:  # it closed its end, or has to be ended: a moment for what it does itself
                    time.sleep(0.01)
                    os.kill(self.pid, signal.SIGKILL)
                    status = os.waitpid(self.pid, 0)[1]
            self.pid = 0
        for end in (self._requests, self._answers, self._lifeline):
            if end >= 0:
                os.close(end)
        self._requests = self._answers = self._lifeline = -1
        if not os.WIFSIGNALED(status):
            return f"its process ended with code {os.waitstatus_to_exitcode(status)}"
        if os.WTERMSIG(status) == signal.SIGXCPU:
            return f"it took more than {self._limits.cpu_seconds} s of the processor's time"
        return f"its process was ended by {signal.Signals(os.WTERMSIG(status)).name}"


def _high(fd: int) -> int:
    """The same end of a pipe at a number that no file of the child's has."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LIFELINE + 6)
    finally:
        os.close(fd)


def _polled(fd: int, event: int, milliseconds: int) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(fd, event)
    return poll.poll(milliseconds)


def _paths(packages: Iterable[str]) -> list[str]:
    """The folders in which these packages or single modules lie."""
    found = [spec for name in packages if (spec := importlib.util.find_spec(name))]
    folders = [Path(spec.origin).parents[bool(spec.submodule_search_locations)] for spec in found if spec.origin]
    return list(dict.fromkeys(map(str, folders)))
