"""What is asked of MPI before it is trusted: its thread level, and a trial whose late messages do no harm."""

import subprocess
import sys
import types

import pytest

from mpirun import describe, mpirun
from noria.launch import mpi


def an_mpi(level):
    """A module in the place of mpi4py.MPI, of two ranks."""
    module = types.ModuleType("mpi4py.MPI")
    module.THREAD_SINGLE, module.THREAD_FUNNELED, module.THREAD_SERIALIZED, module.THREAD_MULTIPLE = range(4)
    module.Query_thread = lambda: level
    module.COMM_WORLD = types.SimpleNamespace(Get_size=lambda: 2)
    return module


@pytest.mark.parametrize(("level", "name"), [(0, "SINGLE"), (1, "FUNNELED"), (2, "SERIALIZED")])
def test_an_mpi_that_several_threads_may_not_use_is_refused(monkeypatch, level, name):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", an_mpi(level))
    with pytest.raises(mpi.Refused, match=f"the thread level {name}, Noria needs MULTIPLE: .*MPI4PY_RC_THREAD_LEVEL"):
        mpi.start()


def test_an_mpi_that_all_threads_may_use_is_taken(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", an_mpi(3))
    assert mpi.start().Get_size() == 2


@pytest.mark.slow
@pytest.mark.mpi
def test_a_job_whose_mpi_was_started_for_one_thread_ends_with_one_line():
    start = "from noria.launch import mpi; mpi.start()"
    done = mpirun(2, [sys.executable, "-c", start], env={"MPI4PY_RC_THREAD_LEVEL": "single"})
    assert done.returncode == 1 and "mpi.Refused: MPI gives this process the thread level" in done.stderr, describe(
        done
    )


LATE = """
import gc, weakref
import torch
from mpi4py import MPI
from noria import transports
from noria.transports import mpi_device

made, opened, zeros = [], [], torch.zeros
class Late(mpi_device.MpiDevice):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        opened.append(self)
    def send(self, *arguments):
        while True:
            yield
mpi_device.TRANSPORT = Late
torch.zeros = lambda *shape, **more: made.append(weakref.ref(tensor := zeros(*shape, **more))) or tensor
transports.TRIAL_SECONDS = 0.05
print(transports.trial(MPI.COMM_SELF, torch.device("cpu")))
torch.zeros = zeros
gc.collect()
assert made[0]() is not None, "MPI would write to memory that is gone"
message = torch.full((len(made[0]()),), 7, dtype=torch.uint8)
opened[0].comm.Send(mpi_device.message(message), 0, 0)
assert torch.equal(made[0](), message)
"""


@pytest.mark.slow
def test_the_memory_of_a_trial_that_timed_out_stays_for_the_message_that_comes_late():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the trial exchange failed on rank 0: 16384 bytes did not arrive within 0 s\n"
