"""A rank that breaks ends the job within seconds, with its message; what was sealed stays and the job can go on."""

import re
import sys
import time
from pathlib import Path

import pytest

import noria.run
import small_run
from mpirun import describe, mpirun
from noria.__main__ import main
from noria.engine.stage import Stage
from noria.output.parts import Parts, part_files, parts_folder
from noria.rows.making import Maker

WORKER = Path(__file__).parent / "mpi" / "failing_worker.py"
SECONDS = 15
SEAL_AT_ONCE = ["--seal-seconds", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("failures"))
    assert main(small_run.command(folder, "undisturbed.h5")) == 0
    return folder


def breaks(folder, output, place, rank, *more):
    """The finished job in which that rank breaks; it took SECONDS at most from there to the end."""
    done = mpirun(3, [sys.executable, WORKER, place, rank, *small_run.command(folder, output, *more)], timeout=90)
    broke = float(done.stdout.split()[0])
    assert time.time() - broke < SECONDS, describe(done)
    assert not (folder / output).exists() and not done.orphans, describe(done)
    return done


def was(done, rank):
    """What the rank that failed says of its place: host, stage, and what it was doing."""
    words = rf"rank={rank}/3 was on \S+, stage {rank} \(layers {rank}\), (.*)"
    return next((match[1] for line in done.stderr.splitlines() if (match := re.search(words, line))), "")


def failures(done):
    """(rank, message) of the lines that say that a rank failed."""
    found = (re.search(r" (rank=\d+/\d+) failed: (.*)", line) for line in done.stderr.splitlines())
    return [match.groups() for match in found if match]


def interrupted(folder, output, monkeypatch, visits):
    """One rank's run that breaks after some visits, with the rows so far in parts."""
    forward, left = Stage.forward, [visits]

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            end = time.monotonic() + 10  # the sealing thread has its turn
            while not part_files(parts_folder(folder / output)) and time.monotonic() < end:
                time.sleep(0.01)
            raise KeyboardInterrupt("that is enough")
        return forward(self, *arguments)

    with monkeypatch.context() as broken:
        broken.setattr(Stage, "forward", failing)
        lengths = ["--prompts", mixed_lengths(folder)]
        assert main(small_run.command(folder, output, *lengths, *SEAL_AT_ONCE)) == 1
    return lengths


def mixed_lengths(folder):
    """The prompts with lengths from 1 to 23, so that a run that breaks has finished some of them."""
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    rows = [line[:-1] + f', "max_new_tokens": {1 + 2 * row}}}' for row, line in enumerate(lines)]
    (folder / "mixed.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "mixed.jsonl"


def sealed_rows(folder, output):
    """The rows that are finished: a launcher may tell rank 0 of a killed rank in time to seal those half-way too."""
    return {row for row, _ in Parts(folder / output, {}).finished()}


# One rank, in this process.


def test_an_exception_ends_the_run_with_its_message_and_code_1(folder, monkeypatch, capsys):
    interrupted(folder, "alone.h5", monkeypatch, 5)
    said = capsys.readouterr().err
    assert "rank=0/1 failed: KeyboardInterrupt: that is enough" in said and "Traceback" in said
    assert part_files(parts_folder(folder / "alone.h5")) and not (folder / "alone.h5").exists()


@pytest.mark.slow
def test_a_run_that_broke_goes_on_with_what_is_left(folder, monkeypatch):
    lengths = interrupted(folder, "resumed.h5", monkeypatch, 10)
    before = sealed_rows(folder, "resumed.h5")
    assert 0 < len(before) < small_run.NUM_ROWS
    admitted, sequence = [], Maker._sequence
    note = lambda self, prompt, *more: admitted.append(prompt.row) or sequence(self, prompt, *more)  # noqa: E731
    monkeypatch.setattr(Maker, "_sequence", note)
    assert main(small_run.command(folder, "resumed.h5", *lengths)) == 0
    assert sorted(admitted) == sorted(set(range(small_run.NUM_ROWS)) - before)
    assert main(small_run.command(folder, "whole.h5", *lengths)) == 0
    assert small_run.rows_of(folder / "resumed.h5") == small_run.rows_of(folder / "whole.h5")
    assert not parts_folder(folder / "resumed.h5").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "0.5"], "sampling.temperature: 0.9 in part-000000.h5, 0.5 now"),
        (["--top-k", "3"], "sampling.top_k: 0 in part-000000.h5, 3 now"),
        (["--seed", "5"], "sampling.seed: 4 in part-000000.h5, 5 now"),
        (["--dtype", "float64"], 'dtype: "float32" in part-000000.h5, "float64" now'),
        (["--prompts", "prompts.jsonl"], "prompts: "),
        (["--model", "other.h5"], "checkpoint: "),
    ],
)
def test_parts_of_another_run_are_refused_by_the_key_that_changed(folder, monkeypatch, capsys, arguments, said):
    output = f"changed{arguments[0]}.h5"
    lengths = interrupted(folder, output, monkeypatch, 5)
    if "other.h5" in arguments:
        small_run.write_model(folder, "other.h5", seed=1)
    before = {path: path.read_bytes() for path in part_files(parts_folder(folder / output))}
    capsys.readouterr()
    changed = [folder / text if text.endswith((".h5", ".jsonl")) else text for text in arguments]
    monkeypatch.setattr(noria.run, "load", None)
    assert main(small_run.command(folder, output, *lengths, *changed)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"{output}.parts holds rows of another run: {said}" in line
    assert line.count(" now") == 1 and "give another output, or --overwrite" in line
    assert before == {path: path.read_bytes() for path in part_files(parts_folder(folder / output))}


# Three ranks.


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(("place", "rank"), [("step", 1), ("step", 0), ("step", 2), ("load", 1)])
def test_an_exception_on_any_rank_ends_all_with_its_message(folder, place, rank):
    done = breaks(folder, f"{place}{rank}.h5", place, rank)
    assert done.returncode == 1, describe(done)
    assert failures(done) == [(f"rank={rank}/3", "FloatingPointError: the bucket has a hole")], describe(done)
    doing = "loading its weights" if place == "load" else r"computing in round \d+, lap 0, group \d+"
    assert re.fullmatch(doing, was(done, rank)), describe(done)


@pytest.mark.slow
@pytest.mark.mpi
def test_an_exception_in_the_communication_thread_ends_all_with_its_message(folder):
    done = breaks(folder, "thread.h5", "communication", 1)
    assert done.returncode == 1, describe(done)
    [(rank, message)] = failures(done)
    assert rank == "rank=1/3" and "FloatingPointError: the bucket has a hole" in message


@pytest.mark.slow
@pytest.mark.mpi
def test_a_rank_that_would_leave_alone_ends_all_with_an_error(folder):
    done = breaks(folder, "leaves.h5", "leaves", 1)
    assert done.returncode == 1 and failures(done) == [("rank=1/3", "SystemExit: 0")], describe(done)


@pytest.mark.slow
@pytest.mark.mpi
def test_damage_that_one_rank_finds_while_loading_is_wrong_input(folder):
    done = breaks(folder, "damaged.h5", "damaged block", 1)
    said = [line for line in done.stderr.splitlines() if "layers/0001" in line]
    assert done.returncode == 2, describe(done)
    assert said == ["noria: rank 1: block layers/0001 is damaged: convert the model again"], describe(done)
    assert not parts_folder(folder / "damaged.h5").exists(), "a refused run leaves nothing behind"


@pytest.mark.slow
@pytest.mark.mpi
def test_damage_in_the_prompts_found_on_the_way_is_wrong_input(folder):
    done = breaks(folder, "prompts.h5", "prompts", 0)
    said = [line for line in done.stderr.splitlines() if "layers/0001" in line]
    assert done.returncode == 2 and len(said) == 1 and "rank=0/3" in said[0], describe(done)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("place", ["killed", "all killed"])
def test_a_job_whose_ranks_are_killed_goes_on_and_ends_as_if_undisturbed(folder, place):
    output = f"{place.replace(' ', '_')}.h5"
    more = ["--prompts", mixed_lengths(folder), *SEAL_AT_ONCE]
    done = breaks(folder, output, place, 1, *more)
    assert done.returncode not in (0, 1, 2), describe(done)
    before = {path.name: path.read_bytes() for path in part_files(parts_folder(folder / output))}
    assert before and 0 < len(sealed_rows(folder, output)) < small_run.NUM_ROWS
    done = breaks(folder, output, "step", 2, *more)
    assert done.returncode == 1, describe(done)
    after = {path.name: path.read_bytes() for path in part_files(parts_folder(folder / output))}
    assert {name: after[name] for name in before} == before, "sealed parts stay as they are"
    done = mpirun(3, ["noria", *small_run.command(folder, output, *more)], timeout=90)
    assert done.returncode == 0 and "finished before" in done.stderr, describe(done)
    assert main(small_run.command(folder, f"whole_{output}", *more)) == 0
    assert small_run.rows_of(folder / output) == small_run.rows_of(folder / f"whole_{output}")
