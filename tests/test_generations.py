"""The finished output: its schema as others see it, the merge, and what probe_output says of what lies there."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc

import h5py
import numpy as np
import pytest

import noria.output.assemble as assemble_module
import noria.output.generations as generations_module
from forks import forked
from noria.errors import InputError
from noria.output.generations import blocks, open_generations
from noria.output.merge import MissingRows, merge
from noria.output.parts import Parts, merged_folder, parts_folder
from noria.output.summary import summary_of
from noria.output.target import probe_output
from noria.tools.provenance import provenance
from output_rows import as_tuple, fill, make_row

HEADER = {"prompts_hash": "ab12", "dtype": "float32"}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


def shuffled(rows, seed=0):
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]


def finished_output(output, num_rows=12, logprobs=False, attrs=None):
    rows = [make_row(row, status="error" if row % 5 == 4 else "done", logprobs=logprobs) for row in range(num_rows)]
    parts = Parts(output, HEADER)
    fill(parts, shuffled(rows), 5)
    merge(parts, output, num_rows, attrs or {}, {"busy_seconds": [1.0, 2.0]})
    return rows


READ_WITH_H5PY_ALONE = """
import json, sys, h5py
f = h5py.File(sys.argv[1])
names = lambda d: {v: k for k, v in h5py.check_enum_dtype(d.dtype).items()}
status, reason = names(f["status"]), names(f["finish_reason"])
offsets, prompts = f["offsets"][:], f["prompt_offsets"][:]
rows = []
for r in range(len(f["id"])):
    part = slice(offsets[r], offsets[r + 1])
    rows.append([int(f["row"][r]), int(f["sample"][r]), f["id"].asstr()[r], status[f["status"][r]],
        reason[f["finish_reason"][r]], f["prompt"].asstr()[r], f["text"].asstr()[r], f["tokens"][part].tolist(),
        f["prompt_tokens"][prompts[r]:prompts[r + 1]].tolist(), f["error"].asstr()[r], f["extra"].asstr()[r],
        f["logprobs"][part].tolist() or None])
types = {name: str(f[name].dtype) for name in ("offsets", "prompt_offsets", "tokens", "row", "logprobs")}
assert not any(name.split(".")[0] == "noria" for name in sys.modules)
attrs = {k: v.item() if hasattr(v, "item") else v for k, v in f.attrs.items()}
print(json.dumps({"rows": rows, "types": types, "attrs": attrs, "timing": f["timing/busy_seconds"][:].tolist(),
    "enums": [list(status.items()), list(reason.items())]}))
"""


def test_h5py_alone_reads_everything_in_an_output(output):
    rows = finished_output(output, logprobs=True, attrs={"run_file": 'model = "a.h5"\n', "ranks": 2})
    command = [sys.executable, "-I", "-c", READ_WITH_H5PY_ALONE, str(output)]
    read = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert [tuple(row) for row in read["rows"]] == [as_tuple(row) for row in rows]
    types = {"offsets": "int64", "prompt_offsets": "int64", "tokens": "int32", "row": "int64", "logprobs": "float32"}
    assert read["types"] == types
    statuses, reasons = (dict(pairs) for pairs in read["enums"])
    assert statuses == {0: "todo", 1: "done", 2: "error"}
    assert reasons == {0: "none", 1: "stop", 2: "length", 3: "error"}
    assert len(json.loads(read["attrs"].pop("checksums"))) == 14
    assert read["attrs"] == {
        "format": "noria-generations",
        "version": 1,
        "complete": True,
        "header": json.dumps(HEADER),
        "repeated_rows": 0,
        "run_file": 'model = "a.h5"\n',
        "ranks": 2,
    }
    assert read["timing"] == [1.0, 2.0]


def test_merged_rows_are_those_added_in_order_whatever_the_order_of_the_parts(output):
    rows = finished_output(output, 100)
    with open_generations(output) as file:
        assert [as_tuple(row) for row in file.rows()] == [as_tuple(row) for row in rows]
        assert file.complete
    assert os.listdir(output.parent) == ["run.h5"]


def test_the_bytes_of_an_output_do_not_depend_on_how_its_rows_were_parted(tmp_path):
    rows = [make_row(row) for row in range(60)]
    images = []
    for size, seed in ((60, 0), (7, 1)):
        output = tmp_path / f"{size}" / "run.h5"
        output.parent.mkdir()
        parts = Parts(output, HEADER)
        fill(parts, shuffled(rows, seed), size)
        merge(parts, output, 60, {"start": "now"}, {})
        images.append(output.read_bytes())
    assert images[0] == images[1]


@pytest.mark.slow
def test_small_blocks_give_the_same_output(tmp_path, monkeypatch):
    finished_output(tmp_path / "one.h5", 40, logprobs=True)
    monkeypatch.setattr(generations_module, "BLOCK_TOKENS", 7)
    monkeypatch.setattr(generations_module, "BLOCK_ROWS", 3)
    rows = finished_output(tmp_path / "two.h5", 40, logprobs=True)
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(tmp_path / "two.h5") as two:
        sums = [json.loads(file.attrs["checksums"]) for file in (one, two)]
    assert sums[0] == sums[1] and len(sums[0]) == 14
    with open_generations(tmp_path / "two.h5") as file:
        assert [as_tuple(row) for row in file.rows()] == [as_tuple(row) for row in rows]


def test_blocks_hold_all_rows_once_and_no_more_tokens_than_they_may(monkeypatch):
    monkeypatch.setattr(generations_module, "BLOCK_TOKENS", 10)
    monkeypatch.setattr(generations_module, "BLOCK_ROWS", 4)
    lengths = np.array([0, 3, 30, 0, 0, 0, 0, 0, 5, 5, 1, 40])
    found = list(blocks(lengths))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(len(lengths)))
    assert all(stop - start == 1 or (lengths[start:stop].sum() <= 10 and stop - start <= 4) for start, stop in found)
    assert list(blocks(np.array([], int))) == []


def test_an_output_without_rows_is_an_output(output):
    parts = Parts(output, HEADER)
    assert merge(parts, output, 0, {}, {}).num_rows == 0
    with open_generations(output) as file:
        assert list(file.rows()) == []
    assert probe_output(output) == "finished"


def test_rows_without_tokens_prompt_or_text_are_kept(output):
    parts = Parts(output, HEADER)
    row = make_row(0, status="error", num_tokens=0)
    row.prompt = row.text = row.id = ""
    fill(parts, [row])
    merged = merge(parts, output, 1, {}, {})
    assert (merged.num_rows, merged.num_errors, merged.num_tokens) == (1, 1, 0)
    with open_generations(output) as file:
        assert [as_tuple(one) for one in file.rows()] == [as_tuple(row)]


def test_merge_seals_what_still_waits(output):
    parts = Parts(output, HEADER)
    parts.add(make_row(0))
    assert merge(parts, output, 1, {}, {}).num_rows == 1


def test_samples_of_a_prompt_stand_side_by_side(output):
    parts = Parts(output, HEADER)
    fill(parts, shuffled([make_row(row, sample) for row in range(5) for sample in range(3)]), 4)
    assert merge(parts, output, 5, {}, {}, samples=3).num_rows == 15
    with h5py.File(output) as file:
        assert list(zip(file["row"], file["sample"], strict=True)) == [(row, s) for row in range(5) for s in range(3)]


def test_logprobs_keep_their_precision_and_rows_without_them_have_none(output):
    parts = Parts(output, HEADER)
    rows = [make_row(0, num_tokens=3), make_row(1, num_tokens=2), make_row(2, num_tokens=2)]
    rows[0].logprobs = np.array([-0.1, -1 / 3, -2.5], np.float64)
    rows[1].logprobs = np.array([-0.25, -0.5], np.float32)
    fill(parts, rows, 1)
    merge(parts, output, 3, {}, {})
    with open_generations(output) as file:
        read = list(file.rows())
    assert read[0].logprobs.tolist() == [-0.1, -1 / 3, -2.5]
    assert read[1].logprobs.tolist() == [-0.25, -0.5]
    assert read[2].logprobs is None


def test_a_row_that_two_parts_have_is_counted_and_written_once(output):
    parts = Parts(output, HEADER)
    first, second = make_row(1, num_tokens=2), make_row(1, num_tokens=7)
    fill(parts, [make_row(0), make_row(1, status="todo", num_tokens=1), first, second], 1)
    merged = merge(parts, output, 2, {}, {})
    assert (merged.num_rows, merged.num_repeated) == (2, 1)
    with open_generations(output) as file:
        assert [as_tuple(row) for row in file.rows()] == [as_tuple(make_row(0)), as_tuple(first)]
        assert file.attrs["repeated_rows"] == 1


def test_missing_rows_are_named_and_the_parts_stay(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(20) if row not in (3, 11)] + [make_row(11, status="todo")])
    with pytest.raises(MissingRows, match="2 rows of 20 not finished: 3, 11: the parts are kept"):
        merge(parts, output, 20, {}, {})
    assert not output.exists() and Parts(output, HEADER).num_finished == 18
    with pytest.raises(MissingRows, match=r"982 rows of 1,000 not finished: 3, 11, 20, 21, .*, \.\.\."):
        merge(parts, output, 1000, {}, {})
    fill(parts, [make_row(3), make_row(11)])
    assert merge(parts, output, 20, {}, {}).num_rows == 20


def test_rows_that_are_not_of_this_run_are_refused(output):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in (0, 1, 7)])
    with pytest.raises(MissingRows, match="1 row of the parts lie outside the 2 of this run: 7"):
        merge(parts, output, 2, {}, {})


def test_a_file_that_does_not_read_back_as_written_gets_no_name(output, monkeypatch):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(9)])

    def damage(path):
        with h5py.File(path, "r+") as file:
            file["tokens"][3] += 1

    monkeypatch.setattr(assemble_module, "fsync", damage)
    with pytest.raises(OSError, match=r"does not read back as it was written \(tokens\): the parts are kept"):
        merge(parts, output, 9, {}, {})
    assert os.listdir(output.parent) == ["run.h5.parts"]
    monkeypatch.undo()
    assert merge(parts, output, 9, {}, {}).num_rows == 9


def test_a_row_lost_on_the_way_is_found_before_the_rename(output, monkeypatch):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(9)])
    gather = assemble_module.gather

    def twice(*arguments):
        for block in gather(*arguments):
            block[4] = dataclasses.replace(block[4], row=3)
            yield block

    monkeypatch.setattr(assemble_module, "gather", twice)
    with pytest.raises(OSError, match=r"does not read back as it was written \(row\)"):
        merge(parts, output, 9, {}, {})
    assert not output.exists() and parts.num_finished == 9


def test_large_attributes_lists_and_tables_are_stored(output):
    text = "# a long run file é\n" * 20_000
    devices = [f"NVIDIA H100 {number}" for number in range(20_000)]
    attrs = {
        "run_file": text,
        "devices": devices,
        "seed": 2**63 - 1,
        "none": None,
        "bad": "a\0b",
        "share": 0.5,
        "huge": 2**70,
    }
    finished_output(output, attrs=attrs)
    with h5py.File(output) as file:
        assert file.attrs["run_file"] == text
        assert json.loads(file.attrs["devices"]) == devices
        assert file.attrs["seed"] == 2**63 - 1 and file.attrs["share"] == 0.5
        assert file.attrs["none"] == "null" and file.attrs["bad"] == "a\ufffdb" and file.attrs["huge"] == str(2**70)


def test_timing_holds_numbers_a_rank_in_groups(output):
    parts = Parts(output, HEADER)
    timing = {
        "ranks": 2,
        "seconds": {"busy": [1.5, 2.5], "idle": [0.5, 0.25]},
        "host": ["a", "b"],
        "per_stage": np.ones((2, 3)),
    }
    merge(parts, output, 0, {}, timing)
    with h5py.File(output) as file:
        assert file["timing/seconds/busy"][:].tolist() == [1.5, 2.5]
        assert file["timing/host"].asstr()[:].tolist() == ["a", "b"]
        assert file["timing/per_stage"].shape == (2, 3) and file["timing/ranks"][()] == 2
    assert "timing seconds/idle: 0.5 s 0.25 s" in summary_of(output).lines(everything=True)


def test_provenance_says_what_made_the_output_and_nothing_of_the_environment(output, monkeypatch):
    monkeypatch.setenv("NORIA_TEST_SECRET", "hunter2")
    attrs = provenance(
        run_file="model = 1",
        checkpoint_hash="c",
        prompts_hash="p",
        launcher="slurm",
        devices=["H100", "H100"],
        start="then",
        seed=7,
    )
    assert attrs["ranks"] == 2 and attrs["versions"]["h5py"] == h5py.__version__ and attrs["seed"] == 7
    finished_output(output, attrs=attrs)
    with h5py.File(output) as file:
        assert {"run_file", "versions", "launcher", "ranks", "devices", "start", "end", "job_ids"} <= set(file.attrs)
    assert b"hunter2" not in output.read_bytes()


@pytest.mark.slow
def test_ten_thousand_rows_merge_in_seconds_and_in_bounded_memory(output, monkeypatch):
    monkeypatch.setattr(generations_module, "BLOCK_ROWS", 500)
    parts = Parts(output, HEADER)
    for start in range(0, 10_000, 250):
        for row in range(start, start + 250):
            generation = make_row(row, num_tokens=100)
            generation.text = "word " * 400
            parts.add(generation)
        parts.seal()
    total = sum(path.stat().st_size for path in parts.folder.iterdir())
    tracemalloc.start()
    began = time.monotonic()
    merge(parts, output, 10_000, {}, {})
    seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 20
    assert peak < total / 3, f"{peak:,} bytes of {total:,}"


KILLED = """
import os, shutil, signal, sys
import noria.output.assemble as assemble_module
import noria.output.merge as merge_module
from noria.output.parts import Parts
output, kill_at = sys.argv[1], int(sys.argv[2])
calls = 0
def killing(function):
    def call(*arguments, **keywords):
        global calls
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return function(*arguments, **keywords)
    return call
for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
    setattr(os, name, killing(getattr(os, name)))
for name in ("_write", "checksums", "write_attrs"):
    setattr(assemble_module, name, killing(getattr(assemble_module, name)))
merge_module._wrong_rows = killing(merge_module._wrong_rows)
assemble_module.RowWriter.append = killing(assemble_module.RowWriter.append)
merge_module.merge(Parts(output, {"prompts_hash": "ab12", "dtype": "float32"}), output, 30, {}, {})
"""


FULL = """
import resource, sys
import noria.output.merge as merge_module
from noria.output.parts import Parts
parts = Parts(sys.argv[1], {})
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), limit[1]))
try:
    merge_module.merge(parts, sys.argv[1], 500, {}, {})
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [0, 2000, 20_000, 200_000, -1])
def test_a_disk_that_is_full_during_the_merge_is_an_error_and_the_parts_stay(output, nbytes):
    rows = [make_row(row, num_tokens=100) for row in range(500)]
    if nbytes < 0:
        # Only the last byte finds no room, when HDF5 closes the file.
        fill(Parts(output, {}), rows)
        merge(Parts(output, {}), output, 500, {}, {})
        nbytes += output.stat().st_size
        output.unlink()
    fill(Parts(output, {}), rows, 100)
    command = forked([sys.executable, "-c", FULL, output, nbytes])
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 0, "HDF5 itself would end in a segmentation fault"
    said = rf"{output.name}: file too large, ([\d,]+ more bytes were to be written, )?a file of this process may have {nbytes:,}: "
    assert re.search(said + "the parts are kept: make room and start the same run again", result.stdout), result.stdout
    assert os.listdir(output.parent) == ["run.h5.parts"]
    assert merge(Parts(output, {}), output, 500, {}, {}).num_rows == 500


@pytest.mark.slow
@pytest.mark.parametrize("ask_first", [True, False])
def test_a_merge_killed_anywhere_is_finished_by_the_next_one(tmp_path, ask_first):
    rows = [make_row(row) for row in range(30)]
    (tmp_path / "original").mkdir()
    fill(Parts(tmp_path / "original" / "run.h5", HEADER), shuffled(rows))
    states, kill_at, code = set(), 0, None
    while code != 0:
        folder = tmp_path / f"{kill_at}"
        shutil.copytree(tmp_path / "original", folder)
        output = folder / "run.h5"
        command = forked([sys.executable, "-c", KILLED, output, kill_at])
        code = subprocess.run(command, timeout=60).returncode
        assert code in (0, -9)
        # What a run does that is started again: it asks what is there, then reads the parts and merges.
        state = probe_output(output) if ask_first else "parts" if parts_folder(output).exists() else "finished"
        states.add((state, output.exists()))
        if state == "parts":
            parts = Parts(output, HEADER, report=pytest.fail)
            assert parts.num_finished == 30
            merge(parts, output, 30, {}, {})
        with open_generations(output) as file:
            assert [as_tuple(row) for row in file.rows()] == [as_tuple(row) for row in rows]
        if ask_first or state == "parts":
            assert os.listdir(folder) == ["run.h5"]
        kill_at += 1
    assert kill_at > 12
    assert {("parts", False), ("finished", True)} <= states


# -- what lies at the place of an output


def test_an_absent_output_is_absent_and_nothing_is_left_behind(output):
    assert probe_output(output) == "absent"
    parts_folder(output).mkdir()
    assert probe_output(output) == "absent", "a folder without parts"
    assert os.listdir(output.parent) == ["run.h5.parts"]


def test_parts_and_finished_outputs_are_told_apart(output):
    fill(Parts(output, HEADER), [make_row(0)])
    assert probe_output(output) == "parts"
    merge(Parts(output, HEADER), output, 1, {}, {})
    assert probe_output(output) == "finished"


def test_parts_of_another_run_beside_a_finished_output_are_not_deleted(output):
    finished_output(output)
    fill(Parts(output, HEADER | {"dtype": "bfloat16"}), [make_row(0)])
    assert probe_output(output) == "finished"
    assert len(list(parts_folder(output).iterdir())) == 1


def test_what_a_killed_deletion_left_is_removed(output):
    finished_output(output)
    merged_folder(output).mkdir()
    (merged_folder(output) / "part-000000.h5").write_bytes(b"")
    assert probe_output(output) == "finished"
    assert os.listdir(output.parent) == ["run.h5"]


def test_overwrite_moves_the_old_output_and_its_parts_aside(output):
    rows = finished_output(output)
    assert probe_output(output, overwrite=True) == "absent"
    assert sorted(os.listdir(output.parent)) == ["run.h5.old-1"]
    fill(Parts(output, HEADER), [make_row(0)])
    assert probe_output(output, overwrite=True) == "absent"
    assert sorted(os.listdir(output.parent)) == ["run.h5.old-1", "run.h5.old-2.parts"]
    assert probe_output(output, overwrite=True) == "absent"
    with open_generations(output.with_name("run.h5.old-1")) as file:
        assert len(list(file.rows())) == len(rows)
    assert Parts(output.with_name("run.h5.old-2"), HEADER).num_finished == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"my thesis\nchapter 1", "a text file that begins with"),
        (b"", "an empty file"),
        (b"\x1f\x8b\x08\x00", "a gzip file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "an HDF5 file that does not open, cut off or damaged"),
        (b"\x00\x01\xff\xfe" * 9, "a file that begins with the bytes 00 01 ff fe"),
    ],
)
def test_a_file_of_something_else_is_never_touched(output, content, words, overwrite):
    output.write_bytes(content)
    with pytest.raises(InputError, match=words):
        probe_output(output, overwrite)
    assert output.read_bytes() == content and os.listdir(output.parent) == ["run.h5"]


@pytest.mark.parametrize(
    ("format", "words"), [("noria-checkpoint", "of format noria-checkpoint"), (None, "it holds weights")]
)
def test_another_hdf5_file_is_refused_by_what_it_is(output, format, words):
    with h5py.File(output, "w") as file:
        file["weights"] = [1, 2]
        if format:
            file.attrs["format"] = format
    for overwrite in (False, True):
        with pytest.raises(InputError, match=words):
            probe_output(output, overwrite)


def test_an_output_of_a_newer_version_is_refused_but_may_be_moved_aside(output):
    finished_output(output)
    with h5py.File(output, "r+") as file:
        file.attrs["version"] = 9
    with pytest.raises(InputError, match="format version 9, this Noria reads 1: use the Noria that wrote it"):
        probe_output(output)
    assert probe_output(output, overwrite=True) == "absent"


def test_a_part_in_the_place_of_an_output_is_refused(output, tmp_path):
    parts = Parts(tmp_path / "other.h5", HEADER)
    fill(parts, [make_row(0)])
    shutil.copy(parts.parts[0].path, output)
    with pytest.raises(InputError, match="part of an unfinished output"):
        probe_output(output)


def test_a_missing_folder_and_a_file_in_place_of_one_are_told(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*nowhere: make it \(mkdir -p"):
        probe_output(tmp_path / "nowhere" / "run.h5")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file, not a folder"):
        probe_output(tmp_path / "file" / "run.h5")
    with pytest.raises(InputError, match="is a folder: name a file"):
        probe_output(tmp_path)
    (tmp_path / "run.h5.parts").write_text("x")
    with pytest.raises(InputError, match="the parts go to a folder of that name"):
        probe_output(tmp_path / "run.h5")


def test_a_folder_that_cannot_be_written_is_told_before_the_run(output, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments: False)
        with pytest.raises(InputError, match=r"cannot be written \(permission denied\)"):
            probe_output(output)

    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(InputError, match=r"cannot be written \(read-only file system\)"):
            probe_output(output)


# -- what an output says of itself


def test_a_summary_counts_rows_and_verifies_every_column(output):
    finished_output(output, attrs={"run_file": "evil \x1b[31m" + "x" * 5000})
    lines = summary_of(output, verify=True).lines()
    assert lines[0] == f"{output}: finished"
    assert lines[1] == "rows        10 done, 2 errors"
    assert "checksums: 13 of 13 columns agree" in lines
    assert all(len(line) < 2100 for line in lines)


@pytest.mark.parametrize("column", ["tokens", "text", "status", "offsets"])
def test_verify_names_the_column_that_was_changed(output, column):
    finished_output(output)
    with h5py.File(output, "r+") as file:
        if column == "text":
            file["text"][3] = "forged"
        elif column == "offsets":
            file["offsets"][1] = file["offsets"][2]
        else:
            file[column][0] = 2
    assert summary_of(output).lines()
    with pytest.raises(InputError, match=f"damaged: {column} do not agree"):
        summary_of(output, verify=True)


def test_a_cut_off_output_is_told(output):
    finished_output(output)
    output.write_bytes(output.read_bytes()[:-100])
    with pytest.raises(InputError, match="does not open, cut off or damaged"):
        open_generations(output)
