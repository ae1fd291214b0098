import argparse
import csv
import json
import os
import sys

import h5py
import numpy as np
import pytest

from noria.__main__ import main
from noria.commands import export as command
from noria.config import load
from noria.desk.exports import paths_of_prompts
from noria.errors import InputError
from noria.output import export as export_module
from noria.output import export_rows
from noria.output.export import KEYS, ExportSettings, export
from noria.output.merge import merge
from noria.output.parts import Parts, part_files
from noria.output.segments import history
from noria.rows.prompt_files import content_hash, content_key
from noria.tools.provenance import segment_of
from output_rows import fill, make_row

HEADER = {"run": 1}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


def finish(output, rows):
    parts = Parts(output, HEADER)
    fill(parts, rows[::-1], 3)
    merge(parts, output, len(rows), {}, {})


def lines(path):
    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=pytest.fail) for line in text.split("\n")[:-1]]


def exported(output, row):
    """The row as export gives it."""
    finish(output, [row])
    export(output, output.with_suffix(".jsonl"))
    (line,) = lines(output.with_suffix(".jsonl"))
    return line


def test_the_command_does_not_write_over_the_prompts_of_the_run(output, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    header = {"prompts": content_key(prompts, content_hash(prompts))}
    parts = Parts(output, header)
    for merged in (False, True):  # not finished, and finished
        if merged:
            merge(parts, output, 1, {}, {})
        else:
            fill(parts, [make_row(0)], 1)
        assert main(["export", str(output), str(prompts)]) == 2
        assert f"{prompts} holds the prompts of {output}, which would be lost" in capsys.readouterr().err
        assert prompts.read_text() == '{"prompt": "a"}\n'
        for _ in range(2):
            assert main(["export", str(output), str(tmp_path / "other.jsonl")]) == 0


def test_prompts_that_were_changed_since_are_not_written_over_either(output, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    config = load(None, {"model": "m.h5", "prompts": str(prompts), "output": str(output)})
    facts = segment_of({}, ["a"], ["a cpu"], [], "2026-11-23T03:15:02Z") | {"of": 1}
    parts = Parts(output, {"prompts": content_key(prompts, content_hash(prompts))})
    parts.begin(facts | {"prompts": paths_of_prompts(config)})
    fill(parts, [make_row(0)], 1)
    prompts.write_text('{"prompt": "mended"}\n')
    for merged in (False, True):
        if merged:
            merge(parts, output, 1, history(parts.folder), {})
        assert main(["export", str(output), str(prompts)]) == 2
        assert f"{prompts} holds the prompts of {output}, which would be lost" in capsys.readouterr().err
    assert prompts.read_text() == '{"prompt": "mended"}\n'


def test_every_row_is_an_object_in_the_order_of_the_prompts(output, tmp_path):
    rows = [make_row(row, status="error" if row == 4 else "done") for row in range(10)]
    finish(output, rows)
    assert export(output, tmp_path / "out.jsonl", report=pytest.fail) == 10
    expected = []
    for row in rows:
        one = {
            "id": row.id,
            "sample": 0,
            "status": row.status,
            "finish_reason": row.finish_reason,
            "prompt": row.prompt,
            "text": row.text,
            "token_ids": row.token_ids.tolist(),
        }
        if row.error:
            one["error"] = row.error
        expected.append(one | (json.loads(row.extra) if row.extra else {}))
    read = lines(tmp_path / "out.jsonl")
    assert read == expected
    assert [list(line) for line in read] == [list(line) for line in expected], "the order of the keys"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "run.h5"]


def test_text_is_utf8_and_not_escaped(output):
    row = make_row(0)
    row.text = "naïve 中文 😀 \u2028 \x1b"
    assert exported(output, row)["text"] == row.text
    assert "naïve 中文 😀".encode() in output.with_suffix(".jsonl").read_bytes()
    assert len(output.with_suffix(".jsonl").read_bytes().split(b"\n")) == 2


def test_logprobs_are_exported_in_their_own_precision(output):
    row = make_row(0, num_tokens=3)
    row.logprobs = np.array([-0.1, -1e-9, -np.inf], np.float32)
    assert exported(output, row)["logprobs"] == [-0.1, -1e-9, None]
    assert np.array_equal(np.float32([-0.1, -1e-9]), row.logprobs[:2])


def test_the_likeliest_ids_and_the_prompts_log_probabilities_are_exported_as_lists(output):
    row = make_row(0, num_tokens=2, logprobs=True)
    row.top_ids, row.top_logprobs = np.array([[5, 6], [7, 8]]), np.array([[-0.1, -2.5], [-0.3, -4]], np.float32)
    row.prompt_token_ids, row.prompt_logprobs = np.array([3, 4]), np.array([np.nan, -0.7], np.float32)
    found = exported(output, row)
    assert (found["top_ids"], found["top_logprobs"]) == ([[5, 6], [7, 8]], [[-0.1, -2.5], [-0.3, -4.0]])
    assert found["prompt_logprobs"] == [None, -0.7]


def test_a_row_without_logprobs_or_error_has_no_such_key(output):
    row = make_row(0, num_tokens=3)
    row.extra = ""
    assert list(exported(output, row)) == ["id", "sample", "status", "finish_reason", "prompt", "text", "token_ids"]


def test_the_users_columns_are_carried_unchanged(output):
    own = {"a": [1, {"b": None}], "big": 2**80, "half": 0.1, "name": "x\u0000y", "lone": "\ud800", "ünï": True}
    row = make_row(0)
    row.extra = json.dumps(own)
    line = exported(output, row)
    assert {name: line[name] for name in own} == own


def test_a_users_column_never_takes_the_place_of_norias(output):
    own = dict.fromkeys(KEYS, "mine") | {"input_text": "also mine"}
    row = make_row(0, num_tokens=2)
    row.extra = json.dumps(own)
    line = exported(output, row)
    assert line["id"] == row.id and line["text"] == row.text and line["token_ids"] == row.token_ids.tolist()
    assert line["input_id"] == "mine" and line["input_text"] == "mine"
    assert line["input_input_text"] == "also mine"
    assert sorted(value for value in line.values() if isinstance(value, str)).count("mine") == len(KEYS)


def test_numbers_that_json_lacks_become_null(output):
    row = make_row(0)
    row.extra = '{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1e5}'
    line = exported(output, row)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1e5)


def test_an_unfinished_output_gives_the_rows_so_far_and_says_so(output, tmp_path, capsys):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(5), make_row(2), make_row(3, status="todo"), make_row(2, num_tokens=1)], 2)
    (parts.folder / "part-000009.h5.tmp").write_bytes(b"being written")
    assert export(output, tmp_path / "out.jsonl") == 2
    assert [line["id"] for line in lines(tmp_path / "out.jsonl")] == ["row-2", "row-5"]
    said = capsys.readouterr().err
    assert "run.h5 is not finished: exporting the 2 rows finished so far, 1 row stopped half-way not included" in said
    assert len(list(parts.folder.iterdir())) == 3, "a job that runs is not disturbed"


def test_a_job_that_finishes_meanwhile_is_exported_whole(output, tmp_path, monkeypatch):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(4)], 2)
    gather = export_rows.gather

    def merged_meanwhile(*arguments):
        parts.add(make_row(4))
        merge(parts, output, 5, {}, {})
        yield from gather(*arguments)

    monkeypatch.setattr(export_rows, "gather", merged_meanwhile)
    assert export(output, tmp_path / "out.jsonl") == 5
    assert len(lines(tmp_path / "out.jsonl")) == 5


def test_an_export_that_fails_beside_a_link_that_leads_nowhere_is_not_tried_for_ever(output, tmp_path, monkeypatch):
    fill(Parts(output, HEADER), [make_row(0)], 1)
    (tmp_path / "run.h5.parts" / "part-000009.h5").symlink_to(tmp_path / "nowhere")
    tries = []

    def full(*_):
        tries.append(1)
        assert len(tries) < 3, "tried for ever"
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(export_module, "_write", full)
    with pytest.raises(OSError, match="no space left"):
        export(output, tmp_path / "rows.jsonl")


def test_a_damaged_part_is_told_and_the_others_are_exported(output, tmp_path):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(4)], 2)
    part_files(parts.folder)[0].write_bytes(b"nothing")
    told = []
    assert export(output, tmp_path / "out.jsonl", told.append) == 2
    assert "part-000000.h5" in told[0]


def test_damage_that_no_writer_can_take_is_told_by_its_column_and_a_fault_of_the_program_is_not_called_damage(
    output, tmp_path, monkeypatch
):
    rows = [make_row(0), make_row(1)]
    rows[0].extra = '{"note": 1}'
    finish(output, rows)
    with monkeypatch.context() as patched, pytest.raises(LookupError, match="a fault"):
        patched.setattr(export_module, "own_columns", lambda extra: {}[f"a fault of {extra!r}"])
        export(output, tmp_path / "rows.jsonl")
    with h5py.File(output, "r+") as file:
        file["extra"][0] = '{"note" 1}'
    with pytest.raises(InputError, match=rf"{output}.*extra"):
        export(output, tmp_path / "rows.jsonl")
    with h5py.File(output, "r+") as file:
        file["extra"][0] = "[1]"
    with pytest.raises(InputError, match=rf"{output}: a row's own columns are not a JSON object"):
        export(output, tmp_path / "rows.jsonl")
    with h5py.File(output, "r+") as file:
        file["extra"][0] = '{"note" 1}'
        del file.attrs["checksums"]
    with pytest.raises(InputError, match=rf"{output} is damaged: JSONDecodeError"):
        export(output, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(("name", "text"), [("header", "[" * 10**5), ("run_file", f"x = {'[' * 10**5}")])
def test_what_an_output_says_of_its_run_is_exported_without_where_it_is_nested_without_end(
    output, tmp_path, name, text
):
    finish(output, [make_row(0)])
    with h5py.File(output, "r+") as file:
        file.attrs[name] = text
    assert export(output, tmp_path / "rows.jsonl", settings=ExportSettings("openai")) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "out.xlsx",
            r"\.xlsx is not a format of export; export writes \.jsonl, \.jsonl\.gz, \.csv, \.parquet: name the file out",
        ),
        ("out.json", r"\.json is not a format of export; did you mean '\.jsonl'\?; export writes \.jsonl"),
        ("out", "a name without a suffix is not a format"),
    ],
)
def test_suffixes_that_cannot_be_written_are_refused_with_those_that_can(output, tmp_path, name, words):
    finish(output, [make_row(0)])
    with pytest.raises(InputError, match=words):
        export(output, tmp_path / name)
    assert os.listdir(tmp_path) == ["run.h5"]


def test_what_is_no_output_is_refused(output, tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        export(output, tmp_path / "out.jsonl")
    output.write_text("hello")
    with pytest.raises(InputError, match="is not a Noria output: it is a text file"):
        export(output, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="there is no folder"):
        export(output, tmp_path / "nowhere" / "out.jsonl")


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(output, tmp_path, monkeypatch):
    finish(output, [make_row(row) for row in range(3)])
    (tmp_path / "out.jsonl").write_text("old")

    def fail(row):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "line_of", fail)
        with pytest.raises(OSError, match="out.jsonl: no space left on device"):
            export(output, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "run.h5"]
    export(output, tmp_path / "out.jsonl")
    assert len(lines(tmp_path / "out.jsonl")) == 3


def test_the_command_writes_the_file_and_says_how_many_rows(output, tmp_path, capsys):
    finish(output, [make_row(row) for row in range(3)])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(output), str(tmp_path / "out.jsonl")])) == 0
    assert len(lines(tmp_path / "out.jsonl")) == 3
    assert capsys.readouterr().err == f"3 rows written to {tmp_path / 'out.jsonl'}\n"


# Tables.


def table_rows():
    """Rows whose own columns are of every kind, here and there missing."""
    own = [
        {
            "n": 1,
            "x": 0.5,
            "ok": True,
            "label": 'a, "b"\nc',
            "mixed": 1,
            "list": [1, {"a": None}],
            "big": 2**80,
            "id": "mine",
        },
        {"n": None, "x": 2, "ok": False, "label": "é中😀", "mixed": "1", "list": [], "big": 1},
        {},
        {"n": -(2**63), "x": 1e300, "lone": "\ud800", "nan": float("nan")},
    ]
    rows = [make_row(row, num_tokens=row, logprobs=row == 2) for row in range(3)] + [
        make_row(3, status="error", num_tokens=0)
    ]
    for row, columns in zip(rows, own, strict=True):
        row.extra = json.dumps(columns) if columns else ""
        row.text += " \r\n\t=1+1"
    return rows


def test_a_csv_file_has_what_the_json_lines_have(output, tmp_path):
    finish(output, table_rows())
    assert export(output, tmp_path / "out.csv") == export(output, tmp_path / "out.jsonl") == 4
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file, strict=True))
    expected = lines(tmp_path / "out.jsonl")
    for record, line in zip(records, expected, strict=True):
        for name, cell in record.items():
            value = line.get(name)
            text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
            assert cell == text.replace("\ud800", "\ufffd"), name
    names = list(records[0])
    assert names[:9] == [*KEYS[:7], "logprobs", "error"] and set(names) == {name for line in expected for name in line}
    assert names[9:13] == ["n", "x", "ok", "label"]


def test_pandas_reads_the_csv_file(output, tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = table_rows()
    finish(output, rows)
    export(output, tmp_path / "out.csv")
    frame = pandas.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert frame.text.tolist() == [row.text for row in rows] and frame.id.tolist() == [row.id for row in rows]


def test_a_parquet_file_has_columns_of_their_own_types(output, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = table_rows()
    finish(output, rows)
    assert export(output, tmp_path / "out.parquet") == 4
    export(output, tmp_path / "out.jsonl")
    table = parquet.read_table(tmp_path / "out.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types["token_ids"] == "list<element: int32>" and types["logprobs"] == "list<element: double>"
    assert (types["sample"], types["n"], types["x"], types["ok"]) == ("int32", "int64", "double", "bool")
    assert {types[name] for name in ("id", "label", "mixed", "list", "big", "nan", "input_id")} == {"string"}
    for record, line in zip(table.to_pylist(), lines(tmp_path / "out.jsonl"), strict=True):
        for name, value in record.items():
            if name in ("mixed", "list", "big") and value is not None:
                value = json.loads(value)
            assert value == (
                line.get(name).replace("\ud800", "\ufffd") if name == "lone" and name in line else line.get(name)
            )


def test_a_table_of_no_rows_has_its_header(output, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    finish(output, [])
    assert export(output, tmp_path / "out.csv") == export(output, tmp_path / "out.parquet") == 0
    assert (tmp_path / "out.csv").read_text().startswith("id,sample,status,finish_reason,prompt,text,token_ids,")
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 0


def test_an_unfinished_output_is_exported_to_tables_too(output, tmp_path):
    fill(Parts(output, HEADER), [make_row(row) for row in range(5)], 2)
    for name in ("out.csv", "out.parquet"):
        assert export(output, tmp_path / name, lambda message: None) == 5


def test_parquet_without_pyarrow_is_refused_with_the_remedy_and_leaves_nothing(output, tmp_path, monkeypatch):
    finish(output, [make_row(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="parquet needs pyarrow: pip install pyarrow"):
        export(output, tmp_path / "out.parquet")
    assert os.listdir(tmp_path) == ["run.h5"]


# OpenAI's responses.


def test_responses_have_a_choice_a_sample_and_the_requests_own_names(output, tmp_path):
    rows = [make_row(0, num_tokens=3), make_row(1, sample=0, num_tokens=2), make_row(1, sample=1, num_tokens=4)]
    rows.append(make_row(2, status="error"))
    rows[0].extra = json.dumps({"model": "m", "url": "/v1/completions"})
    rows[0].logprobs, rows[1].logprobs = -np.arange(3, dtype=np.float32), -np.arange(2, dtype=np.float32)
    rows[2].id = rows[1].id
    parts = Parts(output, HEADER)
    fill(parts, rows, 9)
    assert export(output, tmp_path / "out.jsonl", lambda message: None, ExportSettings("openai")) == 3
    completion, chat, wrong = lines(tmp_path / "out.jsonl")
    assert [one["custom_id"] for one in (completion, chat, wrong)] == ["row-0", "row-1", "row-2"]
    assert wrong["response"] is None and wrong["error"] == {"code": "invalid_request", "message": rows[3].error}
    assert completion["error"] is None and completion["response"]["status_code"] == 200
    body = completion["response"]["body"]
    assert (body["object"], body["model"], body["choices"][0]["text"]) == ("text_completion", "m", rows[0].text)
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [0, -1, -2]
    body = chat["response"]["body"]
    assert body["object"] == "chat.completion" and [one["index"] for one in body["choices"]] == [0, 1]
    assert [one["message"]["content"] for one in body["choices"]] == [rows[1].text, rows[2].text]
    assert [one["finish_reason"] for one in body["choices"]] == ["length", "length"]
    assert body["choices"][0]["logprobs"]["content"][1]["token"] == f"token_id:{rows[1].token_ids[1]}"
    asked = len(rows[1].prompt_token_ids)
    assert body["usage"] == {"prompt_tokens": asked, "completion_tokens": 6, "total_tokens": asked + 6}


def test_responses_are_json_lines(output, tmp_path):
    finish(output, [make_row(0)])
    with pytest.raises(
        InputError, match=r"export --format openai writes \.jsonl, \.jsonl\.gz: name the file out\.jsonl"
    ):
        export(output, tmp_path / "out.csv", settings=ExportSettings("openai"))
