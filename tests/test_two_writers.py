"""Several writers of one name, and files of other people beside it: always one of the whole files, nothing else touched."""

import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest

import tiny_models
from counts import count
from forks import forked
from noria.errors import InputError
from noria.output.export import export
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.tools import atomic
from noria.tools.atomic import new_file, remove_leftovers, replacing
from output_rows import fill, make_row

HEADER = {"prompts": "ab12", "checkpoint": "cd34", "dtype": "float32"}
GO = "import sys\nfrom noria.__main__ import main\nsys.stdin.readline()\nsys.exit(main(sys.argv[1:]))\n"


def finished(path, num_rows, text="", i=1, n=1):
    parts, wanted = Parts(path, HEADER | {"shard": f"{i}/{n}"}), range(i - 1, num_rows, n)
    rows = [make_row(row) for row in wanted]
    for row in rows:
        row.extra = json.dumps({"pad": text * 100})
    fill(parts, rows)
    merge(parts, path, wanted, {"prompt_rows": num_rows})
    return path


def at_once(*commands):
    """Exit codes and words of `noria` commands that begin together, in processes of their own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(forked([sys.executable, "-c", GO, *one]), **pipes) for one in commands]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_exports_at_once_to_one_name_leave_one_of_them_whole(tmp_path, suffix):
    small, large = finished(tmp_path / "a.h5", 40, "a"), finished(tmp_path / "b.h5", 90, "b")
    whole = []
    for source in (small, large):
        export(source, tmp_path / f"{source.stem}.{suffix}")
        whole.append((tmp_path / f"{source.stem}.{suffix}").read_bytes())
    foreign = {tmp_path / f"x.{suffix}.tmp": b"mine", tmp_path / f".x.{suffix}.tmp": b"mine too"}
    for path, content in foreign.items():
        path.write_bytes(content)
    target, before = tmp_path / f"x.{suffix}", set(os.listdir(tmp_path))
    for _ in range(count(20)):
        codes, said = at_once(["export", small, target], ["export", large, target])
        assert codes == [0, 0], said
        assert target.read_bytes() in whole
    assert set(os.listdir(tmp_path)) == before | {target.name}
    assert {path: path.read_bytes() for path in foreign} == foreign


@pytest.mark.slow
def test_of_two_merges_at_once_to_one_name_both_succeed_or_one_is_refused_by_name(tmp_path):
    pairs = [[finished(tmp_path / f"{run}{i}.h5", 20, run, i, 2) for i in (1, 2)] for run in "ab"]
    mine = tmp_path / "out.h5.tmp"
    mine.write_text("mine")
    for number in range(count(20)):
        target = tmp_path / f"out-{number}.h5"
        codes, said = at_once(*(["merge", target, *shards] for shards in pairs))
        assert sorted(codes) == [0, 2], said
        assert any(f"noria: {target} " in words or f"output {target} is being" in words for words in said), said
        export(target, tmp_path / "rows.jsonl")
        rows = [json.loads(line)["pad"][0] for line in (tmp_path / "rows.jsonl").open()]
        assert rows in (["a"] * 20, ["b"] * 20)
    assert mine.read_text() == "mine" and not [name for name in os.listdir(tmp_path) if ".noria." in name]


@pytest.mark.slow
def test_of_two_conversions_at_once_to_one_name_one_is_refused_by_name(tmp_path):
    for seed in (1, 2):
        tiny_models.write_directory(
            tmp_path / f"hf{seed}", tiny_models.LLAMA, tiny_models.state(tiny_models.LLAMA, seed=seed)
        )
        codes, said = at_once(["convert", tmp_path / f"hf{seed}", tmp_path / f"model{seed}.h5"])
        assert codes == [0], said
    whole = [(tmp_path / f"model{seed}.h5").stat().st_size for seed in (1, 2)]
    mine = tmp_path / "m.h5.4711.tmp"
    mine.write_text("mine")
    for number in range(count(20)):
        target = tmp_path / f"m-{number}.h5"
        codes, said = at_once(*(["convert", tmp_path / f"hf{seed}", target] for seed in (1, 2)))
        assert sorted(codes) == [0, 2] and any(str(target) in words for words in said), said
        assert target.stat().st_size in whole
        assert at_once(["inspect", target, "--verify"])[0] == [0]
    assert mine.read_text() == "mine" and not [name for name in os.listdir(tmp_path) if ".noria." in name]


def test_writers_of_one_name_in_one_process_do_not_meet(tmp_path):
    target, start = tmp_path / "file", threading.Barrier(8)

    def write(number):
        start.wait()
        for _ in range(20):
            with replacing(target) as path:
                path.write_bytes(bytes([number]) * 100_000)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = target.read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1 and os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["file"] and target.read_text() == "old"


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_goes_and_everything_else_stays(tmp_path):
    ours = new_file(tmp_path / "x.jsonl").name
    dead = re.sub(r"\.\d+\.(\w{8}\.tmp)", rf".{dead_process()}.\1", ours)
    host = socket.gethostname()
    others = [
        dead.replace(".noria.", ".other."),
        dead.replace(re.sub("[^A-Za-z0-9]", "-", host)[:64], "another-host"),
        dead.replace(".tmp", ".tmp2"),
        dead.removeprefix("."),
        re.sub(r"\w{8}\.tmp", "0123.tmp", dead),
        "x.jsonl.tmp",
        ".x.jsonl.tmp",
    ]
    for name in (dead, *others):
        (tmp_path / name).write_text("half")
    assert [path.name for path in remove_leftovers(tmp_path)] == [dead]
    assert sorted(os.listdir(tmp_path)) == sorted([ours, *others])


def test_a_killed_writers_file_is_removed_by_the_next_writer_beside_it(tmp_path):
    script = "import os, sys\nfrom pathlib import Path\nfrom noria.tools.atomic import new_file\n"
    command = forked(
        [sys.executable, "-c", script + "new_file(Path(sys.argv[1])); os.kill(os.getpid(), 9)", tmp_path / "a"]
    )
    assert subprocess.run(command).returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    with replacing(tmp_path / "b") as path:
        path.write_text("whole")
    assert os.listdir(tmp_path) == ["b"]


def test_containers_that_number_processes_anew_do_not_take_each_others_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_host", lambda: "node-f1")
    theirs = new_file(tmp_path / "x")
    renamed = theirs.rename(theirs.with_name(theirs.name.replace(str(os.getpid()), str(dead_process()))))
    monkeypatch.setattr(atomic, "_host", lambda: "node-f2")
    assert remove_leftovers(tmp_path) == [] and renamed.exists()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "x.jsonl"])
def test_a_name_of_any_length_has_a_temporary_one(tmp_path, name):
    with replacing(tmp_path / name) as path:
        path.write_text("whole")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_may_be_written_but_not_read_takes_a_file(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with replacing(tmp_path / "x") as path:
        path.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole"


def test_an_export_over_the_output_itself_is_refused(tmp_path):
    source = finished(tmp_path / "run.h5", 3)
    os.symlink("run.h5", tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows.jsonl is a link to .*run.h5, the output itself"):
        export(source, tmp_path / "rows.jsonl")
    assert source.stat().st_size > 1000
