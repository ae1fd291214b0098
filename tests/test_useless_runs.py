"""A useless night is seen early, and what became of the rows is said: before loading, at the end, in inspect, by exit codes."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import noria.run
import small_run
import world
from noria.__main__ import main
from noria.desk import validation
from noria.output.outcome import Reasons, how_to_read, outcome_of_parts
from noria.output.parts import Parts, parts_folder
from noria.output.sealed import select
from output_rows import fill, make_row

ROOT = Path(__file__).parent.parent
RIGHT = {"token_ids": [5, 6, 7], "max_new_tokens": 2}
WRONG = {"token_ids": [5], "temperature": -1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("useless"))


@pytest.fixture
def run(folder, tmp_path, capsys):
    """The exit code and the words of a run of these rows."""

    def run(rows, *more, output="out.h5", suffix=".jsonl"):
        prompts = tmp_path / f"p{suffix}"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        code = main(small_run.command(folder, tmp_path / output, "--prompts", prompts, *more))
        return code, capsys.readouterr().err

    return run


def inspect(capsys, path):
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_where_all_rows_are_wrong_nothing_is_loaded_or_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(noria.run.transports, "choose", None)
    rows = [{**WRONG, "id": f"a{row}", "temperature": -row} for row in range(1, 4)] + [{"token_ids": [999999]}]
    code, said = run(rows)
    assert code == 2 and said.count("\n") == 1
    assert "none of 4 rows of" in said and "3 rows in error, such as a1: sampling.temperature is -1" in said
    assert "1 row in error, 3: token id 999999 is not in the model's vocabulary" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]


def test_a_right_row_among_the_first_lets_the_run_go_on_and_the_end_says_what_was_wrong(run, tmp_path, capsys):
    code, said = run([WRONG, WRONG, RIGHT, {**RIGHT, "max_new_tokens": 24}])
    assert code == 0
    lines = said.splitlines()[-3:]
    assert lines[0] == f"output: {tmp_path / 'out.h5'}"
    assert lines[1].startswith("2 rows in error, such as 0: sampling.temperature is -1")
    assert lines[2] == f"to read it: noria export {tmp_path / 'out.h5'} {tmp_path / 'out'}.jsonl"
    out = inspect(capsys, tmp_path / "out.h5")
    assert lines[1] + "\n" in out and "to read it: noria export" in out


def test_how_an_output_is_read_can_be_typed_whatever_its_name():
    assert how_to_read("my run.h5") == "to read it: noria export 'my run.h5' 'my run.jsonl'"


def test_rows_that_ended_at_the_limit_are_counted_where_nobody_asked_to_go_on_to_it(run, tmp_path, capsys):
    rows = [{"token_ids": [row]} for row in range(5, 8)] + [RIGHT]
    assert run(rows, "--no-ignore-eos", "--max-new-tokens", 3)[1].splitlines()[-2] == (
        "3 of 4 rows ended at max_new_tokens (3): raise it if they should go on"
    )
    assert "ended at" not in run(rows, "--max-new-tokens", 3, output="wanted.h5")[1]


@pytest.mark.parametrize(
    ("rows", "more", "code"),
    [
        ([RIGHT, WRONG], [], 0),
        ([RIGHT, WRONG], ["--fail-on-errors"], 65),
        ([RIGHT], ["--fail-on-errors"], 0),
        ([RIGHT, WRONG], ["--shard", "2/2"], 65),
        ([WRONG, WRONG], ["--shard", "2/2"], 65),
        ([RIGHT, WRONG], ["--shard", "1/2", "--fail-on-errors"], 0),
        ([RIGHT], ["--shard", "2/2", "--fail-on-errors"], 0),
        ([], ["--fail-on-errors"], 0),
    ],
)
def test_the_exit_code_is_65_where_all_rows_are_errors_or_any_may_be_none_also_when_nothing_is_left_to_do(
    run, rows, more, code
):
    assert run(rows, *more)[0] == code
    again = run(rows, *more)
    assert again[0] == code and "is finished: nothing to do" in again[1]
    assert ("1 row in error, 1: sampling.temperature" in again[1]) == (
        WRONG in rows and more != ["--shard", "1/2", "--fail-on-errors"]
    )


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.parametrize(
    ("rows", "more"), [([WRONG, RIGHT], ["--fail-on-errors"]), ([RIGHT, WRONG], ["--shard", "2/2"])]
)
def test_every_rank_ends_with_65_also_those_of_a_job_that_finds_nothing_left_to_do(folder, tmp_path, rows, more):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = small_run.command(folder, tmp_path / "out.h5", "--prompts", tmp_path / "p.jsonl", *more)
    for said in ("generated tokens in", "is finished: nothing to do"):
        done = world.command(2, command)
        assert done.returncode == 65 and said in done.stderr
        assert "1 row in error" in done.stderr


def test_only_as_many_rows_are_looked_at_as_are_enough(run, monkeypatch):
    monkeypatch.setattr(validation, "LOOKED_AT", 3)
    code, said = run([WRONG] * 3 + [RIGHT])
    assert code == 2 and "none of the first 3 rows of" in said
    assert run([WRONG] * 2 + [RIGHT, WRONG])[0] == 0


def test_where_rows_are_sealed_already_the_run_goes_on_though_none_of_the_first_can_run(run, monkeypatch):
    rows = [WRONG, WRONG, RIGHT]
    assert run(rows)[0] == 0
    monkeypatch.setattr(validation, "LOOKED_AT", 2)
    assert run(rows, output="fresh.h5")[0] == 2
    assert run(rows, "--retry-errors", "--fail-on-errors")[0] == 65


def test_a_merge_of_shards_gives_65_where_all_rows_are_errors_or_any_may_be_none(run, tmp_path, capsys):
    def merge(name, rows, *more):
        shards = [tmp_path / f"{name}{i}.h5" for i in (1, 2)]
        for i, shard in enumerate(shards, 1):
            run(rows, "--shard", f"{i}/2", output=shard)
        capsys.readouterr()
        command = ["merge", *map(str, [*more, tmp_path / f"{name}.h5", *shards])]
        return main(command), capsys.readouterr().err, main(command)

    code, said, again = merge("all", [WRONG, WRONG, WRONG])
    assert code == again == 65 and "3 rows in error, such as 0: sampling.temperature" in said
    assert merge("some", [RIGHT, WRONG])[::2] == (0, 0)
    assert merge("any", [RIGHT, WRONG], "--fail-on-errors")[::2] == (65, 65)


def test_inspect_of_an_unfinished_output_says_why_rows_are_in_error(run, tmp_path, capsys):
    assert run([RIGHT, WRONG], output="out.h5")[0] == 0
    parts = parts_folder(tmp_path / "out.h5")
    parts.mkdir()
    os.rename(tmp_path / "out.h5", parts / "part-000000.h5")
    assert "\n1 row in error, 1: sampling.temperature is -1" in inspect(capsys, tmp_path / "out.h5")


def test_reasons_that_differ_in_numbers_are_one_and_the_most_frequent_come_first():
    reasons = Reasons()
    for row in range(3):
        reasons.add(f"b{row}", f"the prompt has {5000 + row} tokens, the model's context 4096: shorten it")
    for row in range(9):
        reasons.add(f"c{row}", f"unknown key 'temperatur{'abcdefghi'[row]}'")
    reasons.add("a\x1b", "x" * 999)
    lines = reasons.lines(shown=3)
    assert lines[0] == "3 rows in error, such as b0: the prompt has 5000 tokens, the model's context 4096: shorten it"
    assert len(lines) == 4 and lines[-1] == "8 rows in error for 8 other reasons"
    assert "\x1b" not in "".join(reasons.lines(99)) and max(map(len, reasons.lines(99))) < 300


def validate(folder, tmp_path, capsys, text, *more, name="v.jsonl"):
    (tmp_path / name).write_bytes(text)
    files = ["--model", folder / "model.h5", "--prompts", tmp_path / name, "--output", tmp_path / "v.h5"]
    capsys.readouterr()
    code = main(["validate", *map(str, [*files, *more])])
    return code, *capsys.readouterr()


def test_validate_lists_ten_wrong_rows_with_all_reasons_or_all_of_them(folder, tmp_path, capsys):
    text = (json.dumps(WRONG) + "\n").encode() * 23 + b'{"token_ids": []}\n'
    code, out, _ = validate(folder, tmp_path, capsys, text)
    assert code == 2 and out.count("\nrow ") == 10 and "and 14 other rows (--all lists them)" in out
    assert "\n23 rows in error, such as 0: sampling.temperature" in out and "\n1 row in error, 23: token_ids is" in out
    code, out, _ = validate(folder, tmp_path, capsys, text, "--all")
    assert code == 2 and out.count("\nrow ") == 24 and "row 23" in out and "other row" not in out


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt"])
def test_a_file_without_prompts_is_a_warning(folder, tmp_path, capsys, name):
    code, out, err = validate(folder, tmp_path, capsys, b"", name=name)
    assert code == 0 and f"warning: {tmp_path / name} has no rows" in out and not err
    assert main(small_run.command(folder, tmp_path / f"{name}.h5", "--prompts", tmp_path / name)) == 0
    assert f"warning: {tmp_path / name} has no rows" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "code", "ends"), [("array", 65, 0), ("array", 1, 1), ("single_node", 65, 65)])
def test_scripts_do_not_queue_up_again_on_65_and_those_of_arrays_end_well_after_it(tmp_path, script, code, ends):
    (tmp_path / "bin").mkdir()
    for name, does in (("noria", f"exit {code}"), ("scontrol", f"touch {tmp_path}/requeued")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "activate").write_text("")
    job = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n1"}
    array = {"SLURM_ARRAY_TASK_ID": 1, "SLURM_ARRAY_TASK_MAX": 2, "SLURM_ARRAY_JOB_ID": 6}
    own = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "NORIA_LAUNCH": "env",
        "NORIA_ENVIRONMENT": tmp_path / "activate",
    }
    environment = {name: str(value) for name, value in (job | array | own).items()}
    command = ["bash", ROOT / f"jobs/slurm/{script}.sbatch", "out.h5", "run.toml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == ends and not (tmp_path / "requeued").exists(), done


@pytest.mark.parametrize(
    ("header", "most"), [({}, 256), ({"sampling.max_new_tokens": None}, 256), ({"sampling.max_new_tokens": 9}, 9)]
)
def test_rows_at_the_limit_are_counted_where_nobody_said_one(tmp_path, header, most):
    rows = [make_row(row, num_tokens=most if row < 4 else 5) for row in range(6)]  # every second ended by its length
    parts = Parts(tmp_path / "o.h5", header)
    fill(parts, rows)
    assert outcome_of_parts(parts.parts, select(parts.parts)).lines() == [
        f"2 of 6 rows ended at max_new_tokens ({most}): raise it if they should go on"
    ]


BLANK = '{"a":' + " " * 32 + "1"
HINT = '; most of their text is blanks: "disable_any_whitespace": true in structured_outputs leaves none'


@pytest.mark.parametrize(
    ("structured", "text", "hint"),
    [
        ({"json": {}}, BLANK, HINT),
        (None, BLANK, HINT),  # rows may have constraints of their own
        (None, "a" + " " * 32, ""),
        ({"json": {}}, '{"a": 1, "b": [2,', ""),
        ({"json": {}, "disable_any_whitespace": True}, BLANK, ""),
        ({"regex": ".*"}, BLANK, ""),
    ],
)
def test_rows_of_json_that_ended_in_blanks_are_told_how_to_have_none(tmp_path, structured, text, hint):
    rows = [replace(make_row(row, num_tokens=9), text=text) for row in range(4)]
    parts = Parts(tmp_path / "o.h5", {"sampling.max_new_tokens": 9, "sampling.structured_outputs": structured})
    fill(parts, rows)
    assert outcome_of_parts(parts.parts, select(parts.parts)).lines() == [
        f"2 of 4 rows ended at max_new_tokens (9): raise it if they should go on{hint}"
    ]
