import json
import os
import re
import resource
import signal
import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forks import forked
from noria.__main__ import main
from noria.errors import InputError
from noria.output.generations import NewerVersion, open_generations
from noria.output.parts import Parts, part_files, parts_folder, scan, select
from noria.output.sealed import RowSet
from noria.output.segments import read_segments
from noria.output.target import begun_with
from output_rows import as_tuple, fill, make_row

HEADER = {"prompts_hash": "ab12", "dtype": "float32", "sampling": {"temperature": 0.5}}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


def silent(message):
    raise AssertionError(f"nothing should be reported: {message}")


def test_sealed_rows_read_back_as_they_were_added(output):
    rows = [make_row(row, logprobs=row % 2 == 0) for row in range(25)]
    fill(Parts(output, HEADER), rows)
    read = []
    for path in part_files(parts_folder(output)):
        with open_generations(path) as file:
            read += [as_tuple(generation) for generation in file.rows()]
    assert read == [as_tuple(generation) for generation in rows]


def test_a_resumed_run_knows_what_is_finished_and_goes_on_with_new_names(output):
    fill(Parts(output, HEADER), [make_row(row) for row in range(7)], 3)
    parts = Parts(output, HEADER, report=silent)
    assert parts.finished() == {(row, 0) for row in range(7)}
    assert parts.num_finished == 7
    parts.add(make_row(7, status="error"))
    assert parts.num_finished == 7, "a row that waits is not on the disk"
    assert parts.seal().name == "part-000003.h5"
    assert parts.num_finished == 8 == Parts(output, HEADER).num_finished
    assert [p.name for p in part_files(parts.folder)] == [f"part-{number:06}.h5" for number in range(4)]


def test_the_index_of_a_part_just_sealed_is_the_one_read_from_its_file(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row, status="todo" if row == 3 else "done", logprobs=row == 2) for row in range(6)], 3)
    for ours, read in zip(parts.parts, scan(parts.folder), strict=True):
        assert (ours.path, ours.header, ours.scores) == (read.path, read.header, read.scores)
        for name in ("row", "sample", "status", "num_tokens", "num_prompt_tokens"):
            assert getattr(ours, name).tolist() == getattr(read, name).tolist()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_left_out_of_the_parts_by_name_and_is_not_waited_for(output, make):
    fill(Parts(output, HEADER), [make_row(row) for row in range(4)], 2)
    path = parts_folder(output) / "part-000000.h5"
    path.rename(path.with_name("part-000007.h5"))
    make(path)
    make(parts_folder(output) / "segment-000007.json")
    said = []
    assert sum(len(part.row) for part in scan(parts_folder(output), said.append)) == 4
    assert said == [f"part left out, its rows are generated again: {path} is not a regular file"]
    assert read_segments(parts_folder(output)) == [] and begun_with(output) == HEADER
    assert main(["inspect", str(output)]) == 0


def test_sealing_nothing_makes_no_file(output):
    parts = Parts(output, HEADER)
    assert parts.seal() is None
    assert list(parts.folder.iterdir()) == []


def test_seal_if_due_waits_for_its_time(output):
    now = [100.0]
    parts = Parts(output, HEADER, clock=lambda: now[0])
    now[0] = 120
    assert parts.seal_if_due(10) is None, "no row waits"
    parts.add(make_row(0))
    assert parts.seal_if_due(10) is not None
    parts.add(make_row(1))
    now[0] = 129.9
    assert parts.seal_if_due(10) is None
    now[0] = 130
    assert parts.seal_if_due(10) is not None


def test_many_rows_are_sealed_before_their_time(output, monkeypatch):
    monkeypatch.setattr("noria.output.parts.MAX_PENDING", 3)
    parts = Parts(output, HEADER, clock=lambda: 100.0)
    for row in range(3):
        assert parts.seal_if_due(10) is None
        parts.add(make_row(row))
    assert parts.seal_if_due(10) is not None
    assert parts.pending == []


def test_of_a_row_in_two_parts_the_first_that_was_finished_wins(output):
    parts = Parts(output, HEADER)
    first, second = make_row(1, num_tokens=2), make_row(1, num_tokens=5)
    fill(parts, [make_row(0), make_row(1, status="todo"), first, second, make_row(0)], 1)
    selection = select(parts.parts)
    assert selection.row.tolist() == [0, 1]
    assert selection.part.tolist() == [0, 2]
    assert selection.num_tokens[1] == 2
    assert (selection.num_repeated, selection.num_todo) == (2, 0)


def test_samples_of_one_row_are_rows_of_their_own(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(1, 1), make_row(0, 0), make_row(1, 0), make_row(0, 1)], 2)
    selection = select(parts.parts)
    assert list(zip(selection.row.tolist(), selection.sample.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert selection.num_repeated == 0


def test_a_row_left_half_way_comes_back_until_it_is_finished(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(0), make_row(1, status="todo", num_tokens=2), make_row(1, status="todo", num_tokens=5)], 1)
    parts = Parts(output, HEADER)
    assert parts.finished() == {(0, 0)}
    assert {key: len(row.token_ids) for key, row in parts.unfinished().items()} == {(1, 0): 5}
    fill(parts, [make_row(1)])
    assert Parts(output, HEADER).unfinished() == {}


def test_a_damaged_part_is_reported_and_its_rows_count_as_not_generated(output):
    fill(Parts(output, HEADER), [make_row(row) for row in range(40)], 10)
    cut, flipped, empty = part_files(parts_folder(output))[:3]
    cut.write_bytes(cut.read_bytes()[:-50])
    image = bytearray(flipped.read_bytes())
    place = image.index("prompt 17 é".encode())
    image[place] ^= 1
    flipped.write_bytes(image)
    empty.write_bytes(b"")
    told = []
    parts = Parts(output, HEADER, report=told.append)
    assert parts.finished() == {(row, 0) for row in range(30, 40)}
    assert len(told) == 3
    assert all(path.name in line for path, line in zip((cut, flipped, empty), told, strict=True))
    assert "its checksum" in told[1] and "an empty file" in told[2]
    parts.add(make_row(0))
    assert parts.seal().name == "part-000004.h5", "a damaged part keeps its name"


@pytest.mark.parametrize("column", ["offsets", "prompt_offsets", "status", "tokens", "extra"])
def test_a_part_at_odds_with_itself_is_left_out(output, column):
    fill(Parts(output, HEADER), [make_row(row) for row in range(5)])
    (path,) = part_files(parts_folder(output))
    with h5py.File(path, "r+") as file:
        if column in ("offsets", "prompt_offsets"):
            file[column][2] = 10**9
        elif column == "status":
            file[column][0] = np.uint8(77)
        else:
            del file[column]
    with pytest.raises(InputError, match=column):
        open_generations(path).close()
    told = []
    assert Parts(output, HEADER, report=told.append).num_finished == 0
    assert column in told[0] and "damaged" in told[0]


def test_a_dataset_that_lies_in_another_file_is_not_followed(output, tmp_path):
    fill(Parts(output, HEADER), [make_row(row) for row in range(5)])
    (path,) = part_files(parts_folder(output))
    with h5py.File(path, "r+") as file:
        file.copy("text", file, "copy")
        with h5py.File(tmp_path / "other.h5", "w") as other:
            file.copy("text", other)
        del file["text"], file["copy"]
        file["text"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "text")
    with pytest.raises(InputError, match="text is missing"):
        open_generations(path)


def test_parts_of_a_newer_version_stop_the_run_instead_of_being_left_out(output):
    fill(Parts(output, HEADER), [make_row(0)])
    with h5py.File(part_files(parts_folder(output))[0], "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(NewerVersion, match="version 2, this Noria reads 1"):
        Parts(output, HEADER)


def test_temporary_files_of_a_killed_run_are_removed_and_strangers_left_alone(output):
    parts = Parts(output, HEADER)
    for name in ("part-000000.h5.tmp", ".part-000000.h5.noria.another-host-f00.4711.0123abcd.tmp"):
        (parts.folder / name).write_bytes(b"half")
    (parts.folder / "notes.txt").write_text("mine")
    parts = Parts(output, HEADER, report=silent)
    assert [path.name for path in parts.folder.iterdir()] == ["notes.txt"]


def test_differences_name_the_keys_that_do_not_agree(output):
    fill(Parts(output, HEADER | {"only": 1}), [make_row(0)])
    parts = Parts(output, HEADER | {"dtype": "bfloat16"})
    lines = parts.differences()
    assert len(lines) == 2
    assert lines[0] == 'dtype: "float32" in part-000000.h5, "bfloat16" now'
    assert lines[1].startswith("only: 1 in")
    assert Parts(output, HEADER | {"only": 1}).differences() == []


@pytest.mark.parametrize("text", ["a\0b", "\ud800x", "x\udfff"])
def test_what_hdf5_cannot_hold_becomes_the_replacement_character(output, text):
    generation = make_row(0)
    generation.text = generation.id = generation.prompt = text
    parts = Parts(output, HEADER)
    parts.add(generation)
    with open_generations(parts.seal()) as file:
        (read,) = file.rows()
    assert read.text == read.id == read.prompt == "".join("\ufffd" if c in "\0\ud800\udfff" else c for c in text)


def test_a_full_disk_leaves_the_rows_waiting_and_a_later_seal_writes_them(output):
    parts = Parts(output, HEADER)
    parts.add(make_row(0))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(
            OSError,
            match="part-000000.h5: file too large, [\\d,]+ more bytes were to be written, a file of this process may have 1,000: ",
        ):
            parts.seal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(parts.folder.iterdir()) == [] and parts.num_finished == 0
    parts.seal()
    assert Parts(output, HEADER).num_finished == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_seal_that_fails_before_its_rename_leaves_no_part(output, monkeypatch, call):
    parts = Parts(output, HEADER)
    parts.add(make_row(0))

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="part-000000.h5: input/output error"):
            parts.seal()
    assert part_files(parts.folder) == []
    parts.seal()
    assert Parts(output, HEADER, report=silent).finished() == {(0, 0)}


def test_a_part_is_on_the_disk_before_it_has_its_name(output, monkeypatch):
    parts = Parts(output, HEADER)
    parts.add(make_row(0))
    calls, fsync, replace = [], os.fsync, os.replace
    name_of = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.readlink(name_of(handle))), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    path = parts.seal()
    written, *others = calls
    assert re.fullmatch(rf"{parts.folder}/\.{path.name}\.noria\.\S+\.{os.getpid()}\.\w+\.tmp", written)
    assert others == ["replace", str(parts.folder)]


ENDLESS = """
import sys
from noria.output.parts import Parts
from output_rows import make_row
parts = Parts(sys.argv[1], {"run": 1})
row = parts.num_finished
while True:
    for _ in range(5):
        parts.add(make_row(row)); row += 1
    parts.seal()
    print(row, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_loses_no_row_that_it_had_sealed(output):
    for kill_after in (3, 20, 41):
        process = subprocess.Popen(
            forked([sys.executable, "-c", ENDLESS, output]),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(kill_after):
            sealed = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        told = []
        parts = Parts(output, {"run": 1}, report=told.append)
        finished = parts.finished()
        assert told == []
        last = int(rest[-1]) if rest else sealed
        assert {(row, 0) for row in range(last)} <= finished == {(row, 0) for row in range(len(finished))}
        assert select(parts.parts).num_repeated == 0


def test_header_of_a_part_is_plain_json_for_other_programs(output):
    parts = Parts(output, HEADER)
    parts.add(make_row(0))
    with h5py.File(parts.seal()) as file:
        assert json.loads(file.attrs["header"]) == HEADER
        assert file.attrs["format"] == "noria-generations" and not file.attrs["complete"]


def test_finished_rows_take_eight_bytes_each():
    number, samples = 100_000, 3
    rows = np.repeat(np.random.default_rng(1).permutation(number), samples)
    tracemalloc.start()
    found = RowSet(rows, np.tile(np.arange(samples), number))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * number * samples, "a set of tuples has 137 a row"
    assert len(found) == number * samples and (0, 0) in found and (number - 1, 2) in found
    assert (0, 3) not in found and (number, 0) not in found and (5, -1) not in found


@given(st.sets(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=60))
def test_a_set_of_rows_is_what_a_set_of_pairs_is(pairs):
    rows = np.array(sorted(pairs, reverse=True), np.int64).reshape(-1, 2)
    found = RowSet(rows[:, 0], rows[:, 1])
    assert found == pairs and sorted(found) == sorted(pairs) and found - {(0, 0)} == pairs - {(0, 0)}
    assert [(row, sample) in found for row in range(41) for sample in range(5)] == [
        (row, sample) in pairs for row in range(41) for sample in range(5)
    ]


def test_what_a_resume_knows_of_finished_rows_is_no_python_object_a_row(output):
    parts = Parts(output, HEADER, report=silent)
    fill(parts, [make_row(row) for row in range(2000)])
    tracemalloc.start()
    found = [parts.finished(), parts.done()]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(map(len, found)) == [2000, 2000] and held < 2 * 2000 * 20
