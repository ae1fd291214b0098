"""What ends a job: who says what, and that it ends even where MPI's abort does not."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from forks import forked
from noria.launch import mpi, watchdog
from noria.launch.deadline import NONE, Deadline
from noria.launch.signals import Signals
from noria.launch.stopping import Stopping
from noria.launch.watchdog import Watchdog

HANGING = """
import threading, time
from noria.launch import mpi, watchdog
mpi.is_up, mpi.abort, watchdog.ABORT_SECONDS = (lambda: True), (lambda code: time.sleep(600)), 0.5
dog = watchdog.Watchdog()
dog.computes("stage 1 (layers 4-7)")
dog.begin(lambda: "computing in round 12")
{body}
"""


def end_of(body):
    """Exit code, stderr and seconds of a process whose MPI hangs in its abort."""
    began = time.monotonic()
    code = HANGING.format(body=body)
    done = subprocess.run(forked([sys.executable, "-c", code]), capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr, time.monotonic() - began


@pytest.mark.slow
def test_an_abort_that_hangs_is_ended_by_force():
    code, said, _ = end_of("dog.end('failed: the bucket has a hole', 7)")
    assert code == 7
    assert "rank=0/1 failed: the bucket has a hole" in said
    code, said, seconds = end_of(
        "dog.record_by(lambda why: (print('why:', why, flush=True), time.sleep(600)))\ndog.end('no', 7)"
    )
    assert code == 7 and seconds < 30, "a record that hangs is given up"
    assert f"rank=0/1 was on {Watchdog().host}, stage 1 (layers 4-7), computing in round 12" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "with dog:\n    thread = threading.Thread(target=lambda: 1 / 0)\n    thread.start()\n    time.sleep(600)",
        "dog.__enter__()\n1 / 0",
    ],
)
def test_an_exception_that_nobody_catches_ends_the_job_from_any_thread(body):
    code, said, _ = end_of(body)
    assert code == 1 and "failed: ZeroDivisionError: division by zero" in said and "Traceback" in said


def test_a_rank_with_an_error_does_not_wait_long_for_ranks_that_still_load(monkeypatch):
    monkeypatch.setattr(mpi, "HURRY_SECONDS", 0.1)
    heard = threading.Event()

    class Slow(mpi.Solo):
        def allgather(self, value):
            assert heard.wait(20), "nobody said what was wrong"
            return [value]

    def damaged():
        raise mpi.InputError("block layers/0001 is damaged")

    said = []
    with pytest.raises(mpi.Refused, match="block layers/0001 is damaged"):
        mpi.on_every_rank(Slow(), damaged, lambda words: said.append(words) or heard.set())
    assert said == ["block layers/0001 is damaged"]


class Recorder(Watchdog):
    """Ends nothing; notes what would have ended."""

    def __init__(self):
        super().__init__()
        self.said, self.ended = [], []

    def say(self, message, stream=None):
        self.said.append(message)

    def end(self, message, code, details=""):
        self.ended.append((message, code))


class Rows:
    """What a stop seals, in as long as `seal` takes."""

    def __init__(self, seal, tend=lambda: None):
        self._seal, self.tend = seal, tend

    def stop(self, reason):
        self._seal()
        return "everything is sealed", 0.0


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_ring_that_does_not_drain_is_ended_with_75(monkeypatch):
    monkeypatch.setattr("noria.launch.stopping.DRAIN_SECONDS", 0.2)
    dog = Recorder()
    with Stopping(Signals(), Deadline(time.time() + 2.5, "walltime 3"), dog) as stopping:
        stopping.serve(Rows(lambda: None))
        until(lambda: dog.ended)
    assert dog.said == ["stopping (walltime 3: 2 s are left): everything is sealed"]
    assert dog.ended[0] == ("stopped (walltime 3: 2 s are left): everything is sealed, but the ring did not drain", 75)


@pytest.mark.slow
def test_a_stop_is_told_and_a_second_interrupt_is_heard_while_the_disk_keeps_the_seal_waiting():
    dog, disk = Recorder(), threading.Event()
    with Signals() as signals, Stopping(signals, NONE, dog) as stopping:
        signals.attend()
        stopping.serve(Rows(lambda: disk.wait(60)))
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a terminal and a launcher hand on the same one
        time.sleep(0.7)
        assert not dog.ended
        signal.raise_signal(signal.SIGINT)
        until(lambda: dog.ended)
        assert dog.said == ["SIGUSR1: rows are being sealed; the same command continues with them"]
        disk.set()
        until(lambda: len(dog.said) > 1)
    assert dog.ended == [("stopped at once: interrupted again", 130)]
    assert dog.said[1:] == ["stopping (SIGUSR1): everything is sealed"]


@pytest.mark.slow
def test_a_long_merge_is_not_taken_for_a_ring_that_does_not_drain(monkeypatch):
    monkeypatch.setattr("noria.launch.stopping.DRAIN_SECONDS", 0.1)
    dog = Recorder()
    with Signals() as signals, Stopping(signals, NONE, dog) as stopping:
        stopping.serve(Rows(lambda: None))
        signal.raise_signal(signal.SIGTERM)
        until(lambda: dog.said)
        stopping.drained(complete=True)
        time.sleep(1.5)
    assert not dog.ended


@pytest.mark.slow
@pytest.mark.parametrize("sealed_first", [True, False])
def test_what_follows_a_ring_that_has_drained_may_take_long(monkeypatch, sealed_first):
    monkeypatch.setattr("noria.launch.stopping.DRAIN_SECONDS", 0.1)
    dog, disk = Recorder(), threading.Event()
    with Signals() as signals, Stopping(signals, NONE, dog) as stopping:
        stopping.serve(Rows(lambda: sealed_first or disk.wait(20)))
        signal.raise_signal(signal.SIGTERM)
        until(lambda: dog.said)
        stopping.drained(complete=False)
        disk.set()
        time.sleep(1.5)  # in which a trace of many ranks is written, say
    assert not dog.ended
    assert dog.said[-1] == "stopping (SIGTERM): everything is sealed", "and what is told is a stop, no merge"


@pytest.mark.parametrize(("left", "margin"), [(20, 2), (400, 20), (4000, 60), (float("inf"), 0)])
def test_a_run_stops_a_while_before_its_deadline(left, margin):
    deadline = NONE if left == float("inf") else Deadline(time.time() + left, "walltime")
    stopping = Stopping(Signals(), deadline, Recorder())
    assert stopping.margin == pytest.approx(margin, abs=0.1)


def test_signals_are_held_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.wait(5) is signal.SIGTERM
        assert signals.wait(0.01) is None
        signals.wake()
        assert signals.wait(5) is None
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before
    assert watchdog.ABORT_SECONDS == 5
