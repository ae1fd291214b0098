"""Forks processes that have imported Noria and torch already: what takes two seconds of a processor in each new one.

Usage: fork_server.py SOCKET. fork_client.py asks for one; it ends when its stdin does, and all that it forked with it. A
forked process has the client's arguments, environment, folder, cores and standard streams; it is a child of this one. What an
interpreter reads as it starts is this one's: PYTHON* and OMP_NUM_THREADS of the environment, limits, umask.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

IMPORTED = (
    "noria.__main__",
    "noria.commands.run",
    "noria.commands.inspect",
    "noria.commands.export",
    "mpi4py",
    "psutil",
)
MOST_BYTES = 1 << 20  # of a request: arguments and environment


def receive(connection):
    """The request of a client as a dict, and its three standard streams; None of a client that ended before it asked."""
    data, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size = struct.unpack("<I", data)[0] if len(data) == 4 else MOST_BYTES + 1
    data = b""
    while len(data) < size <= MOST_BYTES and (more := connection.recv(size - len(data))):
        data += more
    return json.loads(data) if len(data) == size else None, streams


class Server:
    """What was forked and whose client has not been told of its end: child -> (connection to the client, pidfd)."""

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._end)
        self._selector.register(self._listener, selectors.EVENT_READ, self._fork)
        self._children = {}

    def serve(self):
        """Returns in each forked process, with its request and streams."""
        while True:
            for key, _ in self._selector.select():
                request = key.data()
                if request is not None:
                    self._close()
                    return request

    def _close(self):
        """Every descriptor by its owner: one that is closed twice may be another's by then."""
        self._selector.close()
        self._listener.close()
        for connection, ended in self._children.values():
            connection.close()
            os.close(ended)

    def _end(self):
        if not os.read(sys.stdin.fileno(), 1):
            for child in self._children:
                os.kill(child, signal.SIGKILL)
            os._exit(0)

    def _fork(self):
        connection, _ = self._listener.accept()
        try:
            request, streams = receive(connection)
        except OSError:  # the client is gone
            request, streams = None, []
        child = os.fork() if request is not None else None
        if child == 0:
            connection.close()
            return request, streams
        for stream in streams:
            os.close(stream)
        if child is None:
            connection.close()
            return None
        ended = os.pidfd_open(child)
        self._children[child] = (connection, ended)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._forward(child, connection))
        self._selector.register(ended, selectors.EVENT_READ, lambda: self._tell(child))
        return None

    def _forward(self, child, connection):
        """A signal that the client got; the client's own end is the child's. Closed only now: it may hold a signal."""
        data = b""
        with contextlib.suppress(ConnectionError):
            data = connection.recv(1)
        if child in self._children:
            os.kill(child, data[0] if data else signal.SIGKILL)
        if not data:
            self._selector.unregister(connection)
            connection.close()

    def _tell(self, child):
        connection, ended = self._children.pop(child)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(OSError):
            connection.send(struct.pack("<i", os.waitstatus_to_exitcode(status)))
        self._selector.unregister(ended)
        os.close(ended)


def become(request, streams):
    """Makes of this process what the client was started as, but for the program."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    if mark := os.environ.get("NORIA_TEST_LAUNCH"):
        Path("/proc/self/comm").write_text(mark[:15])  # /proc shows the server's environment: mpirun.py looks here
    os.chdir(request["folder"])
    os.sched_setaffinity(0, request["cores"])
    os.setpgid(0, 0)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    errors = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(errors, errors="backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def execute(argv):
    """As the interpreter would: -m MODULE, -c CODE, or the path of a program, each with its arguments."""
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.modules.pop(f"{argv[1]}.__main__", None)  # a module that was imported is not the program
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(os.path.realpath(argv[0])))
        runpy.run_path(argv[0], run_name="__main__")


def outcome(argv):
    """The exit code with which the interpreter would end, which it says itself where it is an error."""
    try:
        execute(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001 -- as the interpreter: it ends by it
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(code):
    """Ends as the interpreter does, but for taking the modules apart: torch's take a fifth of a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # the tests' own modules
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy all of its pages
    server = Server(sys.argv[1])
    print("ready", flush=True)
    request, streams = server.serve()
    become(request, streams)
    del server, streams
    leave(outcome(request["argv"]))
