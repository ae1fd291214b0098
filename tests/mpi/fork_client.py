"""Stands for a process that the fork server made: forwards its signals, ends as it ends; its own end is the other's too.

Usage: python -I -S fork_client.py SOCKET ARGUMENTS... of the interpreter. Imports little, so that it starts at once.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGQUIT,
    signal.SIGCONT,
)


def ask(server, argv):
    environment = dict(os.environ) | {"NORIA_TEST_CLIENT": str(os.getpid())}
    cores = sorted(os.sched_getaffinity(0))
    request = {"argv": argv, "environment": environment, "folder": os.getcwd(), "cores": cores}
    data = json.dumps(request).encode()
    socket.send_fds(server, [struct.pack("<I", len(data))], [0, 1, 2])
    server.sendall(data)


def end_as(code):
    """This process's end: an exit code, or a signal if it is negative."""
    if code < 0 and -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    if code < 0:
        os.kill(os.getpid(), -code)
        signal.pause()
    os._exit(code)


def forward(number, frame):
    with contextlib.suppress(OSError):  # the other may have ended
        server.send(bytes([number]))


if __name__ == "__main__":
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until the server knows whose they are
    server.connect(sys.argv[1])
    ask(server, sys.argv[2:])
    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    for number in (0, 1, 2):  # the other's alone: whoever reads them waits for its end only
        os.close(number)
    answer = server.recv(4)
    end_as(struct.unpack("<i", answer)[0] if len(answer) == 4 else -signal.SIGKILL)
