"""Several files of prompts: their order, their rows' numbers and ids, what extends them, and a limit for a try."""

import json
import os
import random

import pytest

import small_run
from counts import count as cases
from noria.__main__ import main
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.rows.prompt_files import (
    PromptFiles,
    _natural,
    content_hash,
    content_key,
    count,
    counts,
    extends,
    files_of,
    prompt_files,
)
from noria.rows.prompts import noted, open_prompts


def write(path, *records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_files_of_a_pattern_come_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["p-1.jsonl", "p-2.jsonl", "p-10.jsonl", "p-10b.jsonl", "p-010.jsonl", "q.jsonl"]
    for name in names:
        write(tmp_path / name)
    (tmp_path / "p-3.jsonl").mkdir()
    found = files_of("p-*.jsonl")
    assert found == ("p-1.jsonl", "p-2.jsonl", "p-010.jsonl", "p-10.jsonl", "p-10b.jsonl")
    assert files_of(["q.jsonl", "p-1*.jsonl"]) == ("q.jsonl", "p-1.jsonl", "p-10.jsonl", "p-10b.jsonl")
    assert files_of("**/p-2.jsonl") == ("p-2.jsonl",)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    path = write(tmp_path / "a[1].jsonl", {"prompt": "x"})
    assert files_of(path) == (path,)


def test_a_pattern_without_files_and_a_file_named_twice_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"b\*.jsonl: no file matches"):
        files_of(str(tmp_path / "b*.jsonl"))
    with pytest.raises(InputError, match="named twice"):
        files_of([path, str(tmp_path / "*.jsonl")])


def test_rows_number_on_from_file_to_file_and_each_is_read_by_its_own_format(tmp_path):
    files = (
        write(tmp_path / "a.jsonl", {"prompt": "one"}, {"prompt": "two", "id": "x"}),
        str(tmp_path / "b.txt"),
        str(tmp_path / "c.csv"),
    )
    (tmp_path / "b.txt").write_text("three\nfour\n")
    (tmp_path / "c.csv").write_text("prompt,id\nfive,y\n")
    source = PromptFiles(files)
    rows = list(open_prompts(source))
    assert [(row.row, row.prompt, row.id) for row in rows] == [
        (0, "one", "0"),
        (1, "two", "x"),
        (2, "three", "2"),
        (3, "four", "3"),
        (4, "five", "y"),
    ]
    assert counts(source) == [2, 2, 1] and count(source) == 5
    told = [
        {"file": file, "first_row": first, "rows": rows}
        for file, first, rows in zip(files, (0, 2, 4), (2, 2, 1), strict=True)
    ]
    assert prompt_files(source, counts(source)) == told


def test_an_id_that_an_earlier_file_has_gets_its_files_name_and_one_within_a_file_is_an_error(tmp_path):
    first = write(tmp_path / "a.jsonl", {"prompt": "p", "id": "x"}, {"prompt": "p", "id": "z"})
    second = write(tmp_path / "b.jsonl", *({"prompt": "p", "id": id} for id in ("x", "y", "y", "x", "z")))
    third = write(tmp_path / "c.jsonl", {"prompt": "p", "id": "x"}, {"prompt": "p", "id": "b.jsonl:x"})
    said = []
    rows = list(noted(open_prompts(PromptFiles((first, second, third))), said.append))
    assert [row.id for row in rows] == [
        "x",
        "z",
        "b.jsonl:x",
        "y",
        "y",
        "x",
        "b.jsonl:z",
        "c.jsonl:x",
        "c.jsonl:b.jsonl:x",
    ]
    assert [row.row for row in rows if row.error] == [4, 5]
    assert len(said) == 1 and "FILE:id" in said[0]


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path):
    one, two = (write(tmp_path / name / "p.jsonl", {"prompt": "p", "id": "x"}) for name in ("a", "b"))
    assert [row.id for row in open_prompts(PromptFiles((one, two)))] == ["x", f"{two}:x"]


def test_the_error_of_a_row_that_cannot_be_read_names_its_file(tmp_path):
    one, two = write(tmp_path / "a.jsonl", {"prompt": "p"}), write(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text("{\n")
    good, bad = open_prompts(PromptFiles((one, two)))
    assert good.error is None and bad.error.startswith("b.jsonl: line 1 is not JSON")


def test_a_limit_reads_so_many_rows_of_all_files(tmp_path):
    one = write(tmp_path / "a.jsonl", *({"prompt": f"p{row}"} for row in range(3)))
    two = write(tmp_path / "b.jsonl", *({"prompt": f"q{row}"} for row in range(3)))
    for limit, expected in ((1, [1, 0]), (3, [3, 0]), (4, [3, 1]), (6, [3, 3]), (9, [3, 3])):
        source = PromptFiles((one, two), limit=limit)
        assert counts(source) == expected and len(list(open_prompts(source))) == sum(expected)


def test_prompts_are_extended_by_files_at_the_end_and_by_lines_of_the_last_one(tmp_path):
    rows = [{"prompt": f"p{row}"} for row in range(6)]
    one, two = write(tmp_path / "a.jsonl", *rows[:2]), write(tmp_path / "b.jsonl", *rows[2:4])
    three = write(tmp_path / "c.csv")
    alone, both = PromptFiles((one,)), PromptFiles((one, two))
    key_alone, key_both = (content_key(source, content_hash(source)) for source in (alone, both))
    assert key_alone != key_both
    assert extends(both, key_alone) and extends(PromptFiles((one, two, three)), key_both) and extends(both, key_both)
    assert not extends(alone, key_both) and not extends(PromptFiles((two, one)), key_both)
    assert not extends(PromptFiles((two, one)), key_alone)
    write(tmp_path / "b.jsonl", *rows[2:])
    assert extends(both, key_both) and extends(PromptFiles((one, two, three)), key_both)
    write(tmp_path / "a.jsonl", *rows[:1])
    assert not extends(both, key_both)


def test_only_the_last_of_the_old_files_may_have_become_longer(tmp_path):
    one, two = write(tmp_path / "a.jsonl", {"prompt": "p"}), write(tmp_path / "b.jsonl", {"prompt": "q"})
    source = PromptFiles((one, two))
    key = content_key(source, content_hash(source))
    write(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "r"})
    assert not extends(source, key)


def test_moving_bytes_from_file_to_file_gives_other_prompts(tmp_path):
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    source, keys = PromptFiles((str(one), str(two))), set()
    for cut in range(1, 12):
        one.write_text("abcdefghijkl"[:cut])
        two.write_text("abcdefghijkl"[cut:])
        keys.add(content_key(source, content_hash(source)))
    assert len(keys) == 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("source"))


def run(folder, output, *more):
    return main(["run", "--model", str(folder / "model.h5"), "--output", str(folder / output), *small_run.KEYS, *more])


@pytest.fixture
def inside(folder, monkeypatch):
    """The folder, as the one in which the command starts."""
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_a_run_with_a_limit_goes_on_without_it_and_gives_the_same_rows(inside, capfd):
    assert run(inside, "whole.h5", "--prompts", "prompts.jsonl") == 0
    assert run(inside, "tried.h5", "--prompts", "prompts.jsonl", "--limit", "5") == 0
    whole = small_run.rows_of("whole.h5")
    assert small_run.rows_of("tried.h5") == whole[:5]
    capfd.readouterr()
    assert run(inside, "tried.h5", "--prompts", "prompts.jsonl", "--limit", "3") == 0
    assert "is finished: nothing to do" in capfd.readouterr().err
    assert run(inside, "tried.h5", "--prompts", "prompts.jsonl", "--limit", "7") == 0
    assert small_run.rows_of("tried.h5") == whole[:7]
    assert run(inside, "tried.h5", "--prompts", "prompts.jsonl") == 0
    assert small_run.rows_of("tried.h5") == whole


@pytest.mark.slow
def test_an_output_of_several_files_names_them_and_is_extended_by_another(inside, capfd):
    lines = (inside / "prompts.jsonl").read_text().splitlines(keepends=True)
    for number, (first, last) in {1: (0, 3), 2: (3, 5), 10: (5, 12)}.items():
        (inside / f"s-{number}.jsonl").write_text("".join(lines[first:last]))
    os.rename("s-10.jsonl", "later.jsonl")
    assert run(inside, "parts.h5", "--prompts", "s-*.jsonl", "--temperature", "0") == 0
    os.rename("later.jsonl", "s-10.jsonl")
    assert run(inside, "parts.h5", "--prompts", "s-*.jsonl", "--temperature", "0") == 2
    assert "holds rows of another run: prompts: " in capfd.readouterr().err
    assert run(inside, "parts.h5", "--prompts", "s-*.jsonl", "--temperature", "0", "--extend") == 0
    assert run(inside, "one.h5", "--prompts", "prompts.jsonl", "--temperature", "0") == 0
    assert small_run.rows_of("parts.h5") == small_run.rows_of("one.h5")
    assert main(["export", "parts.h5", "s-2.jsonl"]) == 2
    assert "s-2.jsonl holds the prompts of parts.h5, which would be lost" in capfd.readouterr().err
    with open_generations("parts.h5") as file:
        told = json.loads(file.attrs["prompt_files"])
        assert [(one["file"], one["first_row"], one["rows"]) for one in told] == [
            ("s-1.jsonl", 0, 3),
            ("s-2.jsonl", 3, 2),
            ("s-10.jsonl", 5, 7),
        ]
        assert 'prompts = ["s-1.jsonl", "s-2.jsonl", "s-10.jsonl"]' in file.attrs["run_file"]


@pytest.mark.slow
def test_other_columns_are_another_run(inside, capfd):
    write(inside / "two.jsonl", *({"prompt": "p", "token_ids": None, "ids": [5 + row, 6]} for row in range(2)))
    write(inside / "ids.jsonl", *({"token_ids": [5 + row, 6], "key": f"k{row}"} for row in range(2)))
    assert run(inside, "ids.h5", "--prompts", "ids.jsonl", "--id-column", "key") == 0
    assert [id for id, *_ in small_run.rows_of("ids.h5")] == ["k0", "k1"]
    assert run(inside, "ids.h5", "--prompts", "ids.jsonl") == 2
    assert 'id_column: "key" there, null now' in capfd.readouterr().err


@pytest.mark.slow
def test_the_run_says_once_what_its_rows_forms_mean(inside, capfd):
    rows = [{"token_ids": [5, 6], "max_tokens": 2, "num_beams": 4} for _ in range(3)]
    write(inside / "forms.jsonl", *rows, {"token_ids": [5, 6], "max_tokens": 2})
    assert run(inside, "forms.h5", "--prompts", "forms.jsonl") == 0
    said = capfd.readouterr().err
    assert said.count("max_tokens in rows is read as max_new_tokens") == 1
    assert said.count("num_beams is another program's key") == 1
    assert [len(ids) for _, _, ids in small_run.rows_of("forms.h5")] == [2, 2, 2, 2]
    assert run(inside, "strict.h5", "--prompts", "forms.jsonl", "--strict-keys") == 0
    assert [status for _, status, _ in small_run.rows_of("strict.h5")] == ["error"] * 3 + ["done"]


def test_a_run_file_may_follow_the_prompts_on_the_command_line(inside, capsys):
    (inside / "run.toml").write_text('model = "model.h5"\noutput = "v.h5"\n')
    write(inside / "b.jsonl", {"token_ids": [5]})
    assert main(["validate", "--prompts", "prompts.jsonl", "b.jsonl", "run.toml"]) == 0
    assert "2 files (prompts.jsonl to b.jsonl): 13 rows, 0 wrong" in capsys.readouterr().out
    assert main(["validate", "run.toml", "--prompts", "b.jsonl"]) == 0


def test_the_order_of_natural_names_is_total(tmp_path):
    draw = random.Random(5)
    names = ["".join(draw.choices("a1023.-é²", k=draw.randint(0, 6))) for _ in range(cases(2000))]
    shuffled = draw.sample(names, len(names))
    assert sorted(names, key=_natural) == sorted(shuffled, key=_natural)
