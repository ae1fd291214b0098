"""noria.open: the rows of an output in Python, read when they are asked for."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import noria
from counts import full
from noria.output import sealed
from noria.output.compact import Compactor
from noria.output.export import export
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.schema import RowWriter, Scores, write_attrs
from output_rows import as_tuple, fill, make_row

ROWS = [make_row(row, sample) for row in range(40) for sample in range(1 + row % 2)]


def finish(output, rows, samples=1):
    parts = Parts(output, {"run": 1})
    fill(parts, rows, 7)
    merge(parts, output, len({row.row for row in rows}), {}, {}, samples)
    return output


@pytest.fixture(params=["finished", "not finished"])
def run(request, tmp_path):
    if request.param == "finished":
        finish(tmp_path / "run.h5", ROWS, np.array([1 + row % 2 for row in range(40)]))
    else:
        fill(Parts(tmp_path / "run.h5", {"run": 1}), [*ROWS[::-1], make_row(40, status="todo")], 7)
    with noria.open(tmp_path / "run.h5") as opened:
        assert opened.finished == (request.param == "finished")
        yield opened


def same(found, rows):
    return list(map(as_tuple, found)) == list(map(as_tuple, rows))


def test_rows_come_in_order_whole(run):
    assert len(run) == len(ROWS) and same(run, ROWS)
    assert [row.columns for row in run] == [json.loads(row.extra) if row.extra else {} for row in ROWS]


def test_places_and_slices_are_those_of_a_list(run):
    for place in (0, 7, -1, -60, np.int64(3)):
        assert as_tuple(run[place]) == as_tuple(ROWS[place])
    for some in (slice(3, 9), slice(None, None, 7), slice(-5, None), slice(20, 2, -3), slice(9, 3), slice(0, 999)):
        assert same(run[some], ROWS[some]) and len(run[some]) == len(ROWS[some])
    assert same(run[10:50][5:20:2], ROWS[10:50][5:20:2]) and run[10:20][0].id == ROWS[10].id
    for place in (60, -61):
        with pytest.raises(IndexError):
            run[place]


def test_ids_find_rows_slices_of_ids_hold_both_ends_and_lists_keep_their_order(run):
    ids = [row.id for row in ROWS]
    assert as_tuple(run["row-4"]) == as_tuple(ROWS[ids.index("row-4")])
    assert same(run["row-3":"row-7"], [row for row in ROWS if 3 <= row.row <= 7])
    assert same(run["row-38":], [row for row in ROWS if row.row >= 38])
    assert same(run[:"row-1"], [row for row in ROWS if row.row <= 1])
    assert same(run[["row-9", "row-2"]], [row for number in (9, 2) for row in ROWS if row.row == number])
    assert len(run[[]]) == 0 and run["row-6":"row-9"]["row-8"].row == 8
    assert "row-5" in run and "row-41" not in run and 5 not in run and "row-5" not in run[:3]


def test_an_id_of_several_rows_and_one_of_none_are_said(run):
    with pytest.raises(KeyError, match="2 rows have the id 'row-1'"):
        run["row-1"]
    with pytest.raises(KeyError, match="no row of id 'nobody'"):
        run["nobody"]
    with pytest.raises(TypeError):
        run[1.5]


def test_ids_whose_hashes_are_equal_are_told_apart(run, monkeypatch):
    monkeypatch.setattr("noria.output.opened.xxhash.xxh3_64_intdigest", lambda id: 7)
    assert run["row-4"].row == 4 and "nobody" not in run


def test_tables_are_those_of_the_exported_files(run, tmp_path):
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    export(run.path, tmp_path / "run.parquet", lambda message: None)
    expected = parquet.read_table(tmp_path / "run.parquet")
    assert run.to_arrow().equals(expected)
    some = run[5:9].to_arrow()
    assert some.to_pylist() == expected.slice(5, 4).select(some.column_names).to_pylist()
    frame = run.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == expected.column_names
    for name in ("id", "sample", "status", "text", "token_ids"):
        assert frame[name].tolist() == expected[name].to_pylist()
    assert frame["note"].dropna().tolist() == [value for value in expected["note"].to_pylist() if value is not None]


def test_a_table_of_no_rows_has_the_columns(run):
    pytest.importorskip("pandas")
    assert list(run[:0].to_pandas().columns)[:4] == ["id", "sample", "status", "finish_reason"]


def test_rows_of_a_run_that_works_stay_readable_when_their_parts_are_put_together(tmp_path):
    parts = Parts(tmp_path / "run.h5", {"run": 1})
    fill(parts, ROWS, 4)
    with noria.open(tmp_path / "run.h5") as opened:
        assert Compactor(parts, fan_in=4).compact_if_due()
        assert same(opened, ROWS)
        merge(parts, tmp_path / "run.h5", 40, {}, {}, np.array([1 + row % 2 for row in range(40)]))
        assert same(opened, ROWS) and not opened.finished
    with noria.open(tmp_path / "run.h5") as opened:
        assert opened.finished


def test_a_run_that_finishes_while_it_is_opened_is_opened_finished(tmp_path, monkeypatch):
    parts, part_files = Parts(tmp_path / "run.h5", {"run": 1}), sealed.part_files
    fill(parts, ROWS, 4)

    def late(folder):
        monkeypatch.setattr(sealed, "part_files", part_files)
        merge(parts, tmp_path / "run.h5", 40, {}, {}, np.array([1 + row % 2 for row in range(40)]))
        return part_files(folder)

    monkeypatch.setattr(sealed, "part_files", late)
    with noria.open(tmp_path / "run.h5") as opened:
        assert opened.finished and len(opened) == len(ROWS)


def test_a_damaged_part_is_left_out_with_a_warning(tmp_path):
    fill(Parts(tmp_path / "run.h5", {"run": 1}), ROWS, 10)
    part = sorted((tmp_path / "run.h5.parts").glob("part-*"))[1]
    part.write_bytes(part.read_bytes()[:500])
    with pytest.warns(UserWarning, match="part left out"):
        opened = noria.open(tmp_path / "run.h5")
    with opened:
        assert same(opened, ROWS[:10] + ROWS[20:])


def test_what_is_no_output_is_refused(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    for name, words in (("none.h5", "no such file"), ("text.h5", "text file"), (".", "it is a folder")):
        with pytest.raises(noria.InputError, match=words):
            noria.open(tmp_path / name)


def test_what_is_damaged_in_a_row_is_an_input_error(tmp_path):
    output = finish(tmp_path / "run.h5", [replace(make_row(row), text="x" * 5000) for row in range(5)])
    with h5py.File(output) as file:
        reference = file["text"].id.get_offset() + 2 * 16 + 4  # of row 2: where its heap lies
    content = bytearray(output.read_bytes())
    content[reference : reference + 8] = bytes(8)
    output.write_bytes(content)
    with noria.open(output) as opened, pytest.raises(noria.InputError, match="damaged"):
        opened[2]


def test_the_repr_says_what_it_is(run):
    state = "finished" if run.finished else "not finished"
    assert repr(run) == f"<noria.open({str(run.path)!r}): 60 rows, {state}>"


def test_importing_noria_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import noria; print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "h5py", "torch", "mpi4py", "tokenizers", "pandas", "pyarrow"} & set(done.stdout.split())


def test_every_name_of_the_package_is_there_and_typed():
    tree = ast.parse(Path(noria.__file__).read_text())
    typed, _ = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: (node.module, alias.name) for node in typed.body for alias in node.names}
    assert seen == noria._PUBLIC and set(seen) <= set(dir(noria))
    assert all(getattr(noria, name) is not None for name in seen)
    assert Path(noria.__file__).with_name("py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        noria.nothing  # noqa: B018


MANY = """
import pathlib, re, sys, time
import noria.output.opened
taken = []
for _ in range(3):  # a machine that does other work too may be slow once
    began = time.perf_counter()
    run = noria.open(sys.argv[1])
    opened = time.perf_counter()
    id = run[len(run) // 2].id
    taken.append((opened - began, time.perf_counter() - opened))
    run.close()
# not ru_maxrss, which begins at what the process that forked this one had
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(len(run), id, *map(min, zip(*taken)), peak)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_a_million_rows_open_in_a_second_and_200_megabytes(tmp_path):
    count = 1_000_000 if full() else 20_000
    row = make_row(3, num_tokens=8)
    finish_many(tmp_path / "run.h5", row, count)
    done = subprocess.run([sys.executable, "-c", MANY, tmp_path / "run.h5"], capture_output=True, text=True, check=True)
    number, id, opened, first, nbytes = done.stdout.split()
    assert (int(number), id) == (count, row.id)
    assert float(opened) < 1 and float(first) < 0.2 and int(nbytes) < 200e6, done.stdout


def finish_many(path, row, count):
    """An output that holds one row many times."""
    with h5py.File(path, "w") as file:
        write_attrs(file, {"format": "noria-generations", "version": 1, "complete": True, "header": "{}"})
        writer = RowWriter(file, count, count * len(row.token_ids), count * len(row.prompt_token_ids), Scores())
        for _ in range(count // 10_000):
            writer.append([row] * 10_000)
        writer.finish()
