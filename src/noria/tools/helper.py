"""A child process with limits that answers JSON lines: for work on content that nobody trusts.

The child calls `answer(request)` of a module and knows nothing else of it. Requests and answers are JSON, a line each,
over pipes. The child is started by exec, never by a fork alone, so that MPI and CUDA in the parent are not touched; it
has an empty environment, no file of the parent's, and ends when the parent does, however that ends.
"""

import contextlib
import ctypes
import fcntl
import importlib
import importlib.util
import json
import os
import queue
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from noria.tools import helper_child
from noria.tools.helper_child import ANSWERS, LIFELINE, answered, decoded, encoded, one_line

MOST_ENDS = 3  # of a child, before it is not started again
START_SECONDS = 60  # that Python may take until it is ready: on a busy shared file system it takes long
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_GRACE_SECONDS = 1.0  # that an interrupted thread may take


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


class Failed(Exception):
    """There is no answer to this request; the message says why, in one line."""


class _Ended(Exception):
    """The child ended, or had to be ended, before it answered."""


class Helper:
    """Asks `answer` of a module in a child that is started at the first request, or by `start`.

    `libraries` are the packages that the module imports beside the standard library and its own. Where no process can be
    made the module answers in this process, in a thread that is interrupted when its time is over; its memory is then
    not limited. A child that ends is replaced, up to MOST_ENDS times.
    """

    def __init__(self, module: str, limits: Limits, libraries: Iterable[str] = ()):
        self._module, self._limits, self._libraries = module, limits, tuple(libraries)
        self._worker: _Child | _Here | None = None
        self._num_ends, self._why, self._had_child = 0, "", False
        self._lock = threading.Lock()
        self._close: Callable[[], object] = lambda: None

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The child's process id; None without a child."""
        return self._worker.pid if isinstance(self._worker, _Child) else None

    @property
    def given_up(self) -> str:
        """Why nothing is answered any more; empty while it is."""
        return f"it ended {self._num_ends} times; {self._why}" if self._num_ends >= MOST_ENDS else ""

    def start(self) -> None:
        """Starts the child and does not wait until it is ready. That it cannot be started shows at the first request."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._worker is None:
                self._spawn({})

    def ask(self, request: object) -> Any:
        """The module's answer. Raises Failed: this request has none, later ones may."""
        try:
            line = encoded(request)
        except (ValueError, TypeError, RecursionError) as error:
            raise Failed(f"this is no request: {one_line(error)}") from error
        with self._lock:
            said = self._answer(line)
        try:
            answer, wrong = decoded(said)
        except (ValueError, TypeError, RecursionError) as problem:
            raise Failed(f"its answer cannot be read: {one_line(problem)}") from problem
        if wrong is not None:
            raise Failed(wrong)
        return answer

    def close(self) -> None:
        """Ends the child. A later request starts another."""
        with self._lock:
            self._close()
            self._worker = None

    def _answer(self, line: bytes) -> bytes:
        try:
            worker = self._ready()
            if worker.gone():
                self._note("it was ended from outside")
                worker = self._ready()
            said = worker.ask(line)
        except _Ended as error:
            self._note(str(error))
            raise Failed(str(error)) from None
        self._had_child = self._had_child or isinstance(worker, _Child)
        return said

    def _note(self, why: str) -> None:
        """Counts an end of the child."""
        self._close()
        self._worker = None
        self._num_ends, self._why = self._num_ends + 1, why

    def _ready(self) -> "_Child | _Here":
        """The worker that answers: the child that is there, another, or this process."""
        if self.given_up:
            raise Failed(self.given_up)
        if self._worker is not None and self._worker.ready():
            return self._worker
        path = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if os.environ.get(name)}
        for environment in ({}, path):  # some interpreters do not find their own library without it
            with contextlib.suppress(OSError, ValueError):
                child = self._spawn(environment)
                if child.ready():
                    return child
        if self._had_child:  # what ended the last one must not get at this process
            raise _Ended("no other process could be started")
        self._close()
        self._worker = _Here(self._module, self._limits)
        return self._worker

    def _spawn(self, environment: dict[str, str]) -> "_Child":
        self._close()
        self._worker = child = _Child(self._module, self._limits, self._libraries, environment)
        self._close = weakref.finalize(self, child.end)
        return child


class _Child:
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
            except _Ended:
                return False
        return self._is_ready

    def gone(self) -> bool:
        """Whether it has ended since its last answer."""
        return bool(_polled(self._answers, select.POLLIN, 0))

    def ask(self, line: bytes) -> bytes:
        """The answer to a request, both with the end of their lines. Raises _Ended."""
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
                raise _Ended(self.end()) from None

    def _receive(self, seconds: int) -> bytes:
        pieces, nbytes = [], 0
        while True:
            self._wait(self._answers, select.POLLIN, seconds)
            piece = os.read(self._answers, 2**18)
            if not piece:
                raise _Ended(self.end())
            pieces.append(piece)
            nbytes += len(piece)
            if nbytes > self._limits.answer_nbytes:
                self.end()
                raise _Ended(f"its answer has more than {self._limits.answer_nbytes} bytes")
            if b"\n" in piece:
                return b"".join(pieces)

    def _wait(self, fd: int, event: int, seconds: int) -> None:
        """Waits in pieces of a second: a job that is suspended loses one of them."""
        for _ in range(seconds):
            if _polled(fd, event, 1000):
                return
        self.end()
        raise _Ended(f"it took more than {seconds} s")

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


class _TimeIsOver(BaseException):
    """Raised in a thread that answers for too long."""


class _Here:
    """The module in this process, where no other can be made. Its time is limited; what C code takes is not."""

    def __init__(self, module: str, limits: Limits):
        self._answer, self._limits = importlib.import_module(module).answer, limits

    def ready(self) -> bool:
        return True

    def gone(self) -> bool:
        return False

    def ask(self, line: bytes) -> bytes:
        answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def work() -> None:
            with contextlib.suppress(_TimeIsOver):
                answers.put(answered(self._answer, line))

        thread = threading.Thread(target=work, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise Failed(f"neither a process nor a thread can be started: {one_line(error)}") from error
        try:
            said = answers.get(timeout=self._limits.cpu_seconds)
        except queue.Empty:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeIsOver))
            thread.join(_GRACE_SECONDS)
            raise _Ended(f"it took more than {self._limits.cpu_seconds} s") from None
        if len(said) > self._limits.answer_nbytes:
            raise _Ended(f"its answer has more than {self._limits.answer_nbytes} bytes")
        return said


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
