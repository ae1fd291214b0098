"""noria merge: what it refuses, naming each shard, and that a kill or a full disk leaves everything as it was."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest

from forks import forked
from noria.__main__ import main
from noria.output import assemble as assemble_module
from noria.output.agreement import ANEW
from noria.output.generations import open_generations
from noria.output.merge import merge
from noria.output.merge_shards import merge_shards
from noria.output.parts import Parts
from noria.tools import lock
from noria.tools.provenance import provenance
from output_rows import as_tuple, fill, make_row

HEADER = {"prompts": "ab12", "checkpoint": "cd34", "dtype": "float32", "sampling.temperature": 0.5, "sampling.seed": 7}
NUM_ROWS = 11


def shard(path, i, n=3, num_rows=NUM_ROWS, **header):
    """The finished output of a shard, its rows sealed out of order."""
    wanted = range(i - 1, num_rows, n)
    parts = Parts(path, HEADER | {"shard": f"{i}/{n}"} | header)
    told = {"job_ids": {"SLURM_JOB_ID": f"{i}"}, "hosts": [f"h{i}"], "ranks": 2, "of": len(wanted)}
    parts.begin(told)
    fill(parts, [make_row(row, logprobs=i == 2) for row in wanted][::-1], 2)
    attrs = provenance(
        run_file=f"shard = {i}",
        checkpoint_hash="cd34",
        prompts_hash="ab12",
        launcher="slurm",
        devices=["a", "b"],
        start="s",
    )
    segments = [told | {"start": "s", "end": "e", "ended": "finished", "rows": len(wanted), "errors": 0, "tokens": 0}]
    attrs |= {"prompt_rows": num_rows, "seed": 7, "segments": segments, "restarts": i - 1, "hosts": [f"h{i}"]}
    merge(parts, path, wanted, attrs, {"busy": [float(i), 0.5], "peak": [i, i]})
    return path


@pytest.fixture
def shards(tmp_path):
    return [shard(tmp_path / f"s{i}.h5", i) for i in (1, 2, 3)]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.h5"


def rows_of(path):
    with open_generations(path) as file:
        return [as_tuple(row) for row in file.rows()]


def refused(capsys, output, *paths):
    """The line with which `noria merge` refuses these shards, and leaves everything as it was."""
    before = sorted(os.listdir(output.parent))
    capsys.readouterr()
    assert main(["merge", str(output), *map(str, paths)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("noria: ") and printed.err.count("\n") == 1, printed.err
    assert sorted(os.listdir(output.parent)) == before
    return printed.err


def test_the_merge_has_all_rows_in_order_and_the_shards_stay(shards, output, capsys):
    before = [path.read_bytes() for path in shards]
    assert main(["merge", str(output), *map(str, (shards[2], shards[0], shards[1]))]) == 0
    assert capsys.readouterr().err == f"{output}: 11 rows of 3 shards\n"
    expected = [as_tuple(make_row(row, logprobs=row % 3 == 1)) for row in range(NUM_ROWS)]
    assert rows_of(output) == expected
    assert [path.read_bytes() for path in shards] == before
    assert sorted(os.listdir(output.parent)) == ["out.h5", "s1.h5", "s2.h5", "s3.h5"]


def test_its_attributes_tell_of_every_shard(shards, output):
    assert merge_shards(shards, output, ["noria", "merge"]) == NUM_ROWS
    with h5py.File(output) as file:
        attrs = {name: value.item() if hasattr(value, "item") else value for name, value in file.attrs.items()}
        timing = {name: item[:].tolist() for name, item in file["timing"].items()}
    assert json.loads(attrs["header"]) == HEADER | {"shard": "1/1"} and attrs["complete"]
    told = json.loads(attrs["shards"])
    assert [(one["shard"], one["file"], one["rows"], one["restarts"]) for one in told] == [
        ("1/3", "s1.h5", 4, 0),
        ("2/3", "s2.h5", 4, 1),
        ("3/3", "s3.h5", 3, 2),
    ]
    assert (attrs["prompt_rows"], attrs["ranks"], attrs["restarts"], attrs["seed"]) == (11, 6, 3, 7)
    assert json.loads(attrs["hosts"]) == ["h1", "h2", "h3"] and json.loads(attrs["devices"]) == ["a", "b"] * 3
    segments = json.loads(attrs["segments"])
    assert [(one["shard"], one["job_ids"]["SLURM_JOB_ID"]) for one in segments] == [
        ("1/3", "1"),
        ("2/3", "2"),
        ("3/3", "3"),
    ]
    assert attrs["run_file"] == "shard = 1" and json.loads(attrs["argv"]) == ["noria", "merge"]
    assert timing == {"shard": [1, 1, 2, 2, 3, 3], "busy": [1.0, 0.5, 2.0, 0.5, 3.0, 0.5], "peak": [1, 1, 2, 2, 3, 3]}


def test_a_second_merge_of_the_same_shards_says_that_it_is_done(shards, output, capsys):
    for words in ("11 rows of 3 shards", "is already the merge of these shards"):
        assert main(["merge", str(output), *map(str, shards)]) == 0
        assert words in capsys.readouterr().err
    os.unlink(shards[1])
    shard(shards[1], 2)
    assert main(["merge", str(output), *map(str, shards)]) == 0, "the same rows again are the same shard"


def test_a_whole_run_is_no_shard_beside_others_but_all_shards_of_an_array_of_one(tmp_path, shards, output, capsys):
    whole = tmp_path / "whole.h5"
    shard(whole, 1, 1)
    assert "whole.h5 holds a whole run, not a shard of one" in refused(capsys, output, shards[0], whole)
    assert main(["merge", str(output), str(whole)]) == 0
    with open_generations(output) as merged, open_generations(whole) as source:
        assert [as_tuple(row) for row in merged.rows()] == [as_tuple(row) for row in source.rows()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([0, 2], "shard missing: 2/3: give every shard, finished, of 3"),
        ([1], "shards missing: 1/3, 3/3: give every shard"),
        ([0, 1, 1, 2], "shard 2/3 is given twice: "),
        ([0, 0, 0], "shard 1/3 is given 3 times: "),
    ],
)
def test_a_missing_shard_and_one_given_twice_are_named(shards, output, capsys, given, said):
    assert said in refused(capsys, output, *(shards[place] for place in given))


def test_a_copy_of_a_shard_under_another_name_is_given_twice(shards, output, capsys, tmp_path):
    shutil.copy(shards[0], tmp_path / "copy.h5")
    line = refused(capsys, output, *shards[:2], tmp_path / "copy.h5")
    assert f"shard 1/3 is given twice: {shards[0]}, {tmp_path}/copy.h5; shard missing: 3/3" in line


def test_many_missing_shards_are_told_in_one_line(tmp_path, output, capsys):
    shard(tmp_path / "s.h5", 1, 2000)
    line = refused(capsys, output, tmp_path / "s.h5")
    assert "shards missing: 2/2000, 3/2000, 4/2000, 5/2000, 6/2000 and 1994 more" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompts", "other"),
        ("checkpoint", "other"),
        ("dtype", "float64"),
        ("sampling.temperature", 0.25),
        ("sampling.seed", 8),
    ],
)
def test_shards_of_different_runs_are_refused_by_what_differs_and_where(shards, output, capsys, name, value):
    os.unlink(shards[1])
    shard(shards[1], 2, **{name: value})
    line = refused(capsys, output, *shards)
    values = f"{json.dumps(HEADER[name])} in {shards[0]}, {json.dumps(value)} in {shards[1]}"
    assert f"the shards are of different runs: {name} is {values}" in line and "s3.h5" not in line


def test_a_key_that_only_one_shard_has_is_a_difference(shards, output, capsys):
    os.unlink(shards[2])
    shard(shards[2], 3, **{"sampling.new_key": 1})
    assert "sampling.new_key is null in" in refused(capsys, output, *shards)


def test_shards_of_different_counts_are_refused(shards, output, capsys, tmp_path):
    shard(tmp_path / "t.h5", 2, 4)
    line = refused(capsys, output, *shards, tmp_path / "t.h5")
    assert f"{shards[0]} is shard 1/3 and {tmp_path}/t.h5 shard 2/4: all must have one n" in line


def test_an_unfinished_shard_is_named_with_what_it_has_so_far(shards, output, capsys):
    os.unlink(shards[1])
    parts = Parts(shards[1], HEADER | {"shard": "2/3"})
    parts.begin({"hosts": ["h"], "ranks": 1, "of": 4})
    fill(parts, [make_row(1), make_row(4)])
    line = refused(capsys, output, *shards)
    assert f"shard {shards[1]} is not finished (2 of 4 rows): start its job again" in line
    assert "is a part of an unfinished output" in refused(capsys, output, shards[0], parts.parts[0].path, shards[2])


def test_several_bad_files_are_named_together(shards, output, capsys, tmp_path):
    (tmp_path / "notes.h5").write_text("my notes")
    line = refused(capsys, output, shards[0], tmp_path / "notes.h5", tmp_path / "nowhere.h5")
    assert "notes.h5 is not a Noria output: it is a text file" in line and "nowhere.h5: there is no such file" in line


@pytest.mark.parametrize("column", ["tokens", "text", "row"])
def test_a_shard_whose_bytes_changed_is_refused(shards, output, capsys, column):
    with h5py.File(shards[1], "r+") as file:
        file[column][1] = b"forged" if column == "text" else file[column][1] + 3
    assert f"s2.h5 is damaged: {column} do not agree with their checksums" in refused(capsys, output, *shards)


def test_a_shard_with_the_rows_of_another_is_refused(shards, output, capsys):
    with h5py.File(shards[1], "r+") as file:
        file.attrs["header"] = json.dumps(json.loads(file.attrs["header"]) | {"shard": "3/3"})
    line = refused(capsys, output, shards[0], shards[1], shard(shards[2].with_name("t.h5"), 2))
    assert "s2.h5 does not hold the rows of shard 3/3 of 11 prompts" in line


def test_shards_that_saw_different_numbers_of_prompts_are_refused(shards, output, capsys):
    os.unlink(shards[2])
    shard(shards[2], 3, num_rows=NUM_ROWS + 3)
    line = refused(capsys, output, *shards)
    for words in ("different numbers of prompts (", "s1.h5 11, ", "s3.h5 14): run all of them with the same limit"):
        assert words in line


def test_what_is_there_already_is_left_alone(shards, output, capsys, tmp_path):
    output.write_text("my notes")
    assert "out.h5 is not a Noria output" in refused(capsys, output, *shards)
    shutil.copy(shards[0], tmp_path / "old.h5")
    assert "old.h5 exists and is not the merge of these shards" in refused(capsys, tmp_path / "old.h5", *shards)
    assert "is the output of this merge and one of its shards" in refused(capsys, shards[0], *shards)
    fill(Parts(tmp_path / "run.h5", HEADER), [make_row(0)])
    assert "run.h5 is the output of a run that is not finished" in refused(capsys, tmp_path / "run.h5", *shards)


def test_a_folder_that_is_not_there_is_named(shards, tmp_path, capsys):
    assert main(["merge", str(tmp_path / "no" / "out.h5"), *map(str, shards)]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_merge_under_way_is_not_disturbed_by_another(shards, output, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    script = "import sys\nfrom noria.tools.lock import OutputLock\n" + (
        "lock = OutputLock(sys.argv[1], {'job': '17', 'host': 'n3', 'process': 1, 'start': 's'}, print)\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    command = forked([sys.executable, "-c", script, output])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["merge", str(output), *map(str, shards)]) == 2
        assert "is being written by job 17 on n3" in capsys.readouterr().err
        other.stdin.close()
    assert main(["merge", str(output), *map(str, shards)]) == 0


def test_a_chat_template_that_told_different_dates_is_reported(shards, output, capsys):
    told = []
    for number, date in enumerate(("2026-11-23T10:00:00", "2026-11-24T00:00:01", "2026-11-23T23:59:59")):
        os.unlink(shards[number])
        shard(shards[number], number + 1, **{"chat.date": date})
    assert merge_shards(shards, output, [], told.append) == NUM_ROWS
    assert "the shards began on different days: 2026-11-23 in 1/3, 2026-11-24 in 2/3" in told[0]


def test_a_full_disk_is_an_error_and_leaves_nothing(shards, output, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"out\.h5: file too large, [\d,]+ more bytes .* may have 4,000: the shards are unchanged: make room",
        ):
            merge_shards(shards, output, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(os.listdir(output.parent)) == ["s1.h5", "s2.h5", "s3.h5"]


KILLED = """
import os, signal, sys
from pathlib import Path
import noria.output.assemble as assemble_module
from noria.output.merge_shards import merge_shards
calls = 0
def killing(function):
    def call(*arguments, **keywords):
        global calls
        if calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*arguments, **keywords)
    return call
for name in ("fsync", "replace"):
    setattr(os, name, killing(getattr(os, name)))
for name in ("_write", "checksums", "write_attrs", "gather"):
    setattr(assemble_module, name, killing(getattr(assemble_module, name)))
merge_shards([Path(path) for path in sys.argv[3:]], Path(sys.argv[2]), [])
"""


@pytest.mark.slow
def test_a_merge_killed_anywhere_is_done_by_the_next_one(shards, tmp_path):
    kill_at, code, left = 0, None, set()
    while code != 0:
        output = tmp_path / f"{kill_at}" / "out.h5"
        output.parent.mkdir()
        command = forked([sys.executable, "-c", KILLED, kill_at, output, *shards])
        code = subprocess.run(command, timeout=60).returncode
        assert code in (0, -signal.SIGKILL)
        left.add(tuple(name if name == "out.h5" else "a temporary file" for name in os.listdir(output.parent)))
        merge_shards(shards, output, [])
        assert os.listdir(output.parent) == ["out.h5"]
        assert [row[0] for row in rows_of(output)] == list(range(NUM_ROWS))
        kill_at += 1
    assert kill_at > 6 and left == {("a temporary file",), ("out.h5",)}


def test_more_shards_than_files_may_be_open_merge(tmp_path, output, monkeypatch):
    paths = [shard(tmp_path / f"s{i}.h5", i, 5) for i in range(1, 6)]
    monkeypatch.setattr("noria.output.merge_shards._MAX_OPEN", 3)
    began = time.monotonic()
    assert merge_shards(paths, output, []) == NUM_ROWS and time.monotonic() - began < 20
    assert [row[0] for row in rows_of(output)] == list(range(NUM_ROWS))


def test_texts_that_an_earlier_version_decoded_are_told_beside_those_decoded_anew(shards, output, capsys):
    with h5py.File(shards[1], "r+") as file:
        file.attrs["texts"] = ANEW
    capsys.readouterr()
    assert main(["merge", str(output), *map(str, shards)]) == 0
    assert "texts of shard 1/3 were decoded by an earlier version" in capsys.readouterr().err


def test_what_a_shard_says_of_itself_is_left_out_where_it_is_nested_without_end(shards, output):
    with h5py.File(shards[1], "r+") as file:
        file.attrs["hosts"] = "[" * 10**5
    assert merge_shards(shards, output, []) == NUM_ROWS
    with open_generations(output) as file:
        assert json.loads(file.attrs["hosts"]) == ["h1", "h3"]


def test_a_shard_that_changes_while_it_is_merged_is_named_and_nothing_is_written(shards, output, capsys, monkeypatch):
    def changing(function):
        def call(*arguments):
            shutil.copy(shards[0], shards[1])
            return function(*arguments)

        return call

    for name in ("gather", "checksums"):
        with monkeypatch.context() as patched:
            patched.setattr(f"noria.output.assemble.{name}", changing(getattr(assemble_module, name)))
            assert "s2.h5 changed while it was merged: nothing is written" in refused(capsys, output, *shards)
        os.unlink(shards[1])
        shard(shards[1], 2)
    assert main(["merge", str(output), *map(str, shards)]) == 0
