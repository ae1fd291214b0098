"""Every format of prompts against what prompts.py expects of a reader."""

import gzip
import json
from itertools import islice

import pytest

from noria import kinds, readers
from noria.config import InputError
from noria.readers import BadRow

# How each kind writes rows that have only a prompt. A new kind adds itself here.
WRITE = {
    "jsonl": lambda prompts: "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode(),
    "text": lambda prompts: "".join(prompt + "\n" for prompt in prompts).encode(),
}
PROMPTS = ["one", " two ", "größer 東京 🎉", 'with\ttab, "quotes" and \\', "no line ends: \u2028 \x0b \x85", "x" * 2**20]
CASES = [(name, suffix) for name in kinds.names("readers") for suffix in kinds.load("readers", name).SUFFIXES]


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("name", "suffix"), CASES)
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
    assert isinstance(bad, BadRow) and "line 2 is not UTF-8" in bad.error and "0xff" in bad.error
    assert kinds.load("readers", name).count(path) == 3


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_line_beyond_the_limit_is_a_bad_row_and_takes_no_memory(name, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_NBYTES", 1000)
    path = write(tmp_path / f"prompts{suffix}", WRITE[name](["one", "x" * 3_000_000, "three", "y" * 1001]))
    first, bad, third, last = kinds.load("readers", name).read(path)
    assert (first["prompt"], third["prompt"]) == ("one", "three")
    assert "line 2 is longer than" in bad.error and isinstance(last, BadRow)
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
    for content in (first + second, gzip.compress(first) + gzip.compress(second)):
        path.write_bytes(content)
        assert [row["prompt"] for row in reader.read(path)] == ["one", "two"]


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_a_reader_that_is_left_early_reads_no_further(name, suffix, tmp_path):
    path = write(tmp_path / f"prompts{suffix}", WRITE[name](["one", "two", "three"]))
    rows = kinds.load("readers", name).read(path)
    assert [row["prompt"] for row in islice(rows, 2)] == ["one", "two"]
    rows.close()


def test_the_suffix_may_be_in_capitals_and_an_unknown_one_is_refused_with_those_known():
    assert readers.for_path("A.JSONL").__name__ == "noria.readers.jsonl"
    with pytest.raises(InputError, match=r"prompts\.parquet: .*\.jsonl.*\.txt"):
        readers.for_path("prompts.parquet")


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
