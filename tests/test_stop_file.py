"""A file beside the output stops a run in order; one from before means another run."""

import os
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

import small_run
from mpirun import describe, mpirun
from noria.__main__ import main
from noria.engine.stage import Stage
from noria.errors import InputError
from noria.launch.stop_file import StopFile
from noria.output.parts import parts_folder
from noria.output.sealed import scan
from noria.output.segments import read_segments

FLOAT64 = ["--dtype", "float64"]
WORKER = Path(__file__).parent / "mpi" / "stopping_worker.py"
LONG = ["--max-new-tokens", "200", "--seal-seconds", "600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("stop_file"))
    assert main(small_run.command(folder, "undisturbed.h5", *FLOAT64, *LONG)) == 0
    return folder


def test_a_stop_file_is_heard_once_and_is_gone_then(tmp_path):
    stop = StopFile(str(tmp_path / "run.h5"))
    assert stop.heard() is None
    (tmp_path / "run.h5.stop").touch()
    assert stop.heard() == "run.h5.stop was made"
    assert not list(tmp_path.iterdir()) and stop.heard() is None


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nowhere"), lambda path: path.write_text("a reason")])
def test_whatever_has_the_name_is_heard(tmp_path, make):
    make(tmp_path / "run.h5.stop")
    assert StopFile(str(tmp_path / "run.h5")).heard() == "run.h5.stop was made"
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_link_is_stopped_by_either_name(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run.h5").symlink_to("scratch/big.h5")
    stop = StopFile(str(tmp_path / "run.h5"))
    for name in ("run.h5.stop", "scratch/big.h5.stop"):
        (tmp_path / name).touch()
        assert stop.heard() == f"{Path(name).name} was made" and not (tmp_path / name).exists()


def test_a_file_that_cannot_be_removed_stops_the_run_and_refuses_the_next(tmp_path):
    (tmp_path / "run.h5.stop").mkdir()
    stop = StopFile(str(tmp_path / "run.h5"))
    assert stop.heard() == "run.h5.stop was made and cannot be removed (Is a directory): remove it before the next run"
    with pytest.raises(InputError, match=r"cannot be removed \(Is a directory\): remove it, and start"):
        stop.forget_old_ones(time.time() + 60, print)


def test_a_file_from_before_the_run_is_removed_and_said_and_a_later_one_stays(tmp_path):
    said, path = [], tmp_path / "run.h5.stop"
    stop = StopFile(str(tmp_path / "run.h5"))
    path.touch()
    began = path.stat().st_mtime
    os.utime(path, (began - 1, began - 1))
    assert stop.forget_old_ones(began, said.append)
    assert said == [f"{path} was there before this run began: it is removed, and the run continues"]
    path.touch()
    assert not stop.forget_old_ones(began, said.append)
    assert len(said) == 1 and path.exists()


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_old_files_are_told_by_the_clock_of_their_file_system_not_by_the_nodes(tmp_path, monkeypatch, ahead):
    said, path = [], tmp_path / "run.h5.stop"
    stop, here = StopFile(str(tmp_path / "run.h5")), time.time
    monkeypatch.setattr(time, "time", lambda: here() + ahead)  # of a node whose clock is not that of its file server
    path.touch()
    os.utime(path, (here() - 60, here() - 60))
    assert stop.forget_old_ones(time.time(), said.append) and not path.exists()
    began = time.time() - 60
    path.touch()
    assert not stop.forget_old_ones(began, said.append) and path.exists()
    assert len(said) == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_run_alone_is_stopped_by_a_file_within_a_step_and_two_seconds(folder, monkeypatch, capsys):
    forward, visits, at = Stage.forward, [], []
    stop = folder / "alone.h5.stop"

    def slowly(self, *arguments):
        visits.append(1)
        time.sleep(0.1)
        if len(visits) == 5:
            stop.touch()
            at.append(time.monotonic())
        return forward(self, *arguments)

    stop.touch()
    os.utime(stop, (1, 1))
    with monkeypatch.context() as patched:
        patched.setattr(Stage, "forward", slowly)
        assert main(small_run.command(folder, "alone.h5", *FLOAT64, *LONG)) == 75
    assert time.monotonic() - at[0] < 2.5 and not stop.exists()
    said = capsys.readouterr().err
    assert said.count("alone.h5.stop was there before this run began: it is removed, and the run continues") == 1
    assert f"stopping (alone.h5.stop was made): 0 finished rows and {small_run.NUM_ROWS} rows half-way" in said, said
    assert read_segments(parts_folder(folder / "alone.h5"))[-1]["ended"] == "alone.h5.stop was made"
    assert main(small_run.command(folder, "alone.h5", *FLOAT64, *LONG)) == 0
    assert small_run.rows_of(folder / "alone.h5") == small_run.rows_of(folder / "undisturbed.h5")


@pytest.mark.slow
@pytest.mark.mpi
def test_ranks_are_stopped_by_a_file_from_another_process(folder):
    happened = folder / f"happened-{uuid.uuid4().hex}"
    command = small_run.command(folder, "ranks.h5", *FLOAT64, *LONG)
    variables, made = {"NORIA_TEST_HAPPENED": str(happened)}, []

    def touch():
        while not happened.exists():
            time.sleep(0.05)
        (folder / "ranks.h5.stop").touch()
        made.append(time.time())

    threading.Thread(target=touch, daemon=True).start()
    done = mpirun(2, [sys.executable, WORKER, "decode", "nothing", 0, *command], env=variables)
    assert done.returncode == 75, describe(done)
    assert f"stopping (ranks.h5.stop was made): 0 finished rows and {small_run.NUM_ROWS} rows half-way" in done.stderr
    assert made and not (folder / "ranks.h5.stop").exists()
    assert sum(len(part.row) for part in scan(parts_folder(folder / "ranks.h5"))) == small_run.NUM_ROWS
    assert main(small_run.command(folder, "ranks.h5", *FLOAT64, *LONG)) == 0
    assert small_run.rows_of(folder / "ranks.h5") == small_run.rows_of(folder / "undisturbed.h5")
