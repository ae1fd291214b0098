"""A disk that is full at each moment of each command: one line with the file and the numbers, the exit code, nothing
half-written, and when there is room the same command goes on to the same result."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import small_run
from forks import forked
from noria.__main__ import main
from noria.checkpoint import convert as convert_module
from noria.commands import probe
from noria.desk import desk
from noria.output.parts import part_files, parts_folder
from noria.plan.rates import Rates
from noria.tools.writing import WriteError

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "mpi" / "stopping_worker.py"
FLOAT64 = ["--dtype", "float64"]
NUMBERS = r"no space left on device, [\d,]+ more bytes were to be written, [\d,]+ are free in {disk}"


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    disk = tmp_path_factory.mktemp("full")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"this machine lets nobody mount a small disk: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def disk(mounted):
    """An empty disk of 4 MiB in memory."""
    yield mounted
    gc.collect()
    subprocess.run(f"rm -rf {mounted}/*", shell=True, check=True)
    assert os.listdir(mounted) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("there"))
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {2 + 2 * row}}}' for row, line in enumerate(lines)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")  # one ends after another
    assert main(small_run.command(folder, "whole.h5", *FLOAT64)) == 0
    assert main(small_run.command(folder, "shard.h5", *FLOAT64, "--shard", "1/1")) == 0
    return folder


def fill(disk, leave):
    """Fills the disk to its last bytes but these."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            file.truncate(os.path.getsize(disk / "ballast") // 4096 * 4096 - leave)


def command(folder, disk, *more):
    return small_run.command(folder, disk / "o.h5", *FLOAT64, *more)


def sealed_whole(folder, disk, monkeypatch):
    """A run of which every row is sealed and only the output is not written."""

    def full(*_):
        raise WriteError(28, "no space", "somewhere", "make room")

    with monkeypatch.context() as patch:
        patch.setattr(desk, "merge", full)
        assert main(command(folder, disk)) == 1


def finished(folder, disk, monkeypatch):
    """A finished output of the first five prompts."""
    assert main(command(folder, disk, "--limit", "5")) == 0


def prepare_nothing(folder, disk, monkeypatch):
    pass


# moment -> (what was there before, bytes left on the disk, more flags, exit code, file that is named, words of the remedy)
RUNS = {
    "before the first step": (prepare_nothing, 0, [], 2, "o.h5.parts/segment-000000.json", "make room and try again"),
    "the first seal": (prepare_nothing, 12 << 10, ["--seal-seconds", "0"], 1, "o.h5.parts", "could not be sealed"),
    "a later seal": (prepare_nothing, 80 << 10, ["--seal-seconds", "0"], 1, "o.h5.parts", "could not be sealed"),
    "the last seal": (prepare_nothing, 12 << 10, ["--seal-seconds", "600"], 1, "o.h5.parts", "could not be sealed"),
    "the merge": (sealed_whole, 24 << 10, [], 1, "o.h5", ".*make room and start the same run again"),
    "a resume": (sealed_whole, 0, [], 2, "o.h5.parts/segment-000001.json", "make room and try again"),
    "an output that goes on": (
        finished,
        0,
        ["--extend"],
        2,
        "o.h5.parts/segment-000000.json",
        "make room and try again",
    ),
}


@pytest.mark.parametrize("moment", RUNS)
def test_a_run_says_what_it_could_not_write_and_the_same_run_goes_on(moment, folder, disk, monkeypatch, capfd):
    prepare, leave, more, code, name, remedy = RUNS[moment]
    prepare(folder, disk, monkeypatch)
    before = {path for path in disk.rglob("*") if "ballast" not in path.name}
    fill(disk, leave)
    capfd.readouterr()
    assert main(command(folder, disk, *more)) == code
    said = capfd.readouterr().err
    pattern = rf"{disk}/{name}: {NUMBERS.format(disk=disk)}\S*: .*{remedy}"
    assert re.search(pattern, said) and "Traceback" not in said, said
    assert said.count("no space left") == 1 + said.count("the record of this job cannot be written"), said
    left = {path for path in disk.rglob("*") if "ballast" not in path.name} - before
    sealed = {*part_files(parts_folder(disk / "o.h5")), *parts_folder(disk / "o.h5").glob("segment-*.json")}
    allowed = sealed | {parts_folder(disk / "o.h5")} if code == 1 else set()
    assert left <= allowed, "nothing half-written, no lock, nothing at all of a run that is refused"
    assert before <= {*disk.rglob("*")}, "what was sealed or finished stays"
    os.unlink(disk / "ballast")
    assert main(command(folder, disk, *more)) == 0
    assert small_run.rows_of(disk / "o.h5") == small_run.rows_of(folder / "whole.h5")
    assert os.listdir(disk) == ["o.h5"]


def test_a_stop_whose_rows_the_disk_does_not_take_says_so_and_ends_with_1(folder, disk, tmp_path):
    fill(disk, 12 << 10)
    worker = [sys.executable, WORKER, "decode", "USR1", 0, *command(folder, disk, "--seal-seconds", "600")]
    environment = os.environ | {"NORIA_TEST_HAPPENED": str(tmp_path / "happened")}
    done = subprocess.run(forked(worker), capture_output=True, text=True, timeout=60, env=environment)
    pattern = rf"{disk}/o.h5.parts: {NUMBERS.format(disk=disk)}\S*: \d+ rows? could not be sealed, .*make room"
    assert done.returncode == 1 and re.search(pattern, done.stderr) and "Traceback" not in done.stderr, done.stderr
    os.unlink(disk / "ballast")
    assert main(command(folder, disk)) == 0
    assert small_run.rows_of(disk / "o.h5") == small_run.rows_of(folder / "whole.h5")
    assert os.listdir(disk) == ["o.h5"]


def merge(folder, disk, name):
    return main(["merge", str(disk / name), str(folder / "shard.h5")])


def export(folder, disk, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    return main(["export", str(folder / "whole.h5"), str(disk / name)])


def convert(folder, disk, name):
    return main(["convert", str(folder / "hf"), str(disk / name)])


def convert_onto_a_quota(folder, disk, name):
    """The file system says that there is room."""
    check = convert_module._check_space
    convert_module._check_space = lambda *_: None
    try:
        return convert(folder, disk, name)
    finally:
        convert_module._check_space = check


def write_rates(folder, disk, name):
    try:
        probe._write(disk / name, Rates())
    except WriteError as error:
        sys.stderr.write(f"noria: {error}\n")
        return 1
    return 0


WRITERS = {
    "merge": (merge, "m.h5", 1, NUMBERS + ": .*make room and merge again"),
    "export to JSON lines": (export, "x.jsonl", 1, NUMBERS + ": make room.* and export"),
    "export to gzip": (export, "x.jsonl.gz", 1, NUMBERS + ": make room.* and export"),
    "export to CSV": (export, "x.csv", 1, NUMBERS + ": make room.* and export"),
    "export to parquet": (export, "x.parquet", 1, NUMBERS + ": make room.* and export"),
    "convert": (convert, "c.h5", 2, r"needs [\d,]+ bytes, [\d,]+ are free in {disk}: choose another folder"),
    "convert onto a quota": (convert_onto_a_quota, "c.h5", 1, NUMBERS + ": .*make room"),
    "probe": (write_rates, "machine.toml", 1, NUMBERS + ": make room and try again"),
}


@pytest.mark.parametrize("leave", [0, 12 << 10])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_the_disk_does_not_take_is_named_and_not_there(writer, leave, folder, disk, capfd, recwarn):
    write, name, code, said = WRITERS[writer]
    (disk / "kept.jsonl").write_text("")
    fill(disk, leave)
    capfd.readouterr()
    found = write(folder, disk, name)
    if found == 0:  # small enough
        assert (disk / name).stat().st_size <= leave
        return
    error = capfd.readouterr().err
    assert found == code and re.search(rf"{disk}/{name}\S* {said.format(disk=disk)}", error), error
    assert error.count("\n") == 1 and "Traceback" not in error
    gc.collect()  # what is still open would say so here
    assert capfd.readouterr().err == "" and not recwarn.list
    assert sorted(os.listdir(disk)) == ["ballast", "kept.jsonl"]
    os.unlink(disk / "ballast")
    assert write(folder, disk, name) == 0
    assert write(folder, folder, name) == 0
    if not name.endswith(".h5"):
        assert (disk / name).read_bytes() == (folder / name).read_bytes()
    os.unlink(folder / name)


def test_a_trace_that_the_disk_does_not_take_costs_the_trace_alone(folder, disk, capfd):
    fill(disk, 4096)
    command = small_run.command(folder, "traced.h5", *FLOAT64, "--trace", disk / "t.json")
    assert main(command) == 0
    said = capfd.readouterr().err
    assert re.search(rf"warning: the trace {disk}/t.json was not written: .*{NUMBERS.format(disk=disk)}", said), said
    assert "Traceback" not in said and os.listdir(disk) == ["ballast"]
    assert small_run.rows_of(folder / "traced.h5") == small_run.rows_of(folder / "whole.h5")


@pytest.mark.parametrize("tier", ["cache", "weights"])
def test_a_scratch_disk_that_is_full_is_refused_with_the_numbers(folder, disk, tier, capfd):
    fill(disk, 4096)
    more = [f"--{tier}", "disk=100", "--scratch", disk, *([] if tier == "cache" else ["--dtype", "float32", "--stage"])]
    run = small_run.command(folder, f"{tier}.h5", *FLOAT64, *more)
    assert main(run) == 2
    said = capfd.readouterr().err
    pattern = rf"disk tier needs [\d.]+ [KM]iB, the limit is [\d.]+ KiB: .*make room in {disk} or set placement.scratch"
    assert re.search(pattern, said) and "Traceback" not in said, said
    assert os.listdir(disk) == ["ballast"] and not parts_folder(folder / f"{tier}.h5").exists()
    os.unlink(disk / "ballast")
    assert main(run) == 0
    found, whole = (small_run.rows_of(folder / name) for name in (f"{tier}.h5", "whole.h5"))
    assert found == whole if tier == "cache" else [row[:2] for row in found] == [row[:2] for row in whole]
