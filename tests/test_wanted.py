"""Exports of some rows: by status, by finish reason, by ids."""

import json

import pytest

from noria.__main__ import main
from noria.output.merge import merge
from noria.output.parts import Parts
from output_rows import fill, make_row


@pytest.fixture
def output(tmp_path):
    """Rows 0 to 5: even ones `stop`, odd ones `length`, but for row 5, an error. Rows 3 and 4 are prompts of one request."""
    rows = [make_row(row, status="error" if row == 5 else "done") for row in range(6)]
    rows[3].id, rows[3].extra = "asked", json.dumps({"custom_id": "asked", "prompt_index": 0})
    rows[4].id, rows[4].extra = "asked[1]", json.dumps({"custom_id": "asked", "prompt_index": 1})
    parts = Parts(tmp_path / "run.h5", {})
    fill(parts, rows, 2)
    merge(parts, tmp_path / "run.h5", 6, {}, {})
    return tmp_path / "run.h5"


def export(output, *flags, code=0):
    target = output.with_name("out.jsonl")
    assert main(["export", str(output), str(target), *map(str, flags)]) == code
    return [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else None


def ids_of(rows):
    return [row["id"] for row in rows]


def test_rows_of_a_status_or_a_finish_reason_alone(output, capsys):
    assert ids_of(export(output, "--status", "error")) == ["row-5"]
    assert "1 row written" in capsys.readouterr().err
    assert ids_of(export(output, "--status", "done", "--finish-reason", "length")) == ["row-1", "asked"]
    assert ids_of(export(output, "--finish-reason", "stop")) == ["row-0", "row-2", "asked[1]"]
    assert export(output, "--status", "error", "--finish-reason", "stop") == []


def test_rows_of_a_list_of_ids_in_the_order_of_the_prompts(output, tmp_path):
    (tmp_path / "ids").write_bytes(b"row-2\r\nrow-0\n\nasked[1]")
    assert ids_of(export(output, "--ids", tmp_path / "ids")) == ["row-0", "row-2", "asked[1]"]
    (tmp_path / "ids").write_text("asked\n")
    assert ids_of(export(output, "--ids", tmp_path / "ids")) == ["asked", "asked[1]"], "a request with all its prompts"
    (line,) = export(output, "--ids", tmp_path / "ids", "--format", "openai")
    assert line["custom_id"] == "asked" and len(line["response"]["body"]["choices"]) == 2


def test_an_export_and_a_batch_file_are_lists_of_ids_too(output, tmp_path):
    export(output, "--status", "error")
    (tmp_path / "out.jsonl").rename(tmp_path / "wrong.jsonl")
    assert ids_of(export(output, "--ids", tmp_path / "wrong.jsonl")) == ["row-5"]
    responses = [{"id": "batch_req_1", "custom_id": "asked", "response": None}, {"custom_id": "row-1", "body": {}}]
    (tmp_path / "batch.jsonl").write_text("\n".join(map(json.dumps, responses)))
    assert ids_of(export(output, "--ids", tmp_path / "batch.jsonl")) == ["row-1", "asked", "asked[1]"]


def test_ids_that_a_whole_output_lacks_are_refused_and_told_of_one_that_is_not_finished(output, tmp_path, capsys):
    (tmp_path / "ids").write_text("row-1\nno-1\nno-2\nno-3\nno-4\n")
    assert export(output, "--ids", tmp_path / "ids", code=2) is None
    assert "4 ids of 5 not found: 'no-1', 'no-2', 'no-3', ..." in capsys.readouterr().err
    fill(Parts(tmp_path / "half.h5", {}), [make_row(1)], 1)
    assert ids_of(export(tmp_path / "half.h5", "--ids", tmp_path / "ids")) == ["row-1"]
    assert "half.h5: 4 ids of 5 not found: 'no-1', 'no-2', 'no-3', ... among the rows so far" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no", None, "there is no such file"),
        ("ids", b"\xff\n", "invalid start byte"),
        ("ids", b"", "it lists no id, so no row would be exported: leave --ids out"),
        ("ids.jsonl", b"\n\r\n", "it lists no id"),
        ("ids.jsonl", b'{"id": "a"}\n{"name": 1}\n', "line 2: it must be an object with an id"),
        ("ids.jsonl", b'{"id": true}', "line 1: it must be an object with an id"),
        ("ids.jsonl", b"row-1", "line 1: it must be an object with an id"),
    ],
)
def test_a_list_of_ids_that_cannot_be_read_is_refused(output, tmp_path, capsys, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert export(output, "--ids", tmp_path / name, code=2) is None
    assert words in capsys.readouterr().err


def test_a_folder_is_no_list_of_ids(output, tmp_path, capsys):
    assert export(output, "--ids", tmp_path, code=2) is None
    assert f"ids {tmp_path}: it is not a regular file" in capsys.readouterr().err


def test_the_list_of_ids_is_not_written_over(output, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text('{"id": "row-1"}\n')
    export(output, "--ids", tmp_path / "out.jsonl", code=2)
    assert "holds the ids, which would be lost" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "row-1"}\n'


def test_a_follower_of_ids_of_which_a_whole_output_has_none_fails_and_one_of_some_does_not(output, tmp_path, capsys):
    (tmp_path / "ids").write_text("no-1\nno-2\n")
    command = ["export", str(output), str(tmp_path / "out.jsonl"), "--follow", "--ids", str(tmp_path / "ids")]
    assert main(command) == 2 and "is whole: 2 ids of 2 not found: 'no-1', 'no-2'" in capsys.readouterr().err
    (tmp_path / "ids").write_text("no-1\nrow-2\n")
    assert main(command) == 0 and "1 id of 2 not found: 'no-1'" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["row-2"]


def test_a_file_named_as_a_format_that_there_is_not_is_refused(output, capsys):
    assert main(["export", str(output), "vllm:x.jsonl"]) == 2
    assert (
        "there is no format 'vllm' (known: openai:FILE); a file of that name is ./vllm:x.jsonl"
        in capsys.readouterr().err
    )
