"""What is said where a write fails: file, bytes wanted and free, remedy; whatever the system says, and wherever it does."""

import errno
import gc
import os
import resource

import pytest

import noria.tools.writing as writing_module
import small_run
from noria.checkpoint.convert import convert
from noria.commands import probe
from noria.output.export import export
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.plan.rates import Rates
from noria.tools.direct import scratch_file
from noria.tools.trace_file import TraceFile
from noria.tools.writing import WriteError, making, open_new, write_error, writing
from output_rows import make_row

WORDS = {
    errno.ENOSPC: "no space left on device, 1,234 more bytes were to be written, 40,960 are free in {}: make room and try again",
    errno.EDQUOT: "disk quota exceeded, 1,234 more bytes were to be written: delete files, or ask for more (quota -s, or lfs"
    " quota, shows it), and try again",
    errno.EFBIG: "file too large, 1,234 more bytes were to be written, a file of this process may have 5,000: raise that limit"
    " (ulimit -f) and try again",
    errno.EROFS: "read-only file system, 1,234 more bytes were to be written: name another folder, or ask who runs the file system",
    errno.EIO: "input/output error, 1,234 more bytes were to be written: name another folder, or ask who runs the file system",
    errno.EACCES: "permission denied, 1,234 more bytes were to be written: name another folder",
}


@pytest.mark.parametrize("number", WORDS)
def test_it_says_the_file_what_was_wanted_what_is_free_and_the_remedy(number, tmp_path, monkeypatch):
    free = os.statvfs_result((4096, 4096, 99, 20, 10, 9, 9, 9, 0, 255))
    monkeypatch.setattr(writing_module.os, "statvfs", lambda _: free)
    monkeypatch.setattr(writing_module.resource, "getrlimit", lambda _: (5000, 5000))
    error = write_error(OSError(number, os.strerror(number)), tmp_path / "x", 1234)
    assert str(error) == f"{tmp_path / 'x'}: {WORDS[number].format(tmp_path)}"
    assert (error.errno, error.filename) == (number, str(tmp_path / "x")) and isinstance(error, OSError)


def test_a_disk_without_inodes_says_so(tmp_path, monkeypatch):
    free = os.statvfs_result((4096, 4096, 99, 20, 10, 700, 0, 0, 0, 255))
    monkeypatch.setattr(writing_module.os, "statvfs", lambda _: free)
    said = str(write_error(OSError(errno.ENOSPC, "full"), tmp_path / "x"))
    assert f"no space left on device, {tmp_path} takes no more files (0 of 700 inodes are free): make room" in said


def test_the_outermost_place_names_the_file_that_people_know_and_reading_goes_through(tmp_path):
    with pytest.raises(WriteError, match=r"/x\.h5: no space left on device, 7 more bytes .*: the rows are kept$"):
        with making(tmp_path / "x.h5", "the rows are kept"), writing(tmp_path / ".x.h5.tmp", 7):
            raise OSError(errno.ENOSPC, "full")
    with pytest.raises(WriteError, match=r"/x\.h5: read-only file system"), making(tmp_path / "x.h5"):
        raise OSError(errno.EROFS, "read-only")
    with pytest.raises(FileNotFoundError), making(tmp_path / "x.h5"):
        open(tmp_path / "prompts")  # noqa: SIM115 - there is none


def test_a_file_whose_last_bytes_do_not_fit_fails_when_it_is_closed_and_only_then(tmp_path, capfd):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = open_new(tmp_path / "x")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        file.write(bytes(1500))
        with pytest.raises(
            WriteError, match=r"/x: file too large, 500 more bytes were to be written, .* may have 1,000: "
        ):
            file.close()
        del file
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "x").stat().st_size == 1000 and capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("sources"))
    parts = Parts(folder / "done.h5", {})
    parts.add(make_row(0))
    merge(parts, folder / "done.h5", 1, {})
    return folder


def seal(sources, target):
    parts = Parts(target, {})
    parts.add(make_row(0))
    try:
        parts.seal()
    finally:
        parts.folder.rmdir()


def merge_parts(sources, target):
    merge(Parts(target, {}), target, 0, {})


def write_trace(sources, target):
    trace = TraceFile(target)
    trace.add(["{}"])
    trace.close()


def write_scratch(sources, target):
    file = scratch_file(target.parent, 8192, "placement.cache.disk", direct=False)
    try:
        file.write(0, memoryview(bytes(4096)))
    finally:
        file.close()


# writer -> (the file that it makes, the words for it, system calls that may fail under it)
WRITERS = {
    seal: ("run.h5", "run.h5.parts/part-000000.h5", ["open", "fsync", "replace"]),
    merge_parts: ("run.h5", "run.h5", ["open", "pwrite", "fsync", "replace"]),
    lambda sources, target: export(sources / "done.h5", target): ("x.jsonl", "x.jsonl", ["fsync", "replace"]),
    lambda sources, target: convert(sources / "hf", target): ("m.h5", "m.h5", ["pwrite", "fsync", "replace"]),
    lambda sources, target: probe._write(target, Rates()): ("m.toml", "m.toml", ["open", "fsync", "replace"]),
    write_trace: ("t.json", "t.json", ["open", "fsync", "replace"]),
    write_scratch: ("any", "scratch file", ["pwritev"]),
}
CASES = [(writer, call) for writer, (*_, calls) in WRITERS.items() for call in calls]


@pytest.mark.parametrize(("writer", "call"), CASES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_every_writer_says_what_the_system_said_of_its_file_and_leaves_nothing(
    writer, call, number, sources, tmp_path, monkeypatch, capfd
):
    target, named, _ = WRITERS[writer]
    work = getattr(os, call)

    def fail(*arguments, **more):
        if call == "open" and not arguments[1] & os.O_CREAT:
            return work(*arguments, **more)
        if call == "pwrite" and b"process" in bytes(arguments[1]):  # the words of a lock
            return work(*arguments, **more)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(WriteError) as error:
            writer(sources, tmp_path / target)
    assert str(error.value).startswith(f"{tmp_path / named}: {os.strerror(number).lower()}"), error.value
    assert "\n" not in str(error.value)
    left = [path.name for path in tmp_path.rglob("*") if path.name != "run.h5.parts"]
    assert left == [] and capfd.readouterr().err == ""
