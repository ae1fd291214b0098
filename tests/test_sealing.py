"""Rows are sealed beside the run, by a thread of their own: no step waits for the disk, and no stop for what is tended."""

import os
import threading
import time

import pytest

import noria.output.parts
import small_run
from noria.__main__ import main
from noria.desk.desk import Desk
from noria.engine.stage import Stage
from noria.launch.deadline import NONE
from noria.launch.signals import Signals
from noria.launch.stopping import Stopping
from noria.launch.watchdog import Watchdog
from noria.output.parts import Parts
from noria.tools.writing import write_error
from test_watchdog import Rows

OFTEN = ["--dtype", "float64", "--seal-seconds", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("sealing"))
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {1 + 2 * row}}}' for row, line in enumerate(lines)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")  # one ends after another
    assert main(small_run.command(folder, "undisturbed.h5", *OFTEN)) == 0
    return folder


def test_between_the_first_step_and_the_last_only_the_sealing_thread_waits_for_the_disk(folder, monkeypatch):
    happened, fsync = [], os.fsync

    def record(name, call):
        return lambda *arguments: happened.append((name, threading.current_thread().name)) or call(*arguments)

    monkeypatch.setattr(os, "fsync", record("fsync", lambda descriptor: time.sleep(0.02) or fsync(descriptor)))
    monkeypatch.setattr(Desk, "tick", record("tick", Desk.tick))
    assert main(small_run.command(folder, "beside.h5", *OFTEN)) == 0
    ticks = [place for place, (name, _) in enumerate(happened) if name == "tick"]
    between = [thread for name, thread in happened[ticks[0] : ticks[-1]] if name == "fsync"]
    assert between and set(between) == {"noria-sealing"}
    assert small_run.rows_of(folder / "beside.h5") == small_run.rows_of(folder / "undisturbed.h5")


def test_a_disk_that_does_not_keep_up_holds_the_run_before_too_many_rows_wait(folder, monkeypatch):
    waiting, add, fsync = [], Parts.add, os.fsync
    monkeypatch.setattr(noria.output.parts, "MAX_PENDING", 2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(0.1) or fsync(descriptor))
    monkeypatch.setattr(Parts, "add", lambda self, row: waiting.append(len(self.pending)) or add(self, row))
    assert main(small_run.command(folder, "slow.h5", *OFTEN, "--seal-seconds", "600")) == 0
    assert 2 <= max(waiting) <= 3, "a row at most ends in a step"
    assert small_run.rows_of(folder / "slow.h5") == small_run.rows_of(folder / "undisturbed.h5")


def test_what_the_sealing_thread_meets_with_ends_the_run_with_what_is_lost(folder, monkeypatch, capsys):
    write, forward, threads = noria.output.parts.write_whole, Stage.forward, []

    def full(path, data):
        threads.append(threading.current_thread().name)
        if len(threads) > 1:
            raise write_error(OSError(28, "No space left on device"), path, len(data))
        return write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(noria.output.parts, "write_whole", full)
        patched.setattr(Stage, "forward", lambda *arguments: time.sleep(0.05) or forward(*arguments))
        assert main(small_run.command(folder, "full.h5", *OFTEN)) == 1
    said = capsys.readouterr().err
    assert threads == ["noria-sealing"] * 2
    assert f"failed: {folder / 'full.h5.parts'}: no space left on device, " in said and "Traceback" not in said
    assert "could not be sealed, sealed rows are kept: make room and start the same run again" in said
    assert Parts(folder / "full.h5", {}).finished()
    assert main(small_run.command(folder, "full.h5", *OFTEN)) == 0
    assert small_run.rows_of(folder / "full.h5") == small_run.rows_of(folder / "undisturbed.h5")


def test_a_stop_seals_while_the_sealing_thread_is_at_something_long():
    at_it, go_on, sealed = threading.Event(), threading.Event(), threading.Event()
    stopping = Stopping(Signals(), NONE, Watchdog())
    stopping.serve(Rows(sealed.set, lambda: at_it.set() or go_on.wait(20)))
    with stopping:
        stopping.nudge()
        assert at_it.wait(5)
        stopping._stop("SIGTERM")
        assert sealed.wait(2), "the parts that are put together may be large"
        go_on.set()
