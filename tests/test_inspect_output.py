"""noria inspect of outputs: the JSON that scripts read, the words that people read, and which run's output it is."""

import json
import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from noria.__main__ import main
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.segments import history
from output_rows import fill, make_row

ROOT = Path(__file__).parent.parent
JOB = {"hosts": ["n1"], "ranks": 4, "of": 12, "job_ids": {"SLURM_JOB_ID": "77"}}
RUN_FILE = 'model = "m.h5"\nprompts = "p.jsonl"\noutput = "run.h5"\n\n[sampling]\ntop_k = 3\n'


def job(output, rows, ended="walltime"):
    """One job that seals these rows."""
    parts = Parts(output, {"sampling.top_k": 3})
    parts.begin(JOB)
    fill(parts, [make_row(row, status="error" if row in (3, 7) else "done", num_tokens=row) for row in rows])
    parts.end(ended)
    return parts


@pytest.fixture
def unfinished(tmp_path):
    job(tmp_path / "run.h5", range(8))
    return tmp_path / "run.h5"


@pytest.fixture
def finished(unfinished):
    parts = job(unfinished, range(8, 12), "finished")
    merge(parts, unfinished, 12, {"run_file": RUN_FILE, **history(parts.folder)})
    return unfinished


def inspect(capsys, *arguments):
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def counted(path):
    """What h5py alone counts in a finished output."""
    with h5py.File(path) as file:
        status, reason = file["status"], file["finish_reason"]
        of_status, of_reason = (h5py.check_enum_dtype(one.dtype) for one in (status, reason))
        return {
            "rows": {name: int((status[:] == of_status[name]).sum()) for name in ("todo", "done", "error")},
            "tokens": {
                "prompt": len(file["prompt_tokens"]),
                "generated": len(file["tokens"]),
                "cached": int(file["cached_tokens"][:].sum()) if "cached_tokens" in file else 0,
            },
            "finish_reasons": {name: int((reason[:] == of_reason[name]).sum()) for name in ("stop", "length", "error")},
        }


def test_json_of_a_finished_output_counts_what_the_file_holds(finished, capsys):
    found = json.loads(inspect(capsys, finished, "--json"))
    assert {name: found[name] for name in ("rows", "tokens", "finish_reasons")} == counted(finished)
    assert (found["format"], found["finished"], found["running"]) == ("noria-generations", True, False)
    assert found["errors"] == [{"count": 2, "id": "row-3", "error": "the prompt is empty"}]
    assert [(one["rows"], one["errors"], one["ended"]) for one in found["segments"]] == [
        (8, 2, "walltime"),
        (4, 0, "finished"),
    ]


def test_json_of_an_output_that_is_not_finished_has_the_same_keys_and_counts_what_is_left(unfinished, capsys):
    found = json.loads(inspect(capsys, unfinished, "--json"))
    assert not found["finished"] and found["rows"] == {"todo": 4, "done": 6, "error": 2}
    assert found["tokens"]["generated"] == sum(range(8))
    merge(job(unfinished, range(8, 12)), unfinished, 12, {})
    assert json.loads(inspect(capsys, unfinished, "--json")).keys() == found.keys()


def test_rows_that_nobody_has_counted_yet_are_null(tmp_path, capsys):
    Parts(tmp_path / "run.h5", {}).begin(JOB | {"of": 0})
    assert json.loads(inspect(capsys, tmp_path / "run.h5", "--json"))["rows"] == {"todo": None, "done": 0, "error": 0}


def test_json_says_what_was_verified(finished, capsys):
    assert json.loads(inspect(capsys, finished, "--json", "--verify"))["verified"] is True
    with h5py.File(finished, "r+") as file:
        file["tokens"][0] += 1
    assert main(["inspect", str(finished), "--json", "--verify"]) == 2
    out, err = capsys.readouterr()
    assert not out and "tokens do not agree with their checksums" in err


def test_no_text_of_a_row_can_look_finished_to_a_script(tmp_path, capsys):
    parts = Parts(tmp_path / "run.h5", {})
    row = make_row(0, status="error")
    row.error = row.id = '"finished": true'
    fill(parts, [row])
    assert '"finished": true' not in inspect(capsys, tmp_path / "run.h5", "--json")


def test_five_lines_come_first_then_three_generations_and_the_run_file(finished, capsys):
    lines = inspect(capsys, finished).splitlines()
    expected, (jobs, work) = counted(finished), lines[4].split(", ", 1)
    assert lines[:4] == [
        f"{finished}: finished",
        "rows        10 done, 2 errors",
        f"tokens      {expected['tokens']['prompt']} of prompts, {expected['tokens']['generated']} generated",
        f"ended       {expected['finish_reasons']['stop']} at a stop, {expected['finish_reasons']['length']} at their limit of tokens",
    ]
    assert jobs == "work        2 jobs" and work.endswith("the last with 4 ranks on n1")
    assert [line for line in lines if line.startswith("row ")] == [
        f"row {row} (row-{row}): {make_row(row).prompt!r}" for row in range(3)
    ]
    start = lines.index('run file    model = "m.h5"')
    assert [line.strip() for line in lines[start + 1 : start + 5]] == [
        'prompts = "p.jsonl"',
        'output = "run.h5"',
        "[sampling]",
        "top_k = 3",
    ]


def test_all_says_more_in_units(tmp_path, capsys):
    parts = job(tmp_path / "run.h5", range(12))
    timing = {"peak_device_nbytes": np.array([3 * 2**30, 512]), "decode_seconds": 1.5}
    merge(parts, tmp_path / "run.h5", 12, {"launcher": "none"}, timing)
    short, long = (inspect(capsys, tmp_path / "run.h5", *more) for more in ((), ("--all",)))
    for line in ("timing peak_device_nbytes: 3.0 GiB 512 B", "timing decode_seconds: 1.5 s", "launcher: none"):
        assert line in long.splitlines() and line not in short


def test_of_many_jobs_the_last_three_are_shown_unless_all_are_asked_for(tmp_path, capsys):
    for row in range(5):
        job(tmp_path / "run.h5", [row])
    few, everything = (inspect(capsys, tmp_path / "run.h5", *more) for more in ((), ("--all",)))
    assert few.count("\nsegment ") == 3 and "2 earlier segments (--all lists them)" in few
    assert everything.count("\nsegment ") == 5 and "earlier" not in everything


def test_the_output_of_a_run_is_found_by_its_own_arguments(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN_FILE)
    by_file = inspect(capsys, "--json", "--run", "run.toml")
    assert json.loads(by_file) == json.loads(inspect(capsys, finished, "--json"))
    finished.rename(tmp_path / "other.h5")
    arguments = ("--max-new-tokens", 3, "--output", "other.h5", "run.toml")
    assert inspect(capsys, "--json", "--run", *arguments) == by_file
    assert main(["inspect", "--json", "--run", "run.toml"]) == 2 and "run.h5 does not exist" in capsys.readouterr().err
    assert main(["inspect", "--run", "run.toml", "--max-new-token", "3"]) == 2
    assert "--max-new-token" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run.h5", "--run", "run.toml"]])
def test_a_file_or_a_run_is_asked_for(arguments, capsys):
    assert main(["inspect", *arguments]) == 2 and "a file, or --run" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["slurm/several_nodes.sbatch", "pbs/several_nodes.pbs"])
@pytest.mark.parametrize(("says", "code"), [('{"finished": true}', 0), ('{"finished": false}', 1), ("", 1)])
def test_scripts_of_several_nodes_believe_the_output_not_the_launcher(tmp_path, script, says, code):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "noria").write_text(
        f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\n[ $1 = run ] || echo '{says}'\n"
    )
    (tmp_path / "bin" / "noria").chmod(0o755)
    (tmp_path / "activate").write_text("")
    (tmp_path / "nodes").write_text("n1\n")
    own = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "NORIA_LAUNCH": "env",
        "NORIA_ENVIRONMENT": f"{tmp_path}/activate",
        "SLURM_SUBMIT_DIR": f"{tmp_path}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "PBS_O_WORKDIR": f"{tmp_path}",
        "PBS_JOBID": "7",
        "PBS_NODEFILE": f"{tmp_path}/nodes",
        "RUN": "run.toml --seed 1",
    }
    command = ["bash", ROOT / "jobs" / script, "run.toml", "--seed", "1"]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["run run.toml --seed 1", "inspect --json --run run.toml --seed 1"]
