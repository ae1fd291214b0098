"""The child of noria.tools.helper: answers the lines of standard input by a module's `answer`, inside its limits.

Run as a program, `python -I -S helper_child.py SETTINGS`; imports little, because each start waits for it.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import sys
import time
from collections.abc import Callable
from typing import Any

ANSWERS, LIFELINE = 3, 4  # file descriptors, beside 0 for requests
_NOBODY = 65534


def encoded(value: object) -> bytes:
    """A line of JSON. A text may hold lone surrogates, which are no UTF-8 but must come back as they are."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def decoded(line: bytes) -> Any:
    """The value of a line. Raises ValueError or RecursionError."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def answered(answer: Callable[[object], object], line: bytes) -> bytes:
    """The line that answers a request: [answer, null], or [null, why there is none]."""
    try:
        return encoded([answer(decoded(line)), None])
    except MemoryError:
        return encoded([None, "it takes too much memory"])
    except Exception as error:  # noqa: BLE001 - whatever it is, the request has its answer and the next one too
        return encoded([None, one_line(error)])


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:300]


def serve(settings: dict[str, Any]) -> None:
    """Answers the lines of standard input until it ends."""
    _end_with_the_parent()
    _close_others()
    for library in ("OMP", "OPENBLAS", "MKL"):  # numpy starts as many threads as there are cores when it is imported
        os.putenv(f"{library}_NUM_THREADS", "1")
    sys.path += settings["paths"]  # behind the standard library: nothing there takes a module's place
    answer = importlib.import_module(settings["module"]).answer
    limits = settings["limits"]
    _limit(limits["memory_nbytes"], limits["opens_files"])
    _write(b"\n")
    allowed = 0.0
    for line in sys.stdin.buffer:
        used = time.process_time()
        if used > allowed:  # the limit is of whole seconds, and of the process's whole life
            allowed = used + 0.5
            _lower(resource.RLIMIT_CPU, int(used) + 1 + limits["cpu_seconds"])
        _write(answered(answer, line))


def _end_with_the_parent() -> None:
    """Lets the kernel end this process when the parent's end of the lifeline is closed, whatever runs here then.

    A parent-death signal would come when the thread that started this process ends; this one comes with the process.
    """
    fcntl.fcntl(LIFELINE, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(LIFELINE, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)  # SIGIO, which ends a process
    poll = select.poll()
    poll.register(LIFELINE, select.POLLIN)
    if poll.poll(0):  # it is closed already
        os._exit(1)


def _close_others() -> None:
    """Closes what the parent's libraries left open for its children."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > LIFELINE:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _limit(memory_nbytes: int, opens_files: bool) -> None:
    if not opens_files:  # the files may be of whoever started it alone
        _leave_root()
    _lower(resource.RLIMIT_AS, memory_nbytes, for_good=True)
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        _lower(kind, 0, for_good=True)
    if not opens_files:
        _lower(resource.RLIMIT_NOFILE, 0, for_good=True)


def _leave_root() -> None:
    """Becomes nobody: the number of processes is not limited for root."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)


def _lower(kind: int, value: int, for_good: bool = False) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value if for_good else hard))


def _write(line: bytes) -> None:
    left = memoryview(line)
    while left:
        left = left[os.write(ANSWERS, left) :]


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
