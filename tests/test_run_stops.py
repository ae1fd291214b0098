"""A run that is stopped seals what it has, says so, and goes on later as if nothing had been: whoever stopped it, wherever."""

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import noria.run
import noria.tools.lock
import small_run
from forks import forked
from mpirun import describe, environment, mpirun
from noria.__main__ import main
from noria.engine.stage import Stage
from noria.launch.signals import STOPS
from noria.output.parts import Parts, part_files, parts_folder
from noria.output.sealed import scan
from noria.output.segments import read_segments
from noria.rows.admission import Admission

WORKER = Path(__file__).parent / "mpi" / "stopping_worker.py"
SECONDS = 30
FLOAT64 = ["--dtype", "float64"]
HOLD = """
import sys, time
from noria.tools.lock import OutputLock
lock = OutputLock(sys.argv[1], {"job": "17", "host": "node3", "process": 4711, "start": "2026-11-23T03:15:02Z"}, print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("stops"))
    assert main(small_run.command(folder, "undisturbed.h5", *FLOAT64)) == 0
    return folder


def undisturbed(folder):
    return small_run.rows_of(folder / "undisturbed.h5")


def begun_rows(folder, output):
    """Row -> tokens of the rows that stopped half-way."""
    found = Parts(folder / output, {}).unfinished()
    return {row: begun.token_ids.tolist() for (row, _), begun in found.items()}


def many_lengths(folder):
    """Prompts whose rows end one after another."""
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {1 + 2 * row}}}' for row, line in enumerate(lines)]
    (folder / "lengths.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "lengths.jsonl"


def act_in_visit(monkeypatch, number, act, seconds=0.0):
    """Every visit takes so many seconds; in that one `act` is called."""
    forward, visits = Stage.forward, [0]

    def acting(self, *arguments):
        visits[0] += 1
        time.sleep(seconds)
        if visits[0] == number:
            act()
        return forward(self, *arguments)

    monkeypatch.setattr(Stage, "forward", acting)


def signal_twice(number):
    def act():
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    return act


# One rank, in this process.


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2], ids=lambda one: one.name
)
def test_rows_stopped_half_way_are_taken_up_and_end_with_the_same_tokens(folder, monkeypatch, capsys, number):
    output = f"{number.name}.h5"
    with monkeypatch.context() as patched:
        act_in_visit(patched, 9, signal_twice(number))
        assert main(small_run.command(folder, output, *FLOAT64)) == 75
    said = capsys.readouterr().err
    assert said.count("stopping (") == 1, said
    assert f"stopping ({number.name}): 0 finished rows and 12 rows half-way are sealed" in said
    assert "stopped with 12 rows of 12 left: start the same run again to go on" in said
    begun, whole = begun_rows(folder, output), undisturbed(folder)
    assert {row: whole[row][2][: len(tokens)] for row, tokens in begun.items()} == begun
    assert set(map(len, begun.values())) == {8} and set(begun) == set(range(small_run.NUM_ROWS))
    taken = []
    compose = Admission.compose
    monkeypatch.setattr(Admission, "compose", lambda *a: taken.append(compose(*a)) or taken[-1])
    assert main(small_run.command(folder, output, *FLOAT64)) == 0
    assert taken[0].counts.tolist() == [3 + 8] * small_run.NUM_ROWS, "prompt and partial output are prefilled together"
    assert small_run.rows_of(folder / output) == whole


@pytest.mark.slow
def test_signals_that_a_run_was_started_to_ignore_do_not_stop_it(folder, monkeypatch, capsys):
    def all_of_them():
        for number in STOPS:
            os.kill(os.getpid(), number)
        time.sleep(0.3)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        with monkeypatch.context() as patched:
            act_in_visit(patched, 9, all_of_them)
            assert main(small_run.command(folder, "ignoring.h5", *FLOAT64)) == 0
        assert {signal.getsignal(number) for number in STOPS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "stopping" not in capsys.readouterr().err
    assert small_run.rows_of(folder / "ignoring.h5") == undisturbed(folder)


@pytest.mark.slow
def test_a_run_stops_before_its_walltime_and_goes_on(folder, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        act_in_visit(patched, 0, None, seconds=0.5)
        began = time.monotonic()
        assert main(small_run.command(folder, "walltime.h5", *FLOAT64, "--walltime", "00:00:05")) == 75
    assert time.monotonic() - began < 5
    assert "stopping (walltime 00:00:05: 2 s are left): " in capsys.readouterr().err
    assert begun_rows(folder, "walltime.h5")
    assert main(small_run.command(folder, "walltime.h5", *FLOAT64)) == 0
    assert small_run.rows_of(folder / "walltime.h5") == undisturbed(folder)


def sealed_after_a_signal_between_the_last_step_and_the_end(folder, output, monkeypatch, *more):
    """Exit code, and the rows that were sealed a moment after a TERM that came when the ring had just drained."""
    described, sealed = noria.run.asdict, []

    def late(timing):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
        sealed.append(sum(len(part.row) for part in scan(parts_folder(folder / output))))
        return described(timing)

    with monkeypatch.context() as patched:
        patched.setattr(noria.run, "asdict", late)
        code = main(small_run.command(folder, output, *FLOAT64, "--seal-seconds", "600", *more))
    return code, sealed


@pytest.mark.slow
def test_rows_finished_since_the_last_seal_are_sealed_by_a_signal_after_the_last_step(folder, monkeypatch, capsys):
    code, sealed = sealed_after_a_signal_between_the_last_step_and_the_end(folder, "last.h5", monkeypatch)
    assert (code, sealed) == (0, [small_run.NUM_ROWS])
    assert (
        "SIGTERM: every row is finished, the output is being written and will be completed" in capsys.readouterr().err
    )
    assert small_run.rows_of(folder / "last.h5") == undisturbed(folder)


@pytest.mark.slow
def test_rows_finished_by_a_run_short_of_time_are_sealed_by_a_signal_after_the_last_step(folder, monkeypatch, capsys):
    few = ["--step-tokens", "8", "--groups", "1", "--max-new-tokens", "4"]
    left = iter([100.0] * 3 + [1e-9] * 10_000)
    run_looks = lambda self: next(left) if threading.current_thread() is threading.main_thread() else 100.0  # noqa: E731
    monkeypatch.setattr(noria.run.Stopping, "seconds_left", property(run_looks))
    code, sealed = sealed_after_a_signal_between_the_last_step_and_the_end(folder, "short.h5", monkeypatch, *few)
    assert code == 75 and 0 < sealed[0] < small_run.NUM_ROWS
    assert f"stopping (SIGTERM): {sealed[0]} finished rows and 0 rows half-way are sealed" in capsys.readouterr().err
    assert json.loads(next(parts_folder(folder / "short.h5").glob("segment-*")).read_text())["ended"] == "SIGTERM"


@pytest.mark.slow
def test_finished_rows_are_sealed_in_time_though_a_step_takes_long(folder, monkeypatch):
    finished, sealed = [], []
    finish = noria.desk.desk.generation
    monkeypatch.setattr(noria.desk.desk, "generation", lambda *one: finished.append(1) or finish(*one))

    def take_long():
        parts = parts_folder(folder / "long.h5")
        assert not part_files(parts), "nothing is due yet"
        end = time.monotonic() + 20
        while not part_files(parts) and time.monotonic() < end:
            time.sleep(0.1)
        sealed.append(sum(len(part.row) for part in scan(parts)))
        assert sealed == [len(finished)] and 0 < len(finished) < small_run.NUM_ROWS

    act_in_visit(monkeypatch, 9, take_long)
    more = ["--prompts", many_lengths(folder), "--seal-seconds", "3"]
    assert main(small_run.command(folder, "long.h5", *FLOAT64, *more)) == 0 and sealed


def test_a_merge_that_was_killed_is_done_again_without_loading_the_model(folder, monkeypatch, capsys):
    def killed(*arguments):
        raise KeyboardInterrupt("in the merge")

    def loaded(*arguments):
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(noria.desk.desk, "merge", killed)
        assert main(small_run.command(folder, "unmerged.h5", *FLOAT64)) == 1
    assert not (folder / "unmerged.h5").exists()
    capsys.readouterr()
    monkeypatch.setattr(noria.run, "load", loaded)
    monkeypatch.setattr(noria.run, "open_the_ring", loaded)
    assert main(small_run.command(folder, "unmerged.h5", *FLOAT64)) == 0
    assert "no row is left to generate: the output is written without loading the model" in capsys.readouterr().err
    assert small_run.rows_of(folder / "unmerged.h5") == undisturbed(folder)


EARLY = """
import importlib, os, signal, sys, time
from noria.__main__ import main
import_module = importlib.import_module

def slowly(name, *more):
    if name == "noria.commands.run":
        for _ in range(int(sys.argv[2])):
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(0.7)
    return import_module(name, *more)

importlib.import_module = slowly
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times", "code", "said"),
    [
        (signal.SIGUSR1, 2, 75, "stopped (SIGUSR1) before the first step: start the same run again to go on"),
        (signal.SIGTERM, 1, 75, "stopped (SIGTERM) before the first step"),
        (signal.SIGINT, 2, 130, ""),
    ],
)
def test_a_signal_that_comes_while_the_program_is_imported_is_heard(folder, number, times, code, said):
    output = f"early{number}.h5"
    command = [sys.executable, "-c", EARLY, int(number), times, *small_run.command(folder, output)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert not (folder / output).exists()


def test_rows_are_not_begun_when_there_is_no_time_left_for_them(folder, monkeypatch, capsys):
    lengths = [{"token_ids": [5 + row, 6, 7], "max_new_tokens": 4} for row in range(small_run.NUM_ROWS)]
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lengths))
    few = [
        "--step-tokens",
        "8",
        "--groups",
        "1",
        "--prompts",
        folder / "short.jsonl",
    ]  # two prompts of three tokens a step
    left = iter([100.0] * 3 + [1e-9] * 10_000)  # the run has 100 s; after 3 looks at the clock hardly any
    run_looks = lambda self: next(left) if threading.current_thread() is threading.main_thread() else 100.0  # noqa: E731
    monkeypatch.setattr(noria.run.Stopping, "seconds_left", property(run_looks))
    assert main(small_run.command(folder, "late.h5", *FLOAT64, *few)) == 75
    finished = sorted(Parts(folder / "late.h5", {}).finished())
    assert 0 < len(finished) < small_run.NUM_ROWS and not begun_rows(folder, "late.h5")
    assert f"stopped with {small_run.NUM_ROWS - len(finished)} rows of 12 left" in capsys.readouterr().err


def test_a_second_job_on_an_output_is_refused_and_told_who_has_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(noria.tools.lock, "PATIENCE", 0.1)
    output = folder / "owned.h5"
    holder = subprocess.Popen(forked([sys.executable, "-c", HOLD, output]), stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert main(small_run.command(folder, "owned.h5")) == 2
        said = capsys.readouterr().err
        assert said == (
            f"noria: output {output} is being written by job 17 on node3 (process 4711, since 2026-11-23T03:15:02Z):"
            " wait for it, or name another output\n"
        )
        assert not output.exists() and not parts_folder(output).exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert main(small_run.command(folder, "owned.h5")) == 0, "the lock died with its holder"
    assert not (folder / "owned.h5.lock").exists()


def test_errors_are_tried_again_where_that_is_asked_for(folder, capsys):
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "long.jsonl").write_text("\n".join([*lines[:2], lines[2][:-1] + ', "token_ids": []}', lines[3]]) + "\n")
    command = small_run.command(folder, "errors.h5", "--prompts", folder / "long.jsonl")
    assert main(command) == 0
    assert [status for _, status, _ in small_run.rows_of(folder / "errors.h5")] == ["done", "done", "error", "done"]
    assert main(command) == 0
    assert "is finished: nothing to do" in capsys.readouterr().err
    before = small_run.rows_of(folder / "errors.h5")
    assert main([*command, "--retry-errors"]) == 0
    said = capsys.readouterr().err
    assert "0 rows done, 1 with errors, 3 finished before" in said, said
    assert small_run.rows_of(folder / "errors.h5") == before


def test_a_row_that_failed_is_done_after_it_was_tried_again(folder, monkeypatch):
    tokenize = noria.desk.desk.generation

    def failing(sequence, *more):
        if sequence.prompt.row == 3:
            sequence.error = "the bucket has a hole"
        return tokenize(sequence, *more)

    with monkeypatch.context() as patched:
        patched.setattr(noria.desk.desk, "generation", failing)
        assert main(small_run.command(folder, "hole.h5", *FLOAT64)) == 0
    assert [status for _, status, _ in small_run.rows_of(folder / "hole.h5")].count("error") == 1
    assert main(small_run.command(folder, "hole.h5", *FLOAT64, "--retry-errors")) == 0
    assert small_run.rows_of(folder / "hole.h5") == undisturbed(folder)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_a_longer_file_of_prompts_is_taken_where_that_is_asked_for(folder, monkeypatch, capsys, finished):
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    prompts, output = folder / f"growing{finished}.jsonl", f"extended{finished}.h5"
    prompts.write_text("".join(lines[:7]))
    command = small_run.command(folder, output, *FLOAT64, "--prompts", prompts)
    with monkeypatch.context() as patched:
        if not finished:
            act_in_visit(patched, 9, signal_twice(signal.SIGUSR1))
        assert main(command) == (0 if finished else 75)
    prompts.write_text("".join(lines))
    capsys.readouterr()
    assert main(command) == 2
    assert "holds rows of another run: prompts: " in capsys.readouterr().err
    prompts.write_text("".join([lines[0].replace("5", "9"), *lines[1:]]))
    assert main([*command, "--extend"]) == 2
    assert "holds rows of another run: prompts: " in capsys.readouterr().err
    prompts.write_text("".join(lines))
    assert main([*command, "--extend"]) == 0
    assert small_run.rows_of(folder / output) == undisturbed(folder)
    assert main([*command, "--extend"]) == 0 and "nothing to do" in capsys.readouterr().err


def test_a_line_that_goes_on_is_not_an_unchanged_row(folder, capsys):
    command = small_run.command(folder, "lines.h5", "--prompts", folder / "unended.jsonl")
    (folder / "unended.jsonl").write_text(json.dumps({"token_ids": [5, 6]}))
    assert main(command) == 0
    (folder / "unended.jsonl").write_text(
        json.dumps({"token_ids": [5, 6]}) + " \n" + json.dumps({"token_ids": [7]}) + "\n"
    )
    assert main([*command, "--extend"]) == 2
    assert "holds rows of another run: prompts: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--walltime", "soon"],
            "job.walltime is 'soon': it must be HH:MM:SS, such as 03:30:00 or 1-00:00:00, UNLIMITED, or seconds",
        ),
        (["--walltime", "0"], "job.walltime is '0': it must be"),
        (["--overwrite", "--extend"], "job.overwrite and job.extend contradict each other"),
    ],
)
def test_wrong_keys_are_refused(folder, capsys, arguments, said):
    assert main(small_run.command(folder, "refused.h5", *arguments)) == 2
    assert said in capsys.readouterr().err


# Ranks.


def stopped(folder, output, place, action, rank, *more, num_ranks=3, within=SECONDS):
    """The finished job to which that happens; it took so many seconds at most from there to the end."""
    happened = folder / "happened"
    happened.unlink(missing_ok=True)
    command = small_run.command(folder, output, *FLOAT64, *more)
    worker = [sys.executable, WORKER, place, action, rank, *command]
    done = mpirun(num_ranks, worker, timeout=120, env={"NORIA_TEST_HAPPENED": str(happened)})
    assert happened.exists() and time.time() - float(happened.read_text()) < within, describe(done)
    assert not done.orphans, describe(done)
    return done


def goes_on(folder, output, num_ranks=1):
    """The next job on the output, of another shape, ends it as if undisturbed; it says once who runs where, and what.

    One rank runs in this process, which has imported everything.
    """
    elsewhere = ["--weights", "gpu=40,cpu=60", "--cache", "cpu=100", "--schedule", "sequential"]
    shape = ["--laps", "3", "--groups", "5", "--step-tokens", "16", *elsewhere] if num_ranks == 1 else []
    command = small_run.command(folder, output, *FLOAT64, *shape)
    if num_ranks == 1:
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            code = main(command)
        said = stream.getvalue()
    else:
        done = mpirun(num_ranks, ["noria", *command], timeout=120)
        code, said = done.returncode, done.stderr
    assert code == 0, said
    for rank in range(num_ranks):
        assert len(re.findall(rf"rank=0/{num_ranks} rank {rank}: \S+ cpu \(CPU\), \d+ cores?", said)) == 1, said
        assert len(re.findall(rf"rank=0/{num_ranks} plan: rank {rank}: layers ", said)) == 1, said
    assert small_run.rows_of(folder / output) == undisturbed(folder)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("place", ["prefill", "decode"])
def test_a_job_that_gets_usr1_twice_ends_with_75_and_goes_on_with_other_ranks(folder, place):
    output = f"usr1{place}.h5"
    done = stopped(folder, output, place, "USR1 twice", 0)
    assert done.returncode == 75, describe(done)
    half_way = len(begun_rows(folder, output))
    assert done.stderr.count("stopping (") == 1, describe(done)
    assert f"stopping (SIGUSR1): 0 finished rows and {half_way} rows half-way are sealed" in done.stderr, describe(done)
    assert "start the same run again to go on" in done.stderr
    assert half_way == (small_run.NUM_ROWS if place == "decode" else 0)
    goes_on(folder, output, 2)


@pytest.mark.slow
@pytest.mark.mpi
def test_a_job_that_is_stopped_while_it_loads_has_begun_nothing(folder):
    done = stopped(folder, "loading.h5", "load", "USR1", 1)
    assert done.returncode == 75, describe(done)
    assert "stopped (SIGUSR1) before the first step: start the same run again to go on" in done.stderr, describe(done)
    goes_on(folder, "loading.h5")


@pytest.mark.slow
@pytest.mark.mpi
def test_a_job_that_is_stopped_while_it_writes_its_output_finishes_it(folder):
    done = stopped(folder, "merging.h5", "merge", "USR1", 0)
    assert done.returncode == 0, describe(done)
    assert "SIGUSR1: every row is finished, the output is being written and will be completed" in done.stderr, describe(
        done
    )
    assert small_run.rows_of(folder / "merging.h5") == undisturbed(folder)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("action", ["TERM", "INT"])
def test_rows_are_sealed_before_open_mpi_kills_its_ranks_after_term_or_an_interrupt(folder, action):
    done = stopped(folder, f"{action}.h5", "decode", action, 1)
    assert done.returncode not in (0, 2), describe(done)
    assert len(begun_rows(folder, f"{action}.h5")) == small_run.NUM_ROWS, describe(done)
    goes_on(folder, f"{action}.h5")


SMALL_DISK = """
set -e
mount -t tmpfs -o size=1m none "$1"
shift
set +e
"$@"
code=$?
ls -l "$(dirname "${@: -1}")"/*.parts/part-*.h5
exit $code
"""


@pytest.mark.slow
@pytest.mark.mpi
def test_a_small_disk_that_fills_ends_the_job_and_says_what_to_do(folder, tmp_path):
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    rows = [json.loads(line) for line in many_lengths(folder).read_text().splitlines()]
    notes = [random.Random(row).randbytes(55_000).hex() for row in range(len(rows))]  # of nine rows there is room for
    heavy = folder / "heavy.jsonl"
    heavy.write_text("".join(json.dumps(row | {"note": note}) + "\n" for row, note in zip(rows, notes, strict=True)))
    more = ["--prompts", heavy, "--seal-seconds", "0", "--output", tmp_path / "run.h5"]
    slowly = [sys.executable, WORKER, "decode", "nothing", 0, *small_run.command(folder, "x", *more)]
    happened = {"NORIA_TEST_HAPPENED": str(folder / "happened")}
    done = mpirun(1, [*unshare, "bash", "-c", SMALL_DISK, "bash", tmp_path, *slowly], env=happened)
    assert done.returncode == 1, describe(done)
    said = r"failed: \S*run.h5.parts: no space left on device, [\d,]+ more bytes were to be written, [\d,]+ are free in \S+: "
    said += r"\d+ rows? could not be sealed, sealed rows are kept: make room and start the same run again"
    assert re.search(said, done.stderr) and "Traceback" not in done.stderr, describe(done)
    assert done.stdout.count("part-") >= 1, describe(done)


@pytest.mark.slow
@pytest.mark.mpi
def test_a_second_interrupt_stops_a_run_at_once(folder):
    done = stopped(folder, "interrupted.h5", "decode", "INT twice", 0, num_ranks=1)
    assert done.returncode == 130 and "stopped at once: interrupted again" in done.stderr, describe(done)
    assert len(begun_rows(folder, "interrupted.h5")) == small_run.NUM_ROWS
    goes_on(folder, "interrupted.h5")


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("place", "rank", "more"),
    [("decode", 1, []), ("decode", 0, []), ("load", 2, []), ("decode", 2, ["--blocking"]), ("load", 0, ["--blocking"])],
)
def test_a_rank_that_stands_still_ends_the_job_by_name(folder, place, rank, more):
    output = f"still{place}{rank}{''.join(more)}.h5"
    done = stopped(folder, output, place, "STOP", rank, *more)
    assert done.returncode not in (0, 2, 75), describe(done)
    assert f"rank={(rank + 1) % 3}/3 failed: nothing heard for 2 s from rank {rank} on " in done.stderr, describe(done)
    assert f"stage {rank} (layers {rank}): it is stopped, or its machine is gone" in done.stderr
    if rank == 2:  # rank 0 missed it, and could still write why
        assert read_segments(parts_folder(folder / output))[-1]["ended"].startswith("failed: nothing heard for 2 s")
    goes_on(folder, output)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("more", [[], ["--blocking"]])
def test_a_rank_that_computes_for_long_is_not_taken_for_lost(folder, more):
    output = f"pausing{''.join(more)}.h5"
    done = stopped(folder, output, "decode", "pause", 1, *more, within=100)
    assert done.returncode == 0, describe(done)
    assert small_run.rows_of(folder / output) == undisturbed(folder)


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("action", "said"),
    [
        (
            "full",
            r": file too large, .* may have 1,000: \d+ rows could not be sealed, sealed rows are kept: make room and",
        ),
        ("parts removed", ": the sealed parts were removed during the run: put them back"),
    ],
)
def test_a_disk_that_fails_ends_the_job_and_says_what_to_do(folder, action, said):
    output = f"{action.replace(' ', '')}.h5"
    more = ["--seal-seconds", "0"]
    done = stopped(folder, output, "decode", action, 0, *more)
    assert done.returncode == 1, describe(done)
    assert re.search(rf"rank=0/3 failed: \S*{output}.parts{said}", done.stderr), describe(done)
    assert "Traceback" not in done.stderr and "the record of this job" not in done.stderr, describe(done)
    assert (
        "rank=0/3 was on " in done.stderr
        and ", stage 0 (layers 0), composing a step, or sealing rows, in round " in done.stderr
    ), describe(done)
    assert all(path.stat().st_size > 1000 for path in part_files(parts_folder(folder / output)))
    goes_on(folder, output)


@pytest.mark.slow
@pytest.mark.mpi
def test_a_folder_that_is_removed_under_the_run_ends_it(folder):
    gone = folder / "gone"
    gone.mkdir()
    done = stopped(folder, "gone/run.h5", "decode", "folder removed", 0)
    assert done.returncode == 1, describe(done)
    said = f"rank=0/3 failed: {gone / 'run.h5.parts'}: the sealed parts were removed during the run: put them back"
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.mpi
def test_a_checkpoint_that_shrinks_under_the_run_ends_it_naming_the_file_and_the_place(folder):
    small_run.write_model(folder, "shrinking.h5")
    done = stopped(folder, "shrinking_run.h5", "load", "truncate", 1, "--model", folder / "shrinking.h5")
    assert done.returncode == 2, describe(done)
    cut = r"is truncated: \d+ bytes were to be read at byte \d+, the file has \d+; copy or make it again"
    found = re.search(rf"noria: (rank \d: )?.*/shrinking.h5 {cut}", done.stderr)
    assert found, describe(done)


@pytest.mark.slow
@pytest.mark.mpi
def test_ten_kills_lose_no_row_and_change_none(tmp_path, monkeypatch):
    bench = Path(__file__).parent.parent / "jobs" / "bench" / "kill.py"
    spec = importlib.util.spec_from_file_location("kill", bench)
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    job = kill.command

    def of_forks(*arguments):
        *launcher, python = job(*arguments)[:4]
        return [*launcher, *forked([python, *job(*arguments)[4:]])]

    monkeypatch.setattr(kill, "command", of_forks)
    monkeypatch.setattr(kill.os, "environ", environment())
    result = kill.measure(tmp_path, kills=10, seconds=400, seed=3)
    assert result["kills"] >= 1 and result["rows"] == 64, "a machine that is busy has time for few kills"
    assert (result["lost"], result["twice"], result["different"], result["left_behind"]) == (0, 0, 0, [])
