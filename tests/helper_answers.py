"""What a child of noria.tools.helper is asked in tests: it tries what its limits forbid and says how far it came."""

import os
import resource
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path


def answer(request):
    ((name, value),) = request.items()
    return DOES[name](value)


LIMITS = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC", "RLIMIT_NOFILE")


def _loop(_):
    while True:
        pass


def _allocate(_):
    kept = []
    while True:
        kept.append(bytes(2**24))


def _tried(action):
    """What an action gives, or the kind of its error."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - its kind is what is asked
        return type(error).__name__


def _start_thread():
    threading.Thread(target=print).start()


def _write(path):
    with open(path, "w") as file:
        file.write("x")


def _state(_):
    return {
        "environment": dict(os.environ),
        "path": sys.path,
        "isolated": sys.flags.isolated,
        "group": os.getpgid(0) == os.getpid(),
        "blocked": sorted(int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "uid": os.getuid(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
    }


def _print(text):
    print(text, flush=True)
    os.write(1, text.encode())
    os.write(2, text.encode())
    return "printed"


DOES = {
    "say": lambda value: value,
    "state": _state,
    "loop": _loop,
    "sleep": time.sleep,
    "allocate": _allocate,
    "fork": lambda _: _tried(os.fork),
    "thread": lambda _: _tried(_start_thread),
    "spawn": lambda _: _tried(lambda: os.posix_spawn("/bin/true", ["true"], {})),
    "write": lambda path: _tried(lambda: _write(path)),
    "read": lambda path: _tried(lambda: Path(path).read_text()[:9]),
    "append": lambda fd: _tried(lambda: os.write(fd, b"harm")),
    "print": _print,
    "text": lambda number: "x" * number,
    "exit": os._exit,
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "fail": lambda _: 1 / 0,
    "open files": lambda _: [fd for fd in range(64) if _tried(partial(os.fstat, fd)) != "OSError"],
}
