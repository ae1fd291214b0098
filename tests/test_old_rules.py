"""An output that an earlier version began goes on by that version's rules, or is refused before anything is loaded.

The files are those of tests/data/old_rules: an unfinished output, and what that version itself made of it in the end.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import noria.run
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.output.agreement import ANEW
from noria.output.generations import open_generations
from noria.output.parts import Parts, parts_folder
from noria.rows.prompt_files import content_hash, content_key

DATA = Path(__file__).parent / "data" / "old_rules"
KEYS = "--device cpu --dtype float64 --temperature 1.1 --ignore-eos --groups 1 --step-tokens 5".split()
NOT_BEGUN = (9, 10)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA, tmp_path / "old"))


@pytest.fixture(scope="module")
def tokenizer():
    with open_checkpoint(DATA / "model.h5") as file:
        return Tokenizer.from_str(file.tokenizer["tokenizer.json"].decode())


def command(folder, output, *more):
    files = ["--model", folder / "model.h5", "--prompts", folder / "prompts.jsonl", "--output", folder / output]
    return ["run", *map(str, files), *KEYS, *map(str, more)]


def rows_of(path):
    with open_generations(path) as file:
        return list(file.rows())


def sealed_again(folder, output, change, more=()):
    """The sealed rows of the unfinished output, changed, and `more` rows, as the parts of another output."""
    (part,) = (folder / "stopped.h5.parts").glob("part-*.h5")
    with open_generations(part) as file:
        parts = Parts(folder / output, json.loads(file.attrs["header"]))
        for row in [*file.rows(), *more]:
            change(row)
            parts.add(row)
    parts.seal()


def with_prompt(number, token_ids):
    """A change of the prompt tokens of a row: as if that version had rendered it otherwise."""

    def change(row):
        if row.row == number:
            row.prompt_token_ids = np.array(token_ids, np.int32)

    return change


def refused(capsys, monkeypatch, *arguments):
    capsys.readouterr()
    monkeypatch.setattr(noria.run.transports, "choose", None)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_it_ends_as_the_earlier_version_would_have_ended_it_with_texts_anew(folder, tokenizer, capsys):
    assert main(command(folder, "stopped.h5")) == 0
    said = capsys.readouterr().err
    assert "was begun by an earlier version" in said and "sampling by the model's" not in said
    found, wanted = rows_of(folder / "stopped.h5"), rows_of(folder / "whole.h5")
    assert len(found) == len(wanted) == 14
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.row, ours.sample, ours.status, ours.error) == (
            theirs.row,
            theirs.sample,
            theirs.status,
            theirs.error,
        )
        assert ours.finish_reason == theirs.finish_reason and ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.prompt_token_ids.tolist() == theirs.prompt_token_ids.tolist()
        for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None) and (a is None or np.allclose(a, b, 0, 1e-9, equal_nan=True))
    texts = 0
    for row in found:
        prompt, tokens = row.prompt_token_ids.tolist(), row.token_ids.tolist()
        whole = tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]
        ends = [place for stop in (" be", "not") if (place := whole.find(stop)) >= 0] if row.row == 4 else []
        assert row.text == whole[: min(ends, default=None)]
        texts += row.text.startswith(" ")
    assert texts > 3, "texts whose first space the earlier version left away"
    with open_generations(folder / "stopped.h5") as file:
        header = json.loads(file.attrs["header"])
        assert (
            header["rules"] == 1 and file.attrs["texts"] == ANEW and file.attrs["seed"] == header["sampling.seed"] > 0
        )
    assert not parts_folder(folder / "stopped.h5").exists()
    assert main(command(folder, "stopped.h5")) == 0
    assert "stopped.h5 is finished: nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("row", [0, 5, 9])
def test_where_rows_would_be_rendered_otherwise_now_it_is_refused_if_some_are_not_begun(
    folder, capsys, monkeypatch, row
):
    sealed_again(folder, "other.h5", with_prompt(row, [1, 2, 3, 4]))
    if row in NOT_BEGUN:
        assert main(command(folder, "other.h5")) == 0, "nothing is sealed of this row"
        return
    said = refused(capsys, monkeypatch, *command(folder, "other.h5"))
    tokens = len(rows_of(folder / "whole.h5")[row + 2 * (row > 1)].prompt_token_ids)
    assert f"tokenized its prompts differently (row {row}, {row}: 4 tokens there, {tokens} tokens now)" in said
    assert "finish it with that version, or --overwrite" in said
    assert list(parts_folder(folder / "other.h5").glob("part-*"))


@pytest.mark.parametrize("status", ["done", "error"])
def test_it_is_refused_where_a_batch_line_of_several_prompts_was_one_row_and_is_several_now(
    folder, capsys, monkeypatch, status
):
    several = {"url": "/v1/completions", "body": {"prompt": ["or", "be"], "max_tokens": 4}}
    one = {"url": "/v1/completions", "body": {"prompt": "" if status == "error" else "not", "max_tokens": 4}}
    lines = [{"custom_id": id} | line for id, line in zip("abc", (several, one, one), strict=True)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = sorted(rows_of(folder / "whole.h5"), key=lambda row: row.status != "error")[:2]
    first.row, first.id, second.row, second.id = 0, "a", 1, "b"
    if status == "error":
        second = dataclasses.replace(first, row=1, id="b")
    (part,) = (folder / "stopped.h5.parts").glob("part-*.h5")
    with open_generations(part) as file:
        header = json.loads(file.attrs["header"]) | {
            "prompts": content_key(folder / "prompts.jsonl", content_hash(folder / "prompts.jsonl"))
        }
    parts = Parts(folder / "several.h5", header)
    for row in (first, second):
        parts.add(row)
    parts.seal()
    said = refused(capsys, monkeypatch, *command(folder, "several.h5"))
    assert "(row 1: b there, a[1] now), and new rows would not match the old ones" in said


def test_where_all_rows_are_begun_those_half_way_go_on_with_the_prompt_tokens_that_they_had(folder):
    begun = [row for row in rows_of(folder / "whole.h5") if row.row in NOT_BEGUN]
    sealed_again(folder, "other.h5", with_prompt(7, [1, 7, 5]), begun)
    assert main(command(folder, "other.h5")) == 0
    (found,) = (row for row in rows_of(folder / "other.h5") if row.row == 7)
    (half,) = (row for row in rows_of(next((folder / "stopped.h5.parts").glob("part-*.h5"))) if row.row == 7)
    assert found.prompt_token_ids.tolist() == [1, 7, 5] and len(found.token_ids) == 40 > len(half.token_ids) > 3
    assert found.token_ids[: len(half.token_ids)].tolist() == half.token_ids.tolist()


def test_a_finished_output_of_that_version_is_known_again_and_tries_its_errors_again(folder, capsys):
    before = (folder / "whole.h5").read_bytes()
    assert main(command(folder, "whole.h5")) == 0
    assert "whole.h5 is finished: nothing to do" in capsys.readouterr().err
    assert (folder / "whole.h5").read_bytes() == before
    wanted = [row.token_ids.tolist() for row in rows_of(folder / "whole.h5")]
    assert main(command(folder, "whole.h5", "--retry-errors")) == 0
    found = rows_of(folder / "whole.h5")
    assert [row.token_ids.tolist() for row in found] == wanted and found[0].text.startswith(" ")


def test_another_seed_or_temperature_is_another_run(folder, capsys):
    for flag, key in (("--seed", "seed"), ("--top-k", "top_k")):
        assert main(command(folder, "stopped.h5", flag, "2")) == 2
        assert f"holds rows of another run: sampling.{key}: " in capsys.readouterr().err
    assert main(command(folder, "stopped.h5", "--overwrite")) == 0
    with open_generations(folder / "stopped.h5") as file:
        header = json.loads(file.attrs["header"])
    assert (header["rules"], header["sampling.top_k"], header["sampling.seed"]) == (2, 2, 0)
