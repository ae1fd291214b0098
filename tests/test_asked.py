"""Sizes of steps that a user gives and that cost much are told with both plans' numbers; others cost nothing and say nothing."""

import re
from dataclasses import replace

import pytest

import small_run
from noria import config
from noria.__main__ import main
from noria.plan import asked, planner
from noria.plan.asked import cost_of_asked, cost_of_context
from noria.plan.plan import rate_words
from noria.plan.problem import Machine, Problem
from noria.plan.rates import assumed
from noria.plan.rounds import Workload
from test_costs import opt
from test_planner import GiB

SHAPE, BLOCKS = opt(8, 1024, 16)
H200 = assumed("NVIDIA H200")


def problem_of(num_ranks=1, rows=256, **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    machine = Machine("cuda", 8 * GiB, 8 * GiB)
    return Problem(run, SHAPE, BLOCKS, "float16", num_ranks, machine, rows, Workload(rows, 512, 32))


def told(**flags):
    problem = problem_of(**flags)
    plan = planner.make(problem, H200)
    return plan, cost_of_asked(problem, H200, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ({"step_tokens": 1}, "pipeline.step_tokens 1"),
        ({"step_tokens": 30}, "pipeline.step_tokens 30"),
        ({"groups": 200}, "pipeline.groups 200"),
        ({"step_tokens": 4, "groups": 9}, "pipeline.step_tokens 4 and pipeline.groups 9"),
        ({"microbatch_tokens": 1}, "pipeline.microbatch_tokens 1"),
        ({"microbatches": 99}, "pipeline.microbatches 99"),
    ],
)
def test_a_size_that_costs_much_is_told_beside_the_plan_that_leaves_it_open(flags, given):
    plan, lines = told(**flags)
    free = planner.make(problem_of(), H200)
    (line,) = lines
    assert line.startswith(f"{given}: {plan.predicted['rows']:,} row")
    for one, said in zip((plan, free), line.split("; left open: "), strict=True):
        assert f"{one.predicted['rows']:,} row" in said and f"steps of {one.step_tokens:,} token" in said
        assert f"{rate_words(one.predicted['tokens_per_second'])} tok/s predicted" in said
    times = free.predicted["tokens_per_second"] / plan.predicted["tokens_per_second"]
    assert (
        float(re.search(r"([\d,.e+]+) x$", line)[1].replace(",", "")) == pytest.approx(times, rel=0.01) and times > 1.25
    )


@pytest.mark.parametrize(
    "flags", [{}, {"step_tokens": 1 << 14}, {"groups": 2}, {"laps": 2}, {"microbatch_tokens": 4096}]
)
def test_a_size_that_suits_the_rows_is_not_searched_for_anew(flags, monkeypatch):
    problem = problem_of(**flags)
    plan = planner.make(problem, H200)
    monkeypatch.setattr(asked.planner, "make", None)
    assert cost_of_asked(problem, H200, plan) == []


def test_a_size_without_which_nothing_fits_is_not_told():
    problem = problem_of(step_tokens=1)
    plan = planner.make(problem, H200)
    small = replace(problem, machine=Machine("cuda", 1 << 20, 1 << 20))
    assert cost_of_asked(small, H200, plan) == []


@pytest.mark.slow
def test_a_run_and_its_plan_say_it_in_a_line_and_the_tokens_are_the_same(tmp_path, capsys):
    folder = small_run.write_files(tmp_path)
    assert main(small_run.command(folder, "plain.h5")) == 0
    assert "left open" not in capsys.readouterr().err
    command = small_run.command(folder, "run.h5", "--step-tokens", 1)
    assert main(command) == 0
    words = "warning: pipeline.step_tokens 1: 1 row at once in 1 group, steps of 1 token: "
    assert capsys.readouterr().err.count(words) == 1
    assert small_run.rows_of(folder / "run.h5") == small_run.rows_of(folder / "plain.h5")
    assert main(["plan", *command[1:], "--ranks", "1"]) == 0
    assert re.search(
        r"^warning     pipeline.step_tokens 1: 1 row at once .* 12 rows at once", capsys.readouterr().out, re.MULTILINE
    )


CONTEXT = 65_536
ROWS = Workload(500, 512, 128, 500 * 40 + 40, 40)  # at most 640 tokens of those that were looked at


def with_long_context(load, memory=3 * GiB, **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    shape = replace(SHAPE, max_positions=CONTEXT)
    problem = Problem(run, shape, BLOCKS, "float16", 1, Machine("cuda", memory, 2 * GiB), load.num_rows, load)
    plan = planner.make(problem, H200)
    return plan, cost_of_context(problem, H200, plan)


def test_room_for_a_row_as_long_as_the_context_is_told_where_it_costs_much():
    plan, (line,) = with_long_context(ROWS)
    assert "65,536 tokens, since not all rows were looked at" in line and "max_context 640, which is enough" in line
    assert f"{plan.predicted['rows']:,} row" in line and float(line.split()[-2]) > 1.25
    assert with_long_context(ROWS, memory=60 * GiB)[1] == []  # there is room for both
    assert with_long_context(replace(ROWS, whole=True))[1] == []
