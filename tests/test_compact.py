"""Many small parts into one: the same rows, few files, and a kill at any moment loses nothing and repeats nothing."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import pytest

import noria.desk.desk as desk_module
import noria.output.compact as compact_module
import noria.output.export as export_module
import noria.output.export_rows as export_rows
import small_run
from forks import forked
from noria.__main__ import main
from noria.launch.stopping import Stopping
from noria.output.compact import FAN_IN, Compactor
from noria.output.generations import open_generations
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.sealed import part_files, parts_folder, scan
from output_rows import as_tuple, fill, make_row

HEADER = {"prompts": "ab12", "dtype": "float32"}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


def names(output):
    return [path.name for path in part_files(parts_folder(output))]


def rows_of(output):
    with open_generations(output) as file:
        return [as_tuple(row) for row in file.rows()]


def refuse(message):
    raise AssertionError(message)


def fill_and_compact(parts, rows, fan_in):
    compactor = Compactor(parts, fan_in, report=refuse)
    for row in rows:
        parts.add(row)
        parts.seal()
        compactor.compact_if_due()


@pytest.mark.slow
def test_a_long_job_has_few_parts_that_hold_every_row_once(output):
    rows = [make_row(row) for row in range(70)]
    fill_and_compact(Parts(output, HEADER), rows, 4)
    parts = Parts(output, HEADER, report=refuse)
    assert [part.level for part in parts.parts] == [3, 1, 0, 0] and len(parts.parts[0].row) == 64
    assert len(names(output)) == 4 and parts.num_finished == 70
    assert merge(parts, output, 70, {}).num_repeated == 0
    assert rows_of(output) == [as_tuple(row) for row in rows]


def test_parts_of_a_day_are_few_with_the_fan_in_that_runs_use():
    seals = 24 * 3600 // 10
    assert seals // FAN_IN**2 + 2 * (FAN_IN - 1) < 150


@pytest.mark.slow
def test_parts_of_many_rows_stay_as_they_are(output, monkeypatch):
    monkeypatch.setattr("noria.output.compact.LARGE", 16)
    parts = Parts(output, HEADER)
    fill_and_compact(parts, [make_row(row) for row in range(70)], 4)
    assert [len(part.row) for part in parts.parts] == [16, 16, 16, 16, 4, 1, 1]


def test_too_few_parts_stay_as_they_are(output):
    fill_and_compact(Parts(output, HEADER), [make_row(row) for row in range(3)], 4)
    assert names(output) == [f"part-{number:06}.h5" for number in range(3)]


def test_the_index_after_compaction_is_the_one_a_new_run_reads(output):
    parts = Parts(output, HEADER)
    fill_and_compact(parts, [make_row(row, logprobs=row % 2 == 0) for row in range(10)], 4)
    for ours, read in zip(parts.parts, scan(parts.folder), strict=True):
        assert (ours.path, ours.header, ours.scores, ours.level) == (read.path, read.header, read.scores, read.level)
        for name in ("row", "sample", "status", "num_tokens", "num_prompt_tokens"):
            assert getattr(ours, name).tolist() == getattr(read, name).tolist()


def test_a_row_left_half_way_stays_until_it_is_finished_and_then_goes(output):
    parts = Parts(output, HEADER)
    half = [make_row(1, status="todo", num_tokens=2), make_row(1, status="todo", num_tokens=5)]
    fill_and_compact(parts, [make_row(0), *half, make_row(2)], 4)
    parts = Parts(output, HEADER)
    assert len(parts.parts) == 1 and parts.finished() == {(0, 0), (2, 0)}
    assert {key: len(row.token_ids) for key, row in parts.unfinished().items()} == {(1, 0): 5}
    fill_and_compact(parts, [make_row(1), make_row(3), half[0], make_row(4)], 4)
    parts = Parts(output, HEADER)
    assert parts.finished() == {(row, 0) for row in range(5)} and parts.unfinished() == {}
    assert sum((part.status == 0).sum() for part in parts.parts) == 1, "of the older part alone"


@pytest.mark.slow
def test_which_of_two_versions_of_a_row_stands_does_not_change(output):
    def versions():
        return [
            make_row(0),
            make_row(1, num_tokens=2),
            make_row(1, num_tokens=7),
            make_row(2, status="error"),
            make_row(2),
        ]

    fill(Parts(output, HEADER), versions(), 1)
    plain = merge(Parts(output, HEADER), output, 3, {})
    expected = rows_of(output)
    assert plain.num_repeated == 1 and [row[3] for row in expected] == ["done"] * 3, "a row done at last is no error"
    for fan_in in (2, 3, 4, 5):
        output.unlink()
        parts = Parts(output, HEADER)
        fill_and_compact(parts, versions(), fan_in)
        merge(parts, output, 3, {})
        assert rows_of(output) == expected, fan_in


def test_a_part_sealed_while_others_are_put_together_comes_after_them(output, monkeypatch):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row, num_tokens=3) for row in range(4)], 1)

    def seal():
        parts.add(make_row(2, num_tokens=9))  # must not win against the row 2 that is being copied
        parts.seal()

    assemble = compact_module.assemble

    def assemble_late(*arguments, **keywords):
        thread = threading.Thread(target=seal)
        thread.start()
        thread.join()
        assemble(*arguments, **keywords)

    monkeypatch.setattr(compact_module, "assemble", assemble_late)
    assert Compactor(parts, 4, report=refuse).compact_if_due().name == "part-000004.h5"
    assert names(output) == ["part-000004.h5", "part-000005.h5"]
    assert [len(part.row) for part in parts.parts] == [4, 1]
    merge(Parts(output, HEADER), output, 4, {})
    assert len(rows_of(output)[2][7]) == 3


@pytest.mark.slow
def test_parts_put_together_while_somebody_looks_for_them_were_not_taken_away(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(4)], 1)

    class Looking(list):
        def __getitem__(self, place):
            found = super().__getitem__(place)
            if place == -1 and not thread.ident:
                thread.start()
                thread.join(1.0)  # a second is enough to put four parts together, if nothing holds it back
            return found

    thread = threading.Thread(target=Compactor(parts, 4, report=refuse).compact_if_due)
    parts.parts = Looking(parts.parts)
    assert not parts.taken_away()
    thread.join()
    assert names(output) == ["part-000004.h5"] and not parts.taken_away()
    (parts.folder / "part-000004.h5").unlink()
    assert parts.taken_away()


def test_parts_of_an_earlier_header_are_not_put_together_with_later_ones(output):
    fill(Parts(output, HEADER | {"prompts": "old"}), [make_row(row) for row in range(3)], 1)
    fill_and_compact(Parts(output, HEADER), [make_row(row) for row in range(3, 7)], 4)
    headers = [part.header["prompts"] for part in Parts(output, HEADER).parts]
    assert headers == ["old", "old", "old", "ab12"]


def test_a_damaged_part_is_not_copied_as_if_it_were_right(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(4)], 1)
    path = parts.parts[2].path
    image = bytearray(path.read_bytes())
    image[image.index(b"prompt 2 ")] ^= 1
    path.write_bytes(image)
    told = []
    assert Compactor(parts, 4, report=told.append).compact_if_due() is None
    assert "4 parts stay as they are" in told[0] and path.name in told[0] and len(names(output)) == 4


def test_a_full_disk_leaves_the_parts_as_they_are(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(4)], 1)
    told, limit = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        assert Compactor(parts, 4, report=told.append).compact_if_due() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "part-000004.h5: file too large, " in told[0]
    assert sorted(os.listdir(parts.folder)) == [f"part-{number:06}.h5" for number in range(4)]
    assert Parts(output, HEADER, report=refuse).num_finished == 4


KILLED = """
import os, signal, sys
import noria.output.assemble as assemble_module
import noria.output.compact as compact_module
import noria.output.export as export_module
from noria.output.compact import Compactor
from noria.output.parts import Parts
output, kill_at = sys.argv[1], int(sys.argv[2])
parts, calls = Parts(output, {"prompts": "ab12", "dtype": "float32"}), 0
def killing(function):
    def call(*arguments, **keywords):
        global calls
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*arguments, **keywords)
    return call
for name in ("fsync", "replace", "unlink", "pwrite"):
    setattr(os, name, killing(getattr(os, name)))
for name in ("_write", "checksums", "write_attrs"):
    setattr(assemble_module, name, killing(getattr(assemble_module, name)))
assert Compactor(parts, 6).compact_if_due()
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_row_and_repeats_none(tmp_path):
    rows = [make_row(row) for row in range(12)]
    (tmp_path / "original").mkdir()
    fill(Parts(tmp_path / "original" / "run.h5", HEADER), rows, 2)
    kill_at, code, counts = 0, None, set()
    while code != 0:
        output = tmp_path / f"{kill_at}" / "run.h5"
        shutil.copytree(tmp_path / "original", output.parent)
        command = forked([sys.executable, "-c", KILLED, output, kill_at])
        code = subprocess.run(command, timeout=60).returncode
        assert code in (0, -9)
        counts.add(len(names(output)))
        assert sum(len(part.row) for part in scan(parts_folder(output), refuse)) == 12, "a reader sees each row once"
        parts = Parts(output, HEADER, report=refuse)
        assert len(names(output)) in (1, 6) and not list(parts.folder.glob("*.tmp"))
        merged = merge(parts, output, 12, {})
        assert merged.num_repeated == 0 and rows_of(output) == [as_tuple(row) for row in rows]
        shutil.rmtree(output.parent)
        kill_at += 1
    assert kill_at > 12 and counts >= {1, 3, 6, 7}, counts


def test_an_export_meanwhile_has_every_row_once(output, tmp_path, monkeypatch):
    rows = [make_row(row) for row in range(4)]
    parts = Parts(output, HEADER)
    fill(parts, rows, 1)
    gather, due = export_rows.gather, [True]

    def gather_late(*arguments):
        if due.pop() if due else False:
            assert Compactor(parts, 4, report=refuse).compact_if_due()
        return gather(*arguments)

    monkeypatch.setattr(export_rows, "gather", gather_late)
    assert export_module.export(output, tmp_path / "out.jsonl", lambda message: None) == 4
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row.id for row in rows] and not due


@pytest.mark.slow
def test_a_run_puts_its_parts_together_and_its_rows_are_those_of_one_that_does_not(tmp_path, monkeypatch):
    small_run.write_files(tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {1 + 2 * row}}}' for row, line in enumerate(lines)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    assert main(small_run.command(tmp_path, "plain.h5")) == 0
    made, put_together = [], compact_module._compact
    monkeypatch.setattr(compact_module, "_compact", lambda *one: made.append(put_together(*one).name))
    monkeypatch.setattr(desk_module, "Compactor", lambda parts: Compactor(parts, 3, report=refuse))
    monkeypatch.setattr(Stopping, "nudge", lambda self: self._rows and self._rows.tend())  # a seal a step, however fast
    assert main(small_run.command(tmp_path, "compact.h5", "--seal-seconds", "0")) == 0
    assert len(made) >= 4 and small_run.rows_of(tmp_path / "compact.h5") == small_run.rows_of(tmp_path / "plain.h5")
