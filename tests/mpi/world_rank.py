"""A rank of the world that the tests share (tests/world.py): calls what it is asked to call, with nothing left behind.

Usage: world_rank.py SOCKET, under mpirun. It waits for a call without MPI, whose waiting would take a core.
"""

import contextlib
import faulthandler
import gc
import io
import os
import stat
import sys
import threading
import time
import traceback
from multiprocessing.connection import Client
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from noria.__main__ import main
from noria.launch import mpi
from noria.ring import communication

PATIENCE = 1.5  # seconds in which threads may end and files close after a call


def command(comm, argv):
    """`noria argv...` on these ranks, as their launcher would start it: (exit code, stdout, stderr)."""
    size, start = {"OMPI_COMM_WORLD_SIZE": str(comm.Get_size())}, mpi.start
    before = {name: os.environ.get(name) for name in size}
    os.environ.update(size)
    mpi.start = lambda: comm
    out, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = main(argv)
    finally:
        mpi.start = start
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        sys.stderr.write(said.getvalue())  # for the message of a call that fails
    return code, out.getvalue(), said.getvalue()


def open_things():
    """The regular files and the threads of this process, each as words."""
    files = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if stat.S_ISREG(os.stat(f"/proc/self/fd/{descriptor}").st_mode):
                files.append(f"file {target}")
    return files + [f"thread {thread.name}" for thread in threading.enumerate()]


def left_behind(before):
    """What is open that was not before, after PATIENCE at most."""
    end = time.monotonic() + PATIENCE
    while True:
        now = open_things()
        for thing in before:
            with contextlib.suppress(ValueError):
                now.remove(thing)
        if not now or time.monotonic() > end:
            return now
        gc.collect()
        time.sleep(0.01)


def perform(comm, function, arguments):
    """(how it went, what it returned or raised or left open, what was said)."""
    before, said = open_things(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            value = function(comm, *arguments)
    except BaseException:  # noqa: BLE001 -- whatever it is, it is told to the test that called
        return "raised", traceback.format_exc(), said.getvalue()
    if left := left_behind(before):
        return "left open", ", ".join(left), said.getvalue()
    return "returned", value, said.getvalue()


def serve(connection, world):
    """Answers calls until the connection closes; the communicators among the first ranks are made once."""
    from patient import Patient

    rank, size = world.Get_rank(), world.Get_size()
    comms = {number: Patient(world).Split(int(rank >= number), rank) for number in range(1, size + 1)}
    connection.send((rank, os.getpid()))
    while True:
        try:
            num_ranks, function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(perform(comms[num_ranks], function, arguments))


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    communication.SHORTEST_PAUSE = 2e-4  # with more ranks than cores looking costs more than being late
    serve(Client(sys.argv[1]), mpi.start())
