"""A child process with limits that answers JSON lines: for work on content that nobody trusts.

The child calls `answer(request)` of a module and knows nothing else of it. Requests and answers are JSON, a line each,
over pipes. The child is started by exec, never by a fork alone, so that MPI and CUDA in the parent are not touched; it
has an empty environment, no file of the parent's, and ends when the parent does, however that ends.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from noria.tools.helper_child import answered, decoded, encoded, one_line
from noria.tools.helper_process import Child, Ended, Limits

MOST_ENDS = 3  # of a child, before it is not started again
_GRACE_SECONDS = 1.0  # that an interrupted thread may take


class Failed(Exception):
    """There is no answer to this request; the message says why, in one line."""


class Helper:
    """Asks `answer` of a module in a child that is started at the first request, or by `start`.

    `libraries` are the packages that the module imports beside the standard library and its own. Where no process can be
    made the module answers in this process, in a thread that is interrupted when its time is over; its memory is then
    not limited. A child that ends is replaced, up to MOST_ENDS times.
    """

    def __init__(self, module: str, limits: Limits, libraries: Iterable[str] = ()):
        self._module, self._limits, self._libraries = module, limits, tuple(libraries)
        self._worker: Child | _Here | None = None
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
        return self._worker.pid if isinstance(self._worker, Child) else None

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
        except Ended as error:
            self._note(str(error))
            raise Failed(str(error)) from None
        self._had_child = self._had_child or isinstance(worker, Child)
        return said

    def _note(self, why: str) -> None:
        """Counts an end of the child."""
        self._close()
        self._worker = None
        self._num_ends, self._why = self._num_ends + 1, why

    def _ready(self) -> "Child | _Here":
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
            raise Ended("no other process could be started")
        self._close()
        self._worker = _Here(self._module, self._limits)
        return self._worker

    def _spawn(self, environment: dict[str, str]) -> "Child":
        self._close()
        self._worker = child = Child(self._module, self._limits, self._libraries, environment)
        self._close = weakref.finalize(self, child.end)
        return child


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
            raise Ended(f"it took more than {self._limits.cpu_seconds} s") from None
        if len(said) > self._limits.answer_nbytes:
            raise Ended(f"its answer has more than {self._limits.answer_nbytes} bytes")
        return said
