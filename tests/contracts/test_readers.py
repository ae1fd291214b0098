"""Every format of prompts against what prompts.py expects of a reader."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
from datetime import date
from itertools import islice

import h5py
import numpy as np
import pytest

from noria import kinds, readers
from noria.errors import Changed, InputError
from noria.readers import BadRow

pyarrow = pytest.importorskip("pyarrow")


def as_csv(prompts, delimiter=",", more=()):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerows([["prompt", *more], *([prompt, *more] for prompt in prompts)])
    return text.getvalue().encode()


def as_hdf5(prompts):
    prompts, content = list(prompts), io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("prompt", data=prompts, shape=(len(prompts),), dtype=h5py.string_dtype())
    return content.getvalue()


def as_parquet(prompts):
    parquet = pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array(list(prompts), pyarrow.string())}), content, row_group_size=1000
    )
    return content.getvalue()


# How each kind writes rows that have only a prompt. A new kind adds itself here.
WRITE = {
    "jsonl": lambda prompts: "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode(),
    "json": lambda prompts: json.dumps([{"prompt": prompt} for prompt in prompts]).encode(),
    "text": lambda prompts: "".join(prompt + "\n" for prompt in prompts).encode(),
    "csv": as_csv,
    "hdf5": as_hdf5,
    "parquet": as_parquet,
}
PROMPTS = [
    "one",
    " two ",
    "größer 東京 🎉",
    'with\ttab, "quotes" and \\',
    "no line ends: \u2028 \x0b \x85",
    "x" * 2**20,
]
ALL = [(name, suffix) for name in kinds.names("readers") for suffix in kinds.load("readers", name).SUFFIXES]
CASES = [case for case in ALL if case[0] not in ("hdf5", "json", "parquet")]  # kinds of text, whose rows are lines
HEADER_LINES = {"csv": 1}


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("name", "suffix"), ALL)
def test_rows_come_back_in_order_and_unchanged_and_are_counted(name, suffix, tmp_path):
    path = write(tmp_path / f"prompts{suffix}", WRITE[name](PROMPTS))
    reader = readers.for_path(path)
    assert reader is kinds.load("readers", name)
    assert [row["prompt"] for row in reader.read(path)] == PROMPTS
    assert reader.count(path) == len(PROMPTS)


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_bom_line_ends_of_windows_and_a_last_line_without_an_end_change_nothing(name, suffix, tmp_path):
    content = WRITE[name](["one", "two"])
    reader = kinds.load("readers", name)
    windows, trailing = content.replace(b"\n", b"\r\n"), content + b"\n\r\n\n"
    for variant in (b"\xef\xbb\xbf" + content, windows, content.removesuffix(b"\n"), trailing):
        path = write(tmp_path / f"prompts{suffix}", variant)
        assert [row["prompt"] for row in reader.read(path)] == ["one", "two"]
        assert reader.count(path) == 2


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_an_empty_file_has_no_rows(name, suffix, tmp_path):
    path = write(tmp_path / f"prompts{suffix}", b"")
    assert list(kinds.load("readers", name).read(path)) == []
    assert kinds.load("readers", name).count(path) == 0


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_line_that_is_not_utf8_is_a_bad_row_and_the_others_are_read(name, suffix, tmp_path):
    content = WRITE[name](["one", "tw?o", "three"]).replace(b"?", b"\xff")
    path = write(tmp_path / f"prompts{suffix}", content)
    first, bad, last = kinds.load("readers", name).read(path)
    assert (first["prompt"], last["prompt"]) == ("one", "three")
    line = 2 + HEADER_LINES.get(name, 0)
    assert isinstance(bad, BadRow) and f"line {line} is not UTF-8" in bad.error and "0xff" in bad.error
    assert kinds.load("readers", name).count(path) == 3


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_line_beyond_the_limit_is_a_bad_row_and_takes_no_memory(name, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_NBYTES", 1000)
    path = write(tmp_path / f"prompts{suffix}", WRITE[name](["one", "x" * 3_000_000, "three", "y" * 1001]))
    first, bad, third, last = kinds.load("readers", name).read(path)
    assert (first["prompt"], third["prompt"]) == ("one", "three")
    assert f"line {2 + HEADER_LINES.get(name, 0)} is longer than" in bad.error and isinstance(last, BadRow)
    assert kinds.load("readers", name).count(path) == 4


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_files_that_cannot_be_read_are_the_users_error(name, suffix, tmp_path):
    reader = kinds.load("readers", name)
    missing, folder = tmp_path / f"missing{suffix}", tmp_path / f"folder{suffix}"
    folder.mkdir()
    wide = tmp_path / f"wide{suffix}"
    wide.write_bytes("one\n".encode("utf-16"))
    for path, words in ((missing, "no such file"), (folder, "not a regular file"), (wide, "UTF-16")):
        for read in (lambda path: list(reader.read(path)), reader.count):
            with pytest.raises(InputError, match=words):
                read(path)


@pytest.mark.parametrize(("name", "suffix"), [case for case in CASES if case[1].endswith(".gz")])
def test_a_gzip_file_that_was_cut_short_or_damaged_is_an_error_and_not_an_early_end(name, suffix, tmp_path):
    reader, path = kinds.load("readers", name), tmp_path / f"prompts{suffix}"
    whole = gzip.compress(WRITE[name](f"prompt {number}" for number in range(1000)))
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:-4], whole[:middle] + b"\0\xff\0\xff" * 9 + whole[middle + 36 :]):
        path.write_bytes(content)
        for read in (lambda path: list(reader.read(path)), reader.count):
            with pytest.raises(InputError, match=r"cannot be read after line \d+.*(damaged|cut short)"):
                read(path)


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_file_is_decompressed_by_its_content_and_gzip_files_may_be_joined(name, suffix, tmp_path):
    reader, path = kinds.load("readers", name), tmp_path / f"prompts{suffix}"
    first, second = WRITE[name](["one"]), WRITE[name](["two"])
    if name in HEADER_LINES:
        second = second.split(b"\n", 1)[1]
    for content in (first + second, gzip.compress(first) + gzip.compress(second)):
        path.write_bytes(content)
        assert [row["prompt"] for row in reader.read(path)] == ["one", "two"]


@pytest.mark.parametrize(("name", "suffix"), ALL)
def test_a_reader_that_is_left_early_reads_no_further(name, suffix, tmp_path):
    path = write(tmp_path / f"prompts{suffix}", WRITE[name](["one", "two", "three"]))
    rows = kinds.load("readers", name).read(path)
    assert [row["prompt"] for row in islice(rows, 2)] == ["one", "two"]
    rows.close()


def test_the_suffix_may_be_in_capitals_and_an_unknown_one_is_refused_with_those_known():
    assert readers.for_path("A.JSONL").__name__ == "noria.readers.jsonl"
    with pytest.raises(InputError, match=r"prompts\.docx: .*\.csv.*\.h5.*\.jsonl.*\.parquet.*\.txt"):
        readers.for_path("prompts.docx")


def test_lines_that_are_no_json_objects_are_bad_rows_that_name_their_line(tmp_path):
    deep, digits = "[" * 100_000, "1" * 5000
    content = ["{", "[1]", '"text"', "1", "1.5", "true", "null", deep, f'{{"a": {digits}}}', "", '{"prompt": "p"}']
    path = write(tmp_path / "a.jsonl", "\n".join(content).encode())
    rows = list(kinds.load("readers", "jsonl").read(path))
    assert len(rows) == 10 == kinds.load("readers", "jsonl").count(path)
    assert rows[-1] == {"prompt": "p"}
    for number, row in enumerate(rows[:-1], 1):
        assert isinstance(row, BadRow) and row.error.startswith(f"line {number} is ")


def test_blank_lines_of_json_lines_are_no_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\n{"prompt": "a"}\n\n  \t\r\n{"prompt": "b"}\n\n')
    assert [row["prompt"] for row in kinds.load("readers", "jsonl").read(path)] == ["a", "b"]
    assert kinds.load("readers", "jsonl").count(path) == 2


def test_row_numbers_of_plain_text_are_line_numbers_whatever_lines_are_blank(tmp_path):
    path = write(tmp_path / "a.txt", b"\na\n\n \nb\n\n\n")
    assert [row["prompt"] for row in kinds.load("readers", "text").read(path)] == ["", "a", "", " ", "b"]
    assert kinds.load("readers", "text").count(path) == 5


# The kinds of tables.


def table(tmp_path, text, suffix=".csv"):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = list(kinds.load("readers", "csv").read(path))
    assert len(rows) == kinds.load("readers", "csv").count(path)
    return rows


def test_cells_of_a_table_are_values_where_the_key_has_one_and_text_elsewhere(tmp_path):
    header = "id,prompt,temperature,max_new_tokens,chat,stop,system,label,messages,token_ids"
    rows = table(
        tmp_path,
        header
        + '\n7,"say ""hi"", 5",0.5,3,True,".",5,08,,\n,,,,false,"["".""]",,"[1]","[{}]","[1, 2]"\nx,y,hot,3.0,,,,,,[\n',
    )
    names = header.split(",")
    assert rows[0] == dict(zip(names, ["7", 'say "hi", 5', 0.5, 3, True, ".", "5", "08", None, None], strict=True))
    values = [None, None, None, None, False, ["."], None, "[1]", [{}], [1, 2]]
    without_prompt = {name: value for name, value in zip(names, values, strict=True) if name != "prompt"}
    assert rows[1] == without_prompt, "an empty prompt beside token_ids or messages is none"
    assert (rows[2]["temperature"], rows[2]["max_new_tokens"], rows[2]["token_ids"]) == ("hot", 3.0, "[")


def test_a_cell_may_hold_line_ends_and_the_lines_after_it_are_counted(tmp_path):
    rows = table(tmp_path, 'prompt,a\n"one\n\ntwo",1\nbad\n')
    assert rows[0]["prompt"] == "one\n\ntwo"
    assert rows[1].error == "line 5 has 1 cell, the header has 2"


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ";"), (".tsv", "\t"), (".TSV", "\t"), (".tsv.gz", "\t")])
def test_other_delimiters_are_seen(tmp_path, suffix, delimiter):
    (row,) = table(tmp_path, as_csv(["a, b; c"], delimiter, ["x"]), suffix)
    assert row == {"prompt": "a, b; c", "x": "x"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,label\na,b\n", "names no column prompt or messages or token_ids; it has: text, label"),
        ("prompt,a,a\n", "two columns have the name 'a'"),
        (b"prompt,\xff\n", "its header cannot be read: line 1 is not UTF-8"),
        ('"prompt', "its header cannot be read: line 1 is not CSV"),
    ],
)
def test_a_header_that_is_none_is_the_users_error(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        table(tmp_path, text)


@pytest.mark.parametrize("line", ['"a"b,c', "a,b,c", "a", '"never ends'])
def test_a_record_that_does_not_fit_is_a_bad_row(tmp_path, line):
    rows = table(tmp_path, f"prompt,x\none,1\n{line}\ntwo,2\n")
    assert rows[0] == {"prompt": "one", "x": "1"} and isinstance(rows[1], BadRow) and "line 3" in rows[1].error
    assert rows[2] == {"prompt": "two", "x": "2"} and len(rows) == 3


def test_an_open_quote_takes_no_more_memory_than_a_line_may(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_NBYTES", 1000)
    rows = table(tmp_path, 'prompt,x\n"open,1\n' + "two,2\n" * 500)
    assert "line 2 is longer" in rows[0].error and rows[1:] == [{"prompt": "two", "x": "2"}] * 500


def hdf5(tmp_path, **columns):
    with h5py.File(tmp_path / "prompts.h5", "w") as file:
        for name, value in columns.items():
            file[name] = value
    reader = kinds.load("readers", "hdf5")
    rows = list(reader.read(tmp_path / "prompts.h5"))
    assert len(rows) == reader.count(tmp_path / "prompts.h5")
    return rows


def test_datasets_of_hdf5_are_columns_in_their_own_types(tmp_path):
    rows = hdf5(
        tmp_path,
        prompt=np.array([b"one", "größer".encode()]),
        id=np.array([5, 2**40]),
        temperature=np.array([0.5, np.nan]),
        chat=np.array([True, False]),
        label=np.array(["a", "b"], h5py.string_dtype()),
        tokens=[1],
    )
    assert rows == [
        {"prompt": "one", "id": 5, "temperature": 0.5, "chat": True, "label": "a"},
        {"prompt": "größer", "id": 2**40, "temperature": None, "chat": False, "label": "b"},
    ]
    assert type(rows[0]["id"]) is int and type(rows[0]["chat"]) is bool


def test_ragged_tokens_of_hdf5_are_token_ids(tmp_path):
    rows = hdf5(tmp_path, tokens=np.arange(10), offsets=[0, 3, 3, 10], seed=[1, 2, 3])
    assert rows == [
        {"token_ids": [0, 1, 2], "seed": 1},
        {"token_ids": [], "seed": 2},
        {"token_ids": [*range(3, 10)], "seed": 3},
    ]
    assert hdf5(tmp_path, tokens=[1], offsets=[0]) == []


def test_a_wrong_offset_or_text_of_hdf5_is_a_bad_row(tmp_path):
    good, *bad = hdf5(tmp_path, tokens=np.arange(10), offsets=[0, 3, 2, 11, -1])
    assert good["token_ids"] == [0, 1, 2] and all("offsets are wrong" in row.error for row in bad) and len(bad) == 3
    (long,) = hdf5(tmp_path, tokens=np.zeros(2**21 + 1, np.int8), offsets=[0, 2**21 + 1])
    assert long.error == "row 0 has 2,097,153 tokens, at most 2,097,152 are read"
    first, second = hdf5(tmp_path, prompt=np.array([b"one", b"\xff"]))
    assert first["prompt"] == "one" and "row 1 is not UTF-8" in second.error


def test_lists_and_objects_of_parquet_are_values_and_dates_are_text(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [[{"role": "user", "content": "hi"}], None]
    columns = {"messages": messages, "prompt": [None, "p"], "seed": [3, None], "day": [date(2024, 1, 2)] * 2}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, second = kinds.load("readers", "parquet").read(tmp_path / "a.parquet")
    assert first["messages"] == [{"role": "user", "content": "hi"}] and first["prompt"] is None and first["seed"] == 3
    assert second["prompt"] == "p" and second["seed"] is None and second["day"] == "2024-01-02"


def test_without_pyarrow_a_parquet_file_is_refused_with_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", as_parquet(["one"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="parquet needs pyarrow: pip install pyarrow"):
        kinds.load("readers", "parquet").count(path)


REQUEST = {"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions"}
TALK = [{"role": "user", "content": "hi"}]


def request(tmp_path, body, **more):
    path = write(tmp_path / "batch.jsonl", json.dumps(REQUEST | {"body": body} | more).encode())
    (row,) = kinds.load("readers", "jsonl").read(path)
    return row


def test_a_line_of_a_batch_is_a_row_in_norias_names(tmp_path):
    body = {
        "model": "m",
        "messages": TALK,
        "temperature": 0.5,
        "stop": "x",
        "n": 2,
        "seed": 4,
        "max_tokens": 9,
        "top_p": 1,
    }
    row = request(tmp_path, body, label=7)
    expected = {"id": "a-1", "url": REQUEST["url"], "model": "m", "messages": TALK, "max_new_tokens": 9, "label": 7}
    assert row == expected | {name: body[name] for name in ("temperature", "stop", "n", "seed", "top_p")}
    assert request(tmp_path, body | {"max_completion_tokens": 3})["max_new_tokens"] == 3
    assert request(tmp_path, body | {"logprobs": True, "top_logprobs": 5})["logprobs"] == 5
    assert request(tmp_path, body | {"logprobs": True})["logprobs"] == 0
    assert "logprobs" not in request(tmp_path, body | {"logprobs": False, "top_logprobs": None})
    assert request(tmp_path, {"prompt": "p"}, url="/v1/completions") == {
        "id": "a-1", "url": "/v1/completions", "prompt": "p", "chat": False,
    }  # fmt: skip
    assert request(tmp_path, {"prompt": [5, 6], "logprobs": 2}, url="/v1/completions")["token_ids"] == [5, 6]


@pytest.mark.parametrize(
    ("body", "more", "words"),
    [
        ({"messages": TALK, "tool_choice": "required"}, {}, "line 1: body.tool_choice is not in this version"),
        ({"messages": TALK, "tools": {"a": 1}}, {}, 'line 1: body.tools is {"a": 1}: it must be a list of objects'),
        ({"messages": TALK, "chat_template": "x"}, {}, "body.chat_template is not a key of a request"),
        ({"prompt": "p", "tools": [{}]}, {"url": "/v1/completions"}, "body.tools is for /v1/chat/completions"),
        (
            {"prompt": "p", "chat_template_kwargs": {"a": 1}},
            {"url": "/v1/completions"},
            "body.chat_template_kwargs is for /v1/chat/completions: a completion has no chat template",
        ),
        ({"messages": TALK, "stream": True}, {}, "body.stream"),
        ({"input": "x"}, {"url": "/v1/embeddings"}, 'url is "/v1/embeddings"'),
        ([], {}, "body is []"),
        (None, {}, "body is null"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused_by_name(tmp_path, body, more, words):
    row = request(tmp_path, body, **more)
    assert isinstance(row, BadRow) and words in row.error
    calm = {"messages": TALK, "stream": False, "tools": None, "best_of": 1, "response_format": {"type": "text"}}
    assert "messages" in request(tmp_path, calm)


def test_what_a_template_reads_beside_messages_is_handed_on(tmp_path):
    beside = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "documents": [{"title": "t", "text": "x"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    row = request(tmp_path, {"messages": TALK} | beside)
    assert row == {"id": "a-1", "url": REQUEST["url"], "messages": TALK} | beside


def test_a_bad_request_keeps_its_own_id(tmp_path):
    row = request(tmp_path, {"messages": TALK, "stream": True})
    assert isinstance(row, BadRow) and row.id == "a-1"
    path = write(tmp_path / "batch.jsonl", b'{"prompt"\n')
    assert next(kinds.load("readers", "jsonl").read(path)).id is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_tokns", 5, "did you mean 'max_new_tokens'"),
        ("temprature", 0.5, "did you mean 'temperature'"),
        ("topP", 0.5, "did you mean 'top_p'"),
        ("message", TALK, "did you mean 'messages'"),
        ("guided_json", {}, "body.guided_json is not a key of a request"),
        ("label", 1, "go into metadata or beside body"),
        ("modalities", ["audio"], "only text"),
        ("verbosity", "low", "body.verbosity is not in this version"),
    ],
)
def test_a_key_of_a_request_that_nobody_knows_is_refused_and_the_right_one_named(tmp_path, key, value, words):
    row = request(tmp_path, {"messages": TALK, key: value})
    assert isinstance(row, BadRow) and words in row.error and row.id == "a-1"


def test_norias_own_keys_may_stand_in_a_request_and_those_that_change_no_answer_are_left_out(tmp_path):
    own = {"min_new_tokens": 2, "system": "s", "prompt_logprobs": True, "max_new_tokens": 7, "repetition_penalty": 1.5}
    none = {"store": True, "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"]}
    row = request(tmp_path, {"messages": TALK} | own | none)
    assert row == {"id": "a-1", "url": REQUEST["url"], "messages": TALK} | own
    assert request(tmp_path, {"prompt": "p", "chat": True}, url="/v1/completions")["chat"] is True


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt", ".csv", ".h5", ".parquet"])
def test_memory_stays_flat_over_many_rows(tmp_path, suffix):
    name = kinds.names("readers")[
        [suffix in kinds.load("readers", n).SUFFIXES for n in kinds.names("readers")].index(True)
    ]
    path = write(tmp_path / f"many{suffix}", WRITE[name](f"short prompt {row}" for row in range(120_000)))
    program = """if True:
        import sys
        from noria.rows.prompts import open_prompts
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        for prompt in open_prompts(sys.argv[1]):
            assert prompt.error is None
            if prompt.row == 20_000:
                before = resident()
        assert prompt.row == 119_999
        print(resident() - before)
    """
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # What 100,000 rows kept would take is 60 MB; the hashes of their ids are 8 bytes each, the latest in a set.
    assert int(done.stdout) < 12 * 2**20, done.stdout


@pytest.mark.parametrize(("name", "suffix"), ALL)
def test_a_known_file_gives_the_same_rows_and_no_others_once_it_is_another(name, suffix, tmp_path):
    path = write(tmp_path / f"prompts{suffix}", WRITE[name](PROMPTS))
    reader, known = kinds.load("readers", name), readers.know(str(path))
    assert list(reader.read(known)) == list(reader.read(path)) and reader.count(known) == len(PROMPTS)
    whole = path.read_bytes()
    for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for read in (lambda: list(reader.read(known)), lambda: reader.count(known) and list(reader.read(known))):
            with pytest.raises(Changed, match=f"prompts {re.escape(str(path))} changed while the run reads it"):
                read()
    path.write_bytes(whole[:-1])
    with pytest.raises(Changed):
        list(reader.read(known))
    path.write_bytes(whole + whole)
    assert list(reader.read(known)) == list(reader.read(known)) and reader.count(known) == len(PROMPTS)
