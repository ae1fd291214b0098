"""Every value of an output is the same in each format of export, read by csv, pandas, pyarrow and json."""

import csv
import json
import math
import os
import random
import re

import numpy as np
import pytest

import tables
from counts import count as cases
from noria.output.export import KEYS, ExportSettings, export
from noria.output.export_tables import record_batches
from noria.output.generations import Generation
from noria.output.merge import merge
from noria.output.parts import Parts

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
arrow_csv = pytest.importorskip("pyarrow.csv")
arrow_json = pytest.importorskip("pyarrow.json")
TEXTS = ("id", "prompt", "text", "error")


def random_rows(choose):
    """Rows with random texts, tokens and own columns."""
    num_rows, names, dtype = choose.randint(1, 6), tables.names(choose), choose.choice([np.float32, np.float64])
    own = {name: tables.column_of(choose, num_rows) for name in names}
    rows = []
    for row in range(num_rows):
        status = choose.choice(["done", "done", "error"])
        tokens = np.array(choose.choices(range(2**31), k=choose.randint(0, 4)), np.int32)
        extra = {name: column[row] for name, column in own.items() if choose.random() < 0.9}
        error = tables.text(choose) + "." if status == "error" else ""
        texts = {"id": tables.text(choose), "prompt": tables.text(choose), "text": tables.text(choose), "error": error}
        finish = {"finish_reason": "error" if status == "error" else choose.choice(["stop", "length"])}
        one = Generation(row=row, sample=0, status=status, token_ids=tokens, **texts, **finish)
        one.extra = json.dumps(extra, ensure_ascii=choose.random() < 0.5) if extra else ""
        if len(tokens) and status == "done" and choose.random() < 0.5:
            one.logprobs = -np.array([choose.random() for _ in tokens], dtype)
        rows.append(one)
    return rows


def written(folder, rows):
    """An output of these rows, as a run leaves it."""
    parts = Parts(folder / "run.h5", {"run": 1})
    for row in rows:
        parts.add(row)
    parts.seal()
    merge(parts, folder / "run.h5", len(rows), {}, {})
    return folder / "run.h5"


def expected_of(rows):
    """The rows as objects, from what was generated."""
    found = []
    for row in rows:
        one = {
            name: getattr(row, name) for name in KEYS if name in TEXTS or name in ("sample", "status", "finish_reason")
        }
        one |= {"token_ids": row.token_ids.tolist()}
        if row.logprobs is not None:
            one["logprobs"] = [float(str(value)) for value in row.logprobs]
        if not row.error:
            del one["error"]
        found.append(one | (json.loads(row.extra) if row.extra else {}))
    return found


def as_json(value):
    """What JSON can hold of a value."""
    if isinstance(value, list):
        return [as_json(one) for one in value]
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell_of(value):
    """The cell of a table of texts that stands for a value."""
    if value is None or isinstance(value, str):
        return value or ""
    infinite = isinstance(value, float) and math.isinf(value)
    return str(value) if infinite else json.dumps(as_json(value), ensure_ascii=False)


def equal(found, value):
    """Whether two values are the same, of the same type, and zeros of the same sign."""
    return json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True)


def same_numbers(found, value):
    """Whether a number of a table is that of the row: a column of floats has 1.0 for 1."""
    return (found == value and not isinstance(value, bool)) or found is value


def check_csv(path, expected):
    names = list(dict.fromkeys(name for row in expected for name in row))
    with open(path, newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file, strict=True))
    assert set(records[0]) == set(names)
    for record, row in zip(records, expected, strict=True):
        for name in names:
            assert record[name] == cell_of(row.get(name)), name
    frame = pandas.read_csv(path, keep_default_na=False, dtype=str)
    texts = arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    table = arrow_csv.read_csv(
        path, parse_options=arrow_csv.ParseOptions(newlines_in_values=True), convert_options=texts
    )
    for other in (frame.to_dict("records"), table.to_pylist()):
        assert other == [{name: record[name] for name in other[0]} for record in records]


def check_json_lines(path, expected):
    content = path.read_bytes()
    lines = content.decode().split("\n")
    assert lines.pop() == "" and len(lines) == len(expected)
    for line, row in zip(lines, expected, strict=True):
        assert equal(json.loads(line, parse_constant=pytest.fail), as_json(row))
    readers = [arrow_texts] if re.search(rb"\d{19}", content) else [arrow_texts, pandas_texts]  # pandas has int64 alone
    for read in readers:
        assert read(path) == [{name: row[name] for name in ("id", "prompt", "text")} for row in expected]


def pandas_texts(path):
    frame = pandas.read_json(path, lines=True, dtype=False, precise_float=True)
    return frame[["id", "prompt", "text"]].to_dict("records")


def arrow_texts(path):
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "prompt", "text")])
    return arrow_json.read_json(
        path, parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    ).to_pylist()


def check_parquet(path, expected):
    table, frame = parquet.read_table(path), pandas.read_parquet(path, dtype_backend="pyarrow")
    for record, row in zip(table.to_pylist(), expected, strict=True):
        assert record.keys() >= row.keys()
        for name, found in record.items():
            value, kind = row.get(name), table.schema.field(name).type
            if value is None or name in KEYS or not pyarrow.types.is_string(kind):
                assert same_numbers(found, value), name
            else:
                all_texts = all(isinstance(one.get(name), str | None) for one in expected)
                assert equal(found if all_texts else json.loads(found), as_json(value)), name
    for name in ("id", "prompt", "text"):
        assert frame[name].tolist() == [row[name] for row in expected]


@pytest.mark.slow
def test_random_outputs_are_the_same_values_in_all_formats_of_export(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # 500 outputs need not survive a power cut
    checks = {".csv": check_csv, ".jsonl": check_json_lines, ".parquet": check_parquet}
    for seed in range(cases(500)):
        rows = random_rows(random.Random(seed))
        output = written(tmp_path, rows)
        for suffix, check in checks.items():
            assert export(output, tmp_path / f"out{suffix}") == len(rows)
            try:
                check(tmp_path / f"out{suffix}", expected_of(rows))
            except Exception as error:
                raise AssertionError(f"seed {seed}, {suffix}: {error}") from error
        check_responses(output, tmp_path / "out.jsonl", rows)
        output.unlink()


def check_responses(output, path, rows):
    export(output, path, settings=ExportSettings("openai"))
    responses = [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().decode().split("\n")[:-1]]
    for response, row in zip(responses, rows, strict=True):
        assert response["custom_id"] == row.id
        if row.status == "error":
            assert response["error"]["message"] == row.error and response["response"] is None
        else:
            (choice,) = response["response"]["body"]["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (row.text, row.finish_reason)


def rows_with(*extras):
    rows = [Generation(row, str(row), 0, "done", "stop", "p", "t") for row in range(len(extras))]
    for row, extra in zip(rows, extras, strict=True):
        row.extra = json.dumps(extra)
    return rows


def test_the_name_of_a_users_column_does_not_depend_on_the_order_of_columns(tmp_path):
    first, second = {"text": 1, "input_text": 2, "input_x": 3}, {"input_x": 3, "input_text": 2, "text": 1}
    export(written(tmp_path, rows_with(first, second)), tmp_path / "out.jsonl")
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["text"], row["input_text"], row["input_input_text"], row["input_x"]) == ("t", 1, 2, 3)


def test_columns_whose_names_utf8_cannot_tell_apart_are_columns_of_their_own(tmp_path):
    output = written(
        tmp_path, rows_with({chr(code): number for number, code in enumerate([0xD800, 0xDFFF, 0xFFFD], 1)})
    )
    export(output, tmp_path / "out.parquet")
    export(output, tmp_path / "out.csv")
    (record,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        (cells,) = csv.DictReader(file)
    for found in (list(record.values()), [int(cell) for cell in list(cells.values())[-3:]]):
        assert found[-3:] == [1, 2, 3]


@pytest.mark.parametrize(
    "value", ["x" * 300, ["x" * 100] * 3, {"a": ["é" * 100, 1]}], ids=["texts", "lists of texts", "objects"]
)
def test_many_long_values_are_written_to_parquet_in_batches_that_its_columns_hold(tmp_path, monkeypatch, value):
    monkeypatch.setattr("noria.output.export_tables.BATCH_NBYTES", 1000)
    rows = rows_with(*({"own": value} for _ in range(50)))
    export(written(tmp_path, rows), tmp_path / "out.parquet")
    file = parquet.ParquetFile(tmp_path / "out.parquet")
    found = file.read().column("own").to_pylist()
    assert [one if isinstance(value, str) else json.loads(one) for one in found] == [value] * 50
    assert file.metadata.num_row_groups > 10
    sizes = [file.read_row_group(group).column("own").nbytes for group in range(file.metadata.num_row_groups)]
    assert max(sizes) < 1000 + 100, "texts, and where each begins"


def test_a_batch_of_a_table_counts_the_numbers_of_lists_of_lists(monkeypatch):
    monkeypatch.setattr("noria.output.export_tables.BATCH_NBYTES", 10_000)
    rows = [{"own": [None, *[[0.5] * 20] * 20]} for _ in range(10)]
    _, batches = record_batches(lambda: rows, {"own": "list<list<float64>>"})
    assert [batch.num_rows for batch in batches] == [2] * 5, "of 400 numbers each"
