"""What earlier jobs tell the next one of its rows' lengths: from what is sealed, after stops and kills, of the same run alone."""

import json
import time

import numpy as np
import pytest

import noria.rows.reservations as reservations
import small_run
from noria.__main__ import main
from noria.desk import earlier
from noria.desk.desk import Desk
from noria.desk.earlier import Begun, earlier_lengths, of_running
from noria.output.generations import Generations
from noria.output.parts import Parts
from noria.output.segments import read_segments
from noria.rows.reservations import EarlierLengths, Reservations
from output_rows import fill, make_row

HEADER = {"prompts": "ab12"}
FACTS = {"of": 9}


def told(parts):
    found = earlier_lengths(parts, Begun(parts))
    return found.ended.tolist(), sorted(found.half_way.tolist()), found.lost.tolist()


def test_lengths_are_those_of_finished_rows_of_rows_half_way_and_of_rows_that_a_kill_lost(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "run.h5", HEADER)
    parts.begin(FACTS)
    fill(parts, [make_row(row, num_tokens=10 + row) for row in range(4)], 2)
    fill(parts, [make_row(4, status="error", num_tokens=7), make_row(5, status="todo", num_tokens=70)])
    fill(parts, [make_row(6, status="todo", num_tokens=80), make_row(7, num_tokens=17)])
    fill(parts, [make_row(6, num_tokens=90)])
    parts.segment.running = of_running([3, 4, 5])
    parts.segment.seen()
    again = Parts(tmp_path / "run.h5", HEADER)
    begun = Begun(again)
    monkeypatch.setattr(Generations, "read", None)  # no other row is read
    found = earlier_lengths(again, begun)
    assert found.ended.tolist() == [10, 11, 12, 13, 17, 90] and found.half_way.tolist() == [70]
    assert found.lost.tolist() == [3, 4, 5]


def test_of_many_finished_rows_as_many_as_are_judged_by_count_evenly_from_the_latest_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(earlier, "REMEMBERED", 4)
    parts = Parts(tmp_path / "run.h5", HEADER)
    fill(parts, [make_row(row, num_tokens=row) for row in range(20)], 8)
    assert told(parts) == ([16, 17, 18, 19], [], [])
    fill(parts, [make_row(20, num_tokens=20)])
    assert told(parts) == ([16, 17, 18, 19], [], []), "five rows in the last two parts: a place of 1.25 rows each"


@pytest.mark.parametrize("lengths", [[], [7], [1, 5], list(range(300)), [4] * 1000])
def test_lengths_of_rows_in_flight_are_kept_as_a_few_numbers(tmp_path, lengths):
    parts = Parts(tmp_path / "run.h5", HEADER)
    parts.begin(FACTS)
    parts.segment.running = kept = of_running(lengths)
    parts.segment.seen()
    assert len(kept) <= 10 and len(json.dumps(kept)) < 100
    found = told(Parts(tmp_path / "run.h5", HEADER))[2]
    assert len(found) == len(lengths) and np.abs(np.array(found) - np.sort(lengths)).max(initial=0) <= 1
    assert "running" not in read_segments(parts.folder)[0]


def test_a_job_that_dies_at_once_hands_on_what_the_job_before_it_said(tmp_path):
    for lengths in ([5, 9], None, None):
        parts = Parts(tmp_path / "run.h5", HEADER)
        parts.begin(FACTS)
        if lengths:
            parts.segment.running = of_running(lengths)
            fill(parts, [make_row(0, num_tokens=3)])
    assert told(Parts(tmp_path / "run.h5", HEADER)) == ([3], [], [5, 9])


@pytest.mark.parametrize("running", ["many", {"a": 1}, [3, -4], [3, "x"], [3, True], [2], 7, [10**30, 4], None])
def test_a_record_that_cannot_be_true_tells_nothing(tmp_path, running):
    parts = Parts(tmp_path / "run.h5", HEADER)
    parts.begin(FACTS)
    parts.segment.running = running
    fill(parts, [make_row(0, num_tokens=3)])
    assert told(Parts(tmp_path / "run.h5", HEADER)) == ([3], [], [])


def test_a_record_of_too_many_rows_costs_no_memory(tmp_path):
    parts = Parts(tmp_path / "run.h5", HEADER)
    parts.begin(FACTS)
    parts.segment.running = [2**62, 5, 5]
    parts.segment.seen()
    assert len(told(Parts(tmp_path / "run.h5", HEADER))[2]) == 2**16


class Killed(BaseException):
    """Ends a run in this process, and as after a kill nothing is sealed."""


@pytest.fixture
def seen(monkeypatch):
    """What each job's reservations begin with."""
    found, begin = [], Reservations.__init__

    def watched(self, max_positions, before=None):
        begin(self, max_positions, before)
        found.append((before, self.usual))

    monkeypatch.setattr(Reservations, "__init__", watched)
    monkeypatch.setattr(reservations, "ENOUGH", 3)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_a_run_that_goes_on_begins_with_the_lengths_of_its_rows_and_another_run_does_not(
    tmp_path, monkeypatch, seen, killed
):
    """Rows of 2, 4, ... 24 tokens: in round 13 those of up to 12 have ended, and six are in flight with 12 or 13."""
    folder = small_run.write_files(tmp_path)
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    rows = [f'{line[:-1]}, "max_new_tokens": {2 + 2 * row}}}' for row, line in enumerate(lines)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    assert main(small_run.command(folder, "whole.h5")) == 0
    command = small_run.command(folder, "run.h5", "--seal-seconds", 0)
    tick, rounds = Desk.tick, []

    def until_13(self):
        rounds.append(tick(self))
        if len(rounds) == 13:
            if not killed:
                self.stop("test")
                return
            while self._parts.pending:  # another thread seals them
                time.sleep(0.01)
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Desk, "tick", until_13)
        assert main(command) == (1 if killed else 75)
    assert main(command) == 0
    assert small_run.rows_of(folder / "run.h5") == small_run.rows_of(folder / "whole.h5")
    assert main([*command, "--overwrite", "--max-new-tokens", "23"]) == 0, "another run over it"
    (none, _), (_, first), (before, usual), (after, again) = seen
    assert first is None and again is None and not len(after.ended) and not len(none.ended)
    assert before.ended.tolist() == [2, 4, 6, 8, 10, 12]
    running = before.lost if killed else before.half_way
    assert len(running) == 6 and set(running.tolist()) <= {11, 12, 13}, running
    assert usual == reservations.needed(np.array([2, 4, 6, 8, 10, 12]), running, 0.9) > 12
    assert isinstance(before, EarlierLengths)
