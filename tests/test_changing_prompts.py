"""Prompts that are replaced, written over, cut or made longer while a run reads them: an output has rows of one file."""

import json
import os
import random
import threading
import time

import pytest

import small_run
from counts import count
from mpirun import mpirun
from noria.__main__ import main
from noria.engine.stage import Stage
from noria.output.generations import open_generations
from noria.output.parts import part_files, parts_folder
from noria.rows import encoded_ahead

NUM_ROWS = 60
PAD = "x" * 30_000  # some blocks of the file are read long after the first rows are sealed
MORE = ["--prompts", "p.jsonl", "--max-new-tokens", "3", "--step-tokens", "16", "--seal-seconds", "0"]
MORE += ["--no-prefix-sharing"]  # few prompts are read before they are needed


def lines(word):
    rows = [{"id": f"{word}-{row:02}", "token_ids": [5 + row, 6, 7], "pad": PAD} for row in range(NUM_ROWS)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("changing"))
    (folder / "p.jsonl").write_text(lines("old"))
    assert main(command(folder, "undisturbed.h5")) == 0
    return folder


def command(folder, output):
    return small_run.command(folder, output, *MORE[:1], folder / MORE[1], *MORE[2:])


def replaced(path):
    path.with_name("new").write_text(lines("new"))
    os.replace(path.with_name("new"), path)


def written_over(path):
    with path.open("r+") as file:
        file.write(lines("new"))


def written_over_in_secret(path):
    status = path.stat()
    written_over(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncated(path):
    os.truncate(path, random.randrange(1, path.stat().st_size))


def appended(path):
    with path.open("a") as file:
        file.write(lines("new"))


def touched(path):
    os.utime(path)


CHANGES = [replaced, written_over, written_over_in_secret, truncated, appended, touched]


def words_of(*files):
    """The first word of every row's id in these outputs or parts."""
    found = set()
    for path in files:
        with open_generations(path) as file:
            found |= {row.id.partition("-")[0] for row in file.rows()}
    return found


def check(folder, output, change, code, said):
    """What a run that was disturbed leaves: it is whole, or says why, and goes on with the file as it was."""
    path = folder / "p.jsonl"
    assert code == 0 if change is touched else code in (0, 1), said
    if code == 0:
        assert words_of(folder / output) == {"old"}
    else:
        assert f"prompts {path} changed while the run reads it" in said and "Traceback" not in said
        assert words_of(*part_files(parts_folder(folder / output))) <= {"old"}
    path.write_text(lines("old"))
    if code:
        assert main(command(folder, output)) == 0
    assert small_run.rows_of(folder / output) == small_run.rows_of(folder / "undisturbed.h5")
    return code


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_one_rank_never_finishes_an_output_of_two_files(folder, monkeypatch, capsys, change):
    codes = []
    for number in range(count(50)):
        (folder / "p.jsonl").write_text(lines("old"))
        visits, at = [0], random.Random(number).randrange(1, 45) if number else 4
        forward = Stage.forward

        def acting(self, *arguments, forward=forward, visits=visits, at=at):
            visits[0] += 1
            if visits[0] == at:
                change(folder / "p.jsonl")
            time.sleep(0.002)
            return forward(self, *arguments)

        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(Stage, "forward", acting)
            for name in ("EARLY", "AHEAD"):
                patched.setattr(encoded_ahead, name, 2)  # else all rows are read before the first step
            code = main(command(folder, f"{change.__name__}-{number}.h5"))
        codes.append(check(folder, f"{change.__name__}-{number}.h5", change, code, capsys.readouterr().err))
    assert codes[0] == (0 if change is touched else 1), "it is changed before the second block is read"


@pytest.mark.slow
def test_a_change_after_the_last_row_was_read_is_told_and_costs_nothing(folder, monkeypatch, capsys):
    forward, left = Stage.forward, []

    def acting(self, *arguments):
        left.append(1)
        if len(left) == 15:
            replaced(folder / "few.jsonl")
        time.sleep(0.1 * (len(left) > 15))  # the file is looked at when the row that ends next is sealed
        return forward(self, *arguments)

    few = [
        json.loads(line) | {"max_new_tokens": 18 + 6 * row} for row, line in enumerate(lines("old").splitlines()[:2])
    ]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    monkeypatch.setattr(Stage, "forward", acting)
    arguments = small_run.command(folder, "few.h5", "--prompts", folder / "few.jsonl", "--seal-seconds", 0)
    assert main(arguments) == 0 and words_of(folder / "few.h5") == {"old"}
    assert "few.jsonl changed after its rows were read: the output is of the file as it was" in capsys.readouterr().err


def when_begun(output, seconds, change, path):
    """Changes the file so long after the run has read it for its hash."""
    end = time.monotonic() + 30
    while not (parts_folder(output).exists() or output.exists()) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(seconds)
    change(path)


@pytest.mark.slow
def test_two_ranks_never_finish_an_output_of_two_files(folder):
    for number in range(count(50)):
        change, path = CHANGES[number % len(CHANGES)], folder / "p.jsonl"
        path.write_text(lines("old"))
        output = folder / f"two-{number}.h5"
        other = threading.Thread(target=when_begun, args=[output, random.Random(number).uniform(0, 0.5), change, path])
        other.start()
        result = mpirun(2, ["noria", *command(folder, output.name)])
        other.join()
        check(folder, f"two-{number}.h5", change, result.returncode, result.stderr)
