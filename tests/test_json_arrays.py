"""Prompts in a JSON array and in Zstandard files: the rows that json and the same lines give, in bounded memory."""

import gzip
import io
import json
import random
import tracemalloc

import pytest

from counts import count as cases
from noria import readers
from noria.errors import InputError
from noria.readers import BadRow, for_path, jsonl
from noria.readers import json as arrays

VALUES = ["", "text", 'say "hi"', "a\\", "\\\"]},{[", "\ud800", "é🎉\u2028", "a\n\t\0", 0, -0.0, 1e308, 12345678901234567890123,
          float("nan"), float("inf"), True, None, [], {}, [[]], {"a": {"b": [1, "]"]}}, ["{", "["]]  # fmt: skip


def rows_of(path):
    rows = list(for_path(path).read(path))
    assert len(rows) == for_path(path).count(path)
    return rows


def same(one, other):
    return json.dumps(one) == json.dumps(other)  # NaN is NaN there


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**18])
def test_an_array_has_the_values_that_json_reads(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(arrays, "_CHUNK_NBYTES", chunk)
    draw, path = random.Random(chunk), tmp_path / "a.json"
    for _ in range(cases(200)):
        rows = [
            {draw.choice('abc"\\]'): draw.choice(VALUES) for _ in range(draw.randint(0, 4))}
            for _ in range(draw.randint(0, 6))
        ]
        text = json.dumps(rows, indent=draw.choice([None, 2]), ensure_ascii=draw.random() < 0.5)
        path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf", b" \n"]) + text.encode(errors="backslashreplace"))
        expected = json.loads(path.read_bytes().decode("utf-8-sig"))
        assert same(rows_of(path), expected)


def test_an_element_that_is_wrong_is_a_bad_row_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"a": 1}, 5, [1, 2], {"b": nonsense}, {"c": "\xff"}, , {"d": 4}, null]')
    first, *wrong, last, null = rows_of(path)
    assert first == {"a": 1} and last == {"d": 4}
    words = [
        "element 2 is a number",
        "element 3 is a list",
        "element 4 is not JSON",
        "element 5 is not UTF-8",
        "element 6 is not JSON",
    ]
    assert all(isinstance(row, BadRow) and row.error.startswith(word) for row, word in zip(wrong, words, strict=True))
    assert null.error.startswith("element 8 is null: a row is a JSON object")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"b"', "its array is not closed after element 1"),
        ('[{"a": "x}]', "its array is not closed after element 0"),
        ("[", "its array is not closed"),
        ("[]]", "something follows its array"),
        ('[{"a": 1}] [2]', "something follows its array after element 1"),
        ('{\n"data": [1]\n}', "neither an array of objects nor an object a line"),
        ("hello", "neither an array of objects nor an object a line"),
    ],
)
def test_a_file_that_is_no_array_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (lambda: list(arrays.read(path)), lambda: arrays.count(path)):
        with pytest.raises(InputError) as refused:
            read()
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_empty_array_and_an_empty_file_have_no_rows(tmp_path):
    for number, text in enumerate(["[]", " [ \n ] \n", "", "\n"]):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        assert rows_of(path) == []


def test_json_lines_under_the_name_of_an_array_are_read_as_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n{"a": 1}\n{"a": 2}\n{\n')
    one, two, bad = rows_of(path)
    assert (one, two) == ({"a": 1}, {"a": 2}) and "line 4 is not JSON" in bad.error


def test_lines_of_a_batch_are_rows_in_an_array_too(tmp_path):
    path = tmp_path / "a.json"
    request = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}}
    path.write_text(json.dumps([request, request | {"body": {"stream": True}}]))
    good, bad = rows_of(path)
    assert good["id"] == "a" and good["max_new_tokens"] == 3
    several = {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": ["p", "q"]}}
    path.write_text(json.dumps([several, {"prompt": "r"}]))
    assert [row["prompt"] for row in rows_of(path)] == ["p", "q", "r"]
    path.write_text(json.dumps([request, request | {"body": {"stream": True}}]))
    assert bad.id == "a" and bad.error.startswith("element 2: body.stream")


def test_an_element_that_is_too_long_is_a_bad_row_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_NBYTES", 2**20)
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'[{"a": 1}, {"b": "')
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b'"}, [' + b"[" * 2**22 + b"]" * 2**22 + b'], {"c": 3}]')
    tracemalloc.start()
    first, long, deep, last = rows_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (first, last) == ({"a": 1}, {"c": 3}) and peak < 2**24
    assert long.error == "element 2 is longer than 1 MiB" and deep.error == "element 3 is longer than 1 MiB"


# Zstandard.


@pytest.fixture
def zstd():
    return pytest.importorskip("zstandard")


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.csv.zst", "a.tsv.zst", "a.json.zst", "a.ndjson.zst"])
def test_a_file_of_zstandard_has_the_rows_of_the_plain_one(tmp_path, zstd, name):
    lines = [json.dumps({"prompt": f"p{row} " + "x" * (row % 300)}) for row in range(3000)]
    text = {
        "json": "[" + ",".join(lines) + "]",
        "txt": "\n".join(lines),
        "csv": "prompt\n" + "\n".join(map(str, range(3000))),
    }
    text |= {"tsv": "prompt\tx\n" + "a\tb\n" * 5}
    plain = text.get(name.split(".")[1], "\n".join(lines) + "\n").encode()
    (tmp_path / name.removesuffix(".zst")).write_bytes(plain)
    half = len(plain) // 2
    packed = zstd.ZstdCompressor().compress(plain[:half]) + zstd.ZstdCompressor(level=19).compress(plain[half:])
    (tmp_path / name).write_bytes(packed)
    assert rows_of(tmp_path / name) == rows_of(tmp_path / name.removesuffix(".zst"))


@pytest.mark.parametrize("left", [1, 5, 100])
def test_a_file_of_zstandard_that_was_cut_short_is_refused(tmp_path, zstd, left):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd.ZstdCompressor().compress(b'{"prompt": "p"}\n' + random.Random(1).randbytes(3000))[:-left])
    with pytest.raises(InputError, match=r"its last frame is incomplete\): the file is damaged or was cut short"):
        rows_of(path)


def test_a_damaged_file_of_zstandard_is_refused(tmp_path, zstd):
    path = tmp_path / "a.jsonl.zst"
    packed = bytearray(zstd.ZstdCompressor().compress(b'{"prompt": "p"}\n' * 9999))
    packed[20:30] = b"\xff" * 10
    path.write_bytes(packed)
    with pytest.raises(InputError, match="the file is damaged or was cut short"):
        rows_of(path)


def test_a_window_above_the_limit_is_refused_and_one_of_the_limit_is_read(tmp_path, zstd):
    path = tmp_path / "a.jsonl.zst"
    for log, fits in ((27, True), (28, False), (31, False)):
        parameters = zstd.ZstdCompressionParameters(window_log=log)
        written = io.BytesIO()
        with zstd.ZstdCompressor(compression_params=parameters).stream_writer(written, closefd=False) as file:
            file.write(b'{"prompt": "p"}\n' * 10)
        path.write_bytes(written.getvalue())
        if fits:
            assert len(rows_of(path)) == 10
            continue
        with pytest.raises(
            InputError, match="its window is larger than 128 MiB: compress it with zstd --long=27 or less"
        ):
            rows_of(path)


def test_a_bomb_of_zstandard_is_a_bad_row_in_bounded_memory(tmp_path, zstd, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_NBYTES", 2**20)
    path = tmp_path / "a.jsonl.zst"
    packed = zstd.ZstdCompressor(level=19).compressobj()
    pieces = [packed.compress(bytes(2**24)) for _ in range(16)]
    path.write_bytes(b"".join([*pieces, packed.compress(b'\n{"prompt": "p"}\n'), packed.flush()]))
    assert path.stat().st_size < 2**16
    tracemalloc.start()
    bomb, row = rows_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bomb.error == "line 1 is longer than 1 MiB" and row == {"prompt": "p"} and peak < 2**26


def test_without_the_library_the_refusal_says_how_to_install_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 20)
    with pytest.raises(InputError, match="Zstandard needs zstandard: pip install zstandard"):
        list(jsonl.read(path))
