"""Shards: which rows each generates, what is refused, and that merged they are the run without shards."""

import json
import re

import numpy as np
import pytest

import small_run
import world
from mpirun import describe
from noria.__main__ import main
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.tools.values import parse_shard, shard_rows

NUM_ROWS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and 14 rows; every second one sampled by the run's keys, the others greedy by their own."""
    folder = small_run.write_files(tmp_path_factory.mktemp("shards"))
    random = np.random.default_rng(3)
    rows = [
        {
            "id": f"row {row}",
            "token_ids": random.integers(4, 101, [1, 3, 30, 9][row % 4]).tolist(),
            "max_new_tokens": [12, 2, 7, 1, 9][row % 5],
            **({} if row % 2 else {"temperature": 0}),
            **({"temperature": -1} if row == 5 else {}),
        }
        for row in range(NUM_ROWS)
    ]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = [{name: row[name] for name in ("id", "token_ids", "max_new_tokens")} for row in rows]
    (folder / "greedy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in greedy))
    return folder


def arguments(folder, output, *more):
    return small_run.command(folder, output, "--dtype", "float64", "--prompts", folder / "mixed.jsonl", *more)


def tokens(output):
    with open_generations(output) as file:
        return [(row.row, row.id, row.sample, row.status, row.token_ids.tolist(), row.error) for row in file.rows()]


def datasets(output):
    """The checksums of all columns, which are those of their contents."""
    with open_generations(output) as file:
        return json.loads(file.attrs["checksums"])


# Which rows.


@pytest.mark.parametrize("n", [1, 2, 3, 5, 14, 20])
@pytest.mark.parametrize("num_rows", [0, 1, 14, 15])
def test_every_row_is_in_exactly_one_shard(n, num_rows):
    shards = [list(shard_rows(f"{i}/{n}", num_rows)) for i in range(1, n + 1)]
    assert sorted(row for shard in shards for row in shard) == list(range(num_rows))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_rows_that_are_added_to_the_prompts_move_no_row_to_another_shard():
    for i in range(1, 5):
        assert list(shard_rows(f"{i}/4", 30))[: len(shard_rows(f"{i}/4", 11))] == list(shard_rows(f"{i}/4", 11))


def test_without_shard_all_rows_are_the_runs():
    assert shard_rows(None, 7) == shard_rows("1/1", 7) == range(7)


@pytest.mark.parametrize(("text", "parsed"), [("1/4", (1, 4)), ("4/4", (4, 4)), (" 02 / 010 ", (2, 10))])
def test_a_shard_is_two_numbers_from_one(text, parsed):
    assert parse_shard(text) == parsed


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/b", "1/2/3", "-1/4", "1.0/2", "1-4", "²/3", "1/9999999999"])
def test_what_is_no_shard_is_refused_with_an_example(text):
    with pytest.raises(InputError, match=re.escape(f"job.shard is {text!r}: it must be i/n, such as 1/4")):
        parse_shard(text)


@pytest.mark.parametrize(("text", "n"), [("0/4", 4), ("5/4", 4)])
def test_a_shard_outside_its_count_is_told_that_they_count_from_one(text, n):
    with pytest.raises(InputError, match=f"{text}': shards count from 1, so i/{n} goes from 1/{n} to {n}/{n}"):
        parse_shard(text)


def test_the_help_says_how_shards_are_counted(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--shard I/N i/n: generate only every n-th row, starting at row i (1/4, 2/4, 3/4, 4/4: counted from 1, as in job arrays)"
        in said
    )


# What is refused.


def refusal(capsys, folder, *more):
    capsys.readouterr()
    assert main(arguments(folder, "refused.h5", *more)) == 2
    assert not (folder / "refused.h5.parts").exists() and not (folder / "refused.h5").exists()
    return capsys.readouterr().err


def without_seed(command):
    place = command.index("--seed")
    return command[:place] + command[place + 2 :]


def test_a_sampled_shard_needs_no_seed(folder):
    rows = [{"token_ids": [5 + row], "temperature": 1.5} for row in range(2)]
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = small_run.command(folder, "own.h5", "--prompts", folder / "one.jsonl")
    assert main(without_seed(command)) == 0
    for i in (1, 2):
        assert main(without_seed([*command, "--output", str(folder / f"own{i}.h5"), "--shard", f"{i}/2"])) == 0
    assert tokens(folder / "own1.h5") + tokens(folder / "own2.h5") == tokens(folder / "own.h5")


@pytest.mark.parametrize("shard", ["0/3", "4/3", "a"])
def test_a_wrong_shard_is_refused_before_anything_is_loaded(folder, capsys, shard):
    assert "job.shard is" in refusal(capsys, folder, "--shard", shard)


def test_a_shard_does_not_go_on_in_the_output_of_another(folder, capsys):
    assert main(arguments(folder, "mine.h5", "--shard", "1/3")) == 0
    capsys.readouterr()
    for other in (["--shard", "2/3"], ["--shard", "1/2"], []):
        assert main(arguments(folder, "mine.h5", *other)) == 2
        assert 'another run: shard: "1/3" there, "' in capsys.readouterr().err
    assert main(arguments(folder, "mine.h5", "--shard", " 1/03")) == 0, "the same shard, finished"


# Whole runs.


def run_shards(folder, name, n, *more):
    outputs = [folder / f"{name}.{i}.h5" for i in range(1, n + 1)]
    for i, output in enumerate(outputs, 1):
        assert main(arguments(folder, output.name, "--shard", f"{i}/{n}", *more)) == 0
    return outputs


@pytest.mark.slow
def test_three_shards_merged_are_the_run_without_shards(folder, capsys):
    assert main(arguments(folder, "whole.h5")) == 0
    shards = run_shards(folder, "three", 3)
    assert [len(tokens(shard)) for shard in shards] == [5, 5, 4]
    assert main(["merge", str(folder / "three.h5"), *map(str, shards[::-1])]) == 0
    assert "three.h5: 14 rows of 3 shards" in capsys.readouterr().err
    whole = tokens(folder / "whole.h5")
    assert tokens(folder / "three.h5") == whole and datasets(folder / "three.h5") == datasets(folder / "whole.h5")
    assert len({tuple(row[4]) for row in whole}) > 6 and [row[3] for row in whole].count("error") == 1
    assert main(arguments(folder, "three.h5")) == 0
    assert "three.h5 is finished: nothing to do" in capsys.readouterr().err


@pytest.mark.slow
def test_greedy_shards_need_no_seed_and_merge(folder):
    greedy = ["--prompts", folder / "greedy.jsonl", "--temperature", "0"]
    assert main(without_seed(arguments(folder, "greedy.h5", *greedy))) == 0
    outputs = [folder / f"greedy.{i}.h5" for i in (1, 2)]
    for i, output in enumerate(outputs, 1):
        assert main(without_seed(arguments(folder, output.name, *greedy, "--shard", f"{i}/2"))) == 0
    assert main(["merge", str(folder / "both.h5"), *map(str, outputs)]) == 0
    assert tokens(folder / "both.h5") == tokens(folder / "greedy.h5")


@pytest.mark.slow
def test_greedy_shards_that_were_merged_take_longer_prompts(folder, tmp_path):
    lines = (folder / "greedy.jsonl").read_text().splitlines(keepends=True)
    greedy = ["--prompts", tmp_path / "p.jsonl", "--temperature", "0"]
    (tmp_path / "p.jsonl").write_text("".join(lines[:9]))
    shards, merged = [tmp_path / f"{i}.h5" for i in (1, 2)], tmp_path / "merged.h5"
    for i, output in enumerate(shards, 1):
        assert main(without_seed(arguments(folder, output, *greedy, "--shard", f"{i}/2"))) == 0
    assert main(["merge", str(merged), *map(str, shards)]) == 0
    (tmp_path / "p.jsonl").write_text("".join(lines))
    longer = without_seed(arguments(folder, merged, *greedy))
    assert main(longer) == 2 and main([*longer, "--extend"]) == 0
    assert main(without_seed(arguments(folder, tmp_path / "whole.h5", *greedy))) == 0
    assert tokens(merged) == tokens(tmp_path / "whole.h5") and len(tokens(merged)) == NUM_ROWS


@pytest.mark.slow
def test_shards_of_several_samples_a_prompt_merge_too(folder):
    several = ["--n", "3"]
    assert main(arguments(folder, "samples.h5", *several)) == 0
    shards = run_shards(folder, "samples", 2, *several)
    assert main(["merge", str(folder / "samples-merged.h5"), *map(str, shards)]) == 0
    whole = tokens(folder / "samples.h5")
    assert tokens(folder / "samples-merged.h5") == whole and {row[2] for row in whole} == {0, 1, 2}


@pytest.mark.slow
def test_more_shards_than_rows_leave_some_empty_and_merge(folder):
    (folder / "two.jsonl").write_text('{"token_ids": [5, 6]}\n{"token_ids": [7]}\n')
    two = ["--prompts", folder / "two.jsonl"]
    assert main(arguments(folder, "two.h5", *two)) == 0
    shards = run_shards(folder, "two", 3, *two)
    assert tokens(shards[2]) == []
    assert main(["merge", str(folder / "two-merged.h5"), *map(str, shards)]) == 0
    assert tokens(folder / "two-merged.h5") == tokens(folder / "two.h5")


@pytest.mark.slow
@pytest.mark.world
def test_shards_on_other_numbers_of_ranks_merged_are_the_run_of_one_rank(folder):
    assert main(arguments(folder, "alone.h5")) == 0
    outputs = [folder / f"ranks.{i}.h5" for i in (1, 2, 3)]
    for i, output in enumerate(outputs, 1):
        done = world.command(i, arguments(folder, output.name, "--shard", f"{i}/3"))
        assert done.returncode == 0, describe(done)
    assert main(["merge", str(folder / "ranks.h5"), *map(str, outputs)]) == 0
    assert tokens(folder / "ranks.h5") == tokens(folder / "alone.h5")
    with open_generations(folder / "ranks.h5") as file:
        assert file.attrs["ranks"] == 6 and file.file["timing/shard"][:].tolist() == [1, 2, 2, 3, 3, 3]
