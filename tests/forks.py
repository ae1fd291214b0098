"""Commands in forked processes: the two seconds in which a new process imports torch are spent once a test run.

Where a launch is what is tested (imports, signals before the program hears them, environment of the interpreter)
a test starts the real thing instead.
"""

import atexit
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent / "mpi"
_servers = {}


def forked(argv):
    """The command line that does in a forked process what `argv` does in a new one.

    `argv` is sys.executable with -m, -c or a program, or `noria` with its arguments. Anything else comes back as it is.
    """
    argv = list(map(str, argv))
    if argv[0] == "noria":
        argv = [sys.executable, "-m", *argv]
    if argv[0] != sys.executable:
        return argv
    return [sys.executable, "-I", "-S", str(HERE / "fork_client.py"), _server(), *argv[1:]]


def _server():
    """The path of this process's server, which is started at the first call."""
    if os.getpid() not in _servers:
        folder = tempfile.mkdtemp(prefix="noria-forks-")
        path = f"{folder}/socket"
        command = [sys.executable, str(HERE / "fork_server.py"), path]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
        assert server.stdout.readline() == "ready\n", "the fork server did not start"
        _servers[os.getpid()] = (path, server)
        atexit.register(_close, folder, server)
    return _servers[os.getpid()][0]


def _close(folder, server):
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()
    os.unlink(f"{folder}/socket")
    os.rmdir(folder)
