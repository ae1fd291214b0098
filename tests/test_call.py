"""noria.generate: a run as a call of a Python program, always in a child process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import noria
import small_run
from forks import forked
from mpirun import environment, of_forks
from noria.__main__ import main
from noria.launch import call
from noria.output.segments import read_segments

SETTINGS = {"device": "cpu", "max_new_tokens": 24, "ignore_eos": True, "temperature": 0.9, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("call"))
    assert main(small_run.command(folder, "expected.h5")) == 0
    return folder


@pytest.fixture(autouse=True)
def _fast(monkeypatch, tmp_path):
    """Forked ranks, with the variables that mpirun needs here; temporary files in a folder that the test sees."""

    def command(ranks, *arguments):
        noria = [sys.executable, "-m", "noria", *arguments]
        return forked(noria) if ranks == 1 else ["mpirun", "-n", str(ranks), *of_forks(noria)]

    monkeypatch.setattr(call, "command", command)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    forked([sys.executable])  # whose server has a folder among the temporary files
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(call.tempfile, "tempdir", str(tmp_path / "tmp"))


def prompts_of(folder):
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def rows_of(run):
    return [(row.id, row.status, row.token_ids.tolist()) for row in run]


@pytest.mark.slow
def test_a_call_gives_what_the_command_gives_and_the_same_call_finds_it_done(folder, tmp_path, capsys):
    with noria.generate(folder / "model.h5", prompts_of(folder), tmp_path / "run.h5", **SETTINGS) as run:
        assert run.finished and rows_of(run) == small_run.rows_of(folder / "expected.h5")
    assert "12 rows done, 0 with errors" in capsys.readouterr().err
    before = (tmp_path / "run.h5").stat()
    noria.generate(folder / "model.h5", prompts_of(folder), tmp_path / "run.h5", **SETTINGS).close()
    assert "nothing to do" in capsys.readouterr().err and (tmp_path / "run.h5").stat() == before
    with pytest.raises(noria.InputError, match=r"holds rows of another run: prompts"):
        noria.generate(folder / "model.h5", ["other"], tmp_path / "run.h5", **SETTINGS)
    assert sorted(os.listdir(tmp_path)) == ["run.h5", "tmp"] and not os.listdir(tmp_path / "tmp")


@pytest.mark.slow
@pytest.mark.mpi
def test_several_ranks_are_started_from_a_process_that_looks_like_a_rank(folder, tmp_path, monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE", "SLURM_PROCID"):
        monkeypatch.setenv(name, "3")
    file = folder / "prompts.jsonl"
    with noria.generate(str(folder / "model.h5"), file, str(tmp_path / "run.h5"), ranks=2, **SETTINGS) as run:
        assert rows_of(run) == small_run.rows_of(folder / "expected.h5")
        segments = json.loads(run._files[0].attrs["segments"])
    assert [one["ranks"] for one in segments] == [2]


@pytest.mark.slow
def test_without_an_output_the_rows_live_as_long_as_what_is_returned(folder, tmp_path):
    run = noria.generate(folder / "model.h5", [[5, 6, 7]], device="cpu", max_new_tokens=2, ignore_eos=True)
    some, path = run[:1], run.path
    del run
    assert path.exists() and len(some[0].token_ids) == 2 and os.listdir(tmp_path / "tmp") == [path.parent.name]
    some.close()
    del some
    assert os.listdir(tmp_path / "tmp") == []


def ends(monkeypatch, code, *said, interrupted=False, rows=False):
    """Lets a call's child end so; with `rows` it leaves some."""
    seen = []

    def run_child(command, say):
        seen.append(command)
        if rows:
            output = next(line for line in Path(command[-1]).read_text().splitlines() if line.startswith("output"))
            Path(json.loads(output.partition("=")[2])).with_name("run.h5.parts").mkdir()
        return call.ChildEnd(code, interrupted, list(said))

    monkeypatch.setattr(call, "command", lambda ranks, *arguments: list(arguments))
    monkeypatch.setattr(call, "run_child", run_child)
    return seen


@pytest.mark.parametrize(
    ("code", "said", "kind", "words"),
    [
        (
            2,
            ["a line", "noria: model.h5: there is no such file"],
            noria.InputError,
            "^model.h5: there is no such file$",
        ),
        (1, ["rank 1: OutOfMemory", "failed"], RuntimeError, "exit code 1: rank 1: OutOfMemory\nfailed"),
        (-9, [], RuntimeError, "exit code -9"),
        (75, [], noria.Stopped, "the same call with output='.*run.h5' continues it"),
    ],
)
def test_how_a_run_ended_is_how_the_call_does(monkeypatch, tmp_path, code, said, kind, words):
    ends(monkeypatch, code, *said)
    with pytest.raises(kind, match=words):
        noria.generate("model.h5", ["a"])
    assert os.listdir(tmp_path / "tmp") == []


def test_rows_of_a_run_that_stopped_stay_where_the_error_says(monkeypatch, tmp_path):
    ends(monkeypatch, 75, rows=True)
    with pytest.raises(noria.Stopped) as stopped:
        noria.generate("model.h5", ["a"])
    [left] = (tmp_path / "tmp").iterdir()
    assert f"output={str(left / 'run.h5')!r}" in str(stopped.value)
    ends(monkeypatch, 75, interrupted=True)
    with pytest.raises(KeyboardInterrupt, match="the same call continues it"):
        noria.generate("model.h5", ["a"], tmp_path / "run.h5")


def test_rows_in_error_fail_a_call_that_asks_for_it(monkeypatch, tmp_path):
    ends(monkeypatch, 65)
    with pytest.raises(RuntimeError, match="fail_on_errors is set"):
        noria.generate("model.h5", ["a"], tmp_path / "run.h5", fail_on_errors=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_new_token": 3}, "unknown setting max_new_token.*did you mean .max_new_tokens."),
        ({"ranks": 0}, "ranks is 0: it must be an integer from 1"),
        ({"ranks": True}, "ranks is True"),
        ({"temperature": "hot"}, "sampling.temperature"),
        ({"prompts": "one text"}, "one text: give a list"),
        ({"prompts": [1j]}, r"prompts\[0\]"),
        ({"model": ""}, "no model"),
    ],
    ids=str,
)
def test_wrong_arguments_start_nothing_and_leave_nothing(monkeypatch, tmp_path, given, words):
    seen = ends(monkeypatch, 0)
    with pytest.raises(noria.InputError, match=words):
        noria.generate(**{"model": "model.h5", "prompts": ["a"], **given})
    assert not seen and os.listdir(tmp_path / "tmp") == []


def test_settings_are_the_keys_of_a_run_in_python_s_own_types(monkeypatch, tmp_path):
    seen = []

    def run_child(command, say):
        seen.append(Path(command[-1]).read_text())
        return call.ChildEnd(1, False, [])

    ends(monkeypatch, 1)
    monkeypatch.setattr(call, "run_child", run_child)
    settings = {"stop": ("a", "b"), "weights": {"gpu": 40, "cpu": 60}, "top_k": None, "scratch": tmp_path, "n": 2}
    with pytest.raises(RuntimeError):
        noria.generate(tmp_path / "model.h5", ["a"], **settings)
    run = call.config.load(None, {"model": "m", "prompts": "p", "output": "o"} | settings | {"stop": ["a", "b"], "scratch": str(tmp_path), "top_k": None})  # fmt: skip
    assert run.to_toml().splitlines()[3:] == seen[0].splitlines()[3:]


LONG = SETTINGS | {"dtype": "float64", "seal_seconds": 0}
STOPPED = """
import json, sys
import noria
from noria.launch import call
run_child = call.run_child
def told(*arguments):
    ended = run_child(*arguments)
    print("code", ended.code)
    return ended
command, *arguments = json.loads(sys.argv[1])
call.run_child, call.command = told, lambda ranks, *more: [*command, *more]
try:
    noria.generate(*arguments[:-1], **arguments[-1])
except KeyboardInterrupt as error:
    print("interrupted", error)
"""


def long_rows():
    return [{"token_ids": [5 + row % 50, 6, 7], "max_new_tokens": 1 + row % 40} for row in range(240)]


@pytest.fixture(scope="module")
def whole(folder):
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long_rows()))
    files = ["--prompts", folder / "long.jsonl", "--dtype", "float64"]
    assert main(small_run.command(folder, "whole.h5", *files)) == 0
    return small_run.rows_of(folder / "whole.h5")


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_stops_the_run_as_75_and_the_same_call_goes_on(folder, whole, tmp_path, ranks):
    arguments = [str(folder / "model.h5"), long_rows(), str(tmp_path / "run.h5"), ranks]
    given = json.dumps([call.command(ranks), *arguments, LONG])
    parts = tmp_path / "run.h5.parts"
    program = subprocess.Popen(forked([sys.executable, "-c", STOPPED, given]), stdout=subprocess.PIPE, text=True)
    threading.Thread(target=interrupt, args=(program, parts), daemon=True).start()
    said = program.communicate(timeout=100)[0]
    assert said.splitlines()[0] == "code 75" and "interrupted the same call continues it" in said
    stopped = read_segments(parts)
    assert [one["ended"] for one in stopped] == ["SIGUSR1"] and stopped[0]["ranks"] == ranks
    with noria.open(tmp_path / "run.h5") as run:
        assert 0 < len(run) < 240
    with noria.generate(*arguments, **LONG) as run:
        assert rows_of(run) == whole


def interrupt(program, parts):
    """Presses Ctrl-C when a part is sealed."""
    while program.poll() is None and not next(parts.glob("part-*"), None):
        time.sleep(0.02)
    program.send_signal(signal.SIGINT)
