"""The ring among real ranks, and what its pieces do in one process."""

import contextlib
import json
import mmap
import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ring_worker
import torch

import world
from mpirun import describe, mpirun
from noria import transports
from noria.bundle import of_hidden
from noria.errors import InputError
from noria.order import Place
from noria.ring import communication as communication_module
from noria.ring.base import RingShape
from noria.ring.communication import Communication, CommunicationError
from noria.ring.messages import Answer, Hidden
from noria.ring.ring import open_ring
from noria.step import Result, Step
from noria.streams import streams_of

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def ranks(num_ranks, *argv, timeout=60, code=0):
    result = mpirun(num_ranks, [sys.executable, *argv], timeout=timeout)
    assert result.returncode == code, describe(result)
    return result.stdout


@pytest.fixture(scope="module")
def wrong():
    """How many inputs and results were wrong in each case of the ring's worker, by the case's name."""
    counts = world.call(4, ring_worker.cases, timeout=150)
    return {name: sum(count[name] for count in counts) for name in counts[0]}


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.parametrize("transport", ["mpi_device", "mpi_host"])
@pytest.mark.parametrize("laps", [1, 3])
@pytest.mark.parametrize("kind", ["groups=4", "groups=5", "blocking groups=2", "blocking groups=4"])
def test_every_rank_computes_from_the_right_hidden_states_though_sends_wait_for_their_receives(
    wrong, transport, laps, kind
):
    *blocking, groups = kind.split()
    assert wrong[" ".join([transport, *blocking, f"laps={laps}", groups])] == 0


@pytest.mark.world
def test_a_late_transport_shows_a_wait_that_was_lost(wrong):
    assert wrong["late Ring"] == 0
    assert wrong["late Hasty"] > 0


@pytest.mark.world
@pytest.mark.parametrize("transport", ["mpi_device", "mpi_host"])
@pytest.mark.parametrize("blocking", [False, True])
def test_mpi_does_not_see_a_tensor_before_its_event_has_completed(wrong, transport, blocking):
    assert wrong[f"{transport} event=True blocking={blocking}"] == 0
    assert wrong[f"{transport} event=False blocking={blocking}"] == 4


@pytest.mark.slow
@pytest.mark.mpi
def test_an_error_in_the_communication_thread_reaches_the_waiting_main_thread():
    output = ranks(4, HERE / "mpi" / "ring_worker.py", code=9)
    assert "rank 1 heard: communication failed: OSError: broken wire; cause OSError" in output


@pytest.mark.alone
@pytest.mark.mpi
@pytest.mark.slow
def test_hops_overlap_with_stages_and_the_bubble_is_the_theorys():
    """Something else that uses the machine can only add idle time to a case, so each case has three tries."""
    missed, overlap = None, []
    for _ in range(3):
        figures = json.loads(ranks(4, HERE.parent / "jobs" / "bench" / "ring.py", "--rounds", "5", timeout=240))
        overlap.append(figures["overlap"]["ratio"])
        found = {
            (kind, case["groups"]): abs(case["idle"] - case["expected"])
            for kind in ("steady", "flushed")
            for case in figures[kind]
        }
        missed = {case: found[case] for case in (found if missed is None else missed) if found[case] > 0.05}
        if not missed and min(overlap) <= 1.15:
            break
    assert not missed and min(overlap) <= 1.15, (missed, overlap)


def test_a_wait_for_work_that_fails_raises_what_it_raised():
    def breaks():
        yield
        raise OSError("no route")

    def endless():
        while True:
            yield

    communication = Communication()
    other = communication.start(endless())
    with pytest.raises(CommunicationError, match="OSError: no route"):
        communication.start(breaks()).wait()
    for call in (other.wait, lambda: communication.start(endless()), communication.close, communication.ticket().wait):
        with pytest.raises(CommunicationError, match="no route"):
            call()


def test_while_a_thread_waits_polls_follow_each_other_without_a_pause(monkeypatch):
    pauses, seen, done = [], [], threading.Event()
    monkeypatch.setattr(communication_module, "pause", lambda idle: pauses.append(idle) or 1e-4)
    monkeypatch.setattr(communication_module, "EAGER", 0.0)

    def polled():
        while not done.is_set():
            yield

    def awaited():
        while len(seen) < 1000:
            seen.append((communication._num_waits, len(pauses)))
            yield

    communication = Communication(eager=60.0)
    communication.start(polled())
    while len(pauses) < 3:  # nobody waits
        time.sleep(1e-3)
    communication.start(awaited()).wait()
    done.set()
    communication.close()
    counts = {count for waits, count in seen if waits}
    assert len(counts) <= 2 and len(seen) == 1000, "a pause that had begun, and none later"


def test_a_thread_that_waits_where_no_core_is_short_polls_without_giving_its_own_away(monkeypatch):
    rests, left = [], [1000]
    monkeypatch.setattr(communication_module, "_rest", lambda *_: rests.append(threading.current_thread().name))

    def awaited():
        while left[0]:
            left[0] -= 1
            yield

    for spins in (False, True):
        communication = Communication(eager=60.0, spins=spins)
        communication.start(awaited()).wait()
        communication.close()
        assert (threading.current_thread().name in rests) != spins
        rests.clear()
        left[0] = 1000


def test_work_that_goes_on_is_polled_without_a_pause_again(monkeypatch):
    pauses, seen, ready = [], [], threading.Event()
    monkeypatch.setattr(communication_module, "pause", lambda idle: pauses.append(idle) or 1e-4)
    monkeypatch.setattr(communication_module, "EAGER", 0.05)

    def work():
        while not ready.is_set():
            yield
        communication.moved()
        for _ in range(50):
            yield
            seen.append(len(pauses))

    communication = Communication()
    ticket = communication.start(work())
    while len(pauses) < 3:
        time.sleep(1e-3)
    ready.set()
    while not ticket.done:  # nobody waits for it
        time.sleep(1e-3)
    communication.close()
    assert len(set(seen)) == 1, "no pause after it went on"


@pytest.mark.parametrize("end", [Communication.close, Communication.abandon])
def test_the_main_thread_gives_the_interpreter_away_sooner_while_there_is_communication(end):
    """By default work would wait 5 ms for it at each of its steps, whenever the main thread runs Python."""
    before = sys.getswitchinterval()
    communication = Communication()
    assert (
        sys.getswitchinterval() == pytest.approx(communication_module.SWITCH) and before > communication_module.SWITCH
    )
    end(communication)
    assert sys.getswitchinterval() == before


def test_another_thread_can_end_a_wait():
    communication = Communication()
    ticket = communication.ticket()
    threading.Timer(0.1, communication.fail, [RuntimeError("walltime")]).start()
    with pytest.raises(CommunicationError, match="walltime"):
        ticket.wait()


def test_work_begins_in_the_order_in_which_it_was_handed_over_and_inner_work_at_once():
    begun = []

    def inner(name):
        begun.append(name)
        yield

    def outer(name):
        communication.start(inner(f"{name} inner"))
        begun.append(name)
        yield
        return name

    communication = Communication()
    tickets = [communication.start(outer(name)) for name in "abc"]
    assert [ticket.wait() for ticket in tickets] == ["a", "b", "c"]
    communication.close()
    assert begun == ["a inner", "a", "b inner", "b", "c inner", "c"]


def test_closing_waits_for_what_is_unfinished():
    gate = threading.Event()

    def waits():
        while not gate.is_set():
            yield

    communication = Communication()
    ticket = communication.start(waits())
    threading.Timer(0.1, gate.set).start()
    communication.close()
    assert ticket.done


def test_communication_calls_prepare_in_its_own_thread():
    threads = []
    Communication(lambda: threads.append(threading.current_thread().name)).close()
    assert threads == ["noria-communication"]


def alone(laps):
    return RingShape(Place(0, 1, 2, laps), (of_hidden(4, "float32"),) * laps, 8)


def test_one_rank_hands_over_to_itself_and_waits_for_the_result_only_when_it_asks_for_it():
    ring = open_ring(None, alone(laps=2), streams_of(CPU))
    waits = []

    class Event:
        def __init__(self, answer):
            self.answer = answer

        def synchronize(self):
            waits.append("waited")
            self.answer[0] = 5 + len(waits)

    for group in range(2):
        ring.send_header(Step(0, group, token_ids=np.zeros(3, np.int32)))
        hidden = torch.full((3, 4), float(group))
        assert ring.send(group, 0, Hidden((hidden,))) == 0, "bytes that leave the rank"
        hidden.zero_()  # the caller's again
    for group in range(2):
        (received,) = ring.receive(group, 1, 3).arrays
        assert torch.equal(received, torch.full((3, 4), float(group)))
        ids = np.zeros(1, np.int64)
        ring.send_result(group, Answer(Result(ids), Event(ids)))
    assert not waits
    assert [ring.receive_result(group).token_ids.tolist() for group in range(2)] == [[6], [7]]
    ring.close()


def test_a_blocking_ring_of_one_rank_is_refused():
    with pytest.raises(InputError, match="needs 2 <= groups <= ranks"):
        open_ring(None, alone(laps=1), streams_of(CPU), blocking=True)


class TwoRanks:
    """A communicator whose other rank says the same."""

    def Get_size(self):
        return 2

    def allgather(self, value):
        return [value, value]


def test_a_mapped_file_whose_name_is_no_text_does_not_keep_mpi_from_being_looked_at(tmp_path):
    path = os.fsencode(tmp_path) + b"/m\xfcll"
    with open(path, "wb+") as file:
        file.write(bytes(4096))
        file.flush()
        with mmap.mmap(file.fileno(), 4096):
            assert b"m\xfcll" in Path("/proc/self/maps").read_bytes()
            assert transports.cuda_sign() is None


@pytest.mark.parametrize(
    ("device", "requested", "sign", "failure", "name", "reason"),
    [
        ("cpu", "auto", None, None, "mpi_device", "CPU memory"),
        ("cpu", "mpi_host", None, None, "mpi_host", "as requested"),
        ("cuda", "auto", "UCX with its CUDA module", None, "mpi_device", "UCX with its CUDA module"),
        (
            "cuda",
            "auto",
            "UCX with its CUDA module",
            "3 bytes arrived wrong",
            "mpi_host",
            "3 bytes arrived wrong.*libucx",
        ),
        ("cuda", "auto", None, None, "mpi_host", "not say it is CUDA-aware on ranks 0, 1: .*libucx"),
        ("cuda", "mpi_host", "UCX with its CUDA module", None, "mpi_host", "as requested"),
        ("cuda", "mpi_device", "UCX with its CUDA module", None, "mpi_device", "trial"),
        ("cuda", "mpi_device", "UCX with its CUDA module", "3 bytes arrived wrong", None, "3 bytes arrived wrong"),
        ("cuda", "mpi_device", None, None, None, "not say it is CUDA-aware"),
    ],
)
def test_auto_takes_what_the_trial_allows_and_an_explicit_choice_is_never_replaced(
    monkeypatch, device, requested, sign, failure, name, reason
):
    monkeypatch.setattr(transports, "cuda_sign", lambda: sign)
    monkeypatch.setattr(transports, "trial", lambda comm, device: failure)
    if name is None:
        with pytest.raises(InputError, match=f"transport is mpi_device.*{reason}.*mpi_host"):
            transports.choose(TwoRanks(), torch.device(device), requested)
        return
    chosen, why = transports.choose(TwoRanks(), torch.device(device), requested)
    assert chosen == name
    assert re.search(reason, why), why
    assert "\n" not in why


def test_one_rank_needs_no_transport():
    class OneRank:
        def Get_size(self):
            return 1

    name, _ = transports.choose(OneRank(), torch.device("cuda"), "mpi_device")
    assert transports.open_transport(name, OneRank(), CPU) is None


def test_whoever_waits_does_the_work_and_outside_its_own_modes():
    """From thread to thread takes longer than most messages."""
    seen, modes = [], []

    @contextlib.contextmanager
    def outside():
        modes.append("in")
        yield
        modes.append("out")

    def work():
        for _ in range(200):
            seen.append((threading.current_thread().name, len(modes) % 2))
            yield

    communication = Communication(outside=outside)
    communication.start(work()).wait()
    communication.close()
    mine = [mode for name, mode in seen if name == threading.current_thread().name]
    assert len(mine) > 190 and set(mine) == {1}


def test_work_that_is_begun_while_other_work_waits_takes_its_first_step_in_the_thread_that_begins_it():
    stepped, done = [], threading.Event()

    def waits():
        while not done.is_set():
            yield

    def begins():
        stepped.append(threading.current_thread().name)
        yield

    communication = Communication()
    communication.start(waits())
    while not communication._live:
        time.sleep(1e-3)
    for _ in range(20):
        communication.start(begins())
        time.sleep(1e-3)
    done.set()
    communication.close()
    assert stepped.count(threading.current_thread().name) > 10, "but where the thread is at it"
