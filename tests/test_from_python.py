"""Prompts of Python programs as JSON lines: lists, columns and tables of other libraries."""

import datetime
import json
import math
from pathlib import Path

import numpy as np
import pytest

from noria.errors import InputError
from noria.rows.from_python import write_prompts
from noria.rows.prompts import open_prompts


def written(tmp_path, prompts):
    count = write_prompts(prompts, tmp_path / "prompts.jsonl")
    lines = (tmp_path / "prompts.jsonl").read_text("ascii").splitlines()
    assert count == len(lines)
    return [json.loads(line) for line in lines]


class PolarsTable:
    """A table as polars has it: https://docs.pola.rs/api/python/stable/reference/dataframe/api/polars.DataFrame.iter_rows.html"""

    def __init__(self, **columns):
        self.columns = list(columns)
        self._rows = list(zip(*columns.values(), strict=True))

    def iter_rows(self, *, named=False):
        return (dict(zip(self.columns, row, strict=True)) if named else row for row in self._rows)


class PolarsColumn:
    """A column as polars has it."""

    def __init__(self, *values):
        self._values = values

    def __iter__(self):
        return iter(self._values)

    def to_list(self):
        return list(self._values)


class Dataset:
    """A data set as `datasets` has it: by number a row, by name a column; iterating gives rows."""

    def __init__(self, rows):
        self._rows = rows

    def __iter__(self):
        return iter(self._rows)

    def __getitem__(self, key):
        return [row[key] for row in self._rows] if isinstance(key, str) else self._rows[key]


MESSAGES = [{"role": "user", "content": "Hi"}]
ROWS = [{"prompt": "a", "id": "x", "max_new_tokens": 3}, {"prompt": "b", "id": "y", "max_new_tokens": 4}]


def test_texts_rows_conversations_and_token_ids_are_told_apart(tmp_path):
    prompts = ["a", {"prompt": "b", "n": 2}, MESSAGES, [5, 6], (7, 8), np.array([9, 10])]
    assert written(tmp_path, prompts) == [
        {"prompt": "a"},
        {"prompt": "b", "n": 2},
        {"messages": MESSAGES},
        {"token_ids": [5, 6]},
        {"token_ids": [7, 8]},
        {"token_ids": [9, 10]},
    ]


def test_anything_that_iterates_is_taken_once(tmp_path):
    assert written(tmp_path, (f"prompt {number}" for number in range(3))) == [
        {"prompt": f"prompt {n}"} for n in range(3)
    ]
    assert written(tmp_path, {"a": 1}.keys()) == [{"prompt": "a"}] and written(tmp_path, []) == []


def test_columns_and_tables_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert written(tmp_path, frame) == ROWS
    assert written(tmp_path, frame["prompt"]) == [{"prompt": "a"}, {"prompt": "b"}]
    odd = pandas.DataFrame(
        {
            "prompt": ["a", None, pandas.NA],
            "n": pandas.array([1, None, 3], "Int64"),
            "x": [0.5, math.nan, math.inf],
            "at": pandas.to_datetime(["2026-11-29", None, None]),
            0: ["zero"] * 3,
        }
    )
    assert written(tmp_path, odd) == [
        {"prompt": "a", "n": 1, "x": 0.5, "at": "2026-11-29T00:00:00", "0": "zero"},
        {"prompt": None, "n": None, "x": None, "at": None, "0": "zero"},
        {"prompt": None, "n": 3, "x": None, "at": None, "0": "zero"},
    ]


def test_columns_and_tables_of_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    assert written(tmp_path, table) == ROWS
    assert written(tmp_path, table["prompt"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert written(tmp_path, pyarrow.array([[1, 2], [3]])) == [{"token_ids": [1, 2]}, {"token_ids": [3]}]


def test_tables_of_polars_and_datasets_by_what_their_objects_do(tmp_path):
    table = PolarsTable(prompt=["a", "b"], id=["x", "y"], max_new_tokens=[3, 4])
    assert written(tmp_path, table) == ROWS
    assert written(tmp_path, PolarsColumn("a", "b")) == [{"prompt": "a"}, {"prompt": "b"}]
    assert written(tmp_path, PolarsTable(token_ids=[PolarsColumn(1, 2)])) == [{"token_ids": [1, 2]}]
    assert written(tmp_path, Dataset(ROWS)) == ROWS
    assert written(tmp_path, Dataset(ROWS)["prompt"]) == [{"prompt": "a"}, {"prompt": "b"}]


def test_values_become_what_json_has(tmp_path):
    row = {"prompt": "a", "i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "list": (1, [np.int8(2)])}
    row |= {"day": datetime.date(2026, 11, 29), 5: np.eye(2), "nan": np.float64("nan"), "deep": {"x": np.arange(2)}}
    assert written(tmp_path, [row]) == [
        {"prompt": "a", "i": 3, "f": 0.5, "b": True, "list": [1, [2]], "day": "2026-11-29", "5": [[1, 0], [0, 1]], "nan": None, "deep": {"x": [0, 1]}}
    ]  # fmt: skip


def test_texts_arrive_as_they_are_and_a_wrong_item_is_a_row_in_error(tmp_path):
    texts = ["line\nend\r\n", 'quote " \\ \0 \u2028', "中 é 😀 \u202e", "lone \ud800 surrogate"]
    write_prompts([*texts, 7, None, math.nan, [], [MESSAGES]], tmp_path / "prompts.jsonl")
    rows = list(open_prompts(tmp_path / "prompts.jsonl"))
    assert [row.prompt for row in rows[:3]] == texts[:3] and [row.id for row in rows] == list("012345678")
    assert [bool(row.error) for row in rows[4:]] == [True] * 5 and "it must be a string" in rows[4].error


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("The LORD is my", "'The LORD is my', one text: give a list"),
        (b"bytes", "one text"),
        ({"train": [], "test": []}, r"a dict \(of 'train', 'test'\)"),
        (7, "of type int"),
        (None, "of type NoneType"),
        (["a", 1j], r"prompts\[1\] cannot be written as JSON: a value is of type complex"),
        ([{"prompt": "a", "x": {1, 2}}], r"prompts\[0\] .* type set"),
        ([b"bytes"], "type bytes"),
        ([Path("prompts.jsonl")], r"prompts\[0\] .*Path"),
    ],
    ids=str,
)
def test_what_is_no_list_of_prompts_is_refused_by_name(tmp_path, prompts, words):
    with pytest.raises(InputError, match=words):
        write_prompts(prompts, tmp_path / "prompts.jsonl")


def test_a_value_that_holds_itself_is_refused(tmp_path):
    row = {"prompt": "a"}
    row["self"] = row
    with pytest.raises(InputError, match=r"prompts\[0\]"):
        write_prompts([row], tmp_path / "prompts.jsonl")
