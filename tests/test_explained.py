"""What noria plan says of a plan: its terms, what binds, the next best one, and what a larger machine would buy."""

from dataclasses import replace

import pytest

from noria import config
from noria.plan import loads, planner, rates, what_if
from noria.plan.costs import Workload
from noria.plan.explained import PHASES, binding_words, memory_lines, plan_as_dict, term_lines
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem
from noria.plan.rivals import rivals
from noria.plan.what_if import bought
from noria.tools.text import nbytes_words, plural
from test_costs import opt

SMALL = opt(8, 1024, 16)
H200 = rates.assumed("NVIDIA H200")


def problem_of(num_ranks=2, machine=Machine("cuda", 1 * GiB, 8 * GiB), rows=256, **flags):
    flags = {"model": "m", "prompts": "p", "output": "o"} | flags
    run = config.load(None, flags)
    return Problem(run, *SMALL, "float16", num_ranks, machine, rows, Workload(rows, 512, 32))


@pytest.fixture(scope="module")
def streamed():
    """A problem whose layers are all in CPU memory, and its plan."""
    problem = problem_of(weights={"cpu": 100.0})
    return problem, planner.make(problem, H200)


def test_the_terms_are_seconds_that_bytes_take_at_the_rates():
    plan = planner.make(problem_of(weights={"cpu": 100.0}, laps=4), H200)
    terms, rates_of = plan.predicted["terms"], H200
    layer = (3 + 1 + 4 + 4) * 1024 * 1024 * 2  # bytes of the matrices in half precision
    head = 50272 * 1024 * 2
    last = (4 * layer + head) / rates_of.host_to_device  # the second rank's
    assert all(loads.once(plan, rank, lap) for rank in (0, 1) for lap in range(plan.laps)), "a layer, a round"
    assert terms["decode"]["link"] == pytest.approx(last, rel=0.001)
    assert terms["decode"]["disk"] == 0 and plan.predicted["decode"]["round_seconds"] >= terms["decode"]["link"]
    phases = {phase: plan.predicted[phase]["round_seconds"] for phase in ("prefill", "decode")}
    whole = sum(plan.predicted["rounds"][phase] * seconds for phase, seconds in phases.items())
    assert plan.predicted["seconds"] == pytest.approx(whole)


def test_what_binds_is_said_of_the_longest_phase_with_the_largest_other_term(streamed):
    _, plan = streamed
    took = {phase: plan.predicted["rounds"][phase] * plan.predicted[phase]["round_seconds"] for phase in PHASES}
    longest = max(PHASES, key=took.get)
    terms = plan.predicted["terms"][longest]
    first = plan.predicted[longest]["binds"]
    second = max((name for name in terms if name not in (first, "ring")), key=terms.get)
    assert binding_words(plan).startswith(f"{first} in {longest}, which is ")
    assert f"; next is {second}, busy for " in binding_words(plan)
    assert plan_as_dict(plan)["binds"] == first


def test_memory_is_a_table_whose_rows_sum_up(streamed):
    problem, plan = streamed
    _, *rows = [line.split("  ") for line in memory_lines(plan, problem.limits)]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[:2] for row in cells] == [[str(rank), tier] for rank in (0, 1) for tier in ("gpu", "cpu")]
    for (rank, tier), row in zip([(0, "gpu"), (0, "cpu"), (1, "gpu"), (1, "cpu")], cells, strict=True):
        held = plan.memory[rank][tier]
        assert row[2:4] == [nbytes_words(problem.limits[tier]), nbytes_words(sum(held.values()))]
        layers = sum(name.startswith("layers/") for name in plan.weight_tiers[rank])
        assert row[4] == f"{0 if tier == 'gpu' else layers} of {layers}"
        assert [cell for cell in row[5:] if cell != "-"] == [nbytes_words(held[name]) for name in held if held[name]]


def test_ranks_with_the_same_memory_are_one_row():
    plan = planner.make(problem_of(8, laps=1, groups=8), H200)
    ranks = [line.split()[0] for line in memory_lines(plan, {"gpu": 1 << 62, "cpu": 1 << 62, "disk": 1 << 62})]
    assert [*dict.fromkeys(ranks)] == ["rank", "0", "1-6", "7"]


@pytest.mark.slow
def test_each_rival_is_the_plan_that_its_change_gives(streamed):
    problem, plan = streamed
    found = rivals(problem, H200, plan)
    speeds = [one.plan.predicted["tokens_per_second"] for one in found]
    assert speeds == sorted(speeds, reverse=True) and len(found) >= 4
    by_change = {one.change: one.plan for one in found}
    laps = 1 if plan.laps > 1 else 2
    words, pipeline = plural(laps, "lap"), replace(problem.config.pipeline, laps=laps)
    contiguous = planner.make(replace(problem, config=replace(problem.config, pipeline=pipeline)), H200)
    assert by_change[words] == contiguous != plan
    (one,) = (one for one in found if one.change == words)
    assert one.as_dict()["times"] == pytest.approx(
        contiguous.predicted["tokens_per_second"] / plan.predicted["tokens_per_second"]
    )
    assert one.words().startswith(f"{words}: ") and one.words().endswith(f"{one.as_dict()['times']:.2f} x")


def test_what_the_user_chose_has_no_rivals():
    asked = {"laps": 1, "groups": 2, "step_tokens": 512, "weights": {"cpu": 100.0}, "cache": {"gpu": 100.0}}
    problem = problem_of(**asked)
    assert rivals(problem, H200, planner.make(problem, H200)) == []


@pytest.mark.slow
def test_more_of_the_machine_is_planned_as_if_it_were_there():
    problem = problem_of(machine=Machine("cuda", 11 * GiB // 10, GiB // 4))
    plan = planner.make(problem, H200)
    more = {one.name: one for one in bought(problem, H200, plan)}
    assert more["one more"].plan == planner.make(replace(problem, num_ranks=3), H200)
    larger = Machine("cuda", 11 * GiB // 10, GiB // 4 + 32 * GiB)
    assert more["more memory"].plan == planner.make(replace(problem, machine=larger), H200)
    assert "64 GiB more host memory, 2 ranks share them" in more["more memory"].words()
    assert more["faster disk"].words() == "a disk 2 x as fast: nothing (no plan of this run uses the disk)"
    assert more["faster disk"].as_dict()["times"] == 1


def test_the_ranks_of_a_host_share_what_it_has_more(monkeypatch):
    monkeypatch.setattr(what_if, "MORE_HOST_NBYTES", GiB)
    asked = {"cache": {"cpu": 100.0}, "laps": 1, "groups": 2, "step_tokens": 512}
    problem = problem_of(machine=Machine("cuda", 4 * GiB, GiB), rows=3000, **asked)
    plan = planner.make(problem, H200)
    (more,) = (one for one in bought(problem, H200, plan) if one.name == "more memory")
    larger = planner.make(replace(problem, machine=Machine("cuda", 4 * GiB, GiB + GiB // 2)), H200)
    assert more.plan == larger and larger.num_pages > plan.num_pages


def test_a_disk_twice_as_fast_halves_what_it_binds():
    problem = problem_of(weights={"disk": 100.0}, rows=16)
    plan = planner.make(problem, H200)
    assert plan.predicted["decode"]["binds"] == "disk"
    (faster,) = (one for one in bought(problem, H200, plan) if one.name == "faster disk")
    assert faster.as_dict()["times"] == pytest.approx(2, rel=0.05) and faster.words().endswith(" x")


def test_a_limit_that_the_user_set_is_raised_for_what_more_memory_buys():
    problem = problem_of(machine=Machine("cuda", 11 * GiB // 10, 100 * GiB), cpu_memory="256MiB", cache={"cpu": 100.0})
    plan = planner.make(problem, H200)
    (more,) = (one for one in bought(problem, H200, plan) if one.name == "more memory")
    assert sum(more.plan.memory[0]["cpu"].values()) > 256 * 2**20 >= sum(plan.memory[0]["cpu"].values())


def test_one_rank_more_than_there_are_layers_is_refused_in_words():
    problem = problem_of(8)
    more = next(bought(problem, H200, planner.make(problem, H200)))
    assert more.words().startswith("9 ranks: 9 virtual stages") and "refused" in more.as_dict()


def test_terms_of_one_rank_have_no_ring():
    plan = planner.make(problem_of(1), H200)
    lines = list(term_lines(plan))
    assert not any(line.startswith("ring ") for line in lines)
    assert lines[0].split() == ["seconds", "of", "a", "round", "prefill", "decode"] and lines[-1].startswith(
        "all rounds"
    )
