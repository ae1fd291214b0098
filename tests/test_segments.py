"""The jobs that worked on an output: their record survives kills, says nothing of the environment and trusts no file."""

import json
import os
import shutil

import h5py
import pytest

import small_run
from noria.__main__ import main
from noria.engine.stage import Stage
from noria.errors import InputError
from noria.launch.schedulers import job_ids
from noria.output.merge import merge
from noria.output.parts import Parts, parts_folder
from noria.output.segments import age, history, read_segments, segment_lines
from noria.output.summary import summary_of
from noria.output.target import probe_output, reopen
from noria.tools.provenance import segment_of
from output_rows import fill, make_row

HEADER = {"prompts": "ab12", "sampling.seed": 5}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


def facts(job, hosts=("a", "b", "a")):
    devices = [f"{host} cuda:0 (H100)" for host in hosts]
    environment = {"SLURM_JOB_ID": job, "AWS_SECRET_ACCESS_KEY": "hunter2", "HOME": "/home/me"}
    return segment_of(job_ids(environment), hosts, devices, ["noria", "run", "x.toml"], "2026-11-23T03:15:02Z") | {
        "of": 9
    }


def test_of_the_environment_only_the_schedulers_names_of_the_job_are_stored():
    given = {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "2",
        "PBS_JOBID": "",
        "TOKEN": "hunter2",
    }
    assert job_ids(given) == {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_ids({"PBS_JOBID": "0.vm", "PBS_ARRAY_INDEX": "3"}) == {"PBS_JOBID": "0.vm", "PBS_ARRAY_INDEX": "3"}


def test_every_job_adds_its_segment_with_what_it_finished_and_the_tokens_that_it_added(output):
    for number, rows in enumerate(([0, 1], [2], [])):
        parts = Parts(output, HEADER)
        parts.begin(facts(f"10{number}"))
        fill(parts, [make_row(row, status="error" if row == 1 else "done", num_tokens=3) for row in rows])
        fill(parts, [make_row(8, status="todo", num_tokens=5)])
        if number == 1:
            parts.end("walltime")
    found = read_segments(parts.folder)
    assert [(one["rows"], one["errors"], one["tokens"], one["ended"]) for one in found] == [
        (2, 1, 11, ""),
        (1, 0, 3, "walltime"),
        (0, 0, 0, ""),
    ]
    assert [one["job_ids"]["SLURM_JOB_ID"] for one in found] == ["100", "101", "102"]
    one = found[0]
    assert (one["host"], one["hosts"], one["ranks"], one["of"]) == ("a", ["a", "b"], 3, 9)
    assert one["start"] == "2026-11-23T03:15:02Z" and one["end"] > one["start"] and one["argv"][0] == "noria"
    text = "".join(path.read_text() for path in parts.folder.glob("segment-*.json"))
    assert "hunter2" not in text and "/home/me" not in text


def test_a_finished_output_tells_of_all_its_jobs_and_goes_on_counting_when_it_is_reopened(output):
    for job, rows in (("1", [0]), ("2", [1])):
        parts = Parts(output, HEADER)
        parts.begin(facts(job, hosts=("x" + job,)))
        fill(parts, [make_row(row) for row in rows])
    parts.end("finished")
    merge(parts, output, 2, history(parts.folder))
    with h5py.File(output) as file:
        assert file.attrs["restarts"] == 1 and json.loads(file.attrs["hosts"]) == ["x1", "x2"]
        assert json.loads(file.attrs["job_ids"]) == {"SLURM_JOB_ID": "2"}
        assert [one["rows"] for one in json.loads(file.attrs["segments"])] == [1, 1]
    lines = [line for line in summary_of(output).lines(everything=True) if line.startswith("segment")]
    assert len(lines) == 2 and "(finished), job 2 on x2, 1 rank: 1 row, 0 errors" in lines[1]
    reopen(output)
    parts = Parts(output, HEADER)
    parts.begin(facts("3"))
    assert [one["job_ids"]["SLURM_JOB_ID"] for one in read_segments(parts.folder)] == ["1", "2", "3"]
    assert history(parts.folder)["restarts"] == 2


def test_a_reopened_output_still_tells_of_a_job_that_finished_nothing(output):
    for job, rows in (("1", []), ("2", [0]), ("3", [])):
        parts = Parts(output, HEADER)
        parts.begin(facts(job))
        fill(parts, [make_row(row) for row in rows])
    merge(parts, output, 1, history(parts.folder))
    reopen(output)
    parts = Parts(output, HEADER | {"prompts": "longer"})
    parts.begin(facts("4"))
    assert [one["job_ids"]["SLURM_JOB_ID"] for one in read_segments(parts.folder)] == ["1", "2", "3", "4"]


def test_an_output_is_not_reopened_over_the_parts_of_another_run(output, tmp_path):
    merge(Parts(output, HEADER), output, 0, {})
    other = Parts(output, HEADER | {"prompts": "other"})
    fill(other, [make_row(0)])
    with pytest.raises(InputError, match=r"run\.h5\.parts holds parts of another run: move that folder away"):
        reopen(output)
    assert Parts(output, {}).num_finished == 1 and probe_output(output) == "finished"


def test_a_job_of_another_run_that_finished_nothing_is_forgotten(output):
    for header in (HEADER | {"prompts": "old"}, HEADER | {"sampling.seed": 6}, HEADER):
        parts = Parts(output, header)
        parts.begin(facts("1"))
    assert len(read_segments(parts.folder)) == 2, "a seed that was drawn anew is the same run"
    parts.segment.sealed(1, 0, 3)
    Parts(output, HEADER | {"prompts": "new"}).begin(facts("2"))
    assert [one["rows"] for one in read_segments(parts.folder)] == [1, 0]


def test_a_job_that_finishes_no_row_for_long_still_shows_that_it_lives(output):
    now = [100.0]
    parts = Parts(output, HEADER, clock=lambda: now[0])
    parts.begin(facts("1"))
    path = parts.segment.path
    parts.segment.facts["end"] = ""
    written = path.stat().st_mtime_ns
    now[0] = 104
    parts.seal_if_due(0.5)
    assert path.stat().st_mtime_ns == written, "not more than every 5 s"
    now[0] = 106
    assert parts.seal_if_due(0.5) is None
    assert path.stat().st_mtime_ns > written and parts.segment.facts["end"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"format": "other"}', b'{"format": "noria-segment", "rows": "many"}', b"\xff" * 9]
)
def test_a_file_that_is_no_segment_is_left_out(output, content):
    parts = Parts(output, HEADER)
    parts.begin(facts("1"))
    (parts.folder / "segment-000007.json").write_bytes(content)
    assert len(read_segments(parts.folder)) == 1
    parts = Parts(output, HEADER)
    parts.begin(facts("2"))
    assert parts.segment.path.name == "segment-000008.json" and history(parts.folder)["restarts"] == 1


def test_a_segment_that_cannot_be_written_is_reported_and_does_not_end_the_run(output, capsys, monkeypatch):
    parts = Parts(output, HEADER)
    parts.begin(facts("1"))
    shutil.rmtree(parts.folder)
    for _ in range(2):
        parts.segment.seen()
    said = "the record of this job cannot be written: "
    assert capsys.readouterr().err.startswith(f"{said}{parts.segment.path}: no such file or directory")


@pytest.mark.parametrize("tokens", [10**400, -1, 2**63, 1.5, True, "3"], ids=str)
def test_a_record_of_numbers_that_nobody_counted_is_none(output, tokens):
    parts = Parts(output, HEADER)
    parts.begin(facts("1"))
    fill(parts, [make_row(0)])
    [path] = parts.folder.glob("segment-*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": tokens}))
    assert read_segments(parts.folder) == []
    merge(
        parts,
        output,
        1,
        {"segments": [{"start": "2026-11-23T03:15:02Z", "end": "2026-11-23T03:15:09Z", "tokens": tokens}]},
    )
    assert "work        not recorded" in summary_of(output).lines()


def test_half_written_segments_of_a_killed_run_are_removed(output):
    parts = Parts(output, HEADER)
    (parts.folder / "segment-000000.json.tmp").write_text("{")
    assert list(Parts(output, HEADER).folder.iterdir()) == []


def test_a_line_says_who_where_when_and_how_much():
    segment = {
        "start": "s",
        "end": "e",
        "ended": "",
        "hosts": ["h"],
        "ranks": 2,
        "rows": 1,
        "errors": 0,
        "tokens": 1234,
    }
    job = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert segment_lines([segment | {"job_ids": job, "shard": "2/3"}]) == [
        "segment 1 of shard 2/3: s to e (no end recorded), job 12/3 on h, 2 ranks: 1 row, 0 errors, 1,234 tokens"
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s ago"), (90, "90 s ago"), (600, "10 min ago"), (86400, "24 h ago"), (1e6, "12 days ago")],
)
def test_an_age_is_told_in_the_unit_that_fits(seconds, words):
    assert age(seconds) == words


def test_the_folder_of_parts_without_parts_is_no_run_to_resume(output):
    Parts(output, HEADER).begin(facts("1"))
    assert probe_output(output) == "absent" and os.listdir(parts_folder(output)) == ["segment-000000.json"]


@pytest.mark.slow
def test_a_run_that_broke_and_was_started_again_tells_of_both_jobs(tmp_path, monkeypatch):
    small_run.write_files(tmp_path)
    forward, left = Stage.forward, [20]

    def failing(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt("that is enough")
        return forward(self, *arguments)

    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {1 + 2 * row}}}' for row, line in enumerate(lines)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("SLURM_JOB_ID", "501")
    with monkeypatch.context() as broken:
        broken.setattr(Stage, "forward", failing)
        assert main(small_run.command(tmp_path, "out.h5", "--seal-seconds", "0")) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "502")
    assert main(small_run.command(tmp_path, "out.h5")) == 0
    with h5py.File(tmp_path / "out.h5") as file:
        segments, restarts = json.loads(file.attrs["segments"]), file.attrs["restarts"]
    assert restarts == 1 and [one["job_ids"] for one in segments] == [{"SLURM_JOB_ID": "501"}, {"SLURM_JOB_ID": "502"}]
    first, second = (one["rows"] for one in segments)
    assert first >= 1 and second >= 1 and first + second == 12
    assert [one["ended"] for one in segments][1] == "finished" and segments[0]["of"] == 12
