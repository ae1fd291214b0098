"""The helper that the multi-rank tests rely on."""

import os
import sys
import time

import psutil
import pytest

from mpirun import RanksHung, mpirun

pytestmark = pytest.mark.mpi


def python(code):
    return [sys.executable, "-c", code]


def still_runs(pid, patience=5):
    """Whether a killed process is there after `patience` seconds; a zombie that init has not collected does not count."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.05)
    return True


def test_two_ranks_are_one_world_with_one_thread_each():
    code = "import os; from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.size, c.rank, os.environ['OMP_NUM_THREADS'])"
    result = mpirun(2, python(code), fresh=True)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["2 0 1", "2 1 1"]


def test_more_ranks_than_cores_start():
    num_ranks = (os.cpu_count() or 1) + 1
    result = mpirun(num_ranks, ["true"])
    assert result.returncode == 0, result.stderr


def test_the_exit_code_of_a_rank_comes_through():
    assert mpirun(1, python("raise SystemExit(75)"), fresh=True).returncode == 75


@pytest.mark.slow
def test_ranks_that_hang_fail_with_their_output_and_are_gone():
    ignore_sigterm = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"import os, signal, time; {ignore_sigterm}; print(os.getpid(), flush=True); time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(RanksHung) as caught:
        mpirun(2, python(code), timeout=3, fresh=True)
    assert time.monotonic() - start < 20
    printed = str(caught.value).split("--- stdout\n")[1].split("--- stderr")[0]
    pids = [int(line) for line in printed.split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if still_runs(pid)]


@pytest.mark.slow
def test_nothing_that_a_rank_started_outlives_the_call_and_it_is_told(monkeypatch):
    monkeypatch.setattr("mpirun.ORPHAN_SECONDS", 0.5)
    result = mpirun(1, ["bash", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!"])
    assert result.returncode == 0, result.stderr
    assert not still_runs(int(result.stdout))
    assert result.orphans == [int(result.stdout)] and mpirun(1, ["true"]).orphans == []
