"""A forked process is to its caller what a new one would be."""

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from forks import forked

TELL = """
import json, os, sys
print(json.dumps([sys.argv, os.environ.get("TOLD"), os.getcwd(), sys.stdin.read(), os.getpid(), "torch" in sys.modules]))
print("error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
WAIT = r"""
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"heard\n"))
print(os.getpid(), flush=True)
while True: time.sleep(0.1)
"""


def run(argv, **more):
    return subprocess.run(forked(argv), capture_output=True, text=True, timeout=30, **more)


def test_it_has_the_arguments_environment_folder_and_streams_and_its_exit_code_comes_back(tmp_path):
    done = run([sys.executable, "-c", TELL, 7, "x y"], env=os.environ | {"TOLD": "é"}, cwd=tmp_path, input="in")
    assert json.loads(done.stdout)[:4] == [["-c", "7", "x y"], "é", str(tmp_path), "in"]
    assert (done.returncode, done.stderr) == (7, "error\n")
    assert json.loads(done.stdout)[5], "what it is here for: torch is imported already"


def test_a_program_and_a_module_run_as_main(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'\n")
    (tmp_path / "program.py").write_text("import sys, beside\nprint(__name__, beside.name, sys.argv[1:])\n")
    assert run([sys.executable, tmp_path / "program.py", "a"]).stdout == "__main__ beside ['a']\n"
    assert run(["noria", "--version"]).stdout.startswith("noria ")
    assert forked(["true", 1]) == ["true", "1"]


def test_an_exception_is_a_traceback_and_code_1_and_nothing_of_it_is_left_in_the_next():
    done = run([sys.executable, "-c", "import sys; sys.marked = True; 1 / 0"])
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert run([sys.executable, "-c", "import sys; print(hasattr(sys, 'marked'))"]).stdout == "False\n"


@pytest.fixture
def waiting():
    process = subprocess.Popen(forked([sys.executable, "-c", WAIT]), stdout=subprocess.PIPE, text=True)
    yield process, psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    process.stdout.close()


def test_signals_reach_it_and_its_end_by_one_is_its_clients(waiting):
    process, child = waiting
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "heard\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert not child.is_running()


def test_it_dies_with_its_client_and_its_client_with_it(waiting):
    process, child = waiting
    process.kill()
    child.wait(10)
    other = subprocess.Popen(forked([sys.executable, "-c", WAIT]), stdout=subprocess.PIPE, text=True)
    with other, other.stdout:
        os.kill(int(other.stdout.readline()), signal.SIGKILL)
        assert other.wait(10) == -signal.SIGKILL


def test_many_at_once_end_each_with_its_own_code():
    processes = [subprocess.Popen(forked([sys.executable, "-c", f"raise SystemExit({n})"])) for n in range(12)]
    assert [process.wait(30) for process in processes] == list(range(12))


def test_clients_that_end_before_they_have_asked_disturb_nobody():
    path = forked([sys.executable])[4]
    for part in (b"", b"\1", b"\xff\xff\xff\xff", b"\x09\0\0\0{"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.send(part)
    assert run([sys.executable, "-c", "print(1)"]).stdout == "1\n"
