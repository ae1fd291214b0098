"""The lock of an output: one holder, known by name, gone with its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from forks import forked
from noria.errors import InputError
from noria.tools import lock as lock_module
from noria.tools.lock import OutputLock, lock_path

HOLDER = {"job": "17", "host": "node3", "process": 4711, "start": "2026-11-23T03:15:02Z"}
HOLD = """
import sys, time
from noria.tools.lock import OutputLock
lock = OutputLock(sys.argv[1], {"job": "", "host": "node4", "process": 5, "start": "then"}, print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        forked([sys.executable, "-c", HOLD, tmp_path / "run.h5"]), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def take(tmp_path):
    return OutputLock(tmp_path / "run.h5", HOLDER, print)


def test_a_lock_says_who_holds_it_and_leaves_nothing_behind(tmp_path):
    with take(tmp_path) as lock:
        assert '"job": "17"' in lock_path(tmp_path / "run.h5").read_text()
    assert list(tmp_path.iterdir()) == []
    lock.close()


def test_another_process_is_refused_with_the_holders_words(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    with pytest.raises(
        InputError, match=r"run\.h5 is being written by a run on node4 \(process 5, since then\): wait for it"
    ):
        take(tmp_path)


def test_a_holder_that_is_killed_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_path(tmp_path / "run.h5").exists()
    take(tmp_path).close()


def test_a_holder_that_is_still_ending_is_waited_for(tmp_path, holder):
    ending = threading.Timer(0.5, holder.kill)
    ending.start()
    take(tmp_path).close()
    ending.join()
    assert holder.wait(5) == -signal.SIGKILL


def test_words_that_cannot_be_read_are_no_reason_to_go_on(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    lock_path(tmp_path / "run.h5").write_text("[]")
    with pytest.raises(InputError, match="is being written by another job"):
        take(tmp_path)


def test_a_file_that_its_holder_took_away_in_the_meantime_is_not_the_lock(tmp_path, monkeypatch):
    lockf, first = fcntl.lockf, [True]

    def late(handle, operation):
        lockf(handle, operation)
        if first.pop() if first else False:
            os.unlink(lock_path(tmp_path / "run.h5"))

    monkeypatch.setattr(fcntl, "lockf", late)
    with take(tmp_path):
        assert lock_path(tmp_path / "run.h5").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, code):
    said = []

    def no_locks(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    OutputLock(tmp_path / "run.h5", HOLDER, said.append).close()
    assert said == [f"{tmp_path} has no file locks: a second job on {tmp_path / 'run.h5'} would not be noticed"]


def test_a_lock_that_fails_is_one_line(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", broken)
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(InputError, match=r"run\.h5\.lock cannot be locked \(input/output error\): ask who"):
        take(tmp_path)


def test_a_full_disk_takes_the_words_of_a_lock_and_not_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with take(tmp_path) as lock:
        assert lock.held


def test_a_file_that_is_no_lock_is_not_written_over(tmp_path):
    path = tmp_path / "run.h5.lock"
    path.write_text("my notes")
    with pytest.raises(InputError, match="run.h5.lock, where the lock goes, is no lock but another file: move it away"):
        OutputLock(tmp_path / "run.h5", {"job": "1"}, print)
    assert path.read_text() == "my notes"
    for left in ("", '{"job": "17", "ho'):
        path.write_text(left)
        OutputLock(tmp_path / "run.h5", {"job": "1"}, print).close()
        assert not path.exists()
