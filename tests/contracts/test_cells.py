"""Every cell of a table arrives as csv, pandas and pyarrow read it, or is a named error of its row."""

import csv
import io
import json
import random

import pytest

import tables
from counts import count as cases
from noria.readers import BadRow, for_path
from noria.rows.prompts import open_prompts

pandas = pytest.importorskip("pandas")

QUOTING = {"minimal": csv.QUOTE_MINIMAL, "all": csv.QUOTE_ALL, "texts": csv.QUOTE_NONNUMERIC}


def arrived(path):
    """The rows of a file as Noria has them: the prompt, and the user's own columns."""
    found = []
    for prompt in open_prompts(path):
        assert prompt.error in (None, "prompt is empty"), prompt.error
        found.append({"prompt": prompt.prompt} | (json.loads(prompt.extra) if prompt.extra else {}))
    assert len(found) == for_path(path).count(path)
    return found


def rows_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = list(for_path(path).read(path))
    assert len(found) == for_path(path).count(path)
    return found


# Tables in text.


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_written_by_csv_and_pandas_arrive_as_csv_reads_them(suffix, tmp_path):
    path, delimiter = tmp_path / f"a{suffix}", {".csv": ",", ".tsv": "\t"}[suffix]
    for seed in range(cases(500)):
        choose = random.Random(seed)
        header, rows = tables.texts(choose)
        end, quoting = choose.choice(["\n", "\r\n"]), choose.choice(list(QUOTING.values()))
        # A lone \r is a line's end for those that read the file: csv quotes it where it is in the end of its own lines.
        end = "\r\n" if any("\r" in cell for row in (header, *rows) for cell in row) else end
        if choose.random() < 0.5:
            text = io.StringIO(newline="")
            csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([header, *rows])
            path.write_bytes(text.getvalue().encode(choose.choice(["utf-8", "utf-8-sig"])))
        else:
            frame = pandas.DataFrame(rows, columns=header, dtype=object)
            frame.to_csv(path, sep=delimiter, index=False, lineterminator=end, quoting=quoting)
        with open(path, newline="", encoding="utf-8-sig") as file:
            read = list(csv.DictReader(file, delimiter=delimiter, strict=True))
        assert read == [dict(zip(header, row, strict=True)) for row in rows], "what csv reads is what was written"
        assert arrived(path) == read, seed


def test_a_line_end_inside_a_quoted_cell_stays_what_it_is(tmp_path):
    text = b'\xef\xbb\xbfid,prompt\r\n1,"line1\r\nline2"\r\n2,"a\rb"\r\n3,"c\nd"\r\n'
    expected = pandas.read_csv(io.BytesIO(text), keep_default_na=False).prompt.tolist()
    assert expected == ["line1\r\nline2", "a\rb", "c\nd"]
    assert [row["prompt"] for row in rows_of(tmp_path / "a.csv", text)] == expected
    assert [row["prompt"] for row in rows_of(tmp_path / "a.tsv", text.replace(b",", b"\t"))] == expected


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_lines_of_an_old_mac_end_in_a_lone_carriage_return(suffix, tmp_path):
    text = 'id,prompt\r1,"a, b\tc"\r2,d\r'.replace(",", "," if suffix == ".csv" else "\t")
    with io.StringIO(text, newline="") as file:
        expected = list(csv.DictReader(file, delimiter=text[2]))
    assert rows_of(tmp_path / f"a{suffix}", text) == expected and len(expected) == 2


def test_blank_lines_before_a_header_do_not_hide_its_delimiter(tmp_path):
    assert rows_of(tmp_path / "a.csv", "\r\n\nid;prompt\n1;a, b\n") == [{"id": "1", "prompt": "a, b"}]


TSV = {
    'say "hi" now': 'say "hi" now',
    '"quoted" start': '"quoted" start',
    '"': '"',
    '"never ends': '"never ends',
    'ends"': 'ends"',
    '""': "",
    '"""': '"""',
    '""""': '"',
    '"a ""b"" c"': 'a "b" c',
    '"a"b"': '"a"b"',
    '5" pipe': '5" pipe',
    '"x" "y"': '"x" "y"',
    " padded ": " padded ",
    '"a\tb"': "a\tb",
    '"a\nb"': "a\nb",
    '"a\r\n""b"': 'a\r\n"b',
}


@pytest.mark.parametrize("written", TSV)
def test_a_tsv_cell_is_a_whole_quoted_field_or_its_text_as_it_stands(written, tmp_path):
    for end in ("\n", "\r\n"):
        first, last = f"prompt\tx{end}{written}\t1{end}z\t2{end}", f"x\tprompt{end}1\t{written}{end}2\tz{end}"
        for text in (first, last, last.removesuffix(end)):
            rows = rows_of(tmp_path / "a.tsv", text)
            assert rows == [{"prompt": TSV[written], "x": "1"}, {"prompt": "z", "x": "2"}], text


def test_a_tsv_row_whose_quote_never_closes_hides_no_row_behind_it(tmp_path):
    text = 'prompt\tx\n"open\t1\nb\t"2\nc\t3"\n"d"\t4\n'
    rows = rows_of(tmp_path / "a.tsv", text)
    # `"2` and `3"` are a whole field together, as RFC 4180 has it; `"open` is none.
    assert rows[0] == {"prompt": '"open', "x": "1"} and rows[-1] == {"prompt": "d", "x": "4"}
    rows = rows_of(tmp_path / "a.tsv", text.replace('3"', "3"))
    assert rows == [
        {"prompt": '"open', "x": "1"},
        {"prompt": "b", "x": '"2'},
        {"prompt": "c", "x": "3"},
        {"prompt": "d", "x": "4"},
    ]


def test_a_csv_row_whose_quote_never_closes_or_closes_wrongly_is_the_only_one_that_is_lost(tmp_path):
    for bad in ('"open,1', '"open,1\n""x,2', '"a"b,1'):
        rows = rows_of(tmp_path / "a.csv", f'prompt,x\na,0\n{bad}\nc,3\nd,"4"\n')
        assert rows[0] == {"prompt": "a", "x": "0"}
        assert [row for row in rows if not isinstance(row, BadRow)][1:] == [
            {"prompt": "c", "x": "3"},
            {"prompt": "d", "x": "4"},
        ]
        assert rows[1].error.startswith("line 3 is not CSV: ") and len(rows) == 3 + bad.count("\n") + 1


def test_many_quotes_that_never_close_take_no_more_time_than_their_length(tmp_path):
    rows = rows_of(tmp_path / "a.tsv", "prompt\tx\n" + '"a\t"b\n' * 20_000)
    assert len(rows) == 20_000 and rows[-1] == {"prompt": '"a', "x": '"b'}
