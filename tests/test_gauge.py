"""Seconds that keep a rank busy: counted by phase from marks and clocks, and held against a plan's terms."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import small_run
from noria import run as program
from noria.__main__ import main
from noria.engine.gauge import IDLE, NAMES, WATCHED, Gauge, GaugedTransport
from noria.output import opened
from noria.output.generations import open_generations
from noria.report.busy import end_lines
from noria.report.measured import terms
from noria.report.terms import term
from noria.streams import CpuStreams
from noria.tools.busy import Busy
from noria.tools.text import seconds_words


class Clock(CpuStreams):
    """Streams whose marks are the time that the test says; what lies after `reached` has not passed yet."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.now, self.reached = 0, 1 << 60

    def mark(self):
        return self.now

    def passed(self, mark):
        return mark <= self.reached

    def compute(self, gauge, seconds):
        begin = gauge.mark()
        self.now += round(seconds * 1e9)
        gauge.computed(begin)


def test_seconds_are_counted_by_phase_and_the_first_round_is_left_out():
    clock = Clock()
    gauge = Gauge(clock)
    for round, phase in enumerate(["prefill", "prefill", "decode", "", "decode"]):
        clock.compute(gauge, 1.0 + round)
        gauge.took("host", 0.25)
        gauge.end_round(phase)
        gauge.lasted(10.0 * round)
    columns = gauge.columns()
    assert columns["prefill_watched_rounds"] == 1 and columns["decode_watched_rounds"] == 2
    assert columns["prefill_compute_seconds"] == 2.0 and columns["decode_compute_seconds"] == 3.0 + 5.0
    assert columns["prefill_host_seconds"] == 0.25 and columns["decode_host_seconds"] == 0.5
    assert columns["prefill_watched_seconds"] == 10.0 and columns["decode_watched_seconds"] == 20.0 + 40.0
    assert set(columns) == {
        f"{phase}_{name}"
        for phase in ("prefill", "decode")
        for name in (
            "watched_rounds",
            *(f"{one}_seconds" for one in ("watched", *NAMES, *(f"idle_{name}" for name in IDLE))),
        )
    }


def test_the_first_round_counts_where_its_phase_has_no_other():
    clock = Clock()
    gauge = Gauge(clock)
    for round, phase in enumerate(["prefill", "decode", "decode"]):
        clock.compute(gauge, 1.0 + round)
        gauge.end_round(phase)
        gauge.lasted(5.0)
    columns = gauge.columns()
    assert (columns["prefill_watched_rounds"], columns["prefill_compute_seconds"]) == (1, 1.0)
    assert (columns["prefill_watched_seconds"], columns["decode_watched_seconds"]) == (5.0, 10.0)


def test_a_device_waits_from_when_it_has_computed_what_was_queued():
    """The host asks for what is not there at 1 s, the device computes until 3 s, and it is there at 7 s."""
    clock = Clock()
    gauge = Gauge(clock)
    gauge.end_round("decode")
    clock.now = 3 * 10**9  # a mark of the stream is where the device is, not where the host is
    begin = gauge.mark()
    clock.now = 7 * 10**9
    gauge.waited("input", begin)
    with clock.waiting("weights"):
        clock.now += 10**9
    with clock.waiting("cache"):
        clock.now += 2 * 10**9
    gauge.end_round("decode")
    columns = gauge.columns()
    assert [columns[f"decode_idle_{name}_seconds"] for name in ("input", "weights", "cache")] == [4.0, 1.0, 2.0]
    assert columns["prefill_idle_input_seconds"] == 0


def test_what_a_layer_waits_for_its_experts_is_not_computing():
    clock = Clock()
    gauge = Gauge(clock)
    gauge.end_round("decode")
    begin = gauge.mark()
    clock.now += 2 * 10**9
    with clock.waiting("experts"):
        clock.now += 5 * 10**9
    clock.now += 10**9
    gauge.computed(begin)
    gauge.end_round("decode")
    columns = gauge.columns()
    assert (columns["decode_compute_seconds"], columns["decode_idle_weights_seconds"]) == (3.0, 5.0)


def test_after_some_rounds_every_eighth_is_looked_at():
    clock = Clock()
    gauge, marked = Gauge(clock), []
    for round in range(3 * WATCHED):
        marked += [round] * (gauge.mark() is not None)
        gauge.end_round("decode")
    assert marked == [*range(WATCHED + 1), WATCHED + 1, 2 * WATCHED + 1]
    assert gauge.columns()["decode_watched_rounds"] == len(marked) - 1  # without the first


def test_marks_that_the_device_has_not_passed_are_read_later_and_none_is_lost():
    clock = Clock()
    gauge = Gauge(clock)
    gauge.end_round("decode")
    clock.reached = 0
    for _ in range(3):
        clock.compute(gauge, 1.0)
        gauge.end_round("decode")
    assert len(gauge._pending) == 3
    clock.reached = 2 * 10**9
    gauge.end_round("")
    assert len(gauge._pending) == 1 and gauge.columns()["decode_compute_seconds"] == 3.0


def test_copies_are_told_by_lane_while_the_gauge_watches():
    streams = CpuStreams(torch.device("cpu"))
    gauge, source = Gauge(streams), torch.ones(1 << 20)
    for _ in range(2):
        for lane in ("load", "load", "store"):
            streams.copy(lane, [(torch.empty_like(source), source)])
        gauge.end_round("prefill")
    columns = gauge.columns()
    assert columns["prefill_load_seconds"] > 0 and columns["prefill_store_seconds"] > 0
    assert columns["prefill_watched_rounds"] == 1 and columns["decode_load_seconds"] == 0


def test_threads_that_are_at_work_together_are_busy_once():
    now, said = [0.0], []
    busy = Busy(said.append, lambda: now[0])
    with busy:
        now[0] = 1.0
        with busy:
            now[0] = 3.0
        now[0] = 4.0
    now[0] = 10.0
    with pytest.raises(OSError), busy:
        now[0] = 10.5
        raise OSError
    assert said == [4.0, 0.5]


def test_a_send_is_timed_from_when_its_bytes_are_ready(monkeypatch):
    now, told, ready = [0.0], [], [False]
    monkeypatch.setattr("noria.engine.gauge.time.perf_counter", lambda: now[0])

    class Sends:
        device = receive = send_bytes = receive_bytes = close = None

        def send(self, tensor, dest, tag, ready):
            yield
            now[0] += 2.0

    class Told:
        def took(self, name, seconds):
            told.append((name, seconds))

    event = type("Ready", (), {"query": lambda self: ready[0]})()
    work = GaugedTransport(Sends(), Told()).send(None, 1, 2, event)
    next(work)
    now[0], ready[0] = 100.0, True
    assert list(work) == [None] and told == [("hops", 2.0)]


PLAN = {
    "groups": 2,
    "predicted": {
        "device": "NVIDIA H200",
        "rows": 90,
        "tokens_per_second": 80.0,
        "rounds": {"prefill": 10, "decode": 100},
        "prefill": {"round_seconds": 2.0, "tokens_per_second": 5000.0, "binds": "matmul"},
        "decode": {"round_seconds": 1.0, "tokens_per_second": 100.0, "binds": "link"},
        "terms": {
            "prefill": {"link": 1.0, "matmul": 1.5, "device memory": 0.5, "attention": 0.25, "other kernels": 0.25, "ring": 2.0},
            "decode": {"link": 1.0, "disk": 0.5, "matmul": 0.01, "device memory": 0.2, "launches": 0.1, "host": 0.02, "ring": 1.0},
        },
    },
}  # fmt: skip
TIMING = {
    "prefill_seconds": [25.0, 24.0], "prefill_tokens": [100_000, 100_000], "prefill_rounds": [10, 10],
    "decode_seconds": [100.0, 99.0], "decode_tokens": [10_000, 10_000], "decode_rounds": [100, 100],
    "prefill_watched_rounds": [4, 4], "decode_watched_rounds": [20, 20], "seconds": [126.0, 126.0],
    "prefill_load_seconds": [4.0, 5.2], "prefill_store_seconds": [1.0, 1.0], "prefill_compute_seconds": [8.0, 4.0],
    "prefill_hops_seconds": [0.4, 0.8], "prefill_disk_seconds": [0.0, 0.0],
    "decode_load_seconds": [20.0, 10.0], "decode_store_seconds": [22.0, 1.0], "decode_disk_seconds": [5.0, 16.0],
    "decode_compute_seconds": [4.0, 4.2], "decode_launches_seconds": [2.0, 2.2], "decode_host_seconds": [0.8, 0.0],
    "decode_hops_seconds": [0.0, 2.0],
}  # fmt: skip


def test_each_term_stands_beside_the_seconds_of_the_busiest_rank():
    timing = {name: np.array(values, float) for name, values in TIMING.items()}
    found = {
        one.name: (one.planned, one.measured, round(one.difference, 3)) for one in terms(PLAN, timing, 10_000, True)
    }
    assert found["prefill, link"] == ("1 s", "1.3 s", 0.3)
    assert found["prefill, compute"] == ("2 s", "2 s", 0.0)  # matmul 1.5, attention and other kernels 0.25 each
    assert found["prefill, ring"] == ("2 s", "1.8 s", -0.1)  # (2 + 1.3 + 0.1 + 0.2) / 2 groups
    assert found["decode, link"] == ("1 s", "1.1 s", 0.1) and found["decode, disk"] == ("500 ms", "800 ms", 0.6)
    assert found["decode, compute"] == ("200 ms", "210 ms", 0.05) and found["decode, launches"] == (
        "100 ms",
        "110 ms",
        0.1,
    )
    assert found["decode, host"] == ("20 ms", "40 ms", 1.0)
    assert found["prefill, all rounds"] == ("20 s", "25 s", 0.25) and found["decode, all rounds"] == (
        "100 s",
        "100 s",
        0.0,
    )
    assert "prefill, disk" not in found and "prefill, launches" not in found


def test_the_end_of_a_run_names_the_terms_that_are_off():
    timing = {name: np.array(values, float) for name, values in TIMING.items()}
    head, *lines = end_lines(terms(PLAN, timing, 10_000))
    assert head.split() == ["not", "as", "planned", "planned", "measured"]
    assert all(len(line) <= 80 for line in lines)
    assert [line[:24].strip() for line in lines] == [
        "prefill, tokens/s", "prefill, link", "decode, disk", "decode, host",
    ]  # fmt: skip
    assert lines[1].split() == ["prefill,", "link", "1", "s", "1.3", "s", "+30", "%"]
    planned = [one for one in terms(PLAN, timing, 10_000) if not one.is_off]
    assert list(end_lines(planned)) == [f"as planned: {len(planned)} figures within 15 %"] and not list(end_lines([]))


def test_a_term_that_was_planned_to_take_next_to_nothing_keeps_its_columns():
    """As the link of ranks on a CPU, whose cache is in its memory."""
    one = term("prefill, link", 1.08e-8, 1.39e-3, seconds_words)
    assert list(end_lines([one]))[1] == f"{'prefill, link':<24}{'0.000 ms':>12}{'1.39 ms':>12}  >9999 %"
    assert (one.change, replace(one, difference=-0.4).change) == (">9999 %", "-40 %")


def test_launches_that_the_device_hides_are_not_off():
    """Planned 0.1 s a round; the device computes for 0.21 of one."""
    for seconds, off in ((1.0, False), (2.9, False), (3.5, True)):  # of 20 rounds
        changed = TIMING | {"decode_launches_seconds": [seconds, 0.0]}
        timing = {name: np.array(values, float) for name, values in changed.items()}
        [one] = [one for one in terms(PLAN, timing, 10_000) if one.name == "decode, launches"]
        assert one.is_off == off and one.note
    lasted = {"decode_watched_seconds": [4.1, 4.3]}  # the device computes all the time: its queue is full
    timing = {name: np.array(values, float) for name, values in (changed | lasted).items()}
    assert not next(one for one in terms(PLAN, timing, 10_000) if one.name == "decode, launches").is_off


def test_on_a_cpu_launches_are_a_part_of_what_a_layer_computes():
    plan = PLAN | {"predicted": PLAN["predicted"] | {"device": "CPU"}}
    timing = {name: np.array(values, float) for name, values in TIMING.items()}
    found = {one.name: (one.planned, one.measured) for one in terms(plan, timing, 10_000, True)}
    assert found["decode, compute"] == ("300 ms", "210 ms") and "decode, launches" not in found


def test_a_phase_of_a_single_step_is_not_held_against_its_plan():
    one_step = {f"prefill_{name}": [value] * 2 for name, value in (("rounds", 1), ("watched_rounds", 1))}
    timing = {name: np.array(values, float) for name, values in (TIMING | one_step).items()}
    assert not [one for one in terms(PLAN, timing, 10_000) if one.name.startswith("prefill")]
    assert [one for one in terms(PLAN, timing, 10_000) if one.name == "decode, link"]


@pytest.mark.parametrize("damage", [
    {"prefill_watched_rounds": [0, 0], "decode_watched_rounds": [0, 0]},
    {"prefill_watched_rounds": [], "decode_watched_rounds": []},
    {"prefill_load_seconds": [1.0], "decode_load_seconds": [np.nan, np.inf]},
])  # fmt: skip
def test_timings_of_any_kind_are_told_or_left_out(damage):
    timing = {name: np.array(values, float) for name, values in (TIMING | damage).items()}
    list(end_lines(terms(PLAN, timing, None)))
    list(end_lines(terms({"groups": "x", "predicted": {"terms": [1], "device": 3, "rounds": 7}}, timing, None)))


def test_a_run_stores_what_kept_it_busy_and_ends_with_its_terms(tmp_path, capsys, monkeypatch):
    small_run.write_files(tmp_path)
    monkeypatch.setattr(program, "TOLD_SECONDS", 0.0)
    flags = ["--weights", "gpu=50,cpu=50", "--step-tokens", "8", "--laps", "1"]
    assert main(small_run.command(tmp_path, "out.h5", *flags)) == 0
    said = capsys.readouterr().err
    with open_generations(tmp_path / "out.h5") as file:
        plan = json.loads(file.attrs["plan"])
    with opened.open(tmp_path / "out.h5") as rows:
        timing = rows.timings()
    assert timing["decode_watched_rounds"][0] >= 3 and timing["decode_load_seconds"][0] > 0
    assert (
        0 < timing["decode_compute_seconds"][0] < timing["decode_seconds"][0] and timing["decode_host_seconds"][0] > 0
    )
    assert re.search(r"^[\d.,]+ tokens/s: 288 tokens generated, ", said, re.MULTILINE), said
    assert re.search(r"^share of the time .*decode .* rounds$", said, re.MULTILINE) and "\ncomputing  " in said
    assert plan["predicted"]["terms"]["decode"]["link"] > 0
