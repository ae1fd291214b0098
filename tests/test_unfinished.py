"""noria inspect of an output that is not finished: how far its run is, who works on it, who did."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

import noria.output.sealed as sealed
from forks import forked
from noria.__main__ import main
from noria.output.compact import Compactor
from noria.output.merge import merge
from noria.output.parts import Parts, part_files, parts_folder
from output_rows import fill, make_row

HEADER = {"prompts": "ab12", "dtype": "float32", "shard": "2/3", "sampling.top_k": None}
JOB = {"hosts": ["n1", "n2"], "ranks": 4, "of": 10, "job_ids": {"SLURM_JOB_ID": "77"}}


@pytest.fixture
def output(tmp_path):
    """Two parts: rows 0-2 done, 3 an error, 4 left half-way, of 10."""
    parts = Parts(tmp_path / "run.h5", HEADER)
    parts.begin(JOB)
    rows = [make_row(row, status={3: "error", 4: "todo"}.get(row, "done"), num_tokens=6) for row in range(5)]
    fill(parts, rows, 3)
    return tmp_path / "run.h5"


def inspect(capsys, *arguments):
    capsys.readouterr()
    code = main(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_it_counts_what_is_done_wrong_half_way_and_left(output, capsys):
    before = {path: path.read_bytes() for path in parts_folder(output).iterdir()}
    code, out, err = inspect(capsys, output)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{output}: not finished, stopped without notice, last seen 20")
    assert lines[1] == "rows        3 done, 1 error, 6 left (1 row half-way)"
    assert lines[2] == "tokens      6 of prompts, 24 generated"
    assert lines[3] == "ended       2 at a stop, 1 at their limit of tokens"
    assert lines[4].startswith("work        1 job, ") and lines[4].endswith("the last with 4 ranks on n1, n2")
    assert lines[5].startswith(f"2 parts in {output}.parts, ") and lines[5].endswith(" s ago")
    assert "shard: 2/3" in lines
    first = lines.index('run file    prompts = "ab12"')
    assert lines[first + 1 : first + 3] == ['            dtype = "float32"', '            shard = "2/3"']
    (segment,) = (line for line in lines if line.startswith("segment 1: 20"))
    assert segment.endswith("(no end recorded), job 77 on n1, n2, 4 ranks: 4 rows, 1 error, 30 tokens")
    assert {path: path.read_bytes() for path in parts_folder(output).iterdir()} == before, "looking changes nothing"


def test_a_run_that_stopped_in_order_says_why_and_each_of_its_jobs_has_a_line(output, capsys):
    parts = Parts(output, HEADER)
    parts.begin(JOB)
    fill(parts, [make_row(row) for row in (4, 5)])
    parts.end("walltime")
    _, out, _ = inspect(capsys, output)
    assert "stopped (walltime); the same command continues it" in out and "rows        5 done, 1 error, 4 left\n" in out
    assert out.count("\nsegment ") == 2


def test_the_age_is_that_of_the_last_seal(output, capsys):
    for path in part_files(parts_folder(output)):
        os.utime(path, (time.time() - 7300, time.time() - 7300))
    assert "last sealed 2 h ago" in inspect(capsys, output)[1]


def test_the_folder_of_parts_may_be_given_too(output, capsys):
    theirs, ours = (
        re.sub(r"last sealed .* ago", "last sealed", inspect(capsys, path)[1]) for path in (f"{output}.parts", output)
    )
    assert theirs == ours


def test_a_job_that_works_on_it_is_named(output, capsys):
    script = (
        "import sys\nfrom noria.tools.lock import OutputLock\n"
        "lock = OutputLock(sys.argv[1], {'job': '17', 'host': 'n3', 'process': 4711, 'start': 'then'}, print)\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    command = forked([sys.executable, "-c", script, output])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert "being written by job 17 on n3 (process 4711, since then)" in inspect(capsys, output)[1]
        other.kill()
    assert "stopped without notice" in inspect(capsys, output)[1], "the lock dies with its holder"


def test_a_job_that_has_sealed_nothing_yet_is_shown(tmp_path, capsys):
    Parts(tmp_path / "new.h5", HEADER).begin(JOB)
    code, out, _ = inspect(capsys, tmp_path / "new.h5")
    assert (
        code == 0
        and "rows        0 done, 0 errors, 10 left" in out
        and "0 parts in" in out
        and "last sealed never" in out
    )


def test_verify_reads_every_part(output, capsys):
    assert "\nchecksums: all of 2 parts agree\n" in inspect(capsys, output, "--verify")[1]
    path = part_files(parts_folder(output))[1]
    image = bytearray(path.read_bytes())
    image[image.index(b"prompt 4 ")] ^= 1
    path.write_bytes(image)
    assert inspect(capsys, output)[0] == 0
    code, _, err = inspect(capsys, output, "--verify")
    assert code == 2 and "1 of 2 parts damaged" in err and path.name in err
    path.write_bytes(b"")
    code, out, _ = inspect(capsys, output)
    assert (
        code == 0
        and f"part left out, its rows are generated again: {path}" in out
        and "rows        3 done, 0 errors" in out
    )


def test_a_row_tried_again_counts_as_it_stands(output, capsys):
    fill(Parts(output, HEADER), [make_row(3)])
    assert "rows        4 done, 0 errors, 6 left" in inspect(capsys, output)[1]


@pytest.mark.parametrize("scans_first", [True, False])
def test_a_run_that_finishes_meanwhile_is_shown_finished(output, capsys, monkeypatch, scans_first):
    parts, part_files = Parts(output, HEADER), sealed.part_files

    def late(folder):
        monkeypatch.setattr(sealed, "part_files", part_files)
        found = part_files(folder) if scans_first else []
        fill(parts, [make_row(row) for row in range(4, 10)])
        merge(parts, output, 10, {})
        return found

    monkeypatch.setattr(sealed, "part_files", late)
    code, out, _ = inspect(capsys, output)
    assert code == 0 and f"{output}: finished\nrows        9 done, 1 error\n" in out


def test_parts_that_are_put_together_meanwhile_are_read_again(output, capsys, monkeypatch):
    scan_one, due = sealed.scan_one, [True]

    def late(*arguments):
        if due:
            due.clear()
            assert Compactor(Parts(output, HEADER), 2).compact_if_due()
        return scan_one(*arguments)

    monkeypatch.setattr(sealed, "scan_one", late)
    code, out, _ = inspect(capsys, output)
    assert code == 0 and "rows        3 done, 1 error, 6 left (1 row half-way)" in out and "1 part in" in out


def test_texts_of_its_files_cannot_steer_the_terminal(output, capsys):
    (path,) = parts_folder(output).glob("segment-*.json")
    segment = json.loads(path.read_text())
    path.write_text(json.dumps(segment | {"ended": "a\x1b[2J\nb", "job_ids": {"x": "\x9b1m"}}))
    out = inspect(capsys, output)[1]
    assert "\x1b" not in out and "\x9b" not in out and r"a\x1b[2J\nb" in out


def test_what_is_not_there_at_all_is_an_error(tmp_path, capsys):
    code, out, err = inspect(capsys, tmp_path / "no.h5")
    assert (code, out) == (2, "") and "no.h5 does not exist" in err
