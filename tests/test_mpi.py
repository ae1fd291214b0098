"""What is asked of MPI before it is trusted: its thread level, and a trial whose late messages do no harm."""

import os
import subprocess
import sys
import types

import pytest

import small_run
from mpirun import describe, mpirun
from noria.__main__ import main
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


SHELL = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "PMI_SIZE": "4",
    "PMI_RANK": "0",
    "SLURM_PTY_PORT": "40000",
}


@pytest.fixture
def shell_of_a_step(monkeypatch):
    """The variables of `srun --ntasks=4 --pty bash`, and no MPI that could be started."""
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    return monkeypatch


def test_commands_of_one_process_work_in_the_shell_of_a_step(shell_of_a_step, tmp_path, capsys):
    folder = small_run.write_files(tmp_path)
    files = [
        "--model",
        str(folder / "model.h5"),
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--output",
        str(folder / "o.h5"),
    ]
    assert main(["inspect", str(folder / "model.h5")]) == 0
    assert main(["validate", *files]) == 0
    assert main(["plan", "--ranks", "2", *files]) == 0
    assert main(["export", str(folder / "o.h5"), str(folder / "o.jsonl")]) == 2, "its own error, without MPI"
    assert "o.h5" in capsys.readouterr().err
    shell_of_a_step.setenv("SLURM_PROCID", "1")
    shell_of_a_step.setenv("PMI_RANK", "1")
    assert main(["inspect", str(folder / "model.h5")]) == 2, "srun -n 4 noria inspect in that shell: once is enough"
    for name in ("SLURM_PTY_PORT", "PMI_RANK"):
        shell_of_a_step.delenv(name)
    shell_of_a_step.setenv("SLURM_PROCID", "0")
    shell_of_a_step.setattr(mpi, "start", lambda: None)
    assert main(["inspect", str(folder / "model.h5")]) == 2
    assert "is a program of one process: start it without mpirun (here 4 ranks)" in capsys.readouterr().err


def test_a_run_in_the_shell_of_a_step_says_how_to_start_it(shell_of_a_step):
    how = r"mpirun -n RANKS noria \.\.\. \(-n 1 for one\), or with srun --overlap --mpi=pmix -n RANKS noria"
    shell_of_a_step.setattr(mpi, "_is_a_shell", lambda: True)
    with pytest.raises(mpi.Refused, match=rf"^a step of 4 tasks gave this shell its terminal, .*{how}"):
        mpi.start()
    shell_of_a_step.setenv("OMPI_COMM_WORLD_SIZE", "1")  # mpirun -n 1 in that shell
    assert isinstance(mpi.start(), mpi.Solo) and not mpi.may_be_a_shell()


@pytest.mark.slow
@pytest.mark.parametrize(("parent", "found"), [("bash", True), ("slurmstepd", False)])
def test_a_shell_of_a_step_is_known_by_its_terminal_and_that_slurm_did_not_start_the_program(tmp_path, parent, found):
    """In a session of its own, with a terminal; the program's parent has this name."""
    program = (
        "import pty, os, sys, ctypes\n"
        "child, terminal = pty.fork()\n"
        "if child == 0:\n"
        f"    ctypes.CDLL(None).prctl(15, {parent.encode()!r}, 0, 0, 0)\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.spawnv(os.P_WAIT, sys.executable, [sys.executable, *sys.argv[1:]]) << 8))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    asks = "import sys; from noria.launch import mpi; sys.exit(10 + mpi._is_a_shell())"
    variables = os.environ | SHELL
    done = subprocess.run([sys.executable, "-c", program, "-c", asks], env=variables, timeout=60)
    assert done.returncode == 10 + found
    without = subprocess.run([sys.executable, "-c", asks], env=variables, start_new_session=True, timeout=60)
    assert without.returncode == 10, "a rank of a real step has no terminal"
