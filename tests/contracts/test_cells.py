"""Every cell of a table arrives as csv, pandas and pyarrow read it, or is a named error of its row."""

import csv
import datetime
import decimal
import io
import json
import math
import random
import subprocess
import sys
import uuid
from dataclasses import replace

import h5py
import numpy as np
import pytest

import tables
from counts import count as cases
from noria.readers import BadRow, _arrow, for_path
from noria.rows.prompts import open_prompts

pandas = pytest.importorskip("pandas")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
types = pyarrow.types

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


@pytest.mark.parametrize("name", ["a.tsv.csv", "a.tsv2.csv", "a.csv.tsv", "A.TSV"])
def test_the_end_of_a_tables_name_alone_says_what_is_between_its_cells(name, tmp_path):
    between = "\t" if name.lower().endswith(".tsv") else ","
    assert rows_of(tmp_path / name, f"prompt{between}x\na{between}b\n") == [{"prompt": "a", "x": "b"}]


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
        why = "a quote that it opens is not closed (" if bad.startswith('"open') else ""
        assert rows[1].error.startswith(f"line 3 is not CSV: {why}") and len(rows) == 3 + bad.count("\n") + 1


def test_many_quotes_that_never_close_take_no_more_time_than_their_length(tmp_path):
    rows = rows_of(tmp_path / "a.tsv", "prompt\tx\n" + '"a\t"b\n' * 20_000)
    assert len(rows) == 20_000 and rows[-1] == {"prompt": '"a', "x": '"b'}


def test_what_a_template_reads_beside_messages_is_a_value_in_a_table_too(tmp_path):
    talk, tools = [{"role": "user", "content": "q"}], [{"type": "function", "function": {"name": "f"}}]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "messages", "tools", "add_generation_prompt"])
        table.writerow(["", json.dumps(talk), json.dumps(tools), "False"])
        table.writerow(["", json.dumps(talk), "", ""])
        table.writerow(["p", "", "[]", "no"])
    first, second, third = open_prompts(tmp_path / "a.csv")
    assert (first.error, first.messages, first.beside) == (None, talk, {"tools": tools, "add_generation_prompt": False})
    assert (second.error, second.beside) == (None, {})
    assert (third.error, third.beside, json.loads(third.extra)["tools"]) == (None, {}, "[]")


# parquet.


def is_text(value):
    """Whether all bytes in a value are text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace").encode() == value
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return all(map(is_text, held))


def same(found, value, type):
    """Whether what arrived of a value, as JSON, is what pyarrow and pandas say that it is."""
    if value is None:
        return found is None
    if isinstance(value, bytes):
        return found == value.decode()
    if types.is_map(type):
        value = {str(key): one for key, one in value}
        return found.keys() == value.keys() and all(same(found[key], value[key], type.item_type) for key in value)
    if types.is_struct(type):
        fields = {field.name: field.type for field in type if value[field.name] is not None}
        all_same = all(same(found.get(name), value[name], kind) for name, kind in fields.items())
        return all_same and found.keys() == fields.keys()
    if isinstance(value, list):
        return len(found) == len(value) and all(
            same(one, other, type.value_type) for one, other in zip(found, value, strict=True)
        )
    if types.is_timestamp(type) or types.is_duration(type):
        parsed = (pandas.Timestamp if types.is_timestamp(type) else pandas.Timedelta)(found)
        return isinstance(found, str) and parsed == value
    if isinstance(value, datetime.time):  # inside another value: pyarrow leaves the nanoseconds out
        return found.startswith(str(value))
    if types.is_time(type):
        return pandas.Timestamp(f"1970-01-01 {found}").value == value
    if isinstance(value, decimal.Decimal):
        return isinstance(found, str) and decimal.Decimal(found) == value and len(found) == len(str(value))
    if isinstance(value, datetime.date | uuid.UUID):
        return found == str(value)
    return found == value and type_of(found) == type_of(value)


def type_of(value):
    return (
        bool
        if isinstance(value, bool)
        else int
        if isinstance(value, int)
        else float
        if isinstance(value, float)
        else str
    )


def judged(column):
    """The column's values as pyarrow gives them; times of a day, of which Python has no nanoseconds, as integers of them."""
    if types.is_time(column.type):
        return [
            None if one.value is None else one.value * {"ms": 10**6, "us": 10**3, "ns": 1}[column.type.unit]
            for one in column
        ]
    return column.to_pylist()


def test_tables_of_parquet_arrive_as_pyarrow_and_pandas_read_them(tmp_path):
    path, unreadable = tmp_path / "a.parquet", 0
    for seed in range(cases(500)):
        choose = random.Random(seed)
        num_rows, kinds = choose.randint(0, 5), {name: tables.arrow_type(choose) for name in tables.names(choose)}
        columns = {name: [tables.arrow_value(choose, kind) for _ in range(num_rows)] for name, kind in kinds.items()}
        prompts = pyarrow.array([tables.text(choose) + "." for _ in range(num_rows)], pyarrow.string())
        try:
            columns = {name: pyarrow.array(column, kinds[name]) for name, column in columns.items()}
            parquet.write_table(pyarrow.table(columns | {"prompt": prompts}), path, row_group_size=3)
            read = parquet.read_table(path).combine_chunks()
        except pyarrow.ArrowException:  # older ones make no float16 of a float, and read no null lists of a fixed size
            unreadable += 1
            continue
        expected = {name: judged(read[name]) for name in read.column_names}
        for row, prompt in enumerate(open_prompts(path)):
            assert prompt.row == row
            own = json.loads(prompt.extra) if prompt.extra else {}
            values = {name: expected[name][row] for name in kinds}
            if not all(map(is_text, values.values())):
                assert "is not UTF-8 text: byte" in prompt.error, (seed, row)
                continue
            assert (prompt.error, prompt.prompt) == (None, expected["prompt"][row]), (seed, row)
            for name in kinds:
                kind = read.schema.field(name).type
                assert same(own.get(name), values[name], kind), (seed, row, name, own, values[name])
        assert for_path(path).count(path) == num_rows
    newest = int(pyarrow.__version__.split(".")[0]) >= 26
    assert unreadable <= (0 if newest else cases(500) / 4), "tables that pyarrow itself cannot write and read"


def of_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return list(open_prompts(path))


TALKS = [
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "z", "tool_call_id": "7"},
    ],
    [{"role": "user", "content": "hello"}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": [None, 1]}}}]}],
]


def test_keys_that_a_struct_of_parquet_has_in_other_rows_alone_are_not_given(tmp_path):
    """A table gives each message all keys, null where it has none; JSON lines of the same rows have no such keys."""
    rows = [{"id": str(row), "messages": talk, "logit_bias": {str(row): 1.0}} for row, talk in enumerate(TALKS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, wanted = (list(open_prompts(tmp_path / name)) for name in ("a.parquet", "a.jsonl"))
    assert [prompt.messages for prompt in found] == [prompt.messages for prompt in wanted] == TALKS
    # Before 24 pyarrow puts the keys of a struct in order, and with them those of the prompt's text.
    assert all(json.loads(one.prompt) == json.loads(other.prompt) for one, other in zip(found, wanted, strict=True))
    assert [replace(prompt, prompt=None) for prompt in found] == [replace(prompt, prompt=None) for prompt in wanted]


def test_a_bias_that_is_null_is_not_given(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "logit_bias": {"5": null, "6": 1.5}}\n')
    (prompt,) = open_prompts(tmp_path / "a.jsonl")
    assert (prompt.error, prompt.sampling) == (None, {"logit_bias": {"6": 1.5}})
    kind = pyarrow.map_(pyarrow.int32(), pyarrow.float64())
    (prompt,) = of_parquet(
        tmp_path / "a.parquet", prompt=["p"], logit_bias=pyarrow.array([[(5, None), (6, 1.5)]], kind)
    )
    assert (prompt.error, prompt.sampling) == (None, {"logit_bias": {"6": 1.5}})


def test_a_value_of_parquet_that_cannot_be_read_is_the_error_of_its_row_which_keeps_its_id(tmp_path):
    two = pyarrow.StructArray.from_arrays([pyarrow.array([1, 2, 3])] * 2, names=["k", "k"])
    columns = {
        "far": pyarrow.array([0, 2**60, 5], pyarrow.timestamp("us")),
        "bytes": pyarrow.array([{"png": b"a"}, {"png": b"\x89PNG"}, None]),
        "no time of a day": pyarrow.array([0, 86_400_000, 86_399_999], pyarrow.time32("ms")),
        "twice": pyarrow.array([[], [("a", 1), ("a", 2)], []], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
    }
    for name, column in columns.items():
        first, bad, last = of_parquet(tmp_path / "a.parquet", prompt=["a", "b", "c"], id=["x", "y", "z"], own=column)
        assert (first.error, first.id, last.error, last.id, bad.id) == (None, "x", None, "z", "y"), name
        assert bad.error.startswith("row 1: 'own' "), bad.error
    found = list(for_path("a.parquet").read(tmp_path / "a.parquet"))
    assert found[1].error == "row 1: 'own' cannot be read: a map has the same key twice"
    assert "two fields of the same name" in _arrow.values(two)[0].error


@pytest.mark.parametrize(
    ("keys", "kind", "expected"),
    [
        ([1.5, 2.0], pyarrow.float64(), [[1.5, 0], [2.0, 1]]),
        ([True, False], pyarrow.bool_(), [[True, 0], [False, 1]]),
        ([{"a": 1}], pyarrow.struct({"a": pyarrow.int8()}), [[{"a": 1}, 0]]),
        ([3, 4], pyarrow.int16(), {"3": 0, "4": 1}),
    ],
)
def test_a_map_of_parquet_is_an_object_where_its_keys_are_texts_or_integers_and_else_pairs(
    tmp_path, keys, kind, expected
):
    column = pyarrow.array([list(zip(keys, range(9), strict=False))], pyarrow.map_(kind, pyarrow.int8()))
    (prompt,) = of_parquet(tmp_path / "a.parquet", prompt=["p"], own=column)
    assert json.loads(prompt.extra) == {"own": expected}


def test_times_of_parquet_in_a_dictionary_and_of_the_days_of_local_time_are_their_texts():
    times = pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns"))
    assert _arrow.values(times.dictionary_encode()) == ["2023-11-14 22:13:20.123456789"]
    early = pyarrow.array([datetime.datetime(1890, 1, 1)], pyarrow.timestamp("s", "Europe/Berlin"))  # 53 min 28 s ahead
    assert _arrow.values(early) == ["1890-01-01 00:00:00+00:00"]


def test_a_text_of_parquet_that_is_not_utf8_spoils_no_other_text():
    good, bad = _arrow.values(pyarrow.array([b"a", b"\xff"]).view(pyarrow.string()))
    assert good == "a" and bad.error == "is not UTF-8 text: byte 0 is 0xff"


@pytest.mark.skipif(not hasattr(pyarrow, "uuid"), reason="needs pyarrow 18")
def test_a_uuid_of_parquet_is_its_text(tmp_path):
    one = uuid.uuid5(uuid.NAMESPACE_URL, "noria")
    (prompt,) = of_parquet(tmp_path / "a.parquet", prompt=["p"], own=pyarrow.array([one.bytes], pyarrow.uuid()))
    assert json.loads(prompt.extra) == {"own": str(one)}


@pytest.mark.slow
def test_nanoseconds_need_no_pandas(tmp_path):
    times = pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns"))
    parquet.write_table(pyarrow.table({"prompt": ["p"], "own": times}), tmp_path / "a.parquet")
    program = """if True:
        import sys
        sys.modules["pandas"] = None
        from noria.rows.prompts import open_prompts
        (prompt,) = open_prompts(sys.argv[1])
        print(prompt.extra)
    """
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a.parquet"], capture_output=True, text=True)
    assert done.stdout == '{"own": "2023-11-14 22:13:20.123456789"}\n', done.stderr
    assert pandas.Timestamp("2023-11-14 22:13:20.123456789").value == 1_700_000_000_123_456_789


# JSON lines.


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_objects_written_by_json_arrive_as_json_reads_them(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    for seed in range(cases(500)):
        choose = random.Random(seed)
        rows = [{name: tables.json_value(choose) for name in tables.names(choose)} for _ in range(choose.randint(1, 5))]
        rows = [row | {"prompt": tables.text(choose) + choose.choice(["\ud800.", "."])} for row in rows]
        dump = {"ensure_ascii": True, "indent": choose.choice([None, 1]) if suffix == ".json" else None}
        end = choose.choice(["\n", "\r\n", "\n\n"])
        text = json.dumps(rows, **dump) if suffix == ".json" else end.join(json.dumps(row, **dump) for row in rows)
        text = text.replace("\\u2028", "\u2028").replace("\\u00df", "ß")
        path.write_bytes(text.encode(choose.choice(["utf-8", "utf-8-sig"])))
        found = arrived(path)
        # What is compared are texts: -0.0 is not 0.0, 2.0 is not 2.
        assert [json.dumps(one, sort_keys=True) for one in found] == [
            json.dumps(row, sort_keys=True) for row in rows
        ], seed


@pytest.mark.parametrize("depth", [10, 190, 250, 800, 950, 970, 990, 2000])
def test_values_that_are_nested_too_deeply_to_be_written_again_are_the_error_of_their_row(depth, tmp_path):
    deep = "[" * depth + "]" * depth
    rows = [{"prompt": "p", "own": 0}, {"prompt": 0}, {"messages": 0}, {"custom_id": "a", "body": 0}, {"id": 0}]
    texts = [json.dumps(row).replace("0", deep) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(["x", *texts, '{"prompt": "last"}']))
    found = list(open_prompts(tmp_path / "a.jsonl"))
    assert found[-1].error is None and len(found) == len(rows) + 2
    if depth < 200:
        assert found[1].error is None and found[1].extra == json.dumps({"own": json.loads(deep)})
    else:
        assert all("nested" in prompt.error or "body is [[[" in prompt.error for prompt in found[1:-1])


# HDF5.


def hdf5_column(choose, num_rows):
    """A column as h5py takes it, its type there, and the values that h5py and numpy say it has."""
    texts = [tables.text(choose, without="\0") for _ in range(num_rows)]
    shape = choose.choice([(num_rows,), (num_rows, 2), (num_rows, 1, 3)])
    dtype = np.dtype(choose.choice(["<i1", "<u8", ">i4", ">f8", "<f4", "<f2", "?", np.longdouble]))
    numbers = np.array([choose.choice([0, 1, 5]) for _ in range(math.prod(shape))]).reshape(shape).astype(dtype)
    if num_rows and dtype.kind == "f" and dtype.itemsize <= 8:
        numbers.flat[0] = choose.choice([-0.5, np.inf, np.nan])
    kind = choose.choice(["text", "bytes", "fixed", "numbers", "numbers", "lists", "named", "broken"])
    if kind == "numbers":
        return numbers, dtype, numbers.astype(np.float64 if dtype == np.longdouble else dtype).tolist()
    if kind == "lists":
        lists = [np.arange(choose.randint(0, 3), dtype="<i2") for _ in range(num_rows)]
        return lists, h5py.vlen_dtype(np.dtype("<i2")), [one.tolist() for one in lists]
    if kind == "named":
        dtype = np.dtype([("n", "<i8"), ("t", h5py.string_dtype()), ("l", "<f4", (2,))])
        rows = [(choose.randint(-9, 9), text, (0.5, 2.0)) for text in texts]
        return np.array(rows, dtype), dtype, [{"n": n, "t": t, "l": list(values)} for n, t, values in rows]
    if kind == "broken":
        return [b"\xff" + text.encode() for text in texts], h5py.string_dtype(), [None] * num_rows
    if kind == "fixed":
        longest = max([1, *(len(text.encode()) for text in texts)])
        return [text.encode() for text in texts], np.dtype(f"S{longest}"), texts
    return texts, h5py.string_dtype("utf-8" if kind == "text" else "ascii"), texts


def write_hdf5(path, columns):
    with h5py.File(path, "w") as file:
        for name, (data, dtype, _) in columns.items():
            if dtype.kind != "O":
                file.create_dataset(name, data=np.array(data, dtype if isinstance(data, list) else None), dtype=dtype)
                continue
            file.create_dataset(name, (len(data),), dtype)
            for row, value in enumerate(data):
                file[name][row] = value.encode() if isinstance(value, str) else value


@pytest.mark.slow
def test_tables_of_hdf5_arrive_as_h5py_and_numpy_read_them(tmp_path):
    for seed in range(cases(500)):
        choose = random.Random(seed)
        num_rows = choose.randint(0, 5)
        names = [name.replace("/", "").replace(".", "") for name in tables.names(choose)]
        columns = {name: hdf5_column(choose, num_rows) for name in dict.fromkeys(names)}
        prompts = [tables.text(choose, without="\0") + "." for _ in range(num_rows)]
        write_hdf5(tmp_path / "a.h5", columns | {"prompt": (prompts, h5py.string_dtype(), prompts)})
        broken = any(values[:1] == [None] for *_, values in columns.values())
        for row, prompt in enumerate(open_prompts(tmp_path / "a.h5")):
            if broken:
                assert f"row {row} is not UTF-8 text: byte 0 of" in prompt.error
                continue
            assert (prompt.error, prompt.prompt) == (None, prompts[row]), seed
            own, expected = (
                json.loads(prompt.extra or "{}"),
                {name: values[row] for name, (*_, values) in columns.items()},
            )
            expected = {name: None if value != value else value for name, value in expected.items()}
            assert json.dumps(own, sort_keys=True) == json.dumps(expected, sort_keys=True), seed
        assert for_path("a.h5").count(tmp_path / "a.h5") == num_rows


def of_hdf5(path, **columns):
    with h5py.File(path, "w") as file:
        for name, value in columns.items():
            file[name] = value
    return list(open_prompts(path))


def test_token_ids_of_hdf5_may_be_rows_of_a_table(tmp_path):
    found = of_hdf5(tmp_path / "a.h5", token_ids=np.arange(6).reshape(2, 3), vector=np.zeros((2, 2), "f4"))
    assert [(one.error, one.token_ids, one.extra) for one in found] == [
        (None, [0, 1, 2], '{"vector": [0.0, 0.0]}'),
        (None, [3, 4, 5], '{"vector": [0.0, 0.0]}'),
    ]


def test_columns_called_tokens_and_offsets_beside_prompts_are_the_users_own(tmp_path):
    found = of_hdf5(tmp_path / "a.h5", prompt=["a", "b"], tokens=[5, 6], offsets=[0, 1])
    assert [one.extra for one in found] == ['{"offsets": 0, "tokens": 5}', '{"offsets": 1, "tokens": 6}']
    assert [one.extra for one in of_hdf5(tmp_path / "a.h5", prompt=["a"], tokens=[5, 6], offsets=[0, 2])] == [""]


def test_a_number_that_no_float64_holds_is_the_error_of_its_row_which_keeps_its_id(tmp_path):
    exact, more = np.longdouble(1), np.longdouble(1) + np.finfo(np.longdouble).eps
    if float(more) == more:
        pytest.skip("long double is float64 here")
    first, bad = of_hdf5(tmp_path / "a.h5", prompt=["a", "b"], id=["x", "y"], z=np.array([exact, more]))
    assert (first.error, first.extra, bad.id) == (None, '{"z": 1.0}', "y")
    assert bad.error.startswith("row 1: z is 1.000") and "more digits than a float64" in bad.error
