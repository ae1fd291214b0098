"""`--retry-errors` with mended prompts: rows in error may have others than before, all other rows may not.

What comes out is held against a run over the mended prompts from the beginning.
"""

import json

import pytest

import noria.desk.desk
import small_run
from noria.__main__ import main
from noria.output.export import export
from noria.output.generations import open_generations
from noria.output.parts import Parts
from noria.output.sealed import part_files, parts_folder
from noria.output.target import reopen

FLOAT64 = ("--dtype", "float64", "--max-new-tokens", "4")
OVER = {"token_ids": [5, 10**6]}  # no such token
ROWS = [{"id": f"r{row}", "token_ids": [5 + row, 6], "note": row} for row in range(6)]
WRONG = [*ROWS[:2], ROWS[2] | OVER, ROWS[3], ROWS[4] | OVER, ROWS[5]]
HALF = [*ROWS[:4], ROWS[4] | OVER, ROWS[5]]  # row 2 is mended, row 4 is not


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("mended"))


@pytest.fixture
def folder(files, tmp_path):
    (tmp_path / "model.h5").symlink_to(files / "model.h5")
    return tmp_path


def run(folder, rows, *more, output="run.h5", code=0):
    """Runs over these rows: objects, or lines as they are. The name of the file of prompts stays."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))
    assert main(small_run.command(folder, output, *FLOAT64, *more)) == code


def exported(folder, output="run.h5"):
    export(folder / output, folder / "rows.jsonl", lambda line: None)
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def anew(folder, rows, *more):
    """The rows of a run over these prompts from the beginning."""
    (folder / "anew.h5").unlink(missing_ok=True)
    run(folder, rows, *more, output="anew.h5")
    return exported(folder, "anew.h5")


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["finished", "unfinished"])
def test_rows_in_error_get_their_mended_prompts_and_are_listed(folder, capsys, whole):
    run(folder, WRONG)
    if not whole:
        reopen(folder / "run.h5")
        assert part_files(parts_folder(folder / "run.h5"))
    capsys.readouterr()
    run(folder, HALF, "--retry-errors")
    said = capsys.readouterr().err
    assert "1 row in error with another prompt than before: row 2 (r2)" in said
    assert "1 row done, 1 with errors, 4 finished before" in said
    assert exported(folder) == anew(folder, HALF)
    capsys.readouterr()
    run(folder, ROWS, "--retry-errors")
    assert "1 row in error with another prompt than before: row 4 (r4)" in capsys.readouterr().err
    assert exported(folder) == anew(folder, ROWS)


def test_without_the_flag_other_prompts_are_refused_as_ever(folder, capsys):
    run(folder, WRONG)
    run(folder, ROWS, code=2)
    assert "holds rows of another run: prompts:" in capsys.readouterr().err


CHANGED = {
    "a prompt": lambda row: row | {"token_ids": [7, 7]},
    "an id": lambda row: row | {"id": "other"},
    "a column": lambda row: row | {"note": "other"},
    "a column more": lambda row: row | {"more": 1},
    "an error now": lambda row: row | OVER,
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "whole"), [*((case, True) for case in CHANGED), ("a prompt", False)])
def test_a_row_that_is_no_error_may_not_have_another_prompt(folder, capsys, case, whole):
    run(folder, WRONG)
    before = (folder / "run.h5").read_bytes()
    if not whole:
        reopen(folder / "run.h5")
    run(folder, [*ROWS[:5], CHANGED[case](ROWS[5])], "--retry-errors", code=2)
    said = capsys.readouterr().err
    assert "1 row of" in said and "is no error has another prompt now (row 5 (" in said
    place = folder / "run.h5" if whole else part_files(parts_folder(folder / "run.h5"))[0]
    assert place.read_bytes() == before


@pytest.mark.slow
def test_rows_fewer_or_more_than_before_are_refused_and_more_are_taken_with_extend(folder, capsys):
    run(folder, WRONG)
    run(folder, ROWS[:4], "--retry-errors", code=2)
    assert "have 4 rows, and" in capsys.readouterr().err
    more = [*ROWS, {"id": "new", "token_ids": [9]}]
    run(folder, more, "--retry-errors", code=2)
    assert "have more rows than" in capsys.readouterr().err
    run(folder, more, "--retry-errors", "--extend")
    assert exported(folder) == anew(folder, more)


@pytest.mark.slow
def test_an_error_that_is_another_after_it_was_mended_is_told_as_it_is_now(folder):
    run(folder, WRONG)
    rows = [*ROWS[:2], ROWS[2] | {"token_ids": [-1]}, *ROWS[3:]]
    run(folder, rows, "--retry-errors")
    assert exported(folder) == anew(folder, rows)
    assert exported(folder)[2]["error"].startswith("token_ids[0] is -1")


@pytest.mark.slow
def test_a_mended_row_may_ask_for_fewer_samples_or_for_more(folder):
    wrong = [ROWS[0], ROWS[1] | OVER | {"n": 3}, ROWS[2] | OVER, ROWS[3]]
    run(folder, wrong)
    assert [row["status"] for row in exported(folder)] == ["done", "error", "error", "error", "error", "done"]
    right = [ROWS[0], ROWS[1] | {"n": 2}, ROWS[2] | {"n": 2}, ROWS[3]]
    run(folder, right, "--retry-errors", "--temperature", "0.9")
    assert exported(folder) == anew(folder, right, "--temperature", "0.9")


@pytest.mark.slow
def test_a_line_that_was_no_json_and_an_id_that_was_twice_can_be_mended(folder):
    run(folder, [ROWS[0], '{"id": "r1", "token_ids": [6', ROWS[2], ROWS[3] | {"id": "r2"}])
    assert [row["status"] for row in exported(folder)] == ["done", "error", "done", "error"]
    run(folder, ROWS[:4], "--retry-errors")
    assert exported(folder) == anew(folder, ROWS[:4])


@pytest.mark.slow
def test_the_old_version_of_a_row_stays_until_the_new_one_is_sealed(folder, monkeypatch):
    run(folder, WRONG)
    old = exported(folder)
    with monkeypatch.context() as patched:
        patched.setattr(noria.desk.desk.Desk, "_finish", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(BaseException, match=r".*"):
            run(folder, ROWS, "--retry-errors")
    assert not (folder / "run.h5").exists() and exported(folder) == old
    run(folder, ROWS, "--retry-errors")
    assert exported(folder) == anew(folder, ROWS)


@pytest.mark.slow
def test_errors_of_all_kinds_are_listed_only_where_their_rows_are_others_now(folder, capsys):
    kinds = [OVER, {"temperature": -1}, {"token_ids": list(range(200))}, {"top_k": "x"}, {"token_ids": []}]
    wrong = [row | kind for row, kind in zip(ROWS[1:], kinds, strict=True)]
    run(folder, [ROWS[0], *wrong])
    assert [row["status"] for row in exported(folder)] == ["done"] + ["error"] * 5
    for place, listed in (
        (3, "2 rows in error with another prompt than before: row 1 (r1), row 2 (r2)"),
        (6, "3 rows in error with another prompt than before: row 3 (r3), row 4 (r4), row 5 (r5)"),
    ):
        capsys.readouterr()
        run(folder, [*ROWS[:place], *wrong[place - 1 :]], "--retry-errors")
        assert listed in capsys.readouterr().err
    assert exported(folder) == anew(folder, ROWS)


@pytest.mark.slow
def test_rows_that_an_earlier_job_mended_already_are_not_generated_again(folder, capsys):
    run(folder, WRONG)
    run(folder, HALF, "--retry-errors")
    reopen(folder / "run.h5")
    capsys.readouterr()
    run(folder, ROWS, "--retry-errors")
    assert "row 4 (r4)" in capsys.readouterr().err
    assert exported(folder) == anew(folder, ROWS)


@pytest.mark.slow
def test_a_row_that_was_stopped_half_way_may_not_have_another_prompt(folder, capsys):
    run(folder, WRONG)
    reopen(folder / "run.h5")
    parts = Parts(folder / "run.h5", {})
    with_half = part_files(parts.folder)[0]
    header = parts.parts[0].header
    with open_generations(with_half) as file:
        rows = file.read(0, len(file))
    rows[5].status, rows[5].finish_reason, rows[5].token_ids = "todo", "none", rows[5].token_ids[:2]
    with_half.unlink()
    parts = Parts(folder / "run.h5", header)
    for row in rows:
        parts.add(row)
    parts.seal()
    run(folder, [*ROWS[:5], ROWS[5] | {"token_ids": [7]}], "--retry-errors", code=2)
    assert "(row 5 (r5))" in capsys.readouterr().err
    run(folder, ROWS, "--retry-errors")
    assert exported(folder) == anew(folder, ROWS)


@pytest.mark.slow
def test_shards_with_and_without_errors_are_merged_after_they_were_mended(folder):
    for shard in (1, 2):
        run(folder, WRONG, "--shard", f"{shard}/2", output=f"run.{shard}.h5")
    for shard in (1, 2):
        run(folder, ROWS, "--shard", f"{shard}/2", "--retry-errors", output=f"run.{shard}.h5")
    assert main(["merge", str(folder / "all.h5"), *(str(folder / f"run.{shard}.h5") for shard in (1, 2))]) == 0
    assert exported(folder, "all.h5") == anew(folder, ROWS)
