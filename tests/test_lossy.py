"""What is said may be lost: the terminal gone, the disk full, the reader dead. The work goes on, and its exit code is its own."""

import contextlib
import errno
import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

import small_run
from forks import forked
from mpirun import describe, mpirun
from noria.__main__ import main
from noria.engine.stage import Stage
from noria.output.parts import parts_folder
from noria.output.sealed import scan
from noria.output.segments import read_segments
from noria.tools.lossy import lossy

FLOAT64 = ["--dtype", "float64"]
LOST = [errno.EIO, errno.ENOSPC, errno.EPIPE, errno.EBADF]


class Failing(io.StringIO):
    """Takes so many writes, then fails at each with this error."""

    def __init__(self, number, writes):
        super().__init__()
        self.number, self.left, self.failed = number, writes, 0

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            self.failed += 1
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("lost"))
    assert main(small_run.command(folder, "undisturbed.h5", *FLOAT64)) == 0
    return folder


@pytest.mark.parametrize("number", LOST)
def test_a_stream_takes_what_it_can_and_loses_the_rest_without_an_error(number):
    stream = Failing(number, 1)
    said = lossy(stream)
    assert [said.write("one\n"), said.write("two\n")] == [4, 4]
    said.flush()
    print("three", file=said)
    assert stream.getvalue() == "one\n" and stream.failed


def test_a_closed_stream_loses_what_is_said_and_an_error_of_the_program_is_none_of_the_stream():
    stream = io.StringIO()
    said = lossy(stream)
    with pytest.raises(TypeError):
        said.write(5)
    stream.close()
    said.write("lost")
    said.flush()


def test_a_stream_that_could_not_wait_takes_the_next_line():
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    with open(write, "w", buffering=1) as stream, open(read, "rb", buffering=0) as reader:
        said = lossy(stream)
        for _ in range(100):
            said.write("x" * 4095 + "\n")
        while reader.read(65536):
            pass
        said.write("the last\n")
        said.flush()
        assert reader.read(65536).endswith(b"the last\n")


def test_a_lost_stream_leads_nowhere_for_others_too():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream:
        lossy(stream).write("lost\n")
        assert os.write(stream.fileno(), b"what a library says") == 19
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))


HELD = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
from noria.tools.lossy import hold_standard_streams
hold_standard_streams()
os._exit(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY))
"""


def test_no_file_of_a_run_gets_the_number_of_a_standard_stream_that_was_closed(tmp_path):
    assert subprocess.run([sys.executable, "-c", HELD, tmp_path / "file"]).returncode >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "writes"), [(errno.EIO, 0), (errno.ENOSPC, 3), (errno.EPIPE, 5)])
def test_a_run_goes_on_without_its_log(folder, monkeypatch, number, writes):
    output = f"{errno.errorcode[number]}.h5"
    stream = Failing(number, writes)
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(small_run.command(folder, output, *FLOAT64)) == 0
    assert stream.failed and small_run.rows_of(folder / output) == small_run.rows_of(folder / "undisturbed.h5")


@pytest.mark.slow
def test_a_run_without_a_log_that_is_stopped_seals_its_rows_and_records_its_end(folder, monkeypatch):
    forward, visits = Stage.forward, []

    def stopped(self, *arguments):
        visits.append(1)
        if len(visits) == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.3)
        return forward(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Failing(errno.EIO, 2))
        patched.setattr(Stage, "forward", stopped)
        assert main(small_run.command(folder, "stopped.h5", *FLOAT64)) == 75
    parts = parts_folder(folder / "stopped.h5")
    assert read_segments(parts)[-1]["ended"] == "SIGUSR1"
    assert sum(len(part.row) for part in scan(parts)) == small_run.NUM_ROWS
    assert main(small_run.command(folder, "stopped.h5", *FLOAT64)) == 0
    assert small_run.rows_of(folder / "stopped.h5") == small_run.rows_of(folder / "undisturbed.h5")


def test_what_the_user_did_wrong_is_2_though_nobody_can_be_told(folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Failing(errno.ENOSPC, 0))
    assert main(small_run.command(folder, "wrong.h5", "--max-new-tokens", "-1")) == 2
    assert main(["export", str(folder / "no.h5"), str(folder / "no.jsonl")]) == 2


FULL = ["bash", "-c", 'exec "$@" >/dev/full 2>&1', "bash"]
CLOSED = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"]


@pytest.mark.slow
def test_a_run_alone_ends_with_its_own_exit_code_on_a_full_disk_of_logs(folder):
    command = forked(["noria", *small_run.command(folder, "full.h5", *FLOAT64)])
    assert subprocess.run([*FULL, *command], timeout=60).returncode == 0
    assert small_run.rows_of(folder / "full.h5") == small_run.rows_of(folder / "undisturbed.h5")


@pytest.mark.slow
def test_a_run_alone_ends_with_its_own_exit_code_without_any_stream(folder):
    command = [sys.executable, "-m", "noria", *small_run.command(folder, "closed.h5", *FLOAT64)]  # a fork has them all
    assert subprocess.run([*CLOSED, *command], timeout=60).returncode == 0
    assert small_run.rows_of(folder / "closed.h5") == small_run.rows_of(folder / "undisturbed.h5")


@pytest.mark.slow
@pytest.mark.mpi
def test_ranks_end_with_their_own_exit_code_on_a_full_disk_of_logs(folder):
    done = mpirun(2, [*FULL, *forked(["noria", *small_run.command(folder, "full2.h5", *FLOAT64)])])
    assert done.returncode == 0, describe(done)
    assert small_run.rows_of(folder / "full2.h5") == small_run.rows_of(folder / "undisturbed.h5")


@pytest.mark.slow
def test_a_run_outlives_its_terminal_if_nobody_signals_it(folder):
    """The bar is on the terminal, which goes away while rows are generated."""
    ours, theirs = pty.openpty()
    more = ["--groups", "1", "--step-tokens", "4", "--max-new-tokens", "60"]
    command = forked(["noria", *small_run.command(folder, "terminal.h5", *FLOAT64, *more)])
    run = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen, end = b"", time.monotonic() + 60
    while b"plan: rank 0" not in seen and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen += os.read(ours, 65536)
    os.close(ours)
    assert run.wait(60) == 0 and b"plan: rank 0" in seen
    assert small_run.rows_of(folder / "terminal.h5")
