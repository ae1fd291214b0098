"""A run as a child of a Python program: no rank of its caller's, heard, and stopped once."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from forks import forked
from noria.errors import InputError
from noria.launch import child

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_END_TIME": "9",
}
KEPT = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "PRTE_MCA_hwloc_default_binding_policy": "none", "TMPDIR": "/tmp"}
OF_A_RANK = {
    **dict.fromkeys(["PMI_RANK", "PMI_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER_URI41", "PMIX_BFROP_BUFFER_TYPE"], "1"),
    **dict.fromkeys(["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_UNIVERSE_SIZE", "OMPI_FILE_LOCATION"], "1"),
    **dict.fromkeys(["SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"], "1"),
    **dict.fromkeys(["SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID", "SLURM_SRUN_COMM_PORT", "SLURM_PTY_PORT"], "1"),
    **dict.fromkeys(["PALS_RANKID", "PALS_SIZE", "HYDI_CONTROL_FD", "MPI_LOCALRANKID", "SLURM_CPU_BIND"], "1"),
}  # fmt: skip
SETTINGS = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def test_what_launchers_tell_a_rank_is_taken_out_and_the_job_stays():
    assert child.environment(JOB | KEPT | OF_A_RANK | SETTINGS) == JOB | KEPT | SETTINGS
    own = {"OMPI_MCA_pml": "ucx"}  # a user's, where no mpirun set any
    assert child.environment(KEPT | own) == KEPT | own
    assert child.environment(OF_A_RANK | own) == {}


def test_every_variable_by_which_noria_knows_a_rank_is_taken_out():
    from noria.launch import mpi

    names = {*mpi.SIZE_VARIABLES, *mpi.RANK_VARIABLES, mpi.TERMINAL_OF_A_STEP}
    assert child.environment(dict.fromkeys(names, "1")) == {}


def test_one_rank_needs_no_mpirun_and_several_without_one_are_refused(monkeypatch, tmp_path):
    assert child.command(1, "run", "a.toml") == [sys.executable, "-m", "noria", "run", "a.toml"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(child.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(InputError, match="ranks = 2 needs mpirun"):
        child.command(2, "run", "a.toml")
    (tmp_path / "mpirun").write_text("")
    assert child.command(2, "run")[:3] == [str(tmp_path / "mpirun"), "-n", "2"]


def ran(code, *arguments):
    said = []
    ended = child.run_child(forked([sys.executable, "-c", code, *arguments]), said.append)
    return ended, "".join(said)


def test_what_a_child_says_comes_as_it_is_said_and_its_end_is_kept():
    ended, said = ran(
        "import sys\nfor n in range(99): print('line', n, file=(sys.stdout, sys.stderr)[n % 2], flush=True)\nsys.exit(7)"
    )
    assert (ended.code, ended.interrupted) == (7, False)
    assert said == "".join(f"line {number}\n" for number in range(99))
    assert ended.said == [f"line {number}" for number in range(69, 99)]


def test_a_child_has_a_session_and_an_environment_of_its_own(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OF_THE_USER", "kept")
    code = "import os; print(os.getsid(0) == os.getpid(), os.environ.get('OMPI_COMM_WORLD_SIZE'), os.environ['OF_THE_USER'])"
    ended = child.run_child([sys.executable, "-I", "-S", "-c", code], lambda text: None)
    assert ended.said == ["True None kept"]


def test_words_cut_in_a_character_and_bytes_that_are_no_text_are_heard():
    code = "import os, time\nfor piece in (b'caf\\xc3', b'\\xa9 ', b'\\xff end'): os.write(1, piece); time.sleep(0.05)"
    ended, said = ran(code)
    assert said == "café \ufffd end" and ended.said == [said]


def test_a_log_that_cannot_be_written_does_not_end_the_run():
    def broken(text):
        raise BrokenPipeError

    ended = child.run_child(forked([sys.executable, "-c", "print('words')"]), broken)
    assert (ended.code, ended.said) == (0, ["words"])


def test_a_child_is_not_waited_for_longer_because_another_process_holds_its_pipe():
    code = "import subprocess; subprocess.Popen(['sleep', '30'])"
    began = time.monotonic()
    ended, _ = ran(code)
    assert ended.code == 0 and time.monotonic() - began < 10


def test_a_program_with_a_thousand_open_files_hears_its_child():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, limits[1]), limits[1]))
    try:
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1030)]
        ended, said = ran("print('words')")
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (ended.code, said) == (0, "words\n")


HEEDS = """
import signal, sys, time
def heed(number, frame):
    print("heard", signal.Signals(number).name, flush=True)
    time.sleep(0.3)
    sys.exit(75)
signal.signal(signal.SIGUSR1, heed)
signal.signal(signal.SIGINT, heed)
print("ready", flush=True)
time.sleep(60)
"""
IGNORES = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""
PARENT = """
import sys
from noria.launch import child
try:
    print(child.run_child([sys.executable, "-c", sys.argv[1]], lambda text: print(text, end="", flush=True)))
except KeyboardInterrupt:
    print("interrupted twice")
"""


def interrupted(code, times):
    """What a program says whose child runs `code`, and which gets SIGINT when the child is ready, then when it has heard."""
    program = subprocess.Popen(forked([sys.executable, "-c", PARENT, code]), stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(60, program.kill)
    timer.start()
    said = []
    for line in program.stdout:
        said.append(line.strip())
        if line in ("ready\n", "heard\n") and times:
            times -= 1
            os.kill(program.pid, signal.SIGINT)
    timer.cancel()
    program.wait()
    return said


@pytest.mark.slow
def test_ctrl_c_stops_the_child_once_and_its_exit_code_is_kept():
    said = interrupted(HEEDS, 1)
    assert said[:2] == ["ready", "heard SIGUSR1"] and said[2].startswith("ChildEnd(code=75, interrupted=True"), said


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_child_that_does_not_stop():
    assert interrupted(IGNORES, 2) == ["ready", "heard", "interrupted twice"]
