"""The dry run of messages with seconds: against rounds that are counted by hand, and a simulation of its own."""

import random
from types import SimpleNamespace

import pytest

from counts import count
from noria.plan import planner, rates
from noria.plan.rehearsal import Rehearsal, rehearsed
from test_explained import problem_of


def seconds(visits, groups, laps=1, hop=0.0, latency=0.0, blocking=False):
    plan = SimpleNamespace(num_ranks=len(visits), groups=groups, laps=laps, blocking=blocking)
    return Rehearsal(plan, visits, hop, latency).round_seconds()


@pytest.mark.parametrize(("ranks", "groups", "laps"), [(2, 2, 1), (2, 3, 4), (4, 4, 2), (4, 5, 3), (8, 9, 1)])
def test_a_full_ring_takes_all_visits_of_a_rank(ranks, groups, laps):
    assert seconds([0.5] * ranks, groups, laps) == pytest.approx(groups * laps * 0.5)


@pytest.mark.parametrize(("ranks", "groups", "laps"), [(2, 1, 1), (4, 2, 3), (8, 4, 1)])
def test_with_few_groups_a_round_is_a_groups_way_round_the_ring(ranks, groups, laps):
    way = ranks * laps * (0.5 + 0.25) - 0.25 + 0.125  # the last hop has a result, which takes no longer than a header
    assert seconds([0.5] * ranks, groups, laps, hop=0.25, latency=0.125) == pytest.approx(way)


def test_the_slowest_rank_sets_the_pace():
    assert seconds([0.1, 0.7, 0.1, 0.2], groups=5, laps=3) == pytest.approx(5 * 3 * 0.7)


def test_messages_over_one_hop_follow_each_other():
    assert seconds([0.1] * 3, groups=4, laps=2, hop=0.4) == pytest.approx(4 * 2 * 0.4)


def test_a_blocking_ring_waits_for_its_sends():
    assert seconds([0.5] * 4, groups=4, laps=1, hop=0.25, blocking=True) >= 4 * 0.5 + 4 * 0.25


def by_itself(visits, groups, laps, hop, rounds=9):
    """Seconds of a round, by a recurrence over visits: a rank does them in the order of laps and groups."""
    ranks, free, sent = len(visits), [0.0] * len(visits), {}
    links, begun = [0.0] * len(visits), []
    order = [(round, lap, group) for round in range(rounds) for lap in range(laps) for group in range(groups)]
    pending = {rank: list(order) for rank in range(ranks)}
    while any(pending.values()):
        for rank in range(ranks):
            while pending[rank]:
                round, lap, group = pending[rank][0]
                source = None if (rank, lap) == (0, 0) else ((rank - 1) % ranks, lap - (rank == 0), round, group)
                if source is not None and source not in sent:
                    break
                if source is None and round and (ranks - 1, laps - 1, round - 1, group) not in sent:
                    break
                there = sent[source] if source else sent.get((ranks - 1, laps - 1, round - 1, group), 0.0)
                begin = max(free[rank], there)
                if source is None and group == 0:
                    begun.append(begin)
                free[rank] = begin + visits[rank]
                if (rank, lap) == (ranks - 1, laps - 1):
                    sent[rank, lap, round, group] = free[rank]
                else:
                    links[rank] = max(links[rank], free[rank]) + hop
                    sent[rank, lap, round, group] = links[rank]
                pending[rank].pop(0)
    return (begun[7] - begun[3]) / 4


def test_a_dry_run_takes_as_long_as_a_simulation_without_messages():
    draw = random.Random(5)
    for _ in range(count(200)):
        ranks, groups, laps = draw.randint(2, 6), draw.randint(1, 8), draw.randint(1, 4)
        visits = [draw.uniform(0.1, 1.0) for _ in range(ranks)]
        hop = draw.choice([0.0, draw.uniform(0.0, 0.5)])
        assert seconds(visits, groups, laps, hop) == pytest.approx(by_itself(visits, groups, laps, hop)), (
            visits,
            groups,
            laps,
        )


def test_a_plan_is_predicted_by_it_near_what_its_terms_say():
    known = rates.assumed("NVIDIA H200")
    problem = problem_of(4, laps=2)
    plan = planner.make(problem, known)
    told = rehearsed(problem, plan, known).predicted
    for phase in ("prefill", "decode"):
        assert told[phase]["round_seconds"] == pytest.approx(plan.predicted[phase]["round_seconds"], rel=0.2)
        assert told["rehearsed"][phase] == plan.predicted[phase]["round_seconds"]
    whole = sum(told["rounds"][phase] * told[phase]["round_seconds"] for phase in ("prefill", "decode"))
    assert told["seconds"] == pytest.approx(whole)
    assert told["tokens_per_second"] * whole == pytest.approx(
        plan.predicted["tokens_per_second"] * plan.predicted["seconds"]
    )
