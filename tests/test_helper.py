"""The child with limits: what it answers, what it may not, how it ends, and what is done where no process can be made."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import helper_answers
from noria.tools.helper import MOST_ENDS, Failed, Helper
from noria.tools.helper_process import Limits

LIMITS = Limits(memory_nbytes=2**28, cpu_seconds=1, wall_seconds=60, answer_nbytes=2**20)
TEXTS = [
    "",
    "größer 東京 🎉\0",
    "\ud83d\udc31 alone \ud800",
    "line\nends\r\n\u2028",
    "x" * 300_000,
    [1.5, None, {"a": [True]}],
]


@pytest.fixture
def child():
    with Helper("helper_answers", LIMITS) as helper:
        yield helper


@pytest.fixture
def no_processes(monkeypatch):
    def refuse(*arguments, **settings):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "posix_spawn", refuse)


def gone(pid):
    """Whether a process has ended, in a second."""
    for _ in range(100):
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_every_value_of_json_comes_back_as_it_was(child):
    for value in TEXTS:
        assert child.ask({"say": value}) == value
    with pytest.raises(Failed, match="no request"):
        child.ask({"say": {1, 2}})


def test_the_child_has_nothing_of_the_parents(child, monkeypatch):
    monkeypatch.setenv("SECRET", "value")
    inherited = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        state = child.ask({"state": None})
        assert child.ask({"open files": None}) == [0, 1, 2, 3, 4]
    finally:
        os.close(inherited)
    assert set(state["environment"]) <= {"LC_CTYPE"}, "what Python itself sets"
    assert Path(f"/proc/{child.pid}/environ").read_bytes() == b""
    assert state["isolated"] == 1 and "" not in state["path"] and os.getcwd() not in state["path"]
    assert state["uid"] != 0
    assert state["group"] and {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= set(state["blocked"])


def test_the_child_starts_nothing_and_writes_and_opens_nothing(child, tmp_path):
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    os.set_inheritable(log, True)
    assert child.ask({"fork": None}) in ("BlockingIOError", "OSError")
    assert child.ask({"thread": None}) == "RuntimeError"
    assert child.ask({"spawn": None}) in ("BlockingIOError", "OSError")
    assert child.ask({"write": str(tmp_path / "harm")}) == "OSError"
    assert child.ask({"read": "/etc/passwd"}) == "OSError"
    assert child.ask({"append": log}) == "OSError"
    os.close(log)
    assert os.listdir(tmp_path) == ["log"] and (tmp_path / "log").read_bytes() == b""


def test_a_child_that_may_open_files_reads_and_still_writes_none():
    limits = Limits(2**28, 1, 60, 2**20, opens_files=True)
    with Helper("helper_answers", limits) as helper, tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o666)
        assert helper.ask({"read": "/etc/passwd"}) == Path("/etc/passwd").read_text()[:9]
        assert helper.ask({"write": file.name}) == "OSError", "the file is too large"
        assert Path(file.name).read_bytes() == b""


def test_the_limits_are_the_kernels_and_cannot_be_raised(child):
    found = child.ask({"state": None})["limits"]
    assert found["RLIMIT_AS"] == [2**28, 2**28]
    for name in ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC", "RLIMIT_NOFILE"):
        assert found[name] == [0, 0], name
    assert 1 <= found["RLIMIT_CPU"][0] <= 4


def test_what_the_child_prints_goes_nowhere_and_the_next_answer_is_right(child, capfd):
    assert child.ask({"print": "harm\n"}) == "printed"
    assert child.ask({"say": "next"}) == "next"
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_module_is_that_requests_alone(child):
    child.ask({"say": 1})
    pid = child.pid
    with pytest.raises(Failed, match="ZeroDivisionError division by zero"):
        child.ask({"fail": None})
    with pytest.raises(Failed, match="too much memory"):
        child.ask({"allocate": None})
    assert child.ask({"say": 2}) == 2 and child.pid == pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"loop": None}, "more than 1 s of the processor's time"),
        ({"text": 2**21}, "its answer has more than 1048576 bytes"),
        ({"exit": 3}, "ended with code 3"),
        ({"kill": None}, "was ended by SIGKILL"),
    ],
)
def test_a_child_that_ends_is_one_requests_error_and_starts_again(child, request_, words):
    child.ask({"say": 1})
    pid, started = child.pid, time.monotonic()
    with pytest.raises(Failed, match=words):
        child.ask(request_)
    assert gone(pid) and time.monotonic() - started < 30
    assert child.ask({"say": "again"}) == "again" and child.pid not in (None, pid)


@pytest.mark.slow
def test_a_child_that_uses_no_processor_is_ended_by_the_clock():
    with Helper("helper_answers", Limits(2**28, 60, 1, 2**20)) as helper:
        with pytest.raises(Failed, match="it took more than 1 s"):
            helper.ask({"sleep": 60})
        assert helper.ask({"say": 1}) == 1


def test_after_three_ends_nothing_is_answered_any_more(child):
    for number in range(MOST_ENDS):
        assert child.ask({"say": number}) == number and not child.given_up
        with pytest.raises(Failed, match="code 3"):
            child.ask({"exit": 3})
    for _ in range(2):
        with pytest.raises(Failed, match="it ended 3 times; its process ended with code 3"):
            child.ask({"say": 1})
    assert child.given_up and child.pid is None


def test_a_child_ended_from_outside_between_two_requests_costs_none(child):
    child.ask({"say": 1})
    os.kill(child.pid, signal.SIGKILL)
    assert gone(child.pid)
    assert child.ask({"say": 2}) == 2


def test_the_stop_signals_of_a_job_do_not_reach_the_child(child):
    child.ask({"say": 1})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(child.pid, number)
    pid = child.pid
    assert child.ask({"say": 2}) == 2 and child.pid == pid


PARENT = """
import os, sys, threading
from noria.tools.helper import Helper
from noria.tools.helper_process import Limits
helper = Helper("helper_answers", Limits(2**28, 60, 60, 2**20))
helper.ask({"say": 1})
print(helper.pid, flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=helper.ask, args=({"loop": None},), daemon=True).start()
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_child_dies_with_its_parent_however_that_ends(state):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, state], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    assert gone(pid)


def test_the_child_outlives_the_thread_that_started_it(child):
    thread = threading.Thread(target=child.ask, args=({"say": 1},))
    thread.start()
    thread.join()
    pid = child.pid
    time.sleep(0.05)
    assert child.ask({"say": 2}) == 2 and child.pid == pid


def test_closing_ends_the_child_and_so_does_forgetting_the_helper():
    helper = Helper("helper_answers", LIMITS)
    helper.ask({"say": 1})
    first = helper.pid
    helper.close()
    assert gone(first) and helper.ask({"say": 2}) == 2
    second = helper.pid
    del helper
    assert gone(second)


def test_the_start_is_not_waited_for_and_a_failed_one_shows_at_the_first_request(child, no_processes):
    child.start()
    assert child.pid is None
    assert child.ask({"say": 1}) == 1


def test_the_child_is_started_by_exec_and_this_process_never_forks(child, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a fork"))
    started = time.perf_counter()
    child.start()
    assert child.pid and time.perf_counter() - started < 0.1
    assert child.ask({"say": 1}) == 1
    assert Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-I", b"-S"]


# Where no process can be made.


def test_where_no_process_can_be_made_this_one_answers(child, no_processes):
    for value in TEXTS:
        assert child.ask({"say": value}) == value
    assert child.pid is None
    with pytest.raises(Failed, match="ZeroDivisionError"):
        child.ask({"fail": None})
    with pytest.raises(Failed, match="its answer has more than"):
        child.ask({"text": 2**21})
    given = {"say": ["a"]}
    child.ask(given).append("b")
    assert given == {"say": ["a"]}


@pytest.mark.slow
def test_where_no_process_can_be_made_an_endless_answer_is_interrupted_and_after_three_none_is_tried(
    child, no_processes
):
    for _ in range(MOST_ENDS):
        with pytest.raises(Failed, match="it took more than 1 s"):
            child.ask({"loop": None})
    with pytest.raises(Failed, match="it ended 3 times"):
        child.ask({"say": 1})
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.2, "a thread goes on"


def test_an_interpreter_that_cannot_start_with_an_empty_environment_gets_the_path_of_its_library(
    child, monkeypatch, tmp_path
):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\n[ -n "$LD_LIBRARY_PATH" ] || exit 127\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    found = child.ask({"state": None})["environment"]  # PWD is the shell's, LC_CTYPE Python's own
    assert found["LD_LIBRARY_PATH"] == "/nowhere" and set(found) <= {"LD_LIBRARY_PATH", "PWD", "LC_CTYPE", "_"}
    assert child.pid


def test_an_interpreter_that_cannot_start_at_all_leaves_it_to_this_process(child, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert child.ask({"say": 1}) == 1 and child.pid is None


def test_what_ended_a_child_is_not_tried_in_this_process(child, monkeypatch):
    child.ask({"say": 1})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Failed, match="code 3"):
        child.ask({"exit": 3})
    monkeypatch.setattr(helper_answers, "answer", pytest.fail)
    with pytest.raises(Failed, match="no other process could be started"):
        child.ask({"say": 2})


REFUSED = """
import os, resource
from noria.tools.helper import Failed, Helper
from noria.tools.helper_process import Limits
helper = Helper("helper_answers", Limits(2**28, 1, 3, 2**20))
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
import helper_answers
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    print(helper.ask({"say": "here"}), helper.pid)
except Failed as error:
    print(error)
"""


def test_a_job_whose_processes_are_all_used_up_has_no_child():
    """A real limit: the thread of the answer is refused as well, and that is the request's error."""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "neither a process nor a thread can be started: RuntimeError can't start new thread\n"
