"""Bar, summary and segments count the same tokens, also of jobs that stop and go on, and prompts as they are computed."""

import json
import re

import pytest

import small_run
from noria.__main__ import main
from noria.desk.desk import Desk
from noria.output.generations import open_generations
from noria.output.parts import parts_folder
from noria.output.segments import read_segments, segment_lines, segments_of
from noria.rows.admission import Admission
from noria.rows.making import Source
from noria.rows.prompts import Prompt
from noria.rows.slots import Capacity
from noria.sampling import Sampling

SEGMENT = {
    "start": "s",
    "end": "e",
    "ended": "",
    "hosts": [],
    "ranks": 1,
    "rows": 0,
    "errors": 0,
    "tokens": 0,
    "job_ids": {},
}


@pytest.mark.parametrize(
    ("length", "step_tokens", "computed"),
    [(40, 16, [16, 16, 8]), (33, 16, [16, 16, 1]), (17, 16, [16, 1]), (5, 16, [5])],
)
def test_the_tokens_of_a_prompt_are_counted_by_the_step_that_computes_them(length, step_tokens, computed):
    prompt = Prompt(0, "0", "", list(range(length)), {}, "", None)
    limits = Capacity(1, 100, step_tokens, step_tokens, 1, 64)
    source = Source(iter([prompt]), 1, lambda one: one.token_ids, print)
    admission = Admission(source, Sampling(), frozenset(), limits)
    counted = []
    for round in range(len(computed)):
        before = admission.counted.prompt_tokens
        admission.compose(round, 0)
        counted.append(admission.counted.prompt_tokens - before)
    assert counted == computed and sum(counted) == length


def told(said):
    """(rows, prompt tokens, generated tokens) of a run's summary."""
    found = re.search(r"(\d+) rows? done, .*?; ([\d,]+) prompt tokens?, ([\d,]+) generated tokens?", said)
    return tuple(int(number.replace(",", "")) for number in found.groups())


def of_segment(one):
    return one["rows"] - one["errors"], one["prompt_tokens"], one["tokens"]


@pytest.fixture
def stopped_after(monkeypatch):
    """Lets a run stop after so many steps."""

    def stopped_after(steps):
        tick, left = Desk.tick, [steps]

        def counting(desk):
            tick(desk)
            left[0] -= 1
            if left[0] == 0:
                desk.stop("enough")

        monkeypatch.setattr(Desk, "tick", counting)

    return stopped_after


def test_summary_and_segment_of_each_job_agree_and_the_segments_sum_up_to_the_output(
    tmp_path, capsys, monkeypatch, stopped_after
):
    small_run.write_files(tmp_path)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {3 + 2 * row}}}' for row, line in enumerate(lines)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    command = small_run.command(tmp_path, "out.h5", "--step-tokens", "24")
    said = []
    for steps in (9, 7):
        with monkeypatch.context():
            stopped_after(steps)
            capsys.readouterr()
            assert main(command) == 75
            said.append(told(capsys.readouterr().err))
        monkeypatch.undo()
    stopped = read_segments(parts_folder(tmp_path / "out.h5"))
    assert [of_segment(one) for one in stopped] == said and all(tokens > 0 for _, _, tokens in said)
    assert main(command) == 0
    said.append(told(capsys.readouterr().err))
    with open_generations(tmp_path / "out.h5") as file:
        segments, tokens = segments_of(file.attrs), len(file.column("tokens"))
    assert [of_segment(one) for one in segments] == said
    assert sum(one["tokens"] for one in segments) == tokens and sum(one["rows"] for one in segments) == 12


def test_the_last_segment_of_a_job_that_works_is_running():
    lines = segment_lines([SEGMENT, SEGMENT], running=True)
    assert "(no end recorded)" in lines[0] and "(running)" in lines[1]
    assert "(walltime)" in segment_lines([{**SEGMENT, "ended": "walltime"}], running=True)[0]
    assert "(no end recorded)" in segment_lines([SEGMENT])[0]


def test_a_segment_of_an_earlier_version_has_no_prompt_tokens(tmp_path):
    (tmp_path / "segment-000000.json").write_text(json.dumps({"format": "noria-segment", **SEGMENT}))
    assert [one["prompt_tokens"] for one in read_segments(tmp_path)] == [0]
