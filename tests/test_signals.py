"""Signals to any rank, and to the launcher: whoever gets one, rank 0 seals and says so, and the job goes on later."""

import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

import small_run
from mpirun import describe, mpirun
from noria.__main__ import main
from noria.launch.notices import Notices
from noria.launch.signals import Signals
from noria.output.parts import Parts, parts_folder
from noria.output.segments import read_segments

WORKER = Path(__file__).parent / "mpi" / "stopping_worker.py"
FLOAT64 = ["--dtype", "float64"]
LONG = ["--max-new-tokens", "200", "--seal-seconds", "600"]  # 4 s of visits: nobody is late with a signal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("signals"))
    assert main(small_run.command(folder, "undisturbed.h5", *FLOAT64, *LONG)) == 0
    return folder


def find(mark, rank):
    """The process of this rank of a launch, or None; the launcher itself for rank None."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                one.split(b"=", 1) for one in (process / "environ").read_bytes().split(b"\0") if b"=" in one
            )
            name = (process / "comm").read_text().strip()
        except OSError:
            continue
        if variables.get(b"NORIA_TEST_SIGNALS") != mark.encode():
            continue
        its_rank = variables.get(b"OMPI_COMM_WORLD_RANK")
        if (rank is None and name in ("mpirun", "prterun")) or (rank is not None and its_rank == str(rank).encode()):
            return int(process.name)
    return None


def signalled(folder, output, rank, *numbers, num_ranks=2):
    """A run in which these signals go to a rank, or to the launcher (None), once it decodes."""
    happened, mark = folder / f"{output}.happened", uuid.uuid4().hex
    arguments = [sys.executable, WORKER, "decode", "nothing", 0, *small_run.command(folder, output, *FLOAT64, *LONG)]
    variables = {"NORIA_TEST_HAPPENED": str(happened), "NORIA_TEST_SIGNALS": mark}
    ended = []
    launch = threading.Thread(target=lambda: ended.append(mpirun(num_ranks, arguments, 60, variables, fresh=True)))
    launch.start()
    limit = time.monotonic() + 40
    while not happened.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    for number in numbers:
        process = find(mark, rank)
        assert process is not None or number is not numbers[0], "the signal found nobody"
        if process is not None:  # a later one may come after the end
            os.kill(process, number)
        time.sleep(0.8)
    launch.join()
    return ended[0]


def begun(folder, output):
    return {row: one.token_ids.tolist() for (row, _), one in Parts(folder / output, {}).unfinished().items()}


def goes_on(folder, output):
    whole = {number: row[2] for number, row in enumerate(small_run.rows_of(folder / "undisturbed.h5"))}
    half_way = begun(folder, output)
    assert len(half_way) == small_run.NUM_ROWS and all(half_way.values())
    assert {row: whole[row][: len(tokens)] for row, tokens in half_way.items()} == half_way
    assert main(small_run.command(folder, output, *FLOAT64, *LONG)) == 0
    assert small_run.rows_of(folder / output) == small_run.rows_of(folder / "undisturbed.h5")


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ([signal.SIGUSR1], 75, "SIGUSR1"),
        ([signal.SIGTERM], 1, "SIGTERM"),
        ([signal.SIGXCPU], 75, "SIGXCPU"),
        ([signal.SIGINT], 1, "SIGTERM"),  # what the launcher makes of it for its ranks
        ([signal.SIGHUP], 1, "SIGTERM"),
    ],
    ids=lambda value: value[0].name if isinstance(value, list) else None,
)
def test_a_signal_to_the_launcher_is_answered_in_words_and_with_sealed_rows(folder, numbers, code, said):
    output = f"launcher{numbers[0].name}.h5"
    done = signalled(folder, output, None, *numbers)
    assert done.returncode == code, describe(done)
    words = f"stopping ({said}): 0 finished rows and {small_run.NUM_ROWS} rows half-way are sealed"
    assert done.stderr.count(words) == 1, describe(done)
    assert read_segments(parts_folder(folder / output))[-1]["ended"] == said
    goes_on(folder, output)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("rank", "numbers", "code", "reason"),
    [
        (1, [signal.SIGTERM], 75, "SIGTERM at rank 1"),
        (1, [signal.SIGINT, signal.SIGINT], 75, "SIGINT at rank 1"),
        (0, [signal.SIGTERM, signal.SIGUSR1], 75, "SIGTERM"),
    ],
)
def test_a_signal_to_one_rank_stops_the_job_in_order_whichever_rank_it_is(folder, rank, numbers, code, reason):
    output = f"rank{rank}{numbers[0].name}.h5"
    done = signalled(folder, output, rank, *numbers)
    assert done.returncode == code, describe(done)
    words = f"stopping ({reason}): 0 finished rows and {small_run.NUM_ROWS} rows half-way are sealed"
    assert done.stderr.count(words) == 1 and "interrupted again" not in done.stderr, describe(done)
    assert read_segments(parts_folder(folder / output))[-1]["ended"] == reason
    goes_on(folder, output)


class TwoRanks:
    """A communicator of two ranks in one process, whose messages wait here."""

    def __init__(self, rank, sent):
        self._rank, self._sent = rank, sent

    def Get_rank(self):
        return self._rank

    def Get_size(self):
        return 2

    def Split(self, color, key):
        return self

    def send(self, value, dest, tag):
        self._sent.append(value)

    def iprobe(self, tag):
        return bool(self._sent)

    def recv(self, tag):
        return self._sent.pop(0)


def test_what_another_rank_has_is_told_once_and_in_its_own_words():
    sent = []
    first = Notices(TwoRanks(0, sent), Signals())
    with first, Signals(is_first=False) as signals, Notices(TwoRanks(1, sent), signals):
        assert first.heard() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)  # twice, before the run listens: ends rank 0 alone
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGINT)
        limit = time.monotonic() + 5
        while len(sent) < 3 and time.monotonic() < limit:
            time.sleep(0.05)
        assert [first.heard() for _ in range(4)] == ["SIGUSR1 at rank 1", "SIGINT at rank 1", "SIGINT at rank 1", None]


def test_a_wake_ends_one_wait_where_there_is_no_pipe_too():
    signals = Signals()  # never entered, as in a thread
    signals.wake()
    began = time.monotonic()
    assert signals.wait(30) is None
    assert signals.wait(0.05) is None
    assert 0.05 <= time.monotonic() - began < 10
