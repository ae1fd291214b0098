"""A group in a shared folder: whoever of it starts the run again goes on with a colleague's, or is told what to do."""

import os
import pickle
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.commands import probe
from noria.output import export, merge
from noria.output.generations import open_generations
from noria.output.parts import Parts
from noria.output.target import probe_output
from noria.plan.rates import Rates
from noria.tools.lock import OutputLock, lock_path
from noria.tools.trace_file import TraceFile
from output_rows import as_tuple, make_row
from small_run import write_files

ALICE, BOB, GROUP = 61001, 61002, 62000  # no system needs to know them
HEADER = {"prompts": "ab12"}
HOLDER = {"job": "17", "host": "node3", "process": 4711, "start": "then"}
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may work as two users")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Whatever is imported late is imported: other users may not read this user's Python."""
    output = tmp_path_factory.mktemp("imported") / "run.h5"
    begin(output)
    main(["inspect", str(output)])
    go_on(output)


@pytest.fixture
def shared(imported):
    """A folder of the group, in which new files are the group's (setgid)."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, ALICE, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def as_user(user, work, umask=0o002):
    """What `work` returns, or the text of what it raises, in a child of that user which then dies at once."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(user, user, user)
            os.umask(umask)
            os.write(writes, pickle.dumps(work()))
        except BaseException as error:  # noqa: BLE001 - the parent looks at the words
            os.write(writes, pickle.dumps(f"{type(error).__name__}: {error}"))
        os._exit(0)
    os.close(writes)
    with open(reads, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    return pickle.loads(said)


def begin(output):
    """A job that is killed when two of three rows are sealed."""
    OutputLock(output, HOLDER, print)
    parts = Parts(output, HEADER)
    parts.begin({})
    for row in range(2):
        parts.add(make_row(row))
        parts.seal()


def go_on(output):
    """The same run again."""
    with OutputLock(output, HOLDER, print):
        state = probe_output(output)
        parts = Parts(output, HEADER)
        parts.begin({})
        parts.add(make_row(2))
        merge.merge(parts, output, 3, {})
    return state


@root
def test_a_colleague_finishes_the_run_of_a_job_that_died(shared):
    output = shared / "run.h5"
    assert as_user(ALICE, lambda: begin(output)) is None
    assert lock_path(output).stat().st_uid == ALICE
    assert as_user(BOB, lambda: probe_output(output)) == "parts"
    assert as_user(BOB, lambda: go_on(output)) == "parts"
    with open_generations(output) as file:
        assert [as_tuple(row) for row in file.rows()] == [as_tuple(make_row(row)) for row in range(3)]
    assert sorted(os.listdir(shared)) == ["run.h5"]


@root
def test_a_folder_that_takes_files_and_shows_none_takes_an_output_and_its_export(shared):
    output = shared / "run.h5"
    shared.chmod(0o2773)
    os.chown(shared, ALICE, 0)
    assert as_user(BOB, lambda: begin(output)) is None
    assert as_user(BOB, lambda: go_on(output)) == "parts"
    assert as_user(BOB, lambda: export.export(output, shared / "run.jsonl")) == 3
    assert sorted(os.listdir(shared)) == ["run.h5", "run.jsonl"]


CLOSED = {  # what alice's umask or an administrator made of her files, and what a colleague is told
    "the lock": ("run.h5.lock", 0o644, "run.h5.lock is user 61001's (-rw-r--r--): ask for chmod g+w {}"),
    "the folder of parts": ("run.h5.parts", 0o755, "run.h5.parts is user 61001's (drwxr-xr-x): ask for chmod g+w {}"),
    "the folder of parts, shut": (
        "run.h5.parts",
        0o700,
        "run.h5.parts is user 61001's (drwx------): ask for chmod g+rx {}",
    ),
    "a part": (
        "run.h5.parts/part-000001.h5",
        0o600,
        "part-000001.h5 is user 61001's (-rw-------): ask for chmod g+r {}",
    ),
    "the folder, in which owners alone delete": (".", 0o3775, "lets only owners delete: ask for chmod -t {}"),
}


@root
@pytest.mark.parametrize("what", CLOSED)
def test_a_colleague_who_may_not_go_on_is_told_whose_file_it_is_and_what_to_ask_for(shared, what, capfd):
    name, mode, told = CLOSED[what]
    output = shared / "run.h5"
    assert as_user(ALICE, lambda: begin(output)) is None
    if name == ".":
        os.chown(shared, 0, GROUP)
    (shared / name).chmod(mode)
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    said = as_user(BOB, lambda: go_on(output))
    assert said.startswith(f"InputError: output {output}: ") and told.format(shared / name) in said
    now = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    now.pop(lock_path(output), None), before.pop(lock_path(output))
    assert now == before, "who is refused changes nothing"
    assert as_user(ALICE, lambda: probe_output(output)) == "parts"
    if mode != 0o700:
        capfd.readouterr()
        as_user(BOB, lambda: main(["inspect", str(output)]))
        first = capfd.readouterr().out.splitlines()[0]
        assert (
            "the same command continues it once you may write there (" in first and told.format(shared / name) in first
        )


@root
def test_a_colleague_is_told_of_a_job_that_runs_though_its_lock_is_not_theirs_to_write(shared):
    output = shared / "run.h5"
    with OutputLock(output, HOLDER, print):
        lock_path(output).chmod(0o644)
        said = as_user(BOB, lambda: go_on(output))
    assert said == f"InputError: output {output} is being written by job 17 on node3 (process 4711, since then): " + (
        "wait for it, or name another output"
    )


def test_every_file_has_the_mode_that_the_umask_leaves(tmp_path):
    pytest.importorskip("pyarrow")
    output, found = tmp_path / "run.h5", {}
    before = os.umask(0o002)
    try:
        with OutputLock(output, HOLDER, print):
            parts = Parts(output, HEADER)
            parts.begin({})
            parts.add(make_row(0))
            parts.seal()
            found |= {path: path.stat().st_mode for path in tmp_path.rglob("*")}
            merge.merge(parts, output, 1, {})
        for name in ("x.jsonl", "x.jsonl.gz", "x.csv", "x.parquet"):
            export.export(output, tmp_path / name)
        trace = TraceFile(tmp_path / "trace.json")
        trace.add(["{}"])
        trace.close()
        probe._write(tmp_path / "machine.toml", Rates())
        write_files(tmp_path)
        convert(tmp_path / "hf", tmp_path / "again.h5")
    finally:
        os.umask(before)
    found |= {path: path.stat().st_mode for path in tmp_path.iterdir() if path.name != "hf"}
    assert len(found) >= 13
    wrong = {
        path.name: stat.filemode(mode)
        for path, mode in found.items()
        if mode & 0o777 != (0o775 if path.suffix == ".parts" else 0o664)
    }
    assert not wrong
